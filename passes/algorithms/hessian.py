"""The regularized Hessian of a linear layer's rounding error with respect to its weight, factorized for GPTQ.

Notation: x [T, K] rows of the input, D [T, T] the diagonal of their weights, H = x^T D x [K, K] = R R^T with R upper
triangular. With T < K, or few distinct rows, H has directions without any cost that calibration simply did not see.
Therefore (1 - shrinkage) H + shrinkage diag(H) is factorized, with the shrinkage chosen on held-out rows; shrinkage 1
disables compensation between columns.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COLUMNS_PER_BLOCK = 4096  # of H: 64 MiB in float32; wider inputs are processed block by block
MIN_CORRELATION = 1e-4  # lower bound of the diagonal of correlations, for columns that are zero in a part of the rows
SHRINKAGES = (0.01, 0.03, 0.1, 0.3, 0.6, 1.0)
FIRST_SHRINKAGE = 3  # index at which the search starts: the best one for most inputs
CHUNKS, HOLDOUT_EVERY = 12, 3  # rows are cut into CHUNKS consecutive chunks, every third of which is held out
MAX_HOLDOUT_ROWS = 256  # evenly spread; more rows hardly change the choice
COLUMNS_PER_PANEL = 512  # columns of H that are multiplied at a time
ParallelFor = Callable[[Callable[[Any], None], Iterable[Any]], None]  # calls a function for every item


@dataclass(frozen=True)
class HessianBlock:
    """Some columns of x and the factor of their block of H.

    columns: int64 [B], their positions in x.
    propagation: float32 [B, B], R_ij / R_jj above the diagonal: the share of an error in column i to be added to j.
    importance: float32 [B], R_jj^2: the cost of an error in column j that later columns cannot compensate.
    rows: float32 [T, B], D^1/2 x; None if x has a single block.
    pseudo_inverse: float32 [B, T], H^-1 x^T D^1/2: maps an output error to the weight change that compensates it; None
        for the first block.
    """

    columns: Tensor
    propagation: Tensor
    importance: Tensor
    rows: Tensor | None
    pseudo_inverse: Tensor | None


def serial_for(task: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Calls `task` for every item in order; the default `ParallelFor`."""
    for item in items:
        task(item)


def hessian_blocks(
    rows: Tensor,
    row_weight: Tensor,
    importance: Tensor,
    order: Tensor,
    width: int,
    parallel_for: ParallelFor = serial_for,
) -> Iterator[HessianBlock]:
    """Yields the blocks of `width` columns of x float32 [T, K], in the given order.

    row_weight: float64 [T]; importance: float32 [K] > 0, the diagonal of H, bounded from below; order: int64 [K],
    a permutation of the columns.
    """
    rms, root = importance.sqrt(), row_weight.sqrt().float()[:, None]  # [K], [T, 1]
    several = rows.shape[1] > width
    for number, columns in enumerate(torch.split(order, width)):
        part = rows[:, columns].mul_(root)  # [T, B]
        yield _block(columns, part, rms[columns], parallel_for, several=several, first=number == 0)


def _block(
    columns: Tensor, rows: Tensor, rms: Tensor, parallel_for: ParallelFor, *, several: bool, first: bool
) -> HessianBlock:
    """rows: float32 [T, B], D^1/2 x; rms: float32 [B], square root of the (bounded) diagonal of H."""
    unit = rows / rms
    training, holdout = holdout_split(unit)
    gram = gram_matrix(training, parallel_for)  # [B, B]; correlations once the held-out rows are added
    shrinkage = search_shrinkage(gram, holdout, rms, parallel_for)
    gram.add_(gram_matrix(holdout, parallel_for)).mul_(1 - shrinkage)
    gram.fill_diagonal_(1)  # float32 suffices: its rounding errors amount to a slightly different shrinkage
    lower, failed = torch.linalg.cholesky_ex(gram.flip(0, 1))
    if int(failed):  # columns are collinear within float32: no compensation
        lower = torch.eye(len(gram))
    pseudo_inverse = None
    if several and not first:
        right = (unit.T * (1 - shrinkage)).flip(0)  # [B, T]
        pseudo_inverse = torch.cholesky_solve(right, lower).flip(0) / rms[:, None]
    importance = (lower.diagonal().flip(0) * rms).square()
    return HessianBlock(columns, _propagation(lower, rms), importance, rows if several else None, pseudo_inverse)


def _propagation(lower: Tensor, rms: Tensor) -> Tensor:
    """Cholesky factor of the flipped correlations -> R_ij / R_jj in the units of x: float32 [B, B], 1 at i = j."""
    upper = lower.flip(0, 1)
    return upper.mul_(rms[:, None]).div_(upper.diagonal().clone())


def gram_matrix(rows: Tensor, parallel_for: ParallelFor = serial_for) -> Tensor:
    """rows float32 [T, B] -> rows^T rows [B, B]; only panels below the diagonal are multiplied, then mirrored."""
    gram = torch.empty(rows.shape[1], rows.shape[1])

    def multiply(begin: int) -> None:
        panel = rows[:, begin:].T @ rows[:, begin : begin + COLUMNS_PER_PANEL]  # [B - begin, P]
        gram[begin:, begin : begin + COLUMNS_PER_PANEL] = panel
        gram[begin : begin + COLUMNS_PER_PANEL, begin:] = panel.T

    parallel_for(multiply, range(0, rows.shape[1], COLUMNS_PER_PANEL))
    return gram


def holdout_split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[T, B] -> (training rows, held-out rows), in consecutive chunks, as neighboring tokens are correlated."""
    chunk = torch.arange(rows.shape[0]) * CHUNKS // max(rows.shape[0], 1)
    held_out = chunk % HOLDOUT_EVERY == HOLDOUT_EVERY - 1
    return rows[~held_out], rows[held_out]


def search_shrinkage(gram: Tensor, holdout: Tensor, rms: Tensor, parallel_for: ParallelFor = serial_for) -> float:
    """Returns the shrinkage with the smallest expected error on the held-out rows, by descent from FIRST_SHRINKAGE.

    gram: float32 [B, B], of the training rows; holdout: [T', B]; both in units of rms [B].

    The expectation is in closed form and holds for any W: rounding adds an independent error of equal magnitude to
    every column, and compensation turns it into that error times (R diag(R)^-1)^-1.
    """
    if not bool(holdout.any()) or not bool(gram.any()):
        return 1.0
    sampled = holdout[:: -(-holdout.shape[0] // MAX_HOLDOUT_ROWS)]
    errors = (sampled * rms).T.contiguous()  # [B, T']
    costs: dict[int, float] = {}

    def evaluate(number: int) -> None:
        costs[number] = _expected_error(gram, SHRINKAGES[number], rms, errors)

    def cost(number: int) -> float:
        if number not in costs:
            evaluate(number)
        return costs[number]

    best = FIRST_SHRINKAGE
    parallel_for(evaluate, (best, best + 1))
    step = 1 if cost(best + 1) < cost(best) else -1
    while 0 <= best + step < len(SHRINKAGES) and cost(best + step) < cost(best):
        best += step
    return SHRINKAGES[best]


def _expected_error(gram: Tensor, shrinkage: float, rms: Tensor, holdout: Tensor) -> float:
    """Squared error on held-out rows [B, T'] of unit rounding errors, compensated with the Gram matrix [B, B]."""
    compensated = compensated_errors(gram, shrinkage, rms, holdout)
    return float("inf") if compensated is None else float(compensated.square().sum(dtype=torch.float64))


def compensated_errors(gram: Tensor, shrinkage: float, rms: Tensor, holdout: Tensor) -> Tensor | None:
    """Output error on held-out rows [B, T'] of a unit rounding error in each column once it is compensated: [B, T'].

    gram: [B, B], of the training rows in units of rms [B]. None if it is singular.
    """
    if shrinkage == 1:
        return holdout
    shrunk = gram * (1 - shrinkage)
    shrunk.diagonal().copy_(gram.diagonal().clamp(min=MIN_CORRELATION))  # columns may be zero in the training rows
    lower, failed = torch.linalg.cholesky_ex(shrunk.flip(0, 1))
    if int(failed):
        return None
    propagation = _propagation(lower, rms)
    compensated: Tensor = torch.linalg.solve_triangular(propagation, holdout, upper=True, unitriangular=True)
    return compensated
