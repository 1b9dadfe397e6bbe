"""What a command costs: CPU seconds of all its processes, wall time, peak memory.

`measured` starts this very file as a small process between the caller and the command, because Linux counts the memory
of the process that calls fork as the child's own: below a caller that has imported torch, nothing would ever seem to
need less than torch does.

    python -m tools.bench.process RESULT COMMAND...      # writes the figures as JSON to RESULT
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
    """cpu_seconds: user and system time of the command and all that it started. peak_bytes: the largest resident set
    of any one of these processes."""

    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int


class CommandFailed(Exception):
    """The command ended with an exit status other than 0; the message holds the end of what it printed."""


def measured(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Usage:
    """Runs the command with these variables added to the environment; its output is kept back. CommandFailed.

    It runs in a folder of its own: some tools leave files where they are started.
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
    return status if status >= 0 else 128 - status  # as a shell says it: 128 and the signal


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
