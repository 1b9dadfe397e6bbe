"""Search for the weight scales, per output channel or per group of columns, that minimize the error of the outputs.

A smaller scale rounds most weights more finely and clips the largest ones. The cost is the squared rounding error of
each column times the mean square of the input that multiplies it, so both effects are measured at the outputs.
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

INT8_SHARES = tuple(1 - step / 32 for step in range(12))  # of the scale that clips no weight
INT4_SHARES = tuple((27 - step) / 24 for step in range(14))  # also larger ones: GPTQ's compensation enlarges weights
MIN_RELATIVE_MOMENT = 1e-4  # of the mean: lower bound of a column's importance, also if its input was always zero
ELEMENTS_PER_CHUNK = 1 << 17  # float32 temporaries of 512 KiB stay in the cache
GROUP_HEADROOM = 2.0  # for groups that grow by compensated errors before they are rounded


def column_importance(second_moment: Tensor) -> Tensor:
    """Mean square of each input column [K] -> float32 [K] > 0, the weight of an error in that column."""
    moments = second_moment.detach().float().cpu()
    mean = float(moments.mean()) if moments.numel() else 0.0
    return moments.clamp(min=MIN_RELATIVE_MOMENT * mean) if mean > 0 else torch.ones_like(moments)


def search_scales(
    values: Tensor,
    importance: Tensor,
    covering: Tensor,
    limits: tuple[int, int],
    shares: Sequence[float],
    representable: Callable[[Tensor, slice], Tensor],
) -> Tensor:
    """Returns the scale float32 [n] of each row of `values` float32 [n, G] with the smallest weighted squared error.

    importance: float32 [G]; covering: float32 [n], the scale that clips nothing; limits: of the integers; shares: of
    the covering scale, the candidates; representable: (scales, rows) -> the nearest scales that can be stored.

    Candidates are evaluated with the rounding that is used later. Of equally good ones the first is returned.
    """
    rows, columns = values.shape
    best = torch.empty(rows, dtype=torch.float32)
    height = max(1, ELEMENTS_PER_CHUNK // max(columns, 1))
    for start in range(0, rows, height):
        chunk_rows = slice(start, min(start + height, rows))
        chunk = values[chunk_rows]  # [m, G]
        rounded = torch.empty_like(chunk)
        smallest = torch.full((chunk.shape[0],), torch.inf)  # [m]
        chosen = representable(covering[chunk_rows], chunk_rows)  # [m]
        for share in shares:
            scale = representable(covering[chunk_rows] * share, chunk_rows)  # [m]
            torch.div(chunk, scale[:, None], out=rounded)
            rounded.round_().clamp_(*limits).mul_(scale[:, None])
            error = rounded.sub_(chunk).square_() @ importance  # [m]
            chosen = torch.where(error < smallest, scale, chosen)
            smallest = torch.minimum(error, smallest)
        best[chunk_rows] = chosen
    return best


class ChannelScaleGrid:
    """int8 with one scale per row of W [N, K], chosen when the first columns of the row are about to be rounded.

    weight: float [N, K]; importance: float32 [K] of the columns; min_scale: float32 [N, 1] or None, see
    `matmul.smallest_weight_scale_for_bias`; scale_dtype: in which the scale is stored.

    scale: float32 [N, 1], values of `scale_dtype`; zero where no scale is chosen yet.
    """

    limits, group_size = (-WEIGHT_INT8_MAX, WEIGHT_INT8_MAX), None

    def __init__(self, weight: Tensor, importance: Tensor, min_scale: Tensor | None, scale_dtype: torch.dtype) -> None:
        self.weight, self.importance, self.scale_dtype = weight.detach().float().cpu(), importance, scale_dtype
        self.scale = torch.zeros(weight.shape[0], 1)
        self.min_scale = torch.full((weight.shape[0],), SMALLEST_SCALE)
        if min_scale is not None:
            self.min_scale = torch.maximum(self.min_scale, min_scale.float().cpu().flatten())

    def choose_scales(self, rows: slice, group: int, target: Tensor, importance: Tensor) -> Tensor:
        if not bool(self.scale[rows].all()):
            weight = self.weight[rows]
            covering = torch.linalg.vector_norm(weight, ord=torch.inf, dim=1) / WEIGHT_INT8_MAX  # [n]
            if target.shape[1] < weight.shape[1]:  # only a block of the columns: search over the whole rows
                target, importance = weight, self.importance

            def representable(scale: Tensor, chunk_rows: slice) -> Tensor:
                return round_up(torch.maximum(scale, self.min_scale[rows][chunk_rows]), self.scale_dtype).float()

            values = target.contiguous()
            best = search_scales(values, importance, covering, self.limits, INT8_SHARES, representable)
            self.scale[rows, 0] = best
        return self.scale[rows, 0]

    def stored_scales(self) -> tuple[Tensor, ...]:
        return (self.scale,)

    def round_to_nearest(self) -> Tensor:
        """Rounds every weight to the nearest multiple of the best scale of its row: int8 [N, K]."""
        self.choose_scales(slice(None), 0, self.weight, self.importance)
        return quantize_weight_per_channel(self.weight, self.scale)


class GroupScaleGrid:
    """int4 with two-level scales, see `quantize_weight_per_group`; a group's scale is chosen when it is rounded.

    weight: float [N, K]; importance: float32 [K] of the columns; group_size: G; scale_dtype: in which `second` is
    stored.

    first: float32 [N, 1], powers of two; second: float32 [N, K/G], values of `scale_dtype`.
    """

    limits = (INT4_MIN, INT4_MAX)

    def __init__(self, weight: Tensor, importance: Tensor, group_size: int, scale_dtype: torch.dtype) -> None:
        self.weight, self.importance = weight.detach().float().cpu(), importance
        self.group_size, self.scale_dtype = group_size, scale_dtype
        covering = torch.stack([covering_scale(part) for part in torch.split(self.weight, group_size, 1)], 1)
        self.first = first_scale(GROUP_HEADROOM * covering.amax(1, keepdim=True))
        self.second = torch.full_like(covering, SMALLEST_SCALE_SECOND)

    def choose_scales(self, rows: slice, group: int, target: Tensor, importance: Tensor) -> Tensor:
        values, first = target.contiguous(), self.first[rows, 0]

        def representable(scale: Tensor, chunk_rows: slice) -> Tensor:
            return second_scale(scale / first[chunk_rows], self.scale_dtype) * first[chunk_rows]

        scale = search_scales(values, importance, covering_scale(values), self.limits, INT4_SHARES, representable)
        self.second[rows, group] = scale / first
        return scale

    def stored_scales(self) -> tuple[Tensor, ...]:
        return self.first, self.second

    def round_to_nearest(self) -> Tensor:
        """Rounds every weight to the nearest multiple of the best scale of its group: int8 [N, K] in -8..7."""
        size = self.group_size
        parts = zip(torch.split(self.weight, size, 1), torch.split(self.importance, size), strict=True)
        for group, (columns, importance) in enumerate(parts):
            self.choose_scales(slice(None), group, columns, importance)
        return quantize_weight_per_group(self.weight, self.first, self.second)
