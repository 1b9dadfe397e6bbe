"""Schemes that vlqc does not have, each as one row and its quantized layer."""

import pytest
import torch
from torch import Tensor

from vlqc.families.family import DECODER_ROLES, VISION_ROLES, Role
from vlqc.kernels_ref import quant_linear
from vlqc.kernels_ref.matmul import dynamic_quant_matmul
from vlqc.kernels_ref.quant_linear import LayerQuantization, QuantLinear, StaticQuantLinear
from vlqc.kernels_ref.quantize import quantize_per_token
from vlqc.targets.engine import Rule
from vlqc.targets.schemes import (
    FLOAT_ACTIVATION,
    INT8,
    INT8_WEIGHT,
    STATIC_INPUT,
    ActivationFormat,
    ReportStyle,
    Scheme,
    SchemeSpec,
)
from vlqc.targets.vllm_ascend import VllmAscend

COLORS = ("#888888", "#000000")


class FloatInputLinear(QuantLinear):
    """int8 weights per output channel, float inputs, the bias is added."""

    scheme = "FLOAT_INPUT"

    def __init__(self, weight: Tensor, weight_scale: Tensor, weight_offset: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, weight_scale, weight_offset, bias, {})

    @classmethod
    def from_quantized(cls, result: LayerQuantization, bias: Tensor | None, dtype: torch.dtype) -> "FloatInputLinear":
        return cls(result.integers, result.scale, torch.zeros_like(result.scale), bias)

    def multiply(self, tokens: Tensor) -> Tensor:
        product = tokens.float() @ (self.weight.float() * self.weight_scale).T
        return (product if self.bias is None else product + self.bias.float()).to(tokens.dtype)


class UnionLinear(StaticQuantLinear):
    """The tensors of static W8A8, run as W8A8_DYNAMIC."""

    scheme = "UNION"

    def multiply(self, tokens: Tensor) -> Tensor:
        xq, scale_per_token = quantize_per_token(tokens)
        return dynamic_quant_matmul(xq, scale_per_token, self.weight, self.weight_scale, self.bias, tokens.dtype)

    def rounded_input(self, x: Tensor) -> Tensor:
        integers, scale = quantize_per_token(x)
        return integers.float() * scale

    def effective_bias(self) -> Tensor:
        return QuantLinear.effective_bias(self)


FLOAT_INPUT = SchemeSpec(
    "FLOAT_INPUT",
    INT8,
    FLOAT_ACTIVATION,
    stored=INT8_WEIGHT,
    report=ReportStyle("8-bit weights", "w", COLORS, COLORS),
    module="quant_linear:FloatInputLinear",
    naming_priority=5,
)
UNION = SchemeSpec(
    "UNION",
    INT8,
    ActivationFormat(8, is_static=True, is_dynamic=True, cost=0.1),
    stored=(*INT8_WEIGHT, *STATIC_INPUT),
    report=ReportStyle("static or dynamic", "u", COLORS, COLORS),
    module="quant_linear:UnionLinear",
    naming_priority=4,
)


def register(monkeypatch: pytest.MonkeyPatch, spec: SchemeSpec, layer: type[QuantLinear]) -> Scheme:
    """Does what one more row in `Scheme`, its class in `kernels_ref`, and a rule of vLLM Ascend do."""
    member = str.__new__(Scheme, spec.name)
    member._name_, member._value_, member.spec = spec.name, spec.name, spec
    monkeypatch.setitem(Scheme._member_map_, spec.name, member)  # type: ignore[arg-type]
    monkeypatch.setitem(Scheme._value2member_map_, spec.name, member)
    monkeypatch.setattr(Scheme, "_member_names_", [*Scheme._member_names_, spec.name])
    monkeypatch.setattr(quant_linear, layer.__name__, layer, raising=False)
    rule = Rule(member, (*VISION_ROLES, Role.MERGER, *DECODER_ROLES), since="0.10.2rc2")
    monkeypatch.setattr(VllmAscend, "rules", {name: (*rules, rule) for name, rules in VllmAscend.rules.items()})
    return member
