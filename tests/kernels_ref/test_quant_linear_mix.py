"""The layers of W8A8_MIX and W8A16 against those whose tensors or arithmetic they share."""

import pytest
import torch

from tests.support.kernel_inputs import sample
from vlqc.kernels_ref.quant_linear import (
    DynamicQuantLinear,
    LayerQuantization,
    MixQuantLinear,
    QuantLinear,
    StaticQuantLinear,
    WeightOnlyQuantLinear,
)
from vlqc.kernels_ref.quantize import activation_scale_and_offset, quantize_weight_per_channel_absmax

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def made(kind: type[QuantLinear], dtype: torch.dtype = torch.bfloat16) -> QuantLinear:
    x, weight, bias = sample()
    chosen = activation_scale_and_offset(x.min().item(), x.max().item(), dtype)
    integers, scale = quantize_weight_per_channel_absmax(weight, scale_dtype=dtype)
    return kind.from_quantized(LayerQuantization(integers, scale, input=chosen), bias, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("checkpoint", [torch.bfloat16, torch.float16])
def test_mix_is_dynamic_or_static(checkpoint: torch.dtype, dtype: torch.dtype) -> None:
    """Catches one arithmetic with a part of the other: the wrong scale, the bias twice or not at all."""
    x = sample()[0].to(dtype)
    mix, dynamic, static = (made(kind, checkpoint) for kind in (MixQuantLinear, DynamicQuantLinear, StaticQuantLinear))
    assert isinstance(mix, MixQuantLinear)
    for arithmetic, mix.static_input in ((dynamic, False), (static, True)):
        tokens = x.reshape(-1, 24)
        assert torch.equal(mix(x), arithmetic(x))
        assert torch.equal(mix.rounded_input(tokens), arithmetic.rounded_input(tokens))
        assert torch.equal(mix.effective_bias(), arithmetic.effective_bias())
    assert not torch.equal(dynamic(x), static(x))
    stored = static.stored(packed=True, row_parallel=False)
    assert mix.stored(packed=True, row_parallel=False).keys() == stored.keys()
    assert all(torch.equal(mix.get_buffer(name), tensor) for name, tensor in stored.items())


def test_static_arithmetic_is_that_of_one_layer() -> None:
    """Catches a setting of the class, and a layer that does not say which arithmetic it runs."""
    one, other = made(MixQuantLinear), made(MixQuantLinear)
    assert isinstance(one, MixQuantLinear) and isinstance(other, MixQuantLinear)
    one.static_input = True
    described = "in_features=24, out_features=10, bias=True, scheme=W8A8_MIX"
    assert repr(one) == f"MixQuantLinear({described}, static_input=True)" and not other.static_input
    assert repr(other) == f"MixQuantLinear({described})"


@pytest.mark.parametrize("dtype", DTYPES)
def test_w8a16_is_a_float_matmul(dtype: torch.dtype) -> None:
    """Catches inputs that are rounded, the bias left out, leading dimensions lost, and outputs of another dtype."""
    x, _, bias = sample()
    layer, dynamic = made(WeightOnlyQuantLinear), made(DynamicQuantLinear)
    assert bias is not None and layer.stored(packed=True, row_parallel=False).keys() == dynamic.state_dict().keys()
    weight = (layer.weight.double() * layer.weight_scale.double()).to(dtype).double()
    y = layer(x.to(dtype))
    assert y.dtype == dtype and y.shape == (2, 9, 10)
    exact = x.to(dtype).double() @ weight.T + bias.double()
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)
    assert layer.rounded_input(x) is x and torch.equal(layer.effective_bias(), bias.float())
