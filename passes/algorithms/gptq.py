"""GPTQ: quantize a weight column by column and compensate each column's rounding error in the columns after it.

Notation: W [N, K] the weight, Q its quantized value, x [T, K] rows of its input, H = x^T D x as in `hessian`. The error
of the outputs is |(W - Q) x^T|^2 = (W - Q) H (W - Q)^T, so correlated columns can compensate each other.

Source: GPTQ, arXiv 2210.17323. The paper updates W with the inverse of H. Here H = R R^T with R upper triangular, which
gives the same integers from one factorization: column j is rounded from W_j + sum over i < j of (W - Q)_i R_ij / R_jj.

Columns with scales of their own are rounded a second and a third time, as coordinate descent (QuantEase, arXiv
2309.01885) but within a group only: each column to the integer that minimizes the error given all other columns of the
group, those after it included. Beyond the group it would gain little more and cost K / G times as much.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vlqc.passes.algorithms.hessian import COLUMNS_PER_BLOCK, HessianBlock, ParallelFor, hessian_blocks

ROWS_PER_CHUNK = 1024  # rows of W per task, independent of the number of threads
COLUMNS_PER_LEAF = 16  # rounded one by one; errors of wider spans are propagated by a matrix product
SWEEPS = 2  # of coordinate descent: 0.14 dB the first, 0.04 dB the second


class ScaleGrid(Protocol):
    """The quantization grid of one weight W [N, K], whose scales are chosen just before the weight is rounded."""

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest integer."""

    @property
    def group_size(self) -> int | None:
        """Number of columns that share a scale; None for all of them."""

    def choose_scales(self, rows: slice, group: int, target: Tensor, importance: Tensor) -> Tensor:
        """Chooses and returns the scales float32 [n] of some rows of W in one group.

        target: float32 [n, G], the group's columns as they will be rounded, in any order; importance: float32 [G].
        """


def gptq_quantize(
    weights: Sequence[Tensor],
    grids: Sequence[ScaleGrid],
    rows: Tensor,
    row_weight: Tensor,
    importance: Tensor,
    columns_per_block: int = COLUMNS_PER_BLOCK,
) -> list[Tensor]:
    """Quantizes weights float [N_i, K] that share the input x; returns int8 [N_i, K] each.

    grids: one per weight, all with the same group size; rows: x float32 [T, K]; row_weight: float64 [T]; importance:
    float32 [K] > 0, mean square of each column of x.

    Columns are processed by descending importance (GPTQ's act-order) as far as groups stay together. If K exceeds
    `columns_per_block`, blocks of columns are processed in turn, and each block compensates the output error of the
    previous ones by least squares. The result does not depend on the number of threads.
    """
    group_size = grids[0].group_size
    order = activation_order(importance, group_size)
    width = max(columns_per_block // (group_size or 1), 1) * (group_size or 1)
    integers = [torch.empty(weight.shape, dtype=torch.int8) for weight in weights]
    several = rows.shape[1] > width
    output_errors = [torch.zeros(rows.shape[0] if several else 0, weight.shape[0]) for weight in weights]  # [T, N_i]
    chunks = [
        (number, slice(start, min(start + ROWS_PER_CHUNK, weight.shape[0])))
        for number, weight in enumerate(weights)
        for start in range(0, weight.shape[0], ROWS_PER_CHUNK)
    ]
    with single_threaded_pool() as parallel_for:
        for block in hessian_blocks(rows, row_weight, importance, order, width, parallel_for):
            factors = _group_factors(block, group_size)

            def quantize_chunk(
                chunk: tuple[int, slice], block: HessianBlock = block, factors: Sequence[GroupFactor] = factors
            ) -> None:
                number, chunk_rows = chunk
                weight = weights[number].detach()[chunk_rows].float().cpu()
                error = weight.index_select(1, block.columns).T.contiguous()  # [B, n], becomes W - Q
                correction = None
                if block.pseudo_inverse is not None:
                    correction = block.pseudo_inverse @ output_errors[number][:, chunk_rows]
                    error += correction
                quantized = _quantize_block(error, block, factors, grids[number], chunk_rows).T.contiguous()
                integers[number][chunk_rows].index_copy_(1, block.columns, quantized)
                if correction is not None:
                    error -= correction
                if block.rows is not None:
                    output_errors[number][:, chunk_rows] += block.rows @ error

            parallel_for(quantize_chunk, chunks)
    return integers


def activation_order(importance: Tensor, group_size: int | None) -> Tensor:
    """importance [K] -> int64 [K]: columns by descending importance within groups by descending mean importance."""
    grouped = importance.reshape(-1, group_size or importance.numel())  # [K/G, G]
    first_column = torch.arange(len(grouped))[:, None] * grouped.shape[1]
    columns = grouped.argsort(dim=1, descending=True, stable=True) + first_column
    return columns[grouped.mean(1).argsort(descending=True, stable=True)].flatten()


@dataclass(frozen=True)
class GroupFactor:
    """R of a group's columns, float32 [G, G], and R R^T: the cost of their errors that later columns cannot avoid."""

    factor: Tensor
    hessian: Tensor


def _group_factors(block: HessianBlock, group_size: int | None) -> list[GroupFactor]:
    """Of every group of the block, in order; none if all columns share a scale."""
    if group_size is None:
        return []
    spans = [slice(begin, begin + group_size) for begin in range(0, len(block.columns), group_size)]
    factors = [block.propagation[span, span] * block.importance[span].sqrt() for span in spans]
    return [GroupFactor(factor, factor @ factor.T) for factor in factors]


def _quantize_block(
    error: Tensor, block: HessianBlock, factors: Sequence[GroupFactor], grid: ScaleGrid, rows: slice
) -> Tensor:
    """Rounds the columns `error` float32 [B, n] -> int8 [B, n]; `error` is overwritten by the rounding error.

    factors: of the groups; none for a grid without groups.

    Recursive halving: the error of the first half is propagated to the second one in a single matrix product, so that
    every column has received the errors of all columns before it when it is rounded.
    """
    count, (low, high) = error.shape[0], grid.limits
    target, integers = error.clone(), torch.empty(error.shape, dtype=torch.int8)
    group = grid.group_size or count
    leaf = min(COLUMNS_PER_LEAF, group)

    # The function is its own argument: a closure over itself would be a reference cycle and keep the tensors alive.
    def quantize(recurse: Callable[..., None], begin: int, end: int, scale: Tensor) -> None:
        width = end - begin
        if width == group:
            number = int(block.columns[begin]) // group if grid.group_size else 0
            scale = grid.choose_scales(rows, number, target[begin:end].T, block.importance[begin:end])
        if width > leaf:
            unit = group if width > group else leaf
            middle = begin + -(-width // (2 * unit)) * unit
            recurse(recurse, begin, middle, scale)
            target[middle:end].addmm_(block.propagation[begin:middle, middle:end].T, error[begin:middle])
            recurse(recurse, middle, end, scale)
        else:
            for column in range(begin, end):
                integer = (target[column] / scale).round_().clamp_(low, high)  # [n]
                integers[column] = integer
                error[column].addcmul_(integer, scale, value=-1)
                if column + 1 < end:
                    target[column + 1 : end].addr_(block.propagation[column, column + 1 : end], error[column])
        if width == group and factors:
            span = slice(begin, end)
            _descend(integers[span], error[span], target[span], scale, factors[begin // group], grid.limits)

    quantize(quantize, 0, count, torch.empty(0))  # scales are chosen where a group begins
    return integers


def _descend(
    integers: Tensor, error: Tensor, target: Tensor, scale: Tensor, group: GroupFactor, limits: tuple[int, int]
) -> None:
    """Coordinate descent over the integers of one group; overwrites `integers` int8 and `error` float32, both [G, n].

    target: float32 [G, n], from which GPTQ rounded each column; scale: float32 [n].
    """
    count, diagonal = integers.shape[0], group.hessian.diagonal()
    values = integers.float()  # [G, n]
    residual = torch.addcmul(target, values, scale, value=-1)
    gradient = (group.factor * group.factor.diagonal()) @ residual  # [G, n], half of the squared error's
    for start in [*range(0, count, COLUMNS_PER_LEAF)] * SWEEPS:
        stop = min(start + COLUMNS_PER_LEAF, count)
        before = values[start:stop].clone()
        for column in range(start, stop):
            steps = (gradient[column] / scale).div_(diagonal[column]).round_()  # [n]
            integer = steps.add_(values[column]).clamp_(*limits)
            change = torch.sub(values[column], integer).mul_(scale)
            values[column] = integer
            gradient[column + 1 : stop].addr_(group.hessian[column + 1 : stop, column], change)
        changes = before.sub_(values[start:stop]).mul_(scale)  # of the error, [<= 16, n]
        error[start:stop] += changes
        gradient[:start].addmm_(group.hessian[:start, start:stop], changes)
        gradient[stop:].addmm_(group.hessian[stop:, start:stop], changes)
        # Within the span only columns after the changed one have been updated so far.
        gradient[start:stop].addmm_(group.hessian[start:stop, start:stop].triu(), changes)
    integers.copy_(values)


_open_pool: ParallelFor | None = None  # of the context that is open, if any


@contextmanager
def single_threaded_pool() -> Iterator[ParallelFor]:
    """Context that yields a `ParallelFor` whose tasks run concurrently, each on one thread, as does all code inside.

    The last bits of a matrix product depend on how it is divided among threads; with one thread they do not. Nested
    contexts yield the same pool.
    """
    global _open_pool
    if _open_pool is not None:
        yield _open_pool
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            _open_pool = lambda task, items: [None for _ in pool.map(task, items)].clear()  # noqa: E731
            yield _open_pool
    finally:
        _open_pool = None
        torch.set_num_threads(threads)
