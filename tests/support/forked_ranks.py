"""Several ranks as children of one process, which has imported everything: torchrun imports once in each of them."""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def run_forked(work: Callable[[], None], processes: int, output: Path) -> list[int]:
    """Runs `work` in so many child processes, with the variables that torchrun sets; returns their exit codes by rank.

    They append what they print to `output`/stdout and `output`/stderr. This process must have a single thread.
    """
    output.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    sys.stderr.flush()
    children = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            _child(work, rank, processes, port, output)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def _child(work: Callable[[], None], rank: int, processes: int, port: int, output: Path) -> None:
    code = 1
    try:
        for stream in (sys.stdout, sys.stderr):
            name = "stdout" if stream is sys.stdout else "stderr"
            file = os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(file, stream.fileno())
        if processes > 1:
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none"}
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ.update(address | {name: str(number) for name, number in numbers.items()})
        work()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
