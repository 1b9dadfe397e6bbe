"""The processes that work on one compilation: as torchrun started them, or this one alone.

All of them run the same program on the same data and so take the same decisions. Only three things differ: which
samples run through a process's stages, which shared tasks it does, and that the first one alone reports and writes.
What a process lacks it gets from its owner, in an order that does not depend on how many processes there are; so
neither does the result.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from vlqc.errors import Fault, UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
DIGITS = 9  # of a number of processes


class ProcessGroup:
    """A single process: rank 0 of 1. `processes.TorchProcessGroup` overrides `broadcast`, on which all else rests."""

    rank = 0
    size = 1

    @property
    def is_rank0(self) -> bool:
        """Whether this is the process that reports and writes."""
        return self.rank == 0

    def broadcast(self, owner: int, value: T | None) -> T:
        """What process number `owner` gives as `value`, on every process; on its owner it is the very same object."""
        return value  # type: ignore[return-value]

    def all_gather(self, mine: T) -> Iterator[T]:
        """What every process gives, by its number, one at a time: no process holds all of them at once."""
        for owner in range(self.size):
            yield self.broadcast(owner, mine if owner == self.rank else None)

    def broadcast_from_rank0(self, make: Callable[[], T]) -> T:
        """What the first process makes."""
        return self.broadcast(0, make() if self.is_rank0 else None)

    def rank0_first(self, make: Callable[[], T]) -> T:
        """What each process makes for itself, the others once the first one has: it may fill a cache that all use."""
        made = make() if self.is_rank0 else None
        self.broadcast(0, None)
        return made if self.is_rank0 else make()  # type: ignore[return-value]

    def scatter(self, groups: Sequence[Sequence[T]]) -> tuple[int, list[T]]:
        """The first process's items, shared out in their order: (number of the first one here, those that are here).

        The items of one group stay together.
        """
        sizes: list[int] = self.broadcast(0, [len(group) for group in groups])
        share, here = share_of(len(sizes), self.rank, self.size), []
        for number, size in enumerate(sizes):
            for place in range(size):
                item = self.broadcast(0, groups[number][place] if self.is_rank0 else None)
                if number in share:
                    here.append(item)
        return sum(sizes[: share.start]), here

    def parallel_map(self, tasks: Iterable[Callable[[], T]], costs: Sequence[float] | None = None) -> list[T]:
        """What every task returns, in their order; each is done by one process.

        costs: of each task, in any unit, to give all processes as much to do; without, they take turns, and tasks are
        asked for one at a time. Tasks must not change anything, as they do so on one process only.
        """
        owners = None if costs is None else balance_load(costs, self.size)
        done: list[T | None] = []
        for number, task in enumerate(tasks):
            owner = number % self.size if owners is None else owners[number]
            done.append(task() if owner == self.rank else None)
        return [
            self.broadcast(number % self.size if owners is None else owners[number], result)
            for number, result in enumerate(done)
        ]

    def local_device(self, device: "torch.device") -> "torch.device":
        """The device of this process, of all those of a kind on its machine."""
        return device

    def should_report(self, error: BaseException) -> bool:
        """Whether this process is to tell the user of an error that ends it. All others end, too, and tell nothing.

        To be asked before the process ends.
        """
        return True


_here = ProcessGroup()


def current_process_group() -> ProcessGroup:
    """The world that is joined now; outside of `joined` this process alone."""
    return _here


@contextmanager
def init_distributed() -> Iterator[ProcessGroup]:
    """Inside, the processes that torchrun started (RANK and WORLD_SIZE are set); else this one alone. May be nested.

    An error that leaves it ends all processes. Inside, SIGTERM, by which torchrun ends the others when one is lost,
    arrives as an error, so that nothing half-made is left behind. UserError if the processes do not find each other.
    """
    global _here
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if _here.size > 1 or size <= 1:
        yield _here
        return
    if rank >= size:
        fix = "start the processes with torchrun, or unset RANK and WORLD_SIZE"
        raise UserError(Fault(f"RANK is {rank}, WORLD_SIZE {size}", "the environment", "processes count from 0", fix))

    from vlqc.frontend.processes import TorchProcessGroup

    process_group = TorchProcessGroup(rank, size)
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, process_group.stop) if in_main_thread else None
    _here = process_group
    try:
        yield process_group
    except BaseException as error:
        process_group.should_report(error)
        raise
    finally:
        _here = ProcessGroup()
        process_group.close()
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, str(otherwise))
    if not text.isdecimal() or len(text) > DIGITS:
        fix = "start the processes with torchrun, or unset it"
        raise UserError(Fault(f"{name} is {text[:40]!r}", "the environment", "a whole number is wanted", fix))
    return int(text)


def share_of(total: int, rank: int, size: int) -> range:
    """The numbers below `total` that one of `size` processes takes: neighbours, as many as others have or one more."""
    return range(-(-total * rank // size), -(-total * (rank + 1) // size))


def balance_load(costs: Sequence[Any], size: int) -> list[int]:
    """Which of `size` processes does each task: the costliest first, each by whoever has least to do so far."""
    load, owners = [0] * size, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        owners[number] = load.index(min(load))
        load[owners[number]] += costs[number]
    return owners
