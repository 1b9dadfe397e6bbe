"""kernels_ref.quantize against NumPy, onnxruntime's QuantizeLinear and hand-computed ties."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from vlqc.kernels_ref.quantize import (
    SMALLEST_SCALE,
    SMALLEST_SCALE_FLOAT16,
    SMALLEST_TOKEN_SCALE,
    activation_scale_and_offset,
    dequantize_per_tensor,
    quantize_per_tensor,
    quantize_per_token,
    quantize_weight_per_channel_absmax,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ends = st.floats(-1e4, 1e4, allow_nan=False, width=32)


def onnx_quantize(x: NDArray[np.float32], scale: float, offset: int) -> NDArray[np.int8]:
    """onnxruntime's QuantizeLinear: saturate(round_half_even(x / scale) + offset)."""
    node = helper.make_node("QuantizeLinear", ["x", "scale", "offset"], ["y"])
    graph = helper.make_graph(
        [node],
        "quantize",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
        [helper.make_tensor_value_info("y", TensorProto.INT8, [None])],
        [
            helper.make_tensor("scale", TensorProto.FLOAT, [], [scale]),
            helper.make_tensor("offset", TensorProto.INT8, [], [offset]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: NDArray[np.int8] = session.run(None, {"x": x})[0]
    return result


def next_below(value: float, dtype: torch.dtype) -> float:
    """The number of `dtype` just below the positive `value`, by its bit pattern."""
    integer = torch.int32 if dtype is torch.float32 else torch.int16
    return (torch.tensor(value, dtype=dtype).view(integer) - 1).view(dtype).item()


def test_scale_and_offset_of_known_ranges() -> None:
    """Catches a wrong divisor, sign or origin of the offset, and a range that forgets to include zero."""
    assert activation_scale_and_offset(-128.0, 127.0, torch.float32) == (1.0, 0.0)
    assert activation_scale_and_offset(0.0, 255.0, torch.float32) == (1.0, -128.0)
    assert activation_scale_and_offset(-255.0, 0.0, torch.float32) == (1.0, 127.0)
    assert activation_scale_and_offset(100.0, 510.0, torch.bfloat16) == (2.0, -128.0)
    assert activation_scale_and_offset(-510.0, -3.0, torch.float16) == (2.0, 127.0)


def test_scale_and_offset_use_the_rounded_scale() -> None:
    """Catches an offset derived from the scale before it was rounded to the dtype: here the two differ by one."""
    scale, offset = activation_scale_and_offset(-200.0, 56.3, torch.bfloat16)  # 256.3/255 = 1.0051; bfloat16: 1.0078125
    assert scale == 1.0078125
    assert offset == 70.0  # -128 + round(198.45); the unrounded scale gives round(198.99) = 199


@pytest.mark.parametrize("dtype", DTYPES)
@given(first=ends, second=ends)
def test_range_is_covered_and_zero_is_exact(dtype: torch.dtype, first: float, second: float) -> None:
    """Catches a scale rounded down, an offset out of int8, clipping of an end, and a zero that is not exact."""
    minimum, maximum = min(first, second), max(first, second)
    scale, offset = activation_scale_and_offset(minimum, maximum, dtype)
    assert torch.tensor(scale, dtype=torch.float64).to(dtype).item() == scale  # a value of dtype
    assert offset == int(offset) and -128 <= offset <= 127
    low, high = (-128 - offset) * scale, (127 - offset) * scale
    assert low <= 0 <= high
    assert low - scale / 2 <= min(minimum, 0) * (1 - 1e-12) and max(maximum, 0) * (1 - 1e-12) <= high + scale / 2
    assert quantize_per_tensor(torch.zeros(3, dtype=dtype), scale, offset).tolist() == [int(offset)] * 3
    assert dequantize_per_tensor(torch.tensor([int(offset)], dtype=torch.int8), scale, offset, dtype).tolist() == [0.0]


@pytest.mark.parametrize("dtype", DTYPES)
@given(first=ends, second=ends)
def test_scale_is_the_smallest_that_covers(dtype: torch.dtype, first: float, second: float) -> None:
    """Catches a scale rounded up by more than one unit: the next smaller one must not cover the range."""
    minimum, maximum = min(first, second, 0.0), max(first, second, 0.0)
    scale, _ = activation_scale_and_offset(minimum, maximum, dtype)
    assume(scale > SMALLEST_SCALE_FLOAT16)
    assert scale >= (maximum - minimum) / 255
    assert next_below(scale, dtype) < (maximum - minimum) / 255


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_range_still_quantizes_zero(dtype: torch.dtype) -> None:
    """Catches a scale of zero, or one whose reciprocal is infinite in the dtype: zero would become NaN."""
    scale, offset = activation_scale_and_offset(0.0, 0.0, dtype)
    assert scale == (SMALLEST_SCALE_FLOAT16 if dtype is torch.float16 else SMALLEST_SCALE)
    assert quantize_per_tensor(torch.zeros(2, dtype=dtype), scale, offset).tolist() == [-128, -128]
    assert torch.tensor(scale, dtype=dtype).reciprocal().isfinite()


def test_float16_floor_is_tight() -> None:
    """Catches a floor for float16 that is larger than needed: the next smaller scale has an infinite reciprocal."""
    below = next_below(SMALLEST_SCALE_FLOAT16, torch.float16)
    assert torch.tensor(below, dtype=torch.float16).reciprocal().isinf()


@pytest.mark.parametrize(
    ("minimum", "maximum", "dtype", "word"),
    [
        (float("nan"), 1.0, torch.float32, "not finite"),
        (0.0, float("inf"), torch.float32, "not finite"),
        (2.0, 1.0, torch.float32, "reversed"),
        (-1e7, 1e7, torch.float16, "too wide"),
    ],
)
def test_unusable_range_is_refused(minimum: float, maximum: float, dtype: torch.dtype, word: str) -> None:
    """Catches statistics of a broken run turning silently into a scale of NaN or infinity."""
    with pytest.raises(ValueError, match=word):
        activation_scale_and_offset(minimum, maximum, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_round_to_even_and_ends_saturate(dtype: torch.dtype) -> None:
    """Catches rounding half up or away from zero, an offset added after rounding, and a clamp that is off by one."""
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], dtype=dtype)
    assert quantize_per_tensor(x, 1.0, 0.0).tolist() == [-2, -2, 0, 0, 2, 2]
    assert quantize_per_tensor(x, 1.0, 3.0).tolist() == [0, 2, 2, 4, 4, 6]  # the ties of x + 3
    ends = torch.tensor([-1000.0, -129.0, -128.5, -128.0, 126.5, 127.0, 127.5, 128.0, 1000.0], dtype=torch.float32)
    assert quantize_per_tensor(ends, 1.0, 0.0).tolist() == [-128, -128, -128, -128, 126, 127, 127, 127, 127]


def test_quantize_multiplies_by_the_reciprocal_in_the_input_dtype() -> None:
    """Catches a division by the scale, or a reciprocal in float32: the last value tells them apart."""
    x = torch.tensor([129.0], dtype=torch.bfloat16)
    assert quantize_per_tensor(x, 3.0, -7.0).tolist() == [36]  # 43.08 -> 43 -> 36
    assert quantize_per_tensor(torch.tensor([252.0], dtype=torch.bfloat16), 3.0, 0.0).tolist() == [84]
    # 1/2.984375 is 0.3359375 in bfloat16; 254 times that is 85.33, in bfloat16 85.5 -> 86. Divided: 85.11 -> 85.
    assert quantize_per_tensor(torch.tensor([254.0], dtype=torch.bfloat16), 2.984375, 0.0).tolist() == [86]


@given(
    values=st.lists(st.integers(-600, 600), min_size=1, max_size=40),
    exponent=st.integers(-8, 3),
    offset=st.integers(-64, 63).map(lambda half: 2 * half),
)
def test_quantize_agrees_with_onnxruntime(values: list[int], exponent: int, offset: int) -> None:
    """Catches any difference in rounding or saturation; half-integral steps make ties common."""
    scale = 2.0**exponent  # its reciprocal is exact; ONNX rounds before adding the offset, the same for even offsets
    x = np.array(values, dtype=np.float32) / 2 * np.float32(scale)
    ours = quantize_per_tensor(torch.from_numpy(x), scale, float(offset))
    np.testing.assert_array_equal(ours.numpy(), onnx_quantize(x.astype(np.float32), scale, offset))


@given(st.integers(0, 2**32 - 1), st.integers(-128, 127), st.floats(1e-3, 10.0))
def test_quantize_agrees_with_numpy(seed: int, offset: int, scale: float) -> None:
    """Catches another order of operations than rint(x * (1/s) + o) in float32."""
    x = np.random.default_rng(seed).normal(0, 60, 64).astype(np.float32) * np.float32(scale)
    expected = np.clip(np.rint(x * (np.float32(1) / np.float32(scale)) + np.float32(offset)), -128, 127).astype(np.int8)
    np.testing.assert_array_equal(quantize_per_tensor(torch.from_numpy(x), scale, offset).numpy(), expected)


@given(st.integers(0, 2**32 - 1), st.floats(-50, 0), st.floats(0, 50))
def test_round_trip_is_within_half_a_step(seed: int, minimum: float, maximum: float) -> None:
    """Catches a dequantization that does not undo the quantization: sign of the offset, or its place."""
    scale, offset = activation_scale_and_offset(minimum, maximum, torch.float32)
    x = torch.from_numpy(np.random.default_rng(seed).uniform(minimum, maximum, 50))
    back = dequantize_per_tensor(quantize_per_tensor(x, scale, offset), scale, offset, torch.float64)
    assert (back - x).abs().max().item() <= scale * 0.5001


def test_dequantize_takes_stored_tensors() -> None:
    """Catches an offset added in int8, which would overflow, and a result of the wrong dtype."""
    y = dequantize_per_tensor(
        torch.tensor([[-128, 127]], dtype=torch.int8), torch.tensor([0.5]), torch.tensor([127.0]), torch.bfloat16
    )
    assert y.dtype == torch.bfloat16 and y.tolist() == [[-127.5, 0.0]]


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 130])
def test_weight_agrees_with_numpy(rows: int) -> None:
    """Catches rows lost or doubled at the edge of a chunk, a scale over the wrong axis, and a wrong divisor."""
    weight = np.random.default_rng(rows).normal(0, 0.05, (rows, 33)).astype(np.float32)
    scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
    expected = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
    quantized, our_scale = quantize_weight_per_channel_absmax(torch.from_numpy(weight))
    assert quantized.dtype == torch.int8 and our_scale.dtype == torch.float32
    np.testing.assert_array_equal(our_scale.numpy(), scale)
    np.testing.assert_array_equal(quantized.numpy(), expected)
    assert (quantized.abs().amax(dim=1) == 127).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_ties_and_both_ends(dtype: torch.dtype) -> None:
    """Catches rounding half away from zero, and -128 for the most negative weight."""
    weight = torch.tensor([[-127.0, 0.5, 1.5, -2.5, 126.5], [127.0, -0.5, -1.5, 2.5, -126.5]], dtype=dtype)
    weight[:, 4] = torch.tensor([3.5, -3.5], dtype=dtype)
    quantized, scale = quantize_weight_per_channel_absmax(weight)
    assert scale.tolist() == [[1.0], [1.0]]
    assert quantized.tolist() == [[-127, 0, 2, -2, 4], [127, 0, -2, 2, -4]]


def test_weight_rows_of_zeros_and_smallest_scales() -> None:
    """Catches a division by zero in a pruned channel, and a smallest scale that is ignored or leaks to other rows."""
    weight = torch.tensor([[0.0, 0.0], [1.27, -0.5], [1e-12, 0.0], [1.27, 0.01]])
    quantized, scale = quantize_weight_per_channel_absmax(weight)
    assert scale.flatten()[[0, 2]].tolist() == [SMALLEST_SCALE] * 2
    assert quantized.tolist() == [[0, 0], [127, -50], [0, 0], [127, 1]]
    smallest = torch.tensor([[0.5], [0.001], [0.0], [0.1]])
    quantized, scale = quantize_weight_per_channel_absmax(weight, smallest)
    torch.testing.assert_close(scale, torch.tensor([[0.5], [0.01], [SMALLEST_SCALE], [0.1]]), rtol=1e-6, atol=0)
    assert quantized.tolist() == [[0, 0], [127, -50], [0, 0], [13, 0]]
    assert smallest.tolist() == torch.tensor([[0.5], [0.001], [0.0], [0.1]]).tolist()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_weight_without_elements(shape: tuple[int, int]) -> None:
    """Catches a maximum over nothing."""
    quantized, scale = quantize_weight_per_channel_absmax(torch.zeros(shape))
    assert quantized.shape == shape and scale.shape == (shape[0], 1)


# ---- a weight scale in the checkpoint's dtype ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-26, 3))
def test_weight_scale_is_the_smallest_of_the_dtype(dtype: torch.dtype, seed: int, exponent: int) -> None:
    """Catches a scale rounded down, which clips, by more than one unit, or to what float16 cannot hold."""
    weight = torch.from_numpy(np.random.default_rng(seed).normal(0, 2.0**exponent, (5, 12)).astype(np.float32))
    quantized, scale = quantize_weight_per_channel_absmax(weight, scale_dtype=dtype)
    assert scale.dtype == torch.float32 and torch.equal(scale.to(dtype).float(), scale)
    absmax, steps = weight.double().abs().amax(dim=1, keepdim=True), scale.double()
    assert (steps >= absmax / 127 * (1 - 1e-7)).all()
    for step, largest in zip(steps.flatten().tolist(), absmax.flatten().tolist(), strict=True):
        assert step == SMALLEST_SCALE or next_below(step, dtype) < largest / 127 * (1 + 1e-7)
    assert ((quantized.double() * steps - weight.double()).abs() <= steps * 0.50001).all()


def test_weight_is_rounded_by_the_rounded_scale() -> None:
    """Catches integers from the scale before it was rounded: 1.001 becomes 1.0078125, and 100 is 99 of these."""
    weight = torch.tensor([[127.127, 100.0, -127.127]])
    quantized, scale = quantize_weight_per_channel_absmax(weight, scale_dtype=torch.bfloat16)
    assert scale.item() == 1.0078125 and quantized.tolist() == [[126, 99, -126]]
    quantized, _ = quantize_weight_per_channel_absmax(weight)
    assert quantized.tolist() == [[127, 100, -127]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_weight_scale_keeps_its_floors(dtype: torch.dtype) -> None:
    """Catches a scale of zero for a dead row in float16, a smallest scale undercut by the rounding, a lost dtype."""
    smallest = torch.tensor([[0.3], [0.0], [0.001]])
    weight = torch.tensor([[0.1, 0.0], [0.0, 0.0], [127.0, 1.0]])
    quantized, scale = quantize_weight_per_channel_absmax(weight, smallest, dtype)
    assert (scale >= smallest).all() and scale[0] < 0.3 * (1 + torch.finfo(dtype).eps)
    assert scale[1:].tolist() == [[SMALLEST_SCALE], [1.0]] and quantized.tolist() == [[0, 0], [0, 0], [127, 1]]
    _, without_columns = quantize_weight_per_channel_absmax(torch.zeros(3, 0), smallest, dtype)
    assert without_columns[0].item() == scale[0].item()


# ---- activations per token -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_agree_with_numpy(dtype: torch.dtype) -> None:
    """Catches one scale for all tokens, a dropped bias, a misplaced scale, and outputs of the wrong dtype."""
    x = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (40, 33)).astype(np.float32)).to(dtype)
    x *= torch.logspace(-3, 2, 40)[:, None].to(dtype)
    before = x.clone()
    as_float32 = x.float().numpy()
    scale = np.abs(as_float32).max(axis=1, keepdims=True) / np.float32(127)
    quantized, our_scale = quantize_per_token(x)
    assert quantized.dtype == torch.int8 and our_scale.dtype == torch.float32
    np.testing.assert_array_equal(our_scale.numpy(), scale)
    np.testing.assert_array_equal(quantized.numpy(), np.rint(as_float32 / scale).astype(np.int8))
    assert (quantized.abs().amax(dim=1) == 127).all() and torch.equal(x, before)


def test_token_ties_round_to_even() -> None:
    """Catches rounding half up or away from zero, a product with 1/s, and a scale of absmax / 128 or / 127.5."""
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5], [2.5, -127.0, -0.5, -1.5], [889.0, 45.5, 3.5, -10.5]])
    quantized, scale = quantize_per_token(x)
    assert scale.tolist() == [[1.0], [1.0], [7.0]]
    assert quantized.tolist() == [[127, 0, 2, -2], [2, -127, 0, -2], [127, 6, 0, -2]]  # 45.5 * (1 / 7) is above 6.5


def test_token_of_zeros() -> None:
    """Catches NaN in padding or in a token that a dead layer made, and its neighbors getting its scale."""
    quantized, scale = quantize_per_token(torch.tensor([[0.0, 0.0], [-127.0, 64.0], [-0.0, 0.0]]))
    assert quantized.tolist() == [[0, 0], [-127, 64], [0, 0]]
    assert scale.tolist() == [[SMALLEST_TOKEN_SCALE], [1.0], [SMALLEST_TOKEN_SCALE]]
    assert quantize_per_token(torch.zeros(0, 4))[0].shape == (0, 4)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=12))
def test_token_is_within_half_a_step(values: list[float]) -> None:
    """Catches an int8 that wraps where absmax / 127 is subnormal, and overflow near the end of float32."""
    x = torch.tensor([values], dtype=torch.float32)
    quantized, scale = quantize_per_token(x)
    assert quantized.abs().max() <= 127
    assert ((quantized.double() * scale.double() - x.double()).abs() <= scale.double() * 0.50001).all()
