"""Which inputs of a Linear go along with each other: the Gram matrix of its input, as error compensation needs it.

Notation: x [T, K] rows of the input, D their weights on a diagonal, H = x^T D x [K, K] = R R^T with R upper triangular.
A calibration set sees few rows: with T < K some combinations of columns were never seen, and H says that errors there
are free. So what is factorised is (1 - shrinkage) H + shrinkage diag(H); shrinkage 1 means that no column is trusted to
make up for another one.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COLUMNS_PER_BLOCK = 4096  # of H: 64 MiB in float32; wider inputs are taken block by block
FAINT = 1e-4  # of a column's mean square: what it counts for in a part of the rows in which it was silent
SHRINKAGES = (0.01, 0.03, 0.1, 0.3, 0.6, 1.0)
FIRST_SHRINKAGE = 3  # tried first: the best on most inputs
PIECES, HELD_OUT = 12, 3  # of so many pieces of the rows every third is left out, and judged on
MOST_UNSEEN = 256  # rows are judged on, evenly spread: more of them change little
PANEL = 512  # columns of H that are multiplied at a time
Each = Callable[[Callable[[Any], None], Iterable[Any]], None]  # does a task for each part of some work


@dataclass(frozen=True)
class Block:
    """Some columns of x, and their part of H.

    columns: their positions in x, int64 [B]; reach: float32 [B, B], R_ij / R_jj above the diagonal: how much of an
    error in i column j takes over; importance: float32 [B], R_jj^2: what an error in j costs that none behind it takes
    over. Where x has several blocks, rows: float32 [T, B], D^1/2 x, and, but for the first, answer: float32 [B, T],
    H^-1 x^T D^1/2: the change of weights that makes up for an error in the outputs.
    """

    columns: Tensor
    reach: Tensor
    importance: Tensor
    rows: Tensor | None
    answer: Tensor | None


def one_by_one(task: Callable[[Any], None], parts: Iterable[Any]) -> None:
    """Does the parts of some work; whoever has several threads may do them side by side."""
    for part in parts:
        task(part)


def blocks_of(
    rows: Tensor,
    row_weight: Tensor,
    importance: Tensor,
    order: Tensor,
    width: int,
    each: Each = one_by_one,
) -> Iterator[Block]:
    """x float32 [T, K], weights of its rows float64 [T], columns in order int64 [K] -> blocks of `width` columns.

    importance: float32 [K] > 0, the diagonal of H, and more where a column was silent; each: as `one_by_one`.
    """
    size, root = importance.sqrt(), row_weight.sqrt().float()[:, None]  # [K], [T, 1]
    several = rows.shape[1] > width
    for number, columns in enumerate(torch.split(order, width)):
        part = rows[:, columns].mul_(root)  # [T, B]
        yield _block(columns, part, size[columns], each, several=several, first=number == 0)


def _block(columns: Tensor, rows: Tensor, size: Tensor, each: Each, *, several: bool, first: bool) -> Block:
    """rows: float32 [T, B], D^1/2 x; size: float32 [B], root of H's diagonal, or what stands for it."""
    unit = rows / size
    known, unseen = apart(unit)
    gram = gram_of(known, each)  # [B, B], of correlations once it is whole
    shrinkage = chosen_shrinkage(gram, unseen, size, each)
    gram.add_(gram_of(unseen, each)).mul_(1 - shrinkage)
    gram.fill_diagonal_(1)  # float32 is enough: its errors are those of another shrinkage, a little smaller or larger
    lower, failed = torch.linalg.cholesky_ex(gram.flip(0, 1))
    if int(failed):  # the columns go along with each other beyond what float32 tells apart: none makes up for another
        lower = torch.eye(len(gram))
    answer = None
    if several and not first:
        behind = (unit.T * (1 - shrinkage)).flip(0)  # [B, T]
        answer = torch.cholesky_solve(behind, lower).flip(0) / size[:, None]
    importance = (lower.diagonal().flip(0) * size).square()
    return Block(columns, _reach(lower, size), importance, rows if several else None, answer)


def _reach(lower: Tensor, size: Tensor) -> Tensor:
    """The factor of the flipped matrix of correlations -> R_ij / R_jj in the units of x: float32 [B, B], 1 at i = j."""
    upper = lower.flip(0, 1)
    return upper.mul_(size[:, None]).div_(upper.diagonal().clone())


def gram_of(rows: Tensor, each: Each = one_by_one) -> Tensor:
    """float32 [T, B] -> rows^T rows [B, B]: panels below the diagonal, and their mirror images."""
    gram = torch.empty(rows.shape[1], rows.shape[1])

    def multiply(begin: int) -> None:
        panel = rows[:, begin:].T @ rows[:, begin : begin + PANEL]  # [B - begin, P]
        gram[begin:, begin : begin + PANEL] = panel
        gram[begin : begin + PANEL, begin:] = panel.T

    each(multiply, range(0, rows.shape[1], PANEL))
    return gram


def apart(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[T, B] -> the rows to learn from, and those that are left out, in whole pieces: neighbours are much alike."""
    piece = torch.arange(rows.shape[0]) * PIECES // max(rows.shape[0], 1)
    left_out = piece % HELD_OUT == HELD_OUT - 1
    return rows[~left_out], rows[left_out]


def chosen_shrinkage(gram: Tensor, unseen: Tensor, size: Tensor, each: Each = one_by_one) -> float:
    """Gram matrix of some rows float32 [B, B], other rows [T', B], both in units of size [B] -> the best on those.

    In closed form, for any W: rounding leaves an independent error of like size in every column, and what becomes of it
    behind the compensation is that error times (R diag(R)^-1)^-1. Tried from one candidate on while it gets better.
    """
    if not bool(unseen.any()) or not bool(gram.any()):
        return 1.0
    few = unseen[:: -(-unseen.shape[0] // MOST_UNSEEN)]
    errors = (few * size).T.contiguous()  # [B, T']
    tried: dict[int, float] = {}

    def attempt(number: int) -> None:
        tried[number] = _expected_error(gram, SHRINKAGES[number], size, errors)

    def cost(number: int) -> float:
        if number not in tried:
            attempt(number)
        return tried[number]

    best = FIRST_SHRINKAGE
    each(attempt, (best, best + 1))
    step = 1 if cost(best + 1) < cost(best) else -1
    while 0 <= best + step < len(SHRINKAGES) and cost(best + step) < cost(best):
        best += step
    return SHRINKAGES[best]


def _expected_error(gram: Tensor, shrinkage: float, size: Tensor, unseen: Tensor) -> float:
    """What unit errors of rounding come to on rows [B, T'] after compensation by a Gram matrix of other rows."""
    if shrinkage == 1:
        return float(unseen.square().sum(dtype=torch.float64))
    shrunk = gram * (1 - shrinkage)
    shrunk.diagonal().copy_(gram.diagonal().clamp(min=FAINT))  # some columns may be silent in these rows
    lower, failed = torch.linalg.cholesky_ex(shrunk.flip(0, 1))
    if int(failed):
        return float("inf")
    taken = torch.linalg.solve_triangular(_reach(lower, size), unseen, upper=True, unitriangular=True)
    return float(taken.square().sum(dtype=torch.float64))
