"""kernels_ref.matmul against NumPy's int64, onnxruntime's MatMulInteger and Python's integers."""

import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tests.support.kernel_inputs import numpy_matmul
from vlqc.kernels_ref import matmul
from vlqc.kernels_ref.matmul import (
    LARGEST_K,
    int8_matmul,
    int_mm_is_fast_and_exact,
    quantized_bias,
    smallest_weight_scale_for_bias,
    static_quant_matmul,
)
from vlqc.kernels_ref.quantize import quantize_weight_per_channel_absmax

Matmul = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
ROUTES = [int8_matmul, matmul._int8_matmul_by_float32]  # the fast one where there is one, and what runs elsewhere


def random_int8(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(-128, 128, shape, dtype=np.int8))


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=60)
@given(
    rows=st.sampled_from([0, 1, 2, 15, 16, 17, 33]),
    columns=st.sampled_from([1, 3, 8, 31, 64, 1023, 1024, 1025, 2050]),
    features=st.sampled_from([1, 2, 7, 16, 33]),
    seed=st.integers(0, 2**32 - 1),
)
def test_int8_matmul_is_exact(route: Matmul, rows: int, columns: int, features: int, seed: int) -> None:
    """Catches shapes that the fast route refuses or pads wrongly, and a chunk of K that float32 cannot sum exactly."""
    xq, wq = random_int8(seed, rows, columns), random_int8(seed + 1, features, columns)
    product = route(xq, wq)
    assert product.dtype == torch.int32
    np.testing.assert_array_equal(product.numpy(), numpy_matmul(xq, wq))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("columns", [2, 301, 1024, 5000])
@pytest.mark.parametrize(("left", "right"), [(-128, -128), (127, 127), (-128, 127), (127, -128)])
def test_int8_matmul_of_extremes(route: Matmul, columns: int, left: int, right: int) -> None:
    """Catches products summed in 16 bits (CPUs without VNNI) and sums beyond the 24 bits of float32."""
    xq = torch.full((18, columns), left, dtype=torch.int8)
    wq = torch.full((5, columns), right, dtype=torch.int8)
    assert bool((route(xq, wq) == left * right * columns).all())


def test_int8_matmul_float32_chunk_is_as_long_as_it_may_be() -> None:
    """Catches a chunk of K so long that odd sums are lost: 1024 full products and one of 1 need all 25 bits."""
    xq = torch.full((1, 1025), -128, dtype=torch.int8)
    wq = xq.clone()
    xq[0, -1] = wq[0, -1] = 1
    assert matmul._int8_matmul_by_float32(xq, wq).item() == 1024 * 128 * 128 + 1


def test_int8_matmul_at_the_largest_k() -> None:
    """Catches int32 overflow in the largest sum that is allowed, and its absence being checked one too late."""
    longest = torch.full((1, LARGEST_K), -128, dtype=torch.int8)
    assert int8_matmul(longest, longest).item() == 128 * 128 * LARGEST_K
    too_long = torch.full((1, LARGEST_K + 1), -128, dtype=torch.int8)
    assert 128 * 128 * (LARGEST_K + 1) > 2**31 - 1
    with pytest.raises(ValueError, match="overflow int32"):
        int8_matmul(too_long, too_long)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_int8_matmul_without_elements(shape: tuple[int, int, int]) -> None:
    """Catches uninitialized memory for K = 0 and an error for no tokens (a text-only batch in a vision layer)."""
    rows, columns, features = shape
    product = int8_matmul(random_int8(0, rows, columns), random_int8(1, features, columns))
    assert product.shape == (rows, features) and product.dtype == torch.int32 and not product.any()


def test_int8_matmul_of_views() -> None:
    """Catches a route that ignores strides: transposed and sliced operands, single rows with odd strides."""
    for rows, features in [(30, 9), (1, 9), (1, 1), (2, 1)]:
        xq, wq = random_int8(0, 40, rows).T[::2], random_int8(1, 40, features).T
        np.testing.assert_array_equal(int8_matmul(xq, wq).numpy(), numpy_matmul(xq, wq))
        np.testing.assert_array_equal(int8_matmul(wq, xq).numpy(), numpy_matmul(wq, xq))


@pytest.mark.parametrize(
    ("xq", "wq"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int8)),
        (torch.zeros(2, 3, dtype=torch.int8), torch.zeros(3, 2, dtype=torch.int8)),
        (torch.zeros(1, 2, 3, dtype=torch.int8), torch.zeros(2, 3, dtype=torch.int8)),
    ],
)
def test_int8_matmul_refuses_what_does_not_fit(xq: torch.Tensor, wq: torch.Tensor) -> None:
    """Catches floats truncated to int8, or a [K, N] weight, getting past the door."""
    with pytest.raises(ValueError, match=r"expected int8 \[M, K\] and \[N, K\]"):
        int8_matmul(xq, wq)


def test_padding_for_other_devices_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches padding that changes the product or breaks CUDA's limits, which the stand-in for `_int_mm` checks."""

    def cuda_like(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        assert left.shape[0] > 16 and left.shape[1] % 8 == 0 and right.shape[1] % 8 == 0
        return torch.from_numpy((left.numpy().astype(np.int64) @ right.numpy().astype(np.int64)).astype(np.int32))

    monkeypatch.setattr(torch, "_int_mm", cuda_like)
    for rows, columns, features in [(1, 1, 1), (16, 8, 8), (17, 7, 9), (20, 16, 24), (3, 30, 5)]:
        xq, wq = random_int8(rows, rows, columns), random_int8(columns, features, columns)
        product = matmul._int8_matmul_by_int_mm(xq, wq, smallest_rows=17)
        assert product.shape == (rows, features)
        np.testing.assert_array_equal(product.numpy(), numpy_matmul(xq, wq))


@pytest.mark.parametrize("wrong", ["saturates", "missing"])
def test_a_wrong_or_missing_int_mm_is_not_used(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """Catches a trial that accepts 16-bit saturation, as PyTorch 2.5 has it on CPUs without VNNI, or that raises."""

    def saturating(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        pairs = torch.stack([(left[:, i : i + 2].int() + 128) @ right[i : i + 2].int() for i in range(0, 64, 2)])
        return pairs.clamp(-(2**15), 2**15 - 1).sum(0).int() - 128 * right.int().sum(0, dtype=torch.int32)

    def missing(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch, "_int_mm", saturating if wrong == "saturates" else missing)
    assert int_mm_is_fast_and_exact.__wrapped__("cpu") is False


def test_int_mm_is_not_used_on_a_cpu_without_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches PyTorch's scalar loop being chosen because it is exact: it is 10 times slower than float32."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert int_mm_is_fast_and_exact.__wrapped__("cpu") is False
    monkeypatch.delattr(torch.cpu, "_is_vnni_supported")  # a private name: a later PyTorch may drop it
    assert int_mm_is_fast_and_exact.__wrapped__("cpu") is False


def test_exact_where_onednn_has_no_vnni() -> None:
    """Catches trust in `torch._int_mm`: oneDNN held to AVX2 is how a CPU without VNNI behaves in PyTorch 2.5."""
    program = (
        "import torch; from vlqc.kernels_ref.matmul import int8_matmul\n"
        "xq = torch.full((20, 300), 127, dtype=torch.int8)\n"
        "print(int8_matmul(xq, xq).unique().tolist())"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == str([127 * 127 * 300]), result.stderr


def test_int8_matmul_agrees_with_onnxruntime() -> None:
    """Catches a transposed weight or another reading of the operands than ONNX's MatMulInteger."""
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    graph = helper.make_graph(
        [node],
        "matmul",
        [
            helper.make_tensor_value_info("x", TensorProto.UINT8, [None, 24]),
            helper.make_tensor_value_info("w", TensorProto.INT8, [24, 10]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [None, 10])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    xq, wq = random_int8(0, 19, 24), random_int8(1, 10, 24) // 2  # 7 bits: onnxruntime too saturates without VNNI
    unsigned = (xq.numpy().astype(np.int16) + 128).astype(np.uint8)
    (product,) = session.run(None, {"x": unsigned, "w": np.ascontiguousarray(wq.numpy().T)})
    expected = product - 128 * wq.numpy().astype(np.int32).sum(axis=1)
    np.testing.assert_array_equal(int8_matmul(xq, wq).numpy(), expected)


@given(seed=st.integers(0, 2**32 - 1), offset=st.integers(-128, 127), with_bias=st.booleans())
def test_quantized_bias_agrees_with_numpy(seed: int, offset: int, with_bias: bool) -> None:
    """Catches float32 in the division, a wrong sign of the correction, and the sum over the wrong axis."""
    random = np.random.default_rng(seed)
    wq = random_int8(seed, 6, 50)
    bias = random.normal(0, 3, 6).astype(np.float32)
    deq_scale = random.uniform(1e-7, 1e-4, 6).astype(np.float32)
    steps = bias.astype(np.float64) / deq_scale.astype(np.float64) if with_bias else np.zeros(6)
    expected = np.rint(steps - offset * wq.numpy().astype(np.int64).sum(axis=1)).astype(np.int64)
    ours = quantized_bias(torch.from_numpy(bias) if with_bias else None, torch.from_numpy(deq_scale), float(offset), wq)
    assert ours.dtype == torch.int32
    np.testing.assert_array_equal(ours.numpy(), expected)


def test_quantized_bias_rounds_half_to_even_after_the_correction() -> None:
    """Catches half away from zero, and rounding before the correction, which decides ties by the wrong parity."""
    wq = torch.ones(4, 1, dtype=torch.int8)
    bias = torch.tensor([0.5, 1.5, -0.5, -2.5], dtype=torch.bfloat16)
    assert quantized_bias(bias, torch.ones(4), 0.0, wq).tolist() == [0, 2, 0, -2]
    assert quantized_bias(bias, torch.ones(4), 1.0, wq).tolist() == [0, 0, -2, -4]


def test_quantized_bias_overflow_names_the_channel() -> None:
    """Catches a bias that wraps around in int32: the layer would answer with the wrong sign."""
    wq = torch.ones(3, 4, dtype=torch.int8)
    deq_scale = torch.tensor([1e-3, 1e-9, 1e-3])
    with pytest.raises(ValueError, match=r"quant_bias overflows int32 in 1 of 3 channels, first in channel 1"):
        quantized_bias(torch.tensor([1.0, -3.0, 1.0]), deq_scale, 0.0, wq)
    with pytest.raises(ValueError, match="integral"):
        quantized_bias(None, deq_scale, 0.5, wq)


def test_quantized_bias_leaves_room_for_the_sum() -> None:
    """Catches a bias that fits int32 by itself but wraps as soon as the sum is added to it."""
    wq = torch.tensor([[127, -3]], dtype=torch.int8)
    most = 2**31 - 1 - 128 * 130
    for bias in (most, -most):
        fits = quantized_bias(torch.tensor([bias], dtype=torch.float64), torch.ones(1), 0.0, wq)
        assert fits.tolist() == [bias]
        xq = torch.tensor([[127, -128] if bias > 0 else [-128, 127]], dtype=torch.int8)
        exact = int(numpy_matmul(xq, wq)[0, 0]) + bias
        assert static_quant_matmul(xq, wq, fits, torch.ones(1), torch.float32).item() == np.float32(exact)
        with pytest.raises(ValueError, match="overflows int32"):
            quantized_bias(torch.tensor([bias + np.sign(bias)], dtype=torch.float64), torch.ones(1), 0.0, wq)


@given(
    bias=st.floats(-1e6, 1e6, width=32),
    input_scale=st.floats(1.1920929e-07, 100),
    offset=st.sampled_from([-128, 0, 127]),
)
def test_smallest_weight_scale_keeps_the_bias_in_int32(bias: float, input_scale: float, offset: int) -> None:
    """Catches dead channels with a bias stopping a compile: with the smallest scale it fits, to 1e-8 of itself."""
    biases = torch.tensor([bias, bias, 0.0])
    weight = torch.tensor([[0.0] * 40, [1e-9] * 40, [0.0] * 40])
    smallest = smallest_weight_scale_for_bias(biases, input_scale, 40)
    assert smallest.shape == (3, 1) and smallest.dtype == torch.float32
    wq, weight_scale = quantize_weight_per_channel_absmax(weight, smallest)
    deq_scale = (torch.tensor([input_scale]) * weight_scale).flatten()
    quant_bias = quantized_bias(biases, deq_scale, float(offset), wq)
    restored = (quant_bias[0].double() * deq_scale[0].double()).item()
    assert abs(restored - bias) <= max(abs(bias) * 1e-8, deq_scale[0].item())


def test_smallest_weight_scale_bounds_the_worst_layer() -> None:
    """Catches a bound that ignores the sum or the correction of the offset, with all weights at their limits."""
    columns = 40_000
    bias = torch.tensor([5.0])
    scale = smallest_weight_scale_for_bias(bias, 0.01, columns)
    wq = torch.full((1, columns), 127, dtype=torch.int8)
    deq_scale = (torch.tensor([0.01]) * scale).flatten()
    quant_bias = quantized_bias(bias, deq_scale, -128.0, wq)
    assert abs(quant_bias.item()) + 128 * 127 * columns <= 2**31 - 1
    with pytest.raises(ValueError, match="overflow int32"):
        smallest_weight_scale_for_bias(bias, 0.01, LARGEST_K)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_static_quant_matmul_agrees_with_numpy(dtype: torch.dtype) -> None:
    """Catches a bias added after scaling or in float32, and an epilogue that rounds more than once."""
    xq, wq = random_int8(0, 21, 70), random_int8(1, 12, 70)
    quant_bias = np.random.default_rng(2).integers(-(10**8), 10**8, 12, dtype=np.int32)
    deq_scale = np.random.default_rng(3).uniform(1e-6, 1e-5, 12).astype(np.float32)
    expected = (numpy_matmul(xq, wq) + quant_bias).astype(np.float32) * deq_scale
    ours = static_quant_matmul(xq, wq, torch.from_numpy(quant_bias), torch.from_numpy(deq_scale), dtype)
    assert ours.dtype == dtype
    assert torch.equal(ours, torch.from_numpy(expected).to(dtype))


def test_static_quant_matmul_adds_in_int32() -> None:
    """Catches the bias added in float32: 2**24 + 1 - 2**24 would be 0 instead of 1."""
    xq, wq = torch.tensor([[1]], dtype=torch.int8), torch.tensor([[1]], dtype=torch.int8)
    far = torch.full((1, 1024), -128, dtype=torch.int8)
    far_and_one = (torch.cat([far, xq], dim=1), torch.cat([far, wq], dim=1))
    quant_bias = torch.tensor([-(2**24)], dtype=torch.int32)
    assert static_quant_matmul(*far_and_one, quant_bias, torch.ones(1), torch.float32).item() == 1.0
