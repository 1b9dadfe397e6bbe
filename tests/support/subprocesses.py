"""Python in child processes, one or several under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def child_environment() -> dict[str, str]:
    """Environment of a child process: one thread, no variables of an outer torchrun, the same module search path."""
    single = {name: it for name, it in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    # The overlay with another version of transformers, if there is one, precedes the environment's packages.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return single | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def run_python(*arguments: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs Python with these arguments, under torchrun if there are several processes."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes) if processes > 1 else ()
    command = [sys.executable, *map(str, torchrun), *map(str, arguments)]
    return subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=300, check=False)
