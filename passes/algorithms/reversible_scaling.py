"""Scales weights in place so that they can be restored bit for bit, with one byte per weight instead of a copy.

In float32, (w * s) / s and (w / s) * s differ from w by at most a few units in the last place, unless one of them
overflows or is subnormal. What is kept is the difference of the bit patterns, int8; of rows where it does not fit into
int8, a copy. A copy in a shorter dtype is impossible for rotated weights, which need all bits of float32.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlqc.ir.memory import file_backed_copy, release_pages

ROWS_PER_STEP = 64  # rows scaled at a time, so that temporaries stay in the cache


@dataclass(frozen=True)
class Scaling:
    """What undoes one scaling of a weight.

    weight: float32 [N, K], in place; factor: float32, broadcasts with the weight; divided: whether the weight was
    divided by it, else multiplied; corrections: int8 [N, K], bits of the weight - bits of the inverse scaling; copies:
    number of the step -> rows of the weight that the corrections do not restore.
    """

    weight: Tensor
    factor: Tensor
    divided: bool
    corrections: Tensor
    copies: Mapping[int, Tensor]

    @torch.no_grad()
    def undo(self) -> None:
        """Restores the weight, which must be as `scaled` has left it."""
        for step, (rows, factor, correction) in enumerate(_steps(self.weight, self.factor, self.corrections)):
            if (copy := self.copies.get(step)) is not None:
                rows.copy_(copy)
            else:
                inverse = _inverse(rows, factor, self.divided)
                inverse.view(torch.int32).add_(correction)
                rows.copy_(inverse)
        release_pages(self.weight, self.corrections)


@torch.no_grad()
def scaled(weight: Tensor, factor: Tensor, *, divide: bool = False) -> Scaling:
    """Multiplies a weight float32 [N, K] by a factor in place, or divides it. factor: float32, [K] or [N, 1].

    The corrections are in a file if the weight is.
    """
    corrections, copies = torch.empty_like(weight, dtype=torch.int8, requires_grad=False), {}
    for step, (rows, part, correction) in enumerate(_steps(weight, factor, corrections)):
        original = rows.clone()
        if divide:
            rows.div_(part)
        else:
            rows.mul_(part)
        difference = original.view(torch.int32) - _inverse(rows, part, divide).view(torch.int32)
        correction.copy_(difference)
        low, high = torch.aminmax(difference)
        if not -128 <= int(low) <= int(high) <= 127:
            copies[step] = original
    release_pages(weight)
    return Scaling(weight, factor, divide, file_backed_copy(corrections, weight), copies)


def _steps(weight: Tensor, factor: Tensor, corrections: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    parts = (torch.split(tensor, ROWS_PER_STEP) for tensor in (weight, factor.expand(weight.shape), corrections))
    return zip(*parts, strict=True)


def _inverse(rows: Tensor, factor: Tensor, divided: bool) -> Tensor:
    return rows * factor if divided else rows / factor
