"""Rounding that makes up for itself: the error of each column of a weight is passed on to the columns behind it.

Notation: W [N, K] the weight, Q what it is rounded to, x [T, K] rows of its input, H = x^T D x as in `input_gram`. What
counts is |(W - Q) x^T|^2 = (W - Q) H (W - Q)^T: columns that go along with each other can share an error.
Source: GPTQ, arXiv 2210.17323. That updates W by the inverse of H; here H = R R^T with R upper triangular, which gives
the same integers from one factorisation: column j is rounded from W_j + sum over i < j of (W - Q)_i R_ij / R_jj.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from vlqc.passes.algorithms.hessian import COLUMNS_PER_BLOCK, Block, Each, blocks_of

ROWS_PER_CHUNK = 1024  # rows of W that go through at a time, whatever the number of threads
COLUMNS_PER_LEAF = 16  # rounded one after the other; wider spans pass their error on by a matrix product


class Grid(Protocol):
    """What the rows of a weight may be rounded to. group_size: columns that share a step, None for all of them."""

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and the highest integer."""

    @property
    def group_size(self) -> int | None: ...

    def steps(self, rows: slice, group: int, target: Tensor, importance: Tensor) -> Tensor:
        """float32 [n]: the steps of some rows of W in one group, asked for when it is about to be rounded.

        target: float32 [n, G], the group's columns as they are to be rounded, in any order; importance: float32 [G].
        """


def compensated(
    weights: Sequence[Tensor],
    grids: Sequence[Grid],
    rows: Tensor,
    row_weight: Tensor,
    importance: Tensor,
    columns_per_block: int = COLUMNS_PER_BLOCK,
) -> list[Tensor]:
    """Weights float [N_i, K] that read x float32 [T, K], row weights float64 [T] -> their integers, int8 [N_i, K].

    importance: float32 [K] > 0, mean square of each column of x. All grids have the same groups. Columns are taken in
    the order of their importance as far as groups stay together: the first ones find most others behind them. An x of
    more than `columns_per_block` columns is taken in blocks; what one block's errors do to the outputs is handed on to
    the next one by least squares. The same bytes come out for any number of threads.
    """
    group_size = grids[0].group_size
    order = columns_in_order(importance, group_size)
    width = max(columns_per_block // (group_size or 1), 1) * (group_size or 1)
    integers = [torch.empty(weight.shape, dtype=torch.int8) for weight in weights]
    several = rows.shape[1] > width
    errors = [torch.zeros(rows.shape[0] if several else 0, weight.shape[0]) for weight in weights]  # [T, N_i]
    parts = [
        (number, slice(start, min(start + ROWS_PER_CHUNK, weight.shape[0])))
        for number, weight in enumerate(weights)
        for start in range(0, weight.shape[0], ROWS_PER_CHUNK)
    ]
    with single_threads() as each:
        for block in blocks_of(rows, row_weight, importance, order, width, each):

            def task(part: tuple[int, slice], block: Block = block) -> None:
                number, here = part
                weight = weights[number].detach()[here].float().cpu()
                made = weight.index_select(1, block.columns).T.contiguous()  # [B, n], to become W - Q
                correction = None if block.answer is None else block.answer @ errors[number][:, here]
                if correction is not None:
                    made += correction
                rounded = _round_block(made, block, grids[number], here).T.contiguous()
                integers[number][here].index_copy_(1, block.columns, rounded)
                if correction is not None:
                    made -= correction
                if block.rows is not None:
                    errors[number][:, here] += block.rows @ made

            each(task, parts)
    return integers


def columns_in_order(importance: Tensor, group_size: int | None) -> Tensor:
    """float [K] -> int64 [K]: groups by their mean importance, columns within each by their own; the largest first."""
    grouped = importance.reshape(-1, group_size or importance.numel())  # [K/G, G]
    first_column = torch.arange(len(grouped))[:, None] * grouped.shape[1]
    columns = grouped.argsort(dim=1, descending=True, stable=True) + first_column
    return columns[grouped.mean(1).argsort(descending=True, stable=True)].flatten()


def _round_block(made: Tensor, block: Block, grid: Grid, rows: slice) -> Tensor:
    """made float32 [B, n], columns to be rounded -> their integers int8 [B, n]; `made` becomes the error made by that.

    One half after the other, the error of the first handed on to the second in one matrix product: so every column
    meets the errors of all before it when its turn comes.
    """
    count, (low, high) = made.shape[0], grid.limits
    target, integers = made.clone(), torch.empty(made.shape, dtype=torch.int8)
    group = grid.group_size or count
    leaf = min(COLUMNS_PER_LEAF, group)

    # Given itself: a function that finds itself around it would keep all of this until the next garbage collection.
    def take(again: Callable[..., None], begin: int, end: int, step: Tensor) -> None:
        width = end - begin
        if width == group:
            number = int(block.columns[begin]) // group if grid.group_size else 0
            step = grid.steps(rows, number, target[begin:end].T, block.importance[begin:end])
        if width > leaf:
            unit = group if width > group else leaf
            middle = begin + -(-width // (2 * unit)) * unit
            again(again, begin, middle, step)
            target[middle:end].addmm_(block.reach[begin:middle, middle:end].T, made[begin:middle])
            again(again, middle, end, step)
            return
        for column in range(begin, end):
            integer = (target[column] / step).round_().clamp_(low, high)  # [n]
            integers[column] = integer
            made[column].addcmul_(integer, step, value=-1)
            if column + 1 < end:
                target[column + 1 : end].addr_(block.reach[column, column + 1 : end], made[column])

    take(take, 0, count, torch.empty(0))  # steps are set where a group begins
    return integers


_shared: Each | None = None  # of the context that is open


@contextmanager
def single_threads() -> Iterator[Each]:
    """Gives map(task, parts) that runs tasks side by side, each on one thread, as all arithmetic inside is.

    How a matrix product is shared out decides on its last bits; so it never is. One inside another gives the same.
    """
    global _shared
    if _shared is not None:
        yield _shared
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            _shared = lambda task, parts: [None for _ in pool.map(task, parts)].clear()  # noqa: E731
            yield _shared
    finally:
        _shared = None
        torch.set_num_threads(threads)
