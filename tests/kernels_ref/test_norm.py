"""The shifted norm against the norms it wraps."""

import copy

import pytest
import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from vlqc.frontend.tracing import is_leaf
from vlqc.ir.scale_propagation import scales_its_channels
from vlqc.kernels_ref.norm import ShiftedNorm


class OddNorm(torch.nn.Module):
    """A norm with its own formula: only its forward adds the 3."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sign() * 3 * self.weight


def model_norm(channels: int) -> torch.nn.Module:
    """The norm of the language model of the installed transformers, whatever that version calls it."""
    named = {name: part for name, part in vars(modeling_qwen2_5_vl).items() if name.endswith("RMSNorm")}
    (norm_class,) = named.values()
    norm: torch.nn.Module = norm_class(channels, eps=1e-6)
    return norm


def sample(channels: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [2, 5, C], weight [C], bias [C]."""
    generator = torch.Generator().manual_seed(channels)
    x, weight, bias = (torch.randn(*shape, channels, generator=generator) for shape in ((2, 5), (), ()))
    return x, weight, bias


def test_shifted_norm_calls_the_norms_own_forward() -> None:
    """Catches a second implementation of the norm, and a bias that is dropped, doubled or scaled by the weight."""
    x, weight, bias = sample()
    assert torch.equal(ShiftedNorm(OddNorm(weight), bias)(x), x.sign() * 3 * weight + bias)
    for norm in (model_norm(6), torch.nn.RMSNorm(6, eps=1e-6)):
        with torch.no_grad():
            norm.get_parameter("weight").copy_(weight)
        assert torch.equal(ShiftedNorm(norm, bias)(x), norm(x) + bias)
        torch.testing.assert_close(
            ShiftedNorm(norm, bias)(x), torch.nn.functional.rms_norm(x, (6,), weight, 1e-6) + bias
        )


def test_shifted_norm_has_the_names_of_a_folder() -> None:
    """Catches tensors under X.norm.weight: passes, emitter and loader expect X.weight and X.bias, once each."""
    _, weight, bias = sample()
    model = torch.nn.ModuleDict({"input_layernorm": ShiftedNorm(OddNorm(weight), bias)})
    names = ["input_layernorm.weight", "input_layernorm.bias"]
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_parameters()] == names
    assert [name for name, _ in model.named_modules()] == ["", "input_layernorm"]
    assert not model["input_layernorm"].bias.requires_grad


def test_shifted_norm_still_looks_like_a_norm() -> None:
    """Catches a wrapper that is traced into, or that scale propagation does not accept as a producer."""
    _, weight, bias = sample()
    shifted = ShiftedNorm(OddNorm(weight), bias)
    assert is_leaf(shifted) and scales_its_channels(shifted, 6)


def test_shifted_norm_uses_its_weight_as_it_is_now() -> None:
    """Catches the wrapped norm keeping an old weight: folded in place, replaced, loaded, moved or copied."""
    x, weight, bias = sample()
    shifted = ShiftedNorm(OddNorm(weight.clone()), bias.clone())
    shifted.weight.data.mul_(2)
    assert torch.equal(shifted(x), x.sign() * 3 * (2 * weight) + bias)
    shifted.weight = torch.nn.Parameter(weight + 1)
    assert torch.equal(shifted(x), x.sign() * 3 * (weight + 1) + bias)
    shifted.load_state_dict({"weight": weight - 1, "bias": bias + 5}, assign=True)
    assert torch.equal(shifted(x), x.sign() * 3 * (weight - 1) + (bias + 5))
    twin = copy.deepcopy(shifted)
    twin.weight.data.zero_()
    assert torch.equal(twin(x), (bias + 5).expand_as(x)) and shifted(x).ne(twin(x)).any()
    assert shifted.to("meta")(x.to("meta")).device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shifted_norm_answers_in_the_inputs_dtype(dtype: torch.dtype) -> None:
    """Catches float32 leaking out of a norm whose bias or weight is float32, and the sum being rounded twice."""
    x, weight, bias = sample()
    y = ShiftedNorm(OddNorm(weight), bias)(x.to(dtype))
    assert y.dtype == dtype
    assert torch.equal(y, (x.sign() * 3 * weight + bias).to(dtype))
    assert ShiftedNorm(model_norm(6).to(dtype), bias)(x.to(dtype)).dtype == dtype


def test_shifted_norm_refuses_what_it_cannot_hold() -> None:
    """Catches a norm's own bias or other tensors being hidden, and a bias that broadcasts."""
    bias = torch.zeros(6)
    with pytest.raises(ValueError, match="got weight, bias"):
        ShiftedNorm(torch.nn.LayerNorm(6), bias)
    with pytest.raises(ValueError, match="got no tensor"):
        ShiftedNorm(torch.nn.LayerNorm(6, elementwise_affine=False), bias)
    with pytest.raises(ValueError, match=r"bias must have shape \[6\], got \[1\]"):
        ShiftedNorm(torch.nn.RMSNorm(6), torch.zeros(1))


def test_shifted_norm_describes_itself() -> None:
    """Catches a repr without the wrapped norm."""
    assert repr(ShiftedNorm(OddNorm(torch.ones(2)), torch.zeros(2))) == "ShiftedNorm(OddNorm())"
