"""4-bit weights: two-level scales per group of columns, packing of two rows per byte, and the engines' scale_bias.

W = q4 * weight_scale * weight_scale_second: one factor per row [N, 1], one per row and group [N, K/G].
"""

import math

import torch

from vlqc.kernels_ref.quantize import ROWS_PER_CHUNK, SMALLEST_SCALE, round_up

INT4_MIN, INT4_MAX = -8, 7
LARGEST_SCALE_SECOND = 17  # 7 * 17 = 119 is the most that an int8 holds of q4 * second scale, as msModelSlim has it
SMALLEST_SCALE_SECOND = 2.0**-14  # float16's smallest normal number; the scale of a group of zeros
SCALE_BIAS_PARTS = 16  # row-parallel layers are split along K over up to 16 devices
_EXPONENT_BITS = 0x7F800000  # of a float32


def group_size_of(columns: int, groups: int) -> int:
    """Number of columns K and of groups K/G -> G. Raises ValueError if the groups are not of equal size."""
    if groups < 1 or columns % groups or columns == 0:
        raise ValueError(f"{columns} columns cannot be {groups} groups of the same size")
    return columns // groups


def int4_fault(q4: torch.Tensor) -> str:
    """Describes why integers [...] are not 4-bit values; empty if they are, or if the tensor has no data."""
    if q4.numel() == 0 or q4.is_meta:
        return ""
    smallest, largest = int(q4.min()), int(q4.max())
    return "" if smallest >= INT4_MIN and largest <= INT4_MAX else f"{smallest}..{largest} is not within -8..7"


def quantize_weight_per_group_absmax(
    weight: torch.Tensor, group_size: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """weight [N, K] float -> (int8 [N, K] in -8..7, weight_scale float32 [N, 1], weight_scale_second float32 [N, K/G]).

    Both scales are values of `scale_dtype`, and the integers are rounded by their product. Each group gets the smallest
    scale with which no weight errs by more than half a step: 7.5 steps reach its largest weight, 8.5 its smallest.
    `weight_scale` is a power of two, so the product is a value of `scale_dtype` as well (except for subnormals), and
    engines compute the same weight whether or not they round the product. `weight_scale_second` is not an integer and
    at most 17, the range of msModelSlim, so the range of a row does not affect the resolution of its small groups.
    Raises ValueError if the group size does not divide K.
    """
    rows, columns = weight.shape
    if group_size < 1 or columns % group_size or columns == 0:
        raise ValueError(f"{columns} columns cannot be groups of {group_size}")
    groups, device = columns // group_size, weight.device
    q4 = torch.empty(rows, columns, dtype=torch.int8, device=device)  # [N, K]
    weight_scale = torch.empty(rows, 1, dtype=torch.float32, device=device)  # [N, 1]
    weight_scale_second = torch.empty(rows, groups, dtype=torch.float32, device=device)  # [N, K/G]
    for start in range(0, rows, ROWS_PER_CHUNK):
        rows_here = slice(start, start + ROWS_PER_CHUNK)
        chunk = weight[rows_here].to(torch.float32).reshape(-1, groups, group_size)  # [64, K/G, G]
        step = covering_scale(chunk)  # [64, K/G]
        first = first_scale(step.amax(dim=1, keepdim=True))  # [64, 1]
        second = second_scale(step / first, scale_dtype)  # [64, K/G]
        q4[rows_here] = quantize_weight_per_group(chunk.flatten(1), first, second)
        weight_scale[rows_here], weight_scale_second[rows_here] = first, second
    return q4, weight_scale, weight_scale_second


def quantize_weight_per_group(
    weight: torch.Tensor, weight_scale: torch.Tensor, weight_scale_second: torch.Tensor
) -> torch.Tensor:
    """weight [N, K] float, its scales float32 [N, 1] and [N, K/G] -> int8 [N, K], rint of the quotient, -8..7."""
    q4 = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)  # [N, K]
    groups = weight_scale_second.shape[1]
    for start in range(0, weight.shape[0], ROWS_PER_CHUNK):
        rows_here = slice(start, start + ROWS_PER_CHUNK)
        chunk = weight[rows_here].to(torch.float32).reshape(-1, groups, weight.shape[1] // groups)  # [64, K/G, G]
        steps = chunk / (weight_scale[rows_here] * weight_scale_second[rows_here])[:, :, None]
        q4[rows_here] = steps.round_().clamp_(INT4_MIN, INT4_MAX).to(torch.int8).flatten(1)
    return q4


def covering_scale(group: torch.Tensor) -> torch.Tensor:
    """Groups float32 [..., G] -> [...]: the smallest scale with which no weight errs by more than half a step."""
    return torch.maximum(group.amax(dim=-1) / (INT4_MAX + 0.5), group.amin(dim=-1) / (INT4_MIN - 0.5))


def first_scale(largest_step: torch.Tensor) -> torch.Tensor:
    """The largest step of each row, float32 [N, 1] -> its `weight_scale`: a power of two, also for rows of zeros."""
    return _power_of_two_above(largest_step / LARGEST_SCALE_SECOND)


def second_scale(relative_step: torch.Tensor, scale_dtype: torch.dtype) -> torch.Tensor:
    """Scales in units of the first scale, float32 [...] -> `weight_scale_second`, float32 [...].

    Rounded up to a value of `scale_dtype`, at least SMALLEST_SCALE_SECOND and at most LARGEST_SCALE_SECOND.
    """
    bounded = relative_step.clamp(SMALLEST_SCALE_SECOND, LARGEST_SCALE_SECOND)
    return round_up(bounded, scale_dtype).to(torch.float32)


def pack_int4(q4: torch.Tensor) -> torch.Tensor:
    """int8 [N, K] in -8..7 -> int8 [N/2, K], two's complement: row 2i in the low nibble, row 2i + 1 in the high one.

    Raises ValueError if N is odd or a value is out of range. Source: the packed W4A8_DYNAMIC weights of vLLM Ascend.
    """
    if q4.dtype != torch.int8 or q4.shape[0] % 2:
        raise ValueError(f"expected int8 with an even number of rows, got {q4.dtype} {list(q4.shape)}")
    if fault := int4_fault(q4):
        raise ValueError(fault)
    return q4[0::2] & 0xF | q4[1::2] << 4


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_int4`: int8 [N/2, K] -> int8 [N, K] in -8..7. Raises ValueError for another dtype."""
    if packed.dtype != torch.int8:
        raise ValueError(f"packed weights are int8, got {packed.dtype}")
    low, high = ((packed & 0xF) ^ 8) - 8, packed >> 4  # both sign-extended; >> does so by itself
    return torch.stack((low, high), dim=1).flatten(0, 1)  # [N/2, 2, K] -> [N, K]


def scale_bias(
    q4: torch.Tensor, weight_scale: torch.Tensor, weight_scale_second: torch.Tensor, row_parallel: bool
) -> torch.Tensor:
    """q4 int8 [N, K], its scales [N, 1] and [N, K/G] -> float32 [N, 1], or [N, 16] for a row-parallel layer.

    8 * the sum of a row's weights, or of each sixteenth of the row. The hardware multiplies 4 bits by 4 bits: it splits
    an activation into two halves and subtracts 8 from the lower one, 0..15, for which this term compensates. A layer
    that is split along K needs the term per part. Summed in float64. Raises ValueError if 16 does not divide K.
    Source: the packed W4A8_DYNAMIC weights of vLLM Ascend.
    """
    rows, columns = q4.shape
    parts = SCALE_BIAS_PARTS if row_parallel else 1
    if columns % parts:
        raise ValueError(f"{columns} columns cannot be cut into {parts} parts")
    group_size = group_size_of(columns, weight_scale_second.shape[1])
    segment = math.gcd(group_size, columns // parts)  # columns with the same group and the same part
    segments = columns // segment
    # On the CPU, as not every device has float64.
    sums = q4.reshape(rows, segments, segment).sum(dim=2, dtype=torch.int32).cpu()  # [N, segments]
    scale = weight_scale.cpu().to(torch.float64) * weight_scale_second.cpu().to(torch.float64)  # [N, K/G]
    values = sums * scale.repeat_interleave(group_size // segment, dim=1)  # [N, segments]
    per_part = values.reshape(rows, parts, segments // parts).sum(dim=2)  # [N, 1] or [N, 16]
    return (8 * per_part).to(torch.float32).to(q4.device)


def _power_of_two_above(values: torch.Tensor) -> torch.Tensor:
    """Non-negative float32 [...] -> float32 [...]: powers of two above the values, by at most a factor of two.

    The result is at least SMALLEST_SCALE, a power of two, as rows of zeros need a scale as well.
    """
    doubled = (2 * values).clamp_(min=SMALLEST_SCALE)
    return (doubled.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
