"""kernels_ref.linear against float linears, within the bound that the arithmetic allows, and as a module."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.kernel_inputs import sample
from vlqc.kernels_ref.deq_scale import decode_deq_scale
from vlqc.kernels_ref.quant_linear import StaticQuantLinear
from vlqc.kernels_ref.quantize import activation_scale_and_offset, quantize_weight_per_channel_absmax


def made(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype = torch.bfloat16
) -> StaticQuantLinear:
    input_scale, input_offset = activation_scale_and_offset(x.min().item(), x.max().item(), dtype)
    wq, weight_scale = quantize_weight_per_channel_absmax(weight)
    return StaticQuantLinear.from_float(wq, weight_scale, input_scale, input_offset, bias, dtype)


@given(seed=st.integers(0, 2**31), with_bias=st.booleans(), dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_error_is_within_the_analytic_bound(seed: int, with_bias: bool, dtype: torch.dtype) -> None:
    """Catches any lost term: half a step of x and of w, their product, half a step of bias, and float32's rounding."""
    x, weight, bias = sample(seed, with_bias)
    linear = made(x, weight, bias, dtype)
    x64, w64 = x.to(torch.float64), weight.to(torch.float64)
    exact = x64 @ w64.T + (0 if bias is None else bias.to(torch.float64))  # [2, 9, 10]
    half_x = linear.input_scale.item() / 2 * (1 + 1e-4)  # float32 may decide a near-tie the other way
    half_w = linear.weight_scale.to(torch.float64).flatten() / 2 * (1 + 1e-4)  # [10]
    bound = (
        half_x * w64.abs().sum(dim=1)
        + x64.abs().sum(dim=-1, keepdim=True) * half_w
        + 24 * half_x * half_w
        + decode_deq_scale(linear.deq_scale).to(torch.float64) / 2
        + exact.abs() * 1e-5
        + 1e-5
    )
    assert ((linear(x).to(torch.float64) - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward_agrees_with_numpy(dtype: torch.dtype) -> None:
    """Catches a wrong offset correction, the bias added twice, or a misplaced scale; exact in float32."""
    x, weight, bias = sample()
    linear = made(x, weight, bias, dtype)
    assert bias is not None
    scale, offset = linear.input_scale.numpy(), linear.input_offset.numpy()
    xq = np.clip(np.rint(x.numpy() * (np.float32(1) / scale) + offset), -128, 127).astype(np.int64)
    wq = linear.weight.numpy().astype(np.int64)
    deq_scale = (scale * linear.weight_scale.numpy().flatten()).astype(np.float32)
    steps = bias.numpy().astype(np.float64) / deq_scale.astype(np.float64) - int(offset[0]) * wq.sum(axis=1)
    expected = (xq @ wq.T + np.rint(steps).astype(np.int64)).astype(np.float32) * deq_scale
    np.testing.assert_array_equal(linear(x).numpy(), expected)


def test_stored_tensors_have_the_names_shapes_and_dtypes_of_a_folder() -> None:
    """Catches a tensor that is renamed, reshaped, missing, or stored in another dtype than engines expect."""
    x, weight, bias = sample()
    assert bias is not None
    for dtype, deq_dtype in ((torch.bfloat16, torch.float32), (torch.float16, torch.int64)):
        stored = made(x, weight, bias.to(dtype), dtype).state_dict()
        assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()} == {
            "weight": ((10, 24), torch.int8),
            "weight_scale": ((10, 1), torch.float32),
            "weight_offset": ((10, 1), torch.float32),
            "input_scale": ((1,), torch.float32),
            "input_offset": ((1,), torch.float32),
            "quant_bias": ((10,), torch.int32),
            "deq_scale": ((10,), deq_dtype),
            "bias": ((10,), dtype),
        }
        assert not stored["weight_offset"].any()
    assert "bias" not in made(x, weight, None).state_dict()


def test_deq_scale_is_the_float32_product() -> None:
    """Catches a product in the checkpoint's dtype, an error of up to 0.4 % in bfloat16."""
    x, weight, _ = sample()
    linear = made(x, weight, None)
    assert torch.equal(linear.deq_scale, linear.input_scale * linear.weight_scale.flatten())


def test_stored_bias_is_not_used() -> None:
    """Catches the bias being added twice: it is part of quant_bias, and engines ignore its value."""
    x, weight, bias = sample()
    linear = made(x, weight, bias)
    before = linear(x)
    assert linear.bias is not None
    linear.bias = torch.full_like(linear.bias, 1e3)
    assert torch.equal(linear(x), before)


@pytest.mark.parametrize("deq_dtype", [torch.bfloat16, torch.float16])
def test_moving_to_another_dtype_keeps_the_stored_values(deq_dtype: torch.dtype) -> None:
    """Catches `.half()` on a model rounding scales to float16, where small ones become zero."""
    x, weight, bias = sample()
    linear = made(x, weight, bias, deq_dtype)
    before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    expected = linear(x)
    model = torch.nn.Sequential(linear, torch.nn.Linear(10, 2))
    for moved in (model.half(), model.to(torch.bfloat16), model.double(), model.to("cpu", torch.float16)):
        assert moved[0] is linear and moved[1].weight.dtype != torch.float32
        assert all(torch.equal(t, before[n]) and t.dtype == before[n].dtype for n, t in linear.state_dict().items())
        assert torch.equal(linear(x), expected)


def test_moving_to_another_device_moves_every_tensor() -> None:
    """Catches an override that keeps the dtype by not moving at all."""
    x, weight, bias = sample()
    for target in (("meta",), ("meta", torch.float16)):
        linear = made(x, weight, bias).to(*target)
        assert {tensor.device.type for tensor in linear.state_dict().values()} == {"meta"}
        assert linear.weight_scale.dtype == torch.float32
        assert linear(x.to("meta")).shape == (2, 9, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(24,), (0, 24), (3, 24), (2, 0, 24), (2, 3, 4, 24)])
def test_output_keeps_leading_dimensions_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Catches a reshape that fails for one token, none, or four dimensions, and an output left in float32."""
    linear = made(*sample())
    y = linear(torch.ones(shape, dtype=dtype))
    assert y.shape == (*shape[:-1], 10) and y.dtype == dtype


def test_float16_input_uses_the_truncated_deq_scale() -> None:
    """Catches a deq_scale that is not truncated to 19 bits for float16 inputs, or is truncated for float32."""
    ones = torch.ones(1, 1, dtype=torch.int8)
    scale = torch.tensor([[1.0 + 2.0**-10 - 2.0**-20]])
    linear = StaticQuantLinear.from_float(ones, scale, 1.0, 0.0, None, torch.float16)
    assert linear(torch.ones(1, 1, dtype=torch.float16)).item() == 1.0  # in full it would round to 1 + 2**-10
    assert linear(torch.ones(1, 1)).item() == 1.0 + 2.0**-10 - 2.0**-20


def test_constructor_names_every_fault() -> None:
    """Catches a damaged folder being run: wrong shapes and dtypes of stored tensors, all of them named at once."""
    stored = dict(made(*sample()).state_dict())
    stored["deq_scale"] = stored["deq_scale"].half()
    stored["input_scale"] = stored["input_scale"][0]
    stored["quant_bias"] = stored["quant_bias"].long()
    with pytest.raises(ValueError, match=r"input_scale must have shape \[1\].*quant_bias must be.*deq_scale must be"):
        StaticQuantLinear(**stored)


def test_reads_scales_in_the_checkpoints_dtype() -> None:
    """Catches folders of other tools being misread: bfloat16 scales and integer offsets run like float32 ones."""
    x, weight, bias = sample()
    linear = made(x, weight, bias)
    stored = dict(linear.state_dict())
    stored["input_scale"] = stored["input_scale"].to(torch.bfloat16)  # exact: the scale is a value of bfloat16
    stored["input_offset"] = stored["input_offset"].to(torch.bfloat16)
    stored["weight_offset"] = stored["weight_offset"].long()
    assert torch.equal(StaticQuantLinear(**stored)(x), linear(x))


def test_saved_and_loaded_state_gives_the_same_output() -> None:
    """Catches a buffer that is not part of the state."""
    x, weight, bias = sample()
    linear = made(x, weight, bias)
    file = io.BytesIO()
    torch.save(linear.state_dict(), file)
    file.seek(0)
    other = made(*sample(seed=1))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), linear(x))


def test_module_describes_itself() -> None:
    """Catches a repr without shape and scheme."""
    linear = made(*sample())
    assert repr(linear) == "StaticQuantLinear(in_features=24, out_features=10, bias=True, scheme=W8A8)"
    assert (linear.in_features, linear.out_features, StaticQuantLinear.scheme) == (24, 10, "W8A8")
