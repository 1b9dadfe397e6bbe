"""Collectives on Python objects, in terms of one primitive, `broadcast`.

All processes run the same program on the same data, and therefore make the same decisions. They differ in three things:
each runs its own samples through the stages, each does its share of a `parallel_map`, and only rank 0 reports and
writes. Results are exchanged in an order that does not depend on the number of processes, so the output of the program
does not depend on it either.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class ProcessGroup:
    """A single process: rank 0 of 1. `TorchProcessGroup` overrides `broadcast`, `local_device` and `should_report`."""

    rank = 0
    size = 1

    @property
    def is_rank0(self) -> bool:
        """Whether this process reports and writes."""
        return self.rank == 0

    def broadcast(self, src: int, value: T | None) -> T:
        """Returns the `value` of rank `src` on all ranks; on `src` the same object. `value` is ignored elsewhere."""
        return value  # type: ignore[return-value]

    def all_gather(self, value: T) -> Iterator[T]:
        """Yields the `value` of each rank in order, one at a time, so that no rank has to hold all of them."""
        for src in range(self.size):
            yield self.broadcast(src, value if src == self.rank else None)

    def broadcast_from_rank0(self, function: Callable[[], T]) -> T:
        """Calls `function` on rank 0 and returns its result on all ranks."""
        return self.broadcast(0, function() if self.is_rank0 else None)

    def rank0_first(self, function: Callable[[], T]) -> T:
        """Calls `function` on rank 0, then on the other ranks, which can use caches that rank 0 has filled."""
        result = function() if self.is_rank0 else None
        self.broadcast(0, None)
        return result if self.is_rank0 else function()  # type: ignore[return-value]

    def scatter(self, groups: Sequence[Sequence[T]]) -> tuple[int, list[T]]:
        """Splits the items of rank 0 among all ranks, in order; items of one group stay together.

        Returns (index of the first item of this rank, the items of this rank). `groups` is ignored on other ranks.
        """
        sizes: list[int] = self.broadcast(0, [len(group) for group in groups])
        own_groups, items = contiguous_share(len(sizes), self.rank, self.size), []
        for group, size in enumerate(sizes):
            for index in range(size):
                item = self.broadcast(0, groups[group][index] if self.is_rank0 else None)
                if group in own_groups:
                    items.append(item)
        return sum(sizes[: own_groups.start]), items

    def parallel_map(self, tasks: Iterable[Callable[[], T]], costs: Sequence[float] | None = None) -> list[T]:
        """Runs each task on one rank and returns all results, in order, on all ranks.

        tasks: functions without side effects, because they run on one rank only. costs: relative cost of each task, to
        balance the load; without costs, the ranks take turns, and the iterable is consumed one task at a time.
        """
        ranks = None if costs is None else balance_load(costs, self.size)

        def rank_of(index: int) -> int:
            return index % self.size if ranks is None else ranks[index]

        results = [task() if rank_of(index) == self.rank else None for index, task in enumerate(tasks)]
        return [self.broadcast(rank_of(index), result) for index, result in enumerate(results)]

    def local_device(self, device: "torch.device") -> "torch.device":
        """The device of this rank, among the devices of that type on its machine."""
        return device

    def should_report(self, error: BaseException) -> bool:
        """Whether this rank shows an error to the user; all other ranks end silently.

        Has to be called before the process ends: it also makes the error known to the other ranks.
        """
        return True


def contiguous_share(total: int, rank: int, size: int) -> range:
    """The indices below `total` that `rank` of `size` gets: contiguous, and at most one more than any other rank."""
    return range(-(-total * rank // size), -(-total * (rank + 1) // size))


def balance_load(costs: Sequence[Any], size: int) -> list[int]:
    """Rank of each task: tasks in descending order of cost, each to the rank with the lowest load so far."""
    load, ranks = [0] * size, [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
        ranks[task] = load.index(min(load))
        load[ranks[task]] += costs[task]
    return ranks
