"""The steps of a weight, per row or per group of columns, at which rounding costs the outputs least.

A smaller step rounds most weights better and cuts the largest ones: both are counted where they reach the outputs, that
is every column's error with the mean square of what the column is multiplied by.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vlqc.kernels_ref.int4_groups import (
    INT4_MAX,
    INT4_MIN,
    SMALLEST_SCALE_SECOND,
    covering_scale,
    first_scale,
    quantize_weight_per_group,
    second_scale,
)
from vlqc.kernels_ref.quantize import SMALLEST_SCALE, WEIGHT_INT8_MAX, quantize_weight_per_channel, round_up

SHARES_OF_8_BITS = tuple(1 - step / 32 for step in range(12))  # of the step with which nothing is cut
SHARES_OF_4_BITS = tuple((27 - step) / 24 for step in range(14))  # also more: weights still grow by others' errors
FAINT = 1e-4  # of the mean: what a column counts for at least, even if it was silent while it was observed
ELEMENTS_AT_A_TIME = 1 << 17  # float32 temporaries of 512 KiB stay in the cache
ROOM = 2.0  # for groups that grow by the errors which they take over before they are rounded


def importance_of(second_moment: Tensor) -> Tensor:
    """Mean squares of the input float [K] -> float32 [K], all positive: by how much an error in a column counts."""
    known = second_moment.detach().float().cpu()
    mean = float(known.mean()) if known.numel() else 0.0
    return known.clamp(min=FAINT * mean) if mean > 0 else torch.ones_like(known)


def search_scales(
    values: Tensor,
    importance: Tensor,
    covering: Tensor,
    limits: tuple[int, int],
    shares: Sequence[float],
    representable: Callable[[Tensor, slice], Tensor],
) -> Tensor:
    """values float32 [n, G], importance [G] of the columns, covering step [n] -> the best step float32 [n].

    Tried are `shares` of the covering step, made `representable` (called with steps and the rows that they are of),
    with the very rounding that will be used; of steps that are equally good the first is taken.
    """
    rows, columns = values.shape
    best = torch.empty(rows, dtype=torch.float32)
    height = max(1, ELEMENTS_AT_A_TIME // max(columns, 1))
    for start in range(0, rows, height):
        here = slice(start, min(start + height, rows))
        part = values[here]  # [m, G]
        rounded = torch.empty_like(part)
        smallest = torch.full((part.shape[0],), torch.inf)  # [m]
        chosen = representable(covering[here], here)  # [m]
        for share in shares:
            step = representable(covering[here] * share, here)  # [m]
            torch.div(part, step[:, None], out=rounded)
            rounded.round_().clamp_(*limits).mul_(step[:, None])
            error = rounded.sub_(part).square_() @ importance  # [m]
            chosen = torch.where(error < smallest, step, chosen)
            smallest = torch.minimum(error, smallest)
        best[here] = chosen
    return best


class RowGrid:
    """int8 with a scale per row of W [N, K], chosen when its first columns are about to be rounded.

    importance: float32 [K] of the columns; scale: float32 [N, 1], values of `scale_dtype`, none below `smallest`
    float32 [N, 1] (see `matmul.smallest_weight_scale_for_bias`), zero where it is not chosen yet.
    """

    limits, group_size = (-WEIGHT_INT8_MAX, WEIGHT_INT8_MAX), None

    def __init__(self, weight: Tensor, importance: Tensor, smallest: Tensor | None, scale_dtype: torch.dtype) -> None:
        self.weight, self.importance, self.scale_dtype = weight.detach().float().cpu(), importance, scale_dtype
        self.scale = torch.zeros(weight.shape[0], 1)
        self.floor = torch.full((weight.shape[0],), SMALLEST_SCALE)
        if smallest is not None:
            self.floor = torch.maximum(self.floor, smallest.float().cpu().flatten())

    def steps(self, rows: slice, group: int, target: Tensor, importance: Tensor) -> Tensor:
        if not bool(self.scale[rows].all()):
            weight = self.weight[rows]
            covering = torch.linalg.vector_norm(weight, ord=torch.inf, dim=1) / WEIGHT_INT8_MAX  # [n]
            if target.shape[1] < weight.shape[1]:  # no more than a block of each row: the search is for all of it
                target, importance = weight, self.importance

            def representable(step: Tensor, here: slice) -> Tensor:
                return round_up(torch.maximum(step, self.floor[rows][here]), self.scale_dtype).float()

            values = target.contiguous()
            best = search_scales(values, importance, covering, self.limits, SHARES_OF_8_BITS, representable)
            self.scale[rows, 0] = best
        return self.scale[rows, 0]

    def scales(self) -> tuple[Tensor, ...]:
        return (self.scale,)

    def nearest(self) -> Tensor:
        """int8 [N, K]: every weight to the nearest step of the size that is best for its row."""
        self.steps(slice(None), 0, self.weight, self.importance)
        return quantize_weight_per_channel(self.weight, self.scale)


class GroupGrid:
    """4 bits with two scales, see `quantize_weight_per_group`; a group's scale is chosen when its turn comes.

    importance: float32 [K] of the columns; first: float32 [N, 1], a power of two; second: float32 [N, K/G], values of
    `scale_dtype`.
    """

    limits = (INT4_MIN, INT4_MAX)

    def __init__(self, weight: Tensor, importance: Tensor, group_size: int, scale_dtype: torch.dtype) -> None:
        self.weight, self.importance = weight.detach().float().cpu(), importance
        self.group_size, self.scale_dtype = group_size, scale_dtype
        covering = torch.stack([covering_scale(part) for part in torch.split(self.weight, group_size, 1)], 1)
        self.first = first_scale(ROOM * covering.amax(1, keepdim=True))
        self.second = torch.full_like(covering, SMALLEST_SCALE_SECOND)

    def steps(self, rows: slice, group: int, target: Tensor, importance: Tensor) -> Tensor:
        values, first = target.contiguous(), self.first[rows, 0]

        def representable(step: Tensor, here: slice) -> Tensor:
            return second_scale(step / first[here], self.scale_dtype) * first[here]

        step = search_scales(values, importance, covering_scale(values), self.limits, SHARES_OF_4_BITS, representable)
        self.second[rows, group] = step / first
        return step

    def scales(self) -> tuple[Tensor, ...]:
        return self.first, self.second

    def nearest(self) -> Tensor:
        """int8 [N, K] in -8..7: every weight to the nearest step of the size that is best for its group."""
        size = self.group_size
        parts = zip(torch.split(self.weight, size, 1), torch.split(self.importance, size), strict=True)
        for group, (part, counts) in enumerate(parts):
            self.steps(slice(None), group, part, counts)
        return quantize_weight_per_group(self.weight, self.first, self.second)
