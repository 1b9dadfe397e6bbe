"""The matmuls with per-token activations or per-group weights against NumPy's int64 and onnxruntime's MatMulInteger."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tests.support.kernel_inputs import numpy_matmul
from vlqc.kernels_ref.matmul import (
    dynamic_quant_matmul,
    group_quant_matmul,
    weight_only_group_matmul,
    weight_only_matmul,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def integers(seed: int, low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(low, high, shape, dtype=np.int8))


def uniform(seed: int, low: float, high: float, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32))


def onnx_matmul(xq: torch.Tensor, wq: torch.Tensor) -> NDArray[np.int32]:
    """onnxruntime's MatMulInteger of int8 [M, K] and [N, K]; the activations are moved by 128 and back."""
    node = helper.make_node("MatMulInteger", ["x", "w", "zero"], ["y"])
    graph = helper.make_graph(
        [node],
        "matmul",
        [
            helper.make_tensor_value_info("x", TensorProto.UINT8, [None, None]),
            helper.make_tensor_value_info("w", TensorProto.INT8, [None, None]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [None, None])],
        [helper.make_tensor("zero", TensorProto.UINT8, [], [128])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    unsigned = (xq.numpy().astype(np.int16) + 128).astype(np.uint8)
    product: NDArray[np.int32] = session.run(None, {"x": unsigned, "w": np.ascontiguousarray(wq.numpy().T)})[0]
    return product


# ---- W8A8_DYNAMIC ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dynamic_agrees_with_numpy(dtype: torch.dtype, with_bias: bool) -> None:
    """Catches scales on the wrong axis, a bias scaled or in int32, another order, and more roundings than one."""
    xq, wq = integers(0, -127, 128, 21, 70), integers(1, -127, 128, 12, 70)
    scale_per_token, weight_scale = uniform(2, 0.01, 0.1, 21, 1), uniform(3, 1e-4, 1e-3, 12, 1)
    bias = uniform(4, -3, 3, 12).to(dtype) if with_bias else None
    in_dtype = weight_scale.to(dtype).float().numpy()
    expected = numpy_matmul(xq, wq).astype(np.float32) * in_dtype.T * scale_per_token.numpy()
    if bias is not None:
        expected = expected + bias.float().numpy()
    ours = dynamic_quant_matmul(xq, scale_per_token, wq, weight_scale, bias, dtype)
    assert ours.dtype == dtype
    assert torch.equal(ours, torch.from_numpy(expected).to(dtype))


def test_dynamic_reads_the_weight_scale_in_the_dtype() -> None:
    """Catches a float32 weight scale where engines read bfloat16: 1.01 is 1.0078125 there."""
    xq, wq = torch.full((1, 8), 127, dtype=torch.int8), torch.ones(1, 8, dtype=torch.int8)
    token, scale, bias = torch.ones(1, 1), torch.tensor([[1.01]]), torch.tensor([-1023.9375])  # 127 * 8 * 1.0078125
    assert dynamic_quant_matmul(xq, token, wq, scale, bias, torch.bfloat16).item() == 0.0
    in_float32 = dynamic_quant_matmul(xq, token, wq, scale, None, torch.float32)
    assert in_float32.item() == np.float32(1016) * np.float32(1.01)


def test_dynamic_rounds_only_at_the_end() -> None:
    """Catches the product rounded before the bias is added: 257 is no bfloat16, but 257 - 256 is 1."""
    xq, wq = torch.tensor([[127, 127, 3]], dtype=torch.int8), torch.ones(1, 3, dtype=torch.int8)
    y = dynamic_quant_matmul(xq, torch.ones(1, 1), wq, torch.ones(1, 1), torch.tensor([-256.0]), torch.bfloat16)
    assert y.item() == 1.0


# ---- W4A8_DYNAMIC ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "group_size"), [(96, 96), (96, 32), (96, 1), (1024, 256)])
def test_group_agrees_with_numpy(columns: int, group_size: int, dtype: torch.dtype, with_bias: bool) -> None:
    """Catches groups mixed up or left out, a scale on the wrong axis, another order, more roundings than one."""
    xq, q4 = integers(0, -127, 128, 9, columns), integers(1, -8, 8, 12, columns)
    groups = columns // group_size
    token, first = uniform(2, 0.01, 0.1, 9, 1), uniform(3, 1e-4, 1e-3, 12, 1)
    second, bias = uniform(4, 0.5, 17, 12, groups), uniform(5, -3, 3, 12).to(dtype) if with_bias else None
    expected = np.zeros((9, 12), dtype=np.float32)
    for group in range(groups):
        here = slice(group * group_size, (group + 1) * group_size)
        expected += numpy_matmul(xq[:, here], q4[:, here]).astype(np.float32) * second.numpy()[:, group]
    expected = expected * first.numpy().T * token.numpy()
    if bias is not None:
        expected = expected + bias.float().numpy()
    ours = group_quant_matmul(xq, token, q4, first, second, bias, dtype)
    assert ours.dtype == dtype
    assert torch.equal(ours, torch.from_numpy(expected).to(dtype))


@given(seed=st.integers(0, 2**31), group_size=st.sampled_from([16, 64, 128]))
def test_group_is_the_product_with_the_dequantized_weight(seed: int, group_size: int) -> None:
    """Catches a consistent misreading of the format: exact, as all scales are powers of two and sums fit float32."""
    xq, q4 = integers(seed, -127, 128, 5, 256), integers(seed + 1, -8, 8, 6, 256)
    random = np.random.default_rng(seed)
    token, first, second = (
        torch.from_numpy(2.0 ** random.integers(-2, 3, shape).astype(np.float32))
        for shape in ((5, 1), (6, 1), (6, 256 // group_size))
    )
    scale = (first.double() * second.double()).numpy().repeat(group_size, axis=1)
    expected = (xq.numpy() * token.numpy().astype(np.float64)) @ (q4.numpy() * scale).T
    ours = group_quant_matmul(xq, token, q4, first, second, None, torch.float32)
    np.testing.assert_array_equal(ours.numpy().astype(np.float64), expected)


def test_group_agrees_with_onnxruntime() -> None:
    """Catches rows, columns or groups interpreted differently from one MatMulInteger per group."""
    xq, q4 = integers(0, -127, 128, 19, 64), integers(1, -8, 8, 10, 64)
    token, first, second = uniform(2, 0.01, 0.1, 19, 1), uniform(3, 1e-3, 1e-2, 10, 1), uniform(4, 1, 17, 10, 2)
    parts = [onnx_matmul(xq[:, here], q4[:, here]) for here in (slice(0, 32), slice(32, 64))]
    summed = sum(part.astype(np.float64) * second.numpy()[:, group] for group, part in enumerate(parts))
    expected = summed * first.numpy().T * token.numpy()
    ours = group_quant_matmul(xq, token, q4, first, second, None, torch.float32)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_group_sums_are_exact_integers() -> None:
    """Catches group sums in a float dtype: extremes of both signs that cancel except for 1."""
    xq = torch.full((1, 512), 127, dtype=torch.int8)
    q4 = torch.tensor([[7, -7] * 256], dtype=torch.int8)
    xq[0, 0], q4[0, :2] = 126, torch.tensor([7, -7], dtype=torch.int8)
    y = group_quant_matmul(xq, torch.ones(1, 1), q4, torch.ones(1, 1), torch.ones(1, 1), None, torch.float32)
    assert y.item() == -7.0


def test_groups_must_divide() -> None:
    """Catches the last columns being dropped when K is not a multiple of the number of groups."""
    xq, q4 = integers(0, -127, 128, 2, 32), integers(1, -8, 8, 4, 32)
    with pytest.raises(ValueError, match="32 columns cannot be 5 groups"):
        group_quant_matmul(xq, torch.ones(2, 1), q4, torch.ones(4, 1), torch.ones(4, 5), None, torch.float32)
    with pytest.raises(ValueError, match="32 columns cannot be 5 groups"):
        weight_only_group_matmul(xq.float(), q4, torch.ones(4, 1), torch.ones(4, 5), torch.float32)


# ---- what vLLM Ascend runs for dense W4A8_DYNAMIC --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_only_agrees_with_numpy(dtype: torch.dtype) -> None:
    """Catches groups mixed up, activations that are quantized after all, and a result in another dtype."""
    x, q4 = uniform(0, -3, 3, 9, 96).to(dtype), integers(1, -8, 8, 12, 96)
    first = torch.full((12, 1), 2.0**-9)
    second = uniform(2, 0.5, 17, 12, 3).to(torch.bfloat16).to(dtype).float()  # values of all three dtypes
    weight = q4.numpy() * (first.double() * second.double()).numpy().repeat(32, axis=1)
    expected = x.double().numpy() @ torch.from_numpy(weight).to(dtype).double().numpy().T
    ours = weight_only_group_matmul(x, q4, first, second, dtype)
    assert ours.dtype == dtype
    np.testing.assert_allclose(ours.double().numpy(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_weight_only_rounds_scale_and_weight_to_the_dtype() -> None:
    """Catches a weight in float32: in bfloat16 1.0078125 squared is 1.015625, and 7 times that 7.125, not 7.109."""
    q4, near_one = torch.tensor([[7]], dtype=torch.int8), torch.tensor([[1.0078125]])
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    assert weight_only_group_matmul(x, q4, near_one, near_one, torch.bfloat16).item() == 7.125
    exact = weight_only_group_matmul(x.float(), q4, near_one, near_one, torch.float32).item()
    assert exact == 7 * 1.0078125**2
    # Each scale by itself: 1.004 is 1.0078125 in bfloat16; 1.004 squared, rounded only then, would be 1.0078125.
    first, second, one = torch.tensor([[1.004]]), torch.tensor([[1.004]]), torch.ones(1, 1, dtype=torch.int8)
    assert weight_only_group_matmul(x, one, first, second, torch.bfloat16).item() == 1.015625


def test_weight_only_sums_in_float32() -> None:
    """Catches a sum that is rounded to bfloat16 on the way: 256 + 1 - 256 is 1."""
    x = torch.tensor([[256.0, 1.0, -256.0]], dtype=torch.bfloat16)
    ones = torch.ones(1, 3, dtype=torch.int8)
    one = torch.ones(1, 1)
    assert weight_only_group_matmul(x, ones, one, one, torch.bfloat16).item() == 1.0


# ---- W8A16 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_w8a16_agrees_with_numpy(dtype: torch.dtype, with_bias: bool) -> None:
    """Catches inputs that are rounded to int8, a scale on the wrong axis, a bias that is scaled or left out."""
    x, wq, scale = uniform(0, -3, 3, 9, 96).to(dtype), integers(1, -127, 128, 12, 96), uniform(2, 1e-4, 1e-3, 12, 1)
    bias = uniform(3, -3, 3, 12).to(dtype) if with_bias else None
    in_dtype = scale.to(dtype).double().numpy()
    weight = torch.from_numpy(wq.numpy() * in_dtype).to(dtype).double().numpy()
    expected = x.double().numpy() @ weight.T + (0 if bias is None else bias.double().numpy())
    ours = weight_only_matmul(x, wq, scale, bias, dtype)
    assert ours.dtype == dtype
    np.testing.assert_allclose(ours.double().numpy(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_w8a16_agrees_with_onnxruntime() -> None:
    """Catches rows, columns or scales interpreted differently from DequantizeLinear and Gemm."""
    x, wq, scale, bias = (
        uniform(0, -3, 3, 9, 96),
        integers(1, -127, 128, 12, 96),
        uniform(2, 1e-4, 1e-3, 12),
        uniform(3, -3, 3, 12),
    )
    stored = [numpy_helper.from_array(each.numpy(), name) for each, name in ((wq, "w"), (scale, "s"), (bias, "b"))]
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["weight"], axis=0),
        helper.make_node("Gemm", ["x", "weight", "b"], ["y"], transB=1),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in "xy"]
    graph = helper.make_graph(nodes, "matmul", ends[:1], ends[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    ours = weight_only_matmul(x, wq, scale[:, None], bias, torch.float32)
    np.testing.assert_allclose(ours.numpy(), session.run(None, {"x": x.numpy()})[0], rtol=1e-5, atol=1e-5)


def test_w8a16_rounds_scale_weight_and_result_once() -> None:
    """Catches a weight in float32, and a product that is rounded before the bias is added: 1.01 is 1.0078125 in
    bfloat16, 127 times that 127.9921875, as bfloat16 128; 257 is no bfloat16, but 257 - 256 is 1."""
    one, largest = torch.ones(1, 1, dtype=torch.bfloat16), torch.tensor([[127]], dtype=torch.int8)
    assert weight_only_matmul(one, largest, torch.tensor([[1.01]]), torch.tensor([-128.0]), torch.bfloat16).item() == 0
    exact = weight_only_matmul(one.float(), largest, torch.tensor([[1.01]]), None, torch.float32).item()
    assert exact == np.float32(127) * np.float32(1.01)
    x, ones = torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.int8)
    assert weight_only_matmul(x, ones, torch.ones(1, 1), torch.tensor([-256.0]), torch.bfloat16).item() == 1.0
