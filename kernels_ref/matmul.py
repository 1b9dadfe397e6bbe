"""The quantized matmuls of the Ascend: int8 x int8 or int4 -> int32, exact, and one float32 epilogue."""

import functools

import torch

from vlqc.kernels_ref.int4_groups import group_size_of
from vlqc.kernels_ref.quantize import ROWS_PER_CHUNK

INT32_MAX = 2**31 - 1
# A mean error is corrected in multiples of this many steps, so that `verify` can still detect any other change of
# quant_bias. Outputs are about ten thousand steps, so the remaining error is at least 60 dB below them.
CORRECTION_STEP = 8
LARGEST_PRODUCT = 128 * 128  # -128 * -128
LARGEST_K = INT32_MAX // LARGEST_PRODUCT  # 131071: no sum of that many products leaves int32
FLOAT32_EXACT_K = 2**24 // LARGEST_PRODUCT  # 1024: float32 represents sums of that many products exactly


def int8_matmul(xq: torch.Tensor, wq: torch.Tensor) -> torch.Tensor:
    """xq int8 [M, K], wq int8 [N, K] -> int32 [M, N] = xq @ wq.T, exact for every M, K, N.

    Uses `torch._int_mm` if `int_mm_is_fast_and_exact`, else float32, which is also exact but about 10 times slower.
    Raises ValueError if K is above LARGEST_K, where the sum could overflow int32, or if shapes or dtypes do not match.
    """
    if xq.dtype != torch.int8 or wq.dtype != torch.int8 or xq.dim() != 2 or wq.dim() != 2 or xq.shape[1] != wq.shape[1]:
        raise ValueError(f"expected int8 [M, K] and [N, K], got {_signature(xq)} and {_signature(wq)}")
    if xq.shape[1] > LARGEST_K:
        raise ValueError(f"K is {xq.shape[1]}: a sum of more than {LARGEST_K} int8 products may overflow int32")
    if 0 in (*xq.shape, *wq.shape):
        return torch.zeros(xq.shape[0], wq.shape[0], dtype=torch.int32, device=xq.device)
    if int_mm_is_fast_and_exact(xq.device.type):
        return _int8_matmul_by_int_mm(xq, wq)
    return _int8_matmul_by_float32(xq, wq)


@functools.cache
def int_mm_is_fast_and_exact(device_type: str) -> bool:
    """Whether `torch._int_mm` is fast and exact on a device type ("cpu", "cuda", ...); determined once per process.

    On a CPU without VNNI, oneDNN adds pairs of products in 16 bits, which saturate (PyTorch up to 2.5 returns those
    wrong sums, PyTorch issue 136746); later versions use a scalar loop 10 times slower than float32. Some devices do
    not support it at all. Therefore it is tried with the products that saturate.
    """
    if device_type == "cpu" and not getattr(torch.cpu, "_is_vnni_supported", lambda: False)():
        return False
    extremes = torch.tensor([127, -128], dtype=torch.int8, device="cpu").repeat_interleave(16)  # [32]
    trial = extremes[:, None].repeat(1, 64)  # [32, 64]
    expected = extremes[:, None].to(torch.int32) * extremes.to(torch.int32) * 64  # [32, 32]
    try:
        on_device = trial.to(device_type)
        with torch._C.DisableTorchFunction():  # tracing must not record the trial, which runs only once
            product = _int8_matmul_by_int_mm(on_device, on_device)
        return torch.equal(product.cpu(), expected)
    except RuntimeError:  # includes NotImplementedError: no kernel for this device
        return False


def quantized_bias(
    bias: torch.Tensor | None,
    deq_scale: torch.Tensor,
    input_offset: float,
    wq: torch.Tensor,
    mean_error: torch.Tensor | None = None,
) -> torch.Tensor:
    """bias float [N] or None, deq_scale float32 [N], wq int8 [N, K] -> int32 [N], the `quant_bias` of the engines.

    = round(bias / deq_scale - input_offset * sum_k wq), half to even: the layer's bias in steps of deq_scale, corrected
    for the input's offset. Computed in int64 and float64, so only that rounding is inexact.

    mean_error: float [N], mean excess of the quantized layer's outputs, which is subtracted in whole CORRECTION_STEPs,
    limited to the root sum of squares of the integers of each row.

    Raises ValueError, naming the channel, if it overflows int32 alone or together with the largest possible sum.
    """
    if not float(input_offset).is_integer():
        raise ValueError(f"the input offset must be integral, got {input_offset}")
    # On the CPU, as not every device has float64.
    chunks = torch.split(wq, ROWS_PER_CHUNK)
    row_sum = torch.cat([chunk.sum(dim=1, dtype=torch.int64) for chunk in chunks]).cpu()  # [N]
    row_absolute_sum = torch.cat([chunk.to(torch.int16).abs_().sum(dim=1, dtype=torch.int64) for chunk in chunks]).cpu()
    steps = -int(input_offset) * row_sum.to(torch.float64)  # [N]
    if bias is not None:
        steps += bias.cpu().to(torch.float64) / deq_scale.cpu().to(torch.float64)
    steps = steps.round_()
    if mean_error is not None:
        steps -= _correction(mean_error.cpu().to(torch.float64) / deq_scale.cpu().to(torch.float64), wq)
    fits = steps.abs() + 128 * row_absolute_sum <= INT32_MAX  # [N]; also False for NaN
    if not bool(fits.all()):
        channel = int((~fits).nonzero()[0])
        raise ValueError(
            f"quant_bias overflows int32 in {int((~fits).sum())} of {len(fits)} channels, first in channel {channel}: "
            f"{steps[channel].item():.6g} steps of deq_scale {deq_scale[channel].item():.6g}, with sums of up to "
            f"{128 * int(row_absolute_sum[channel])} to be added; use a larger weight scale"
        )
    return steps.to(torch.int32).to(wq.device)


def _correction(steps: torch.Tensor, wq: torch.Tensor) -> torch.Tensor:
    """Mean errors in steps of deq_scale, float64 [N] -> the corrections subtracted in quant_bias, float64 [N]."""
    largest = torch.linalg.vector_norm(wq.to(torch.float32), dim=1).cpu().to(torch.float64)  # [N]
    whole = (largest / CORRECTION_STEP).floor_()
    return CORRECTION_STEP * (steps / CORRECTION_STEP).round_().clamp_(-whole, whole)


def smallest_weight_scale_for_bias(bias: torch.Tensor, input_scale: float, in_features: int) -> torch.Tensor:
    """Smallest weight scales float32 [N, 1] with which `quantized_bias` of a bias float [N] cannot overflow.

    They matter for rows of (nearly) zero weights with a bias, whose absmax scale is too small, and for inputs that were
    (nearly) always zero. Raises ValueError if K is so large that there is no such scale.
    """
    largest_bias = INT32_MAX - 2 * LARGEST_PRODUCT * in_features  # without the sum and its offset correction
    if largest_bias <= 0:
        raise ValueError(f"K is {in_features}: sum and offset alone may overflow int32")
    # 1e-6 larger, as the products that follow are rounded to float32.
    return (bias.to(torch.float32).abs() * (1.000001 / input_scale / largest_bias))[:, None]  # [N, 1]


def static_quant_matmul(
    xq: torch.Tensor, wq: torch.Tensor, quant_bias: torch.Tensor, deq_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """xq int8 [M, K], wq int8 [N, K], quant_bias int32 [N], deq_scale float32 [N] -> dtype [M, N].

    = dtype((xq @ wq.T + quant_bias) * deq_scale): the sum in int32, the product in float32, one rounding to `dtype`.
    Source: quant_matmul of the Ascend, as MindIE and vLLM Ascend call it for W8A8.
    """
    accumulator = int8_matmul(xq, wq).add_(quant_bias)  # [M, N] int32
    return accumulator.to(torch.float32).mul_(deq_scale).to(dtype)  # [M, N]


def dynamic_quant_matmul(
    xq: torch.Tensor,
    scale_per_token: torch.Tensor,
    wq: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """xq int8 [M, K], its scales [M, 1], wq int8 [N, K], its scales [N, 1], bias float [N] or None -> dtype [M, N].

    = dtype((xq @ wq.T) * weight_scale * scale_per_token + bias): the sum in int32, the rest in float32 in this order,
    one rounding to `dtype`. `weight_scale` is read in `dtype`, as the engines do.
    Source: quant_matmul of the Ascend with per-token scales, as MindIE and vLLM Ascend call it for W8A8_DYNAMIC.
    """
    scale_per_channel = weight_scale.to(dtype).to(torch.float32).flatten()  # [N]
    y = int8_matmul(xq, wq).to(torch.float32).mul_(scale_per_channel).mul_(scale_per_token)  # [M, N]
    return (y if bias is None else y.add_(bias.to(torch.float32))).to(dtype)


def group_quant_matmul(
    xq: torch.Tensor,
    scale_per_token: torch.Tensor,
    q4: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_scale_second: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """xq int8 [M, K], its scales [M, 1], q4 int8 [N, K], its scales [N, 1] and [N, K/G], bias or None -> dtype [M, N].

    = dtype(sum_g (xq_g @ q4_g.T) * weight_scale_second_g * weight_scale * scale_per_token + bias): every group's sum
    in int32, the rest in float32 in this order, one rounding to `dtype`. Source: W4A8 of the Ascend, 4-bit weights and
    8-bit activations; vLLM Ascend runs `weight_only_group_matmul` in dense layers instead.
    """
    group_size = group_size_of(q4.shape[1], weight_scale_second.shape[1])
    y = torch.zeros(xq.shape[0], q4.shape[0], dtype=torch.float32, device=xq.device)  # [M, N]
    for group, scale_per_channel in enumerate(weight_scale_second.to(torch.float32).T):  # [N]
        columns = slice(group * group_size, (group + 1) * group_size)
        y += int8_matmul(xq[:, columns], q4[:, columns]).to(torch.float32).mul_(scale_per_channel)
    y.mul_(weight_scale.to(torch.float32).flatten()).mul_(scale_per_token)
    return (y if bias is None else y.add_(bias.to(torch.float32))).to(dtype)


def weight_only_group_matmul(
    x: torch.Tensor,
    q4: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_scale_second: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x float [M, K], q4 int8 [N, K], its scales [N, 1] and [N, K/G] -> dtype [M, N] = x @ W.T.

    W = q4 * (weight_scale * weight_scale_second), with scales, their product and W rounded to `dtype`; x is rounded to
    `dtype`, the sum is in float32. There is no bias. Source: dense W4A8_DYNAMIC layers of vLLM Ascend.
    """
    groups = weight_scale_second.shape[1]
    in_groups = q4.to(dtype).reshape(q4.shape[0], groups, group_size_of(q4.shape[1], groups))  # [N, K/G, G]
    scale_per_group = weight_scale.to(dtype) * weight_scale_second.to(dtype)  # [N, K/G]
    weight = (in_groups * scale_per_group[:, :, None]).reshape(q4.shape)  # [N, K]
    y: torch.Tensor = x.to(dtype).to(torch.float32) @ weight.to(torch.float32).T  # [M, N]
    return y.to(dtype)


def weight_only_matmul(
    x: torch.Tensor, wq: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """x float [M, K], wq int8 [N, K], its scales [N, 1], bias float [N] or None -> dtype [M, N] = x @ W.T + bias.

    W = wq * weight_scale, with the scale and W rounded to `dtype`, as is x; the sum and the bias in float32, one
    rounding to `dtype`. Source: npu_weight_quant_batchmatmul of the Ascend, as vLLM Ascend calls it for W8A16. For few
    tokens the operator may multiply the integers first, which rounds less.
    """
    weight = wq.to(dtype) * weight_scale.to(dtype)  # [N, K]
    y: torch.Tensor = x.to(dtype).to(torch.float32) @ weight.to(torch.float32).T  # [M, N]
    return (y if bias is None else y.add_(bias.to(torch.float32))).to(dtype)


def _int8_matmul_by_int_mm(xq: torch.Tensor, wq: torch.Tensor, smallest_rows: int | None = None) -> torch.Tensor:
    """Pads with zeros to supported shapes: K and N to multiples of 8, M to at least `smallest_rows`.

    CUDA rejects other shapes and 16 rows or fewer. The CPU accepts all, but for a single row or column it mixes up the
    strides and returns uninitialized memory (PyTorch 2.5 to 2.13, K = 1). Model layers only need padding of M.
    """
    if smallest_rows is None:
        smallest_rows = 2 if xq.device.type == "cpu" else 17
    rows, features = xq.shape[0], wq.shape[0]
    pad_k = -xq.shape[1] % 8
    padded_xq = _pad(xq, max(smallest_rows - rows, 0), pad_k)  # [>= M, K + pad]
    padded_wq = _pad(wq, -features % 8, pad_k)  # [N + pad, K + pad]
    return torch._int_mm(padded_xq, padded_wq.T)[:rows, :features].contiguous()


def _pad(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return torch.nn.functional.pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix.contiguous()


def _int8_matmul_by_float32(xq: torch.Tensor, wq: torch.Tensor) -> torch.Tensor:
    """Exact with any float32 matmul, including those that multiply in bfloat16 or TF32, which represent every int8."""
    accumulator = torch.zeros(xq.shape[0], wq.shape[0], dtype=torch.int32, device=xq.device)  # [M, N]
    for start in range(0, xq.shape[1], FLOAT32_EXACT_K):
        columns = slice(start, start + FLOAT32_EXACT_K)
        product = xq[:, columns].to(torch.float32) @ wq[:, columns].to(torch.float32).T  # [M, N]
        accumulator += product.to(torch.int32)
    return accumulator


def _signature(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
