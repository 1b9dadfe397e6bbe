"""Joins the processes that torchrun started. Does not import torch unless there are several."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from vlqc.errors import Fault, UserError
from vlqc.frontend.process_group import ProcessGroup

MAX_DIGITS = 9  # of RANK and WORLD_SIZE

_current = ProcessGroup()


def current_process_group() -> ProcessGroup:
    """The process group of the enclosing `init_distributed`; outside of one, a single process."""
    return _current


@contextmanager
def init_distributed() -> Iterator[ProcessGroup]:
    """Joins the process group that RANK and WORLD_SIZE describe, or a single process if they are not set.

    May be nested; the inner one yields the group of the outer one. An exception that leaves the context ends all
    processes. Inside, SIGTERM raises an exception, so that files are cleaned up: torchrun sends it to the other
    processes if one fails. Raises UserError if the processes cannot connect.
    """
    global _current
    rank, size = _environment_int("RANK", 0), _environment_int("WORLD_SIZE", 1)
    if _current.size > 1 or size <= 1:
        yield _current
        return
    if rank >= size:
        fix = "start the processes with torchrun, or unset RANK and WORLD_SIZE"
        raise UserError(Fault(f"RANK is {rank}, WORLD_SIZE {size}", "environment", "ranks start at 0", fix))

    from vlqc.frontend.torch_process_group import TorchProcessGroup

    process_group = TorchProcessGroup(rank, size)
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous_handler = signal.signal(signal.SIGTERM, process_group.handle_sigterm) if in_main_thread else None
    _current = process_group
    try:
        yield process_group
    except BaseException as error:
        process_group.should_report(error)
        raise
    finally:
        _current = ProcessGroup()
        process_group.close()
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous_handler)


def _environment_int(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or len(text) > MAX_DIGITS:
        fix = "start the processes with torchrun, or unset it"
        raise UserError(Fault(f"{name} is {text[:40]!r}", "environment", "it must be a non-negative integer", fix))
    return int(text)
