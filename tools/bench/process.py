"""Measures CPU seconds of all processes, wall time and peak memory of a command.

`measured` runs this file as a small process between the caller and the command: Linux counts the memory of the process
that calls fork as the child's own, so a command started from a process with torch would never need less than torch.

    python -m tools.bench.process RESULT COMMAND...      # writes the measurements as JSON to RESULT
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

KIB = 1024  # the unit of ru_maxrss on Linux


@dataclass(frozen=True)
class Usage:
    """cpu_seconds: user and system time of the command and its descendants. peak_bytes: the largest resident set size
    of any of these processes."""

    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int


class CommandFailed(Exception):
    """The exit status of the command is not 0; the message has the end of its output."""


def measured(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Usage:
    """Runs the command in a temporary folder, with these additional environment variables; captures its output.

    Raises CommandFailed.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "usage.json"
        ran = subprocess.run(
            [sys.executable, "-S", "-E", str(Path(__file__).resolve()), str(result), *command],
            cwd=folder,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if ran.returncode:
            raise CommandFailed(f"{' '.join(command[:3])} ... ended with {ran.returncode}\n{ran.stdout[-4000:]}")
        return Usage(**json.loads(result.read_text(encoding="utf-8")))


def main(arguments: list[str]) -> int:
    """Runs the command, writes its `Usage`, returns its exit status."""
    result, *command = arguments
    started = time.monotonic()
    status = subprocess.run(command).returncode
    wall = time.monotonic() - started
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    usage = Usage(used.ru_utime + used.ru_stime, wall, used.ru_maxrss * KIB)
    Path(result).write_text(json.dumps(asdict(usage)), encoding="utf-8")
    return status if status >= 0 else 128 - status  # as in a shell: 128 plus the signal


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
