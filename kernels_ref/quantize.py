"""Quantization to int8 and back: activations per tensor or per token, weights per output channel.

All rounding is half to even (`torch.round`), as in the operators of the Ascend. Inputs must be finite: the result for
NaN is undefined, as on the device.
"""

import math

import torch

INT8_MIN, INT8_MAX = -128, 127
INT8_STEPS = INT8_MAX - INT8_MIN
WEIGHT_INT8_MAX = 127  # symmetric: -128 is not used, so that a weight and its negative have the same error
SMALLEST_SCALE = 2.0**-23  # 1.1920929e-07, float32's epsilon: the floor that PyTorch's observers use
SMALLEST_SCALE_FLOAT16 = 2.0**-16 + 2.0**-24  # the smallest float16 with a finite reciprocal: operators use that
SMALLEST_TOKEN_SCALE = 2.0**-126  # the smallest normal float32: a token of zeros divides by it instead of by zero
ROWS_PER_CHUNK = 64  # float32 temporaries stay in the cache: 8 times faster than temporaries as large as the matrix

_SAME_SIZE_INTEGER = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def activation_scale_and_offset(minimum: float, maximum: float, dtype: torch.dtype) -> tuple[float, float]:
    """Observed range -> (scale, offset) of per-tensor asymmetric int8 that covers it and represents zero exactly.

    `scale` is a value of `dtype` (bfloat16, float16 or float32), rounded up so that the range stays covered: neither
    end is clipped by more than half a step. `offset` is an integer in -128..127, computed with the rounded scale; zero
    maps to it. Raises ValueError if the range is not finite, is reversed, or its scale exceeds `dtype`.
    Source: msModelSlim's min-max formula, offset = -128 - round(minimum / scale).
    """
    if not (math.isfinite(minimum) and math.isfinite(maximum)):
        raise ValueError(f"the range {minimum} .. {maximum} is not finite")
    if minimum > maximum:
        raise ValueError(f"the range {minimum} .. {maximum} is reversed")
    low, high = torch.tensor([[minimum], [maximum]], dtype=torch.float64, device="cpu")
    scale, offset = (float(value) for value in activation_scales_and_offsets(low, high, dtype))
    if math.isinf(scale):
        raise ValueError(f"the range {minimum} .. {maximum} is too wide: its scale exceeds {dtype}")
    return scale, offset


def activation_scales_and_offsets(
    minimum: torch.Tensor, maximum: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`activation_scale_and_offset` of R finite ranges: minimum, maximum float64 [R] -> scale, offset float64 [R].

    Scales that exceed `dtype` are infinite.
    """
    minimum, maximum = minimum.clamp(max=0.0), maximum.clamp(min=0.0)
    floor = SMALLEST_SCALE_FLOAT16 if dtype is torch.float16 else SMALLEST_SCALE
    scale = round_up(((maximum - minimum) / INT8_STEPS).clamp(min=floor), dtype).double()
    return scale, INT8_MIN - torch.round(minimum / scale)


def quantize_per_tensor(x: torch.Tensor, scale: float | torch.Tensor, offset: float | torch.Tensor) -> torch.Tensor:
    """x [...] float, scale and offset one value each -> int8 [...] = clamp(rint(x * (1/scale) + offset), -128, 127).

    `scale`, its reciprocal, the product and the sum have x's dtype, as on the device; hardware may use float16
    internally and differ by one step. Source: the npu_quantize operator as MindIE and vLLM Ascend call it.
    """
    scale = torch.as_tensor(scale, dtype=x.dtype, device=x.device)
    offset = torch.as_tensor(offset, dtype=x.dtype, device=x.device)
    return (x * scale.reciprocal()).add_(offset).round_().clamp_(INT8_MIN, INT8_MAX).to(torch.int8)


def dequantize_per_tensor(
    quantized: torch.Tensor, scale: float | torch.Tensor, offset: float | torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """int8 [...], scale and offset one value each -> dtype [...] = (quantized - offset) * scale in float32."""
    scale = torch.as_tensor(scale, dtype=torch.float32, device=quantized.device)
    offset = torch.as_tensor(offset, dtype=torch.float32, device=quantized.device)
    return (quantized.to(torch.float32) - offset).mul_(scale).to(dtype)


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] float -> (int8 [M, K] in -127..127, scale float32 [M, 1]): s = max|x| / 127, q = rint(x / s) per row.

    Computed in float32 for any dtype of x. A row of zeros gives zeros. Source: npu_dynamic_quant as MindIE and vLLM
    Ascend call it for W8A8_DYNAMIC.
    """
    x32 = x.to(torch.float32)  # [M, K]
    absmax = torch.linalg.vector_norm(x32, ord=math.inf, dim=1, keepdim=True)  # [M, 1]
    scale_per_token = (absmax / INT8_MAX).clamp_(min=SMALLEST_TOKEN_SCALE)  # [M, 1]
    return (x32 / scale_per_token).round_().to(torch.int8), scale_per_token


def quantize_weight_per_channel_absmax(
    weight: torch.Tensor,
    smallest_scale_per_channel: torch.Tensor | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K] float -> (int8 [N, K] in -127..127, scale float32 [N, 1] = absmax of the row / 127).

    The scale is a value of `scale_dtype`, and the integers are rounded by that value, as engines read the scale of a
    W8A8_DYNAMIC layer in the checkpoint's dtype. It is rounded up, so that no weight is clipped and none errs by more
    than half a step; this costs 0.02 dB in bfloat16.

    A scale is at least `smallest_scale_per_channel` [N, 1] (see `matmul.smallest_weight_scale_for_bias`) and at least
    SMALLEST_SCALE. The latter applies to rows of zeros: their bias is stored in steps of input scale * weight scale, so
    a small scale preserves it, while 1.0 would round it to zero.
    """
    rows, columns = weight.shape
    quantized = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)  # [N, K]
    scale = torch.full((rows, 1), SMALLEST_SCALE, dtype=torch.float32, device=weight.device)  # [N, 1]
    if smallest_scale_per_channel is not None:
        scale = torch.maximum(scale, smallest_scale_per_channel.to(scale))
    if columns == 0:
        return quantized, round_up(scale, scale_dtype).to(torch.float32)
    for start in range(0, rows, ROWS_PER_CHUNK):
        rows_here = slice(start, start + ROWS_PER_CHUNK)
        chunk = weight[rows_here].to(torch.float32)  # [64, K]
        absmax = torch.linalg.vector_norm(chunk, ord=math.inf, dim=1, keepdim=True)  # [64, 1]
        scale[rows_here] = round_up(torch.maximum(absmax / WEIGHT_INT8_MAX, scale[rows_here]), scale_dtype)
        quantized[rows_here] = quantize_weight_per_channel(chunk, scale[rows_here])
    return quantized, scale


def quantize_weight_per_channel(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """weight [N, K] float, scale float32 [N, 1] -> int8 [N, K] = clamp(rint(weight / scale), -127, 127)."""
    quantized = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)  # [N, K]
    for start in range(0, weight.shape[0], ROWS_PER_CHUNK):
        rows_here = slice(start, start + ROWS_PER_CHUNK)
        steps = weight[rows_here].to(torch.float32) / scale[rows_here]  # [64, K]
        quantized[rows_here] = steps.round_().clamp_(-WEIGHT_INT8_MAX, WEIGHT_INT8_MAX).to(torch.int8)
    return quantized


def round_up(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Positive float [...] -> dtype [...]: the smallest values of `dtype` that are not smaller, or infinity."""
    rounded = values.to(dtype)
    too_low = rounded.to(values.dtype) < values
    bits = rounded.view(_SAME_SIZE_INTEGER[dtype])  # the next larger positive float has the next bit pattern
    return (bits + too_low.to(bits.dtype)).view(dtype)
