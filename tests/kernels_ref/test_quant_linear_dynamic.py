"""The linears with per-token activations, W8A8_DYNAMIC and W4A8_DYNAMIC, against NumPy and as modules."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.kernel_inputs import sample
from vlqc.kernels_ref.int4_groups import quantize_weight_per_group_absmax
from vlqc.kernels_ref.quant_linear import DynamicQuantLinear, GroupQuantLinear, QuantLinear
from vlqc.kernels_ref.quantize import quantize_weight_per_channel_absmax

SCHEMES: list[type[QuantLinear]] = [DynamicQuantLinear, GroupQuantLinear]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def dynamic(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype = torch.bfloat16) -> DynamicQuantLinear:
    return DynamicQuantLinear.from_float(*quantize_weight_per_channel_absmax(weight, scale_dtype=dtype), bias)


def grouped(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype = torch.bfloat16) -> GroupQuantLinear:
    return GroupQuantLinear.from_float(*quantize_weight_per_group_absmax(weight, 8, dtype), bias)


def made(scheme: type[QuantLinear], seed: int = 0, with_bias: bool = True) -> QuantLinear:
    _, weight, bias = sample(seed, with_bias)
    return dynamic(weight, bias) if scheme is DynamicQuantLinear else grouped(weight, bias)


def steps_of(linear: QuantLinear) -> torch.Tensor:
    """The scale of every weight, float64 [N, K]."""
    steps = linear.weight_scale.double().expand(10, 24)
    if isinstance(linear, GroupQuantLinear):
        steps = steps * linear.weight_scale_second.double().repeat_interleave(8, dim=1)
    return steps


@pytest.mark.parametrize("scheme", SCHEMES)
@given(seed=st.integers(0, 2**31), with_bias=st.booleans())
def test_error_is_within_the_analytic_bound(scheme: type[QuantLinear], seed: int, with_bias: bool) -> None:
    """Catches any lost term: half a step of x (for each token) and of w, their product, and float32's rounding."""
    x, weight, bias = sample(seed, with_bias)
    linear = made(scheme, seed, with_bias)
    x64, w64 = x.double(), weight.double()
    exact = x64 @ w64.T + (0 if bias is None else bias.double())  # [2, 9, 10]
    half_x = x64.abs().amax(dim=-1, keepdim=True) / 127 / 2 * (1 + 1e-4)  # [2, 9, 1]
    half_w = steps_of(linear) / 2 * (1 + 1e-4)  # [10, 24]
    bound = half_x * w64.abs().sum(dim=1) + x64.abs() @ half_w.T + half_x * half_w.sum(dim=1) + exact.abs() * 1e-5
    assert ((linear(x).double() - exact).abs() <= bound + 1e-5).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_forward_agrees_with_numpy(scheme: type[QuantLinear], dtype: torch.dtype) -> None:
    """Catches one scale for all tokens, a dropped bias, a misplaced scale, and outputs of the wrong dtype."""
    x = sample()[0].to(dtype)
    linear = made(scheme)
    assert linear.bias is not None
    tokens = x.float().numpy().reshape(18, 24)
    scale = np.abs(tokens).max(axis=1, keepdims=True) / np.float32(127)
    xq = np.rint(tokens / scale).astype(np.float64)
    expected = xq * scale @ (linear.weight.double() * steps_of(linear)).numpy().T + linear.bias.numpy()
    y = linear(x)
    assert y.dtype == dtype and y.shape == (2, 9, 10)
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    np.testing.assert_allclose(y.double().numpy().reshape(18, 10), expected, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bias_is_used(scheme: type[QuantLinear]) -> None:
    """Catches the habit of the static scheme, where the stored bias is ignored."""
    x = sample()[0]
    linear = made(scheme)
    assert linear.bias is not None
    before, linear.bias = linear(x), linear.bias + 64
    torch.testing.assert_close(linear(x), before + 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_only_is_a_float_matmul_without_bias(dtype: torch.dtype) -> None:
    """Catches activations still rounded to int8, and a bias that vLLM Ascend leaves out in dense W4A8 layers."""
    x = sample()[0].to(dtype)
    linear = made(GroupQuantLinear)
    assert isinstance(linear, GroupQuantLinear) and not linear.weight_only
    linear.weight_only = True
    weight = (linear.weight.double() * steps_of(linear)).to(dtype).double()
    y = linear(x)
    assert y.dtype == dtype and y.shape == (2, 9, 10)
    np.testing.assert_allclose(y.double(), x.double() @ weight.T, rtol=torch.finfo(dtype).eps, atol=1e-5)
    assert GroupQuantLinear.weight_only is False  # of this layer only


def test_stored_tensors_have_the_names_shapes_and_dtypes_of_a_folder() -> None:
    """Catches a tensor that is renamed, reshaped, missing, or stored in another dtype than engines expect."""
    _, weight, bias = sample()
    assert bias is not None
    every = {
        "weight": ((10, 24), torch.int8),
        "weight_scale": ((10, 1), torch.float32),
        "weight_offset": ((10, 1), torch.float32),
        "bias": ((10,), torch.bfloat16),
    }
    groups = {"weight_scale_second": ((10, 3), torch.float32), "weight_offset_second": ((10, 3), torch.float32)}
    for linear, expected in (
        (dynamic(weight, bias.bfloat16()), every),
        (grouped(weight, bias.bfloat16()), every | groups),
    ):
        stored = linear.state_dict()
        assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()} == expected
        assert not any(tensor.any() for name, tensor in stored.items() if "offset" in name)
    assert "bias" not in dynamic(weight, None).state_dict() and "bias" not in grouped(weight, None).state_dict()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_moving_keeps_the_stored_values_and_follows_the_device(scheme: type[QuantLinear]) -> None:
    """Catches `.half()` on a model rounding scales to float16, and an override that does not move at all."""
    x, linear = sample()[0], made(scheme)
    before, expected = {name: tensor.clone() for name, tensor in linear.state_dict().items()}, linear(x)
    for moved in (linear.half(), linear.to(torch.bfloat16), linear.double(), linear.to("cpu", torch.float16)):
        assert moved is linear and torch.equal(linear(x), expected)
        assert all(torch.equal(t, before[n]) and t.dtype == before[n].dtype for n, t in linear.state_dict().items())
    linear.to("meta", torch.float16)
    assert {tensor.device.type for tensor in linear.state_dict().values()} == {"meta"}
    assert linear.weight_scale.dtype == torch.float32
    assert linear(x.to("meta")).shape == (2, 9, 10)
    assert type(linear)(**linear.state_dict()).in_features == 24  # built from tensors without data, too


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(24,), (0, 24), (3, 24), (2, 0, 24), (2, 3, 4, 24)])
def test_output_keeps_leading_dimensions(scheme: type[QuantLinear], shape: tuple[int, ...]) -> None:
    """Catches a reshape that fails for one token, none, or four dimensions."""
    linear = made(scheme)
    assert linear(torch.ones(shape)).shape == (*shape[:-1], 10)
    if isinstance(linear, GroupQuantLinear):
        linear.weight_only = True
        assert linear(torch.ones(shape)).shape == (*shape[:-1], 10)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tokens_of_zeros_give_the_bias(scheme: type[QuantLinear]) -> None:
    """Catches NaN from a scale of zero for padding."""
    linear = made(scheme)
    assert linear.bias is not None
    assert torch.equal(linear(torch.zeros(2, 24)), linear.bias.expand(2, 10))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_constructor_names_every_fault(scheme: type[QuantLinear]) -> None:
    """Catches a damaged folder being run: wrong shapes and dtypes of stored tensors, all of them named at once."""
    stored = dict(made(scheme).state_dict())
    stored["weight"] = stored["weight"].int()
    stored["weight_scale"] = stored["weight_scale"].flatten()
    stored["bias"] = stored["bias"][:9]
    with pytest.raises(
        ValueError, match=r"weight must be torch.int8.*weight_scale must have.*bias must have shape \[10"
    ):
        scheme(**stored)
    with pytest.raises(ValueError, match=r"weight must have shape \[N, K\], got \[24\]"):
        scheme(**{**stored, "weight": stored["weight"][0]})


def test_constructor_checks_groups_and_values() -> None:
    """Catches packed weights taken for unpacked ones, 8-bit weights marked as 4-bit, and groups of unequal size."""
    stored = dict(made(GroupQuantLinear).state_dict())
    with pytest.raises(ValueError, match=r"weight_scale must have shape \[5, 1\], got \[10, 1\].*_second must have"):
        GroupQuantLinear(**{**stored, "weight": stored["weight"][:5]})
    wide = stored["weight"].clone()
    wide[3, 3] = 8
    second = torch.ones(10, 5)
    with pytest.raises(ValueError, match=r"8 is not within -8\.\.7.*24 columns cannot be 5 groups.*offset_second must"):
        GroupQuantLinear(**{**stored, "weight": wide, "weight_scale_second": second})
    for broken in (torch.ones(10, 0), torch.tensor(1.0), torch.ones(10, 3, 1)):
        with pytest.raises(ValueError, match="weight_scale_second"):
            GroupQuantLinear(**{**stored, "weight_scale_second": broken})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_reads_scales_in_the_checkpoints_dtype(scheme: type[QuantLinear]) -> None:
    """Catches folders of other tools being misread: bfloat16 scales and integer offsets run like float32 ones."""
    x, linear = sample()[0], made(scheme)
    stored = {
        name: tensor.to(torch.bfloat16) if "scale" in name else tensor.long() if "offset" in name else tensor
        for name, tensor in linear.state_dict().items()
    }
    assert torch.equal(scheme(**stored)(x), linear(x))
    if isinstance(linear, GroupQuantLinear):
        other = GroupQuantLinear(**stored)
        other.weight_only = linear.weight_only = True
        assert torch.equal(other(x), linear(x))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_saved_and_loaded_state_gives_the_same_output(scheme: type[QuantLinear]) -> None:
    """Catches a buffer that is not part of the state."""
    x, linear, file = sample()[0], made(scheme), io.BytesIO()
    torch.save(linear.state_dict(), file)
    file.seek(0)
    other = made(scheme, seed=1)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), linear(x))


def test_modules_describe_themselves() -> None:
    """Catches a repr without the scheme and its options."""
    described = "in_features=24, out_features=10, bias=True, scheme="
    assert repr(made(DynamicQuantLinear)) == f"DynamicQuantLinear({described}W8A8_DYNAMIC)"
    linear = made(GroupQuantLinear)
    assert isinstance(linear, GroupQuantLinear) and linear.group_size == 8
    assert repr(linear) == f"GroupQuantLinear({described}W4A8_DYNAMIC, group_size=8)"
    linear.weight_only = True
    assert repr(linear) == f"GroupQuantLinear({described}W4A8_DYNAMIC, group_size=8, weight_only=True)"
