"""Modules of a stage as ONNX nodes: linears, with QuantizeLinear and DequantizeLinear if quantized, norms, activations.

A static W8A8 linear is QuantizeLinear -> DequantizeLinear -> MatMul with a DequantizeLinear of its int8 weight (one
scale per output channel) -> Add of a DequantizeLinear of its int32 bias: the form in which runtimes recognise int8
arithmetic. Per token, the scale is computed in front of QuantizeLinear. 4-bit weights are INT4, dequantized in blocks.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlqc.kernels_ref.deq_scale import decode_deq_scale
from vlqc.kernels_ref.norm import ShiftedNorm
from vlqc.kernels_ref.quant_linear import DynamicQuantLinear, GroupQuantLinear, QuantLinear, StaticQuantLinear
from vlqc.kernels_ref.quantize import INT8_MAX, SMALLEST_TOKEN_SCALE
from vlqc.reporting.onnx.builder import Builder

Shape = tuple[int, ...]


class NoRule(Exception):
    """What has no form in ONNX here; the message says what."""


def export_module(make: Builder, module: nn.Module, name: str, x: str, shape: Shape, to: str) -> str:
    """A called module: its checkpoint name, its input's name and shape -> the name of its output. NoRule."""
    if isinstance(module, nn.Linear):
        return _linear(make, module, name, x, to)
    for kind, quantized in QUANTIZED.items():
        if isinstance(module, kind):
            return quantized(make, module, name, x, shape, to)
    if isinstance(module, ShiftedNorm):
        normalised = _norm(make, module._norm[0], module.weight, name, x, f"{to}_unshifted")
        return make.op("Add", normalised, make.tensor(module.bias, f"{name}.bias"), to=to)
    if isinstance(module, nn.LayerNorm):
        inputs = [x, make.tensor(module.weight, f"{name}.weight")]
        inputs += [make.tensor(module.bias, f"{name}.bias")] if module.bias is not None else []
        return make.op("LayerNormalization", *inputs, to=to, axis=-len(module.normalized_shape), epsilon=module.eps)
    if type(module).__name__.endswith("RMSNorm"):
        return _norm(make, module, module.get_parameter("weight"), name, x, to)
    if (activation := activation_of(module)) is not None:
        return export_activation(make, activation, x, to)
    raise NoRule(f"a module of the kind {type(module).__name__}")


def activation_of(module: nn.Module) -> str | None:
    """silu, gelu, gelu_tanh, relu or identity, if the module is one of them."""
    kind = type(module).__name__
    if kind in ("GELU", "GELUActivation"):
        return "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else "gelu"
    if isinstance(module, nn.Dropout) and module.training:
        return None
    known = {"SiLU": "silu", "SiLUActivation": "silu", "ReLU": "relu", "Identity": "identity", "Dropout": "identity"}
    return known.get(kind)


def export_activation(make: Builder, kind: str, x: str, to: str) -> str:
    if kind == "silu":
        return make.op("Mul", x, make.op("Sigmoid", x, to=f"{to}_sigmoid"), to=to)
    if kind == "relu":
        return make.op("Relu", x, to=to)
    if kind == "identity":
        return make.op("Identity", x, to=to)
    return make.op("Gelu", x, to=to, approximate="tanh" if kind == "gelu_tanh" else "none")


def _norm(make: Builder, norm: Any, weight: Tensor, name: str, x: str, to: str) -> str:
    """x / sqrt(mean(x^2) + eps) * weight."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(eps, float):
        raise NoRule(f"a norm of the kind {type(norm).__name__}, whose epsilon is not known")
    square = make.op("Mul", x, x, to=f"{to}_square")
    mean = make.op("ReduceMean", square, make.numbers(-1), to=f"{to}_mean", keepdims=1)
    root = make.op("Sqrt", make.op("Add", mean, make.scalar(eps), to=f"{to}_eps"), to=f"{to}_root")
    normalised = make.op("Div", x, root, to=f"{to}_normalised")
    return make.op("Mul", make.tensor(weight, f"{name}.weight"), normalised, to=to)


# ---- linears ---------------------------------------------------------------------------------------------------------


def _product(make: Builder, x: str, weight: str, bias: str | None, to: str) -> str:
    """x [..., K] @ weight [N, K].T + bias."""
    turned = make.op("Transpose", weight, to=f"{to}_weight_turned", perm=[1, 0])
    if bias is None:
        return make.op("MatMul", x, turned, to=to)
    return make.op("Add", make.op("MatMul", x, turned, to=f"{to}_product"), bias, to=to)


def _linear(make: Builder, linear: nn.Linear, name: str, x: str, to: str) -> str:
    bias = None if linear.bias is None else make.tensor(linear.bias, f"{name}.bias")
    return _product(make, x, make.tensor(linear.weight, f"{name}.weight"), bias, to)


def _per_channel(make: Builder, module: QuantLinear, name: str, to: str) -> str:
    """The int8 weight [N, K], dequantized by one scale per output channel."""
    weight = make.tensor(module.weight, f"{name}.weight")
    scale = make.tensor(module.weight_scale.float().flatten(), f"{name}.weight_scale")
    return make.op("DequantizeLinear", weight, scale, to=f"{to}_weight", axis=0)


def _static(make: Builder, module: StaticQuantLinear, name: str, x: str, shape: Shape, to: str) -> str:
    """quant_bias + offset * sum of a row's integers is the bias in steps of deq_scale: int32, as runtimes want it."""
    offset = int(module.input_offset)
    scale = make.tensor(module.input_scale.float().reshape(()), f"{name}.input_scale")
    zero = make.tensor(module.input_offset.to(torch.int8).reshape(()), f"{name}.input_offset")
    q = make.op("QuantizeLinear", _rows(make, x, shape, to), scale, zero, to=f"{to}_input_q")
    values = make.op("DequantizeLinear", q, scale, zero, to=f"{to}_input")
    steps = module.quant_bias.long() + offset * module.weight.sum(1, dtype=torch.int64)
    if int(steps.abs().max()) >= 2**31:
        raise NoRule(f"the bias of {name}, which needs more than 32 bits without its input's offset")
    deq_scale = make.tensor(decode_deq_scale(module.deq_scale), f"{name}.deq_scale")
    bias_q = make.tensor(steps.to(torch.int32), f"{name}.bias_in_steps")
    bias = make.op("DequantizeLinear", bias_q, deq_scale, to=f"{to}_bias", axis=0)
    weight = _per_channel(make, module, name, to)
    return _shaped(make, module, shape, to, lambda at: _product(make, values, weight, bias, at))


def _rows(make: Builder, x: str, shape: Shape, to: str) -> str:
    """[..., K] -> [M, K]: between quantized values onnxruntime's optimizer only gets matrices right."""
    return x if len(shape) == 2 else make.op("Reshape", x, make.numbers(-1, shape[-1]), to=f"{to}_tokens")


def _shaped(make: Builder, module: QuantLinear, shape: Shape, to: str, product: Callable[[str], str]) -> str:
    """product: makes [M, N], whose name it is told -> [..., N]."""
    if len(shape) == 2:
        return product(to)
    return make.op("Reshape", product(f"{to}_rows"), make.numbers(*shape[:-1], module.out_features), to=to)


def _per_token(make: Builder, x: str, shape: Shape, to: str) -> str:
    """x [..., K] rounded to int8 with a scale for each token, and back: [M, K]."""
    flat = _rows(make, x, shape, to)
    most = make.op("ReduceMax", make.op("Abs", flat, to=f"{to}_abs"), make.numbers(-1), to=f"{to}_absmax", keepdims=0)
    step = make.op("Div", most, make.scalar(INT8_MAX), to=f"{to}_step")
    scale = make.op("Max", step, make.scalar(SMALLEST_TOKEN_SCALE), to=f"{to}_token_scale")  # [M]
    # Without zeros of its own type onnxruntime's optimizer takes the integers for unsigned ones.
    zero = make.tensor(torch.zeros(math.prod(shape[:-1]), dtype=torch.int8), f"{to}_token_offset")
    q = make.op("QuantizeLinear", flat, scale, zero, to=f"{to}_input_q", axis=0)
    return make.op("DequantizeLinear", q, scale, zero, to=f"{to}_input", axis=0)


def _dynamic(make: Builder, module: DynamicQuantLinear, name: str, x: str, shape: Shape, to: str) -> str:
    values = _per_token(make, x, shape, to)
    bias = None if module.bias is None else make.tensor(module.bias.float(), f"{name}.bias")
    weight = _per_channel(make, module, name, to)
    return _shaped(make, module, shape, to, lambda at: _product(make, values, weight, bias, at))


def _groups(make: Builder, module: GroupQuantLinear, name: str, x: str, shape: Shape, to: str) -> str:
    """The scale of a block is the product of the two stored ones."""
    if module.in_features % 2 and module.out_features % 2:
        raise NoRule(f"the 4-bit weight of {name}, of an odd number of values")
    scale = (module.weight_scale.float() * module.weight_scale_second.float()).contiguous()  # [N, K/G]
    weight = make.op(
        "DequantizeLinear",
        make.int4(module.weight, f"{name}.weight"),
        make.tensor(scale, f"{name}.weight_scale"),
        to=f"{to}_weight",
        axis=1,
        block_size=module.group_size,
    )
    if module.weight_only:
        return _product(make, x, weight, None, to)
    bias = None if module.bias is None else make.tensor(module.bias.float(), f"{name}.bias")
    values = _per_token(make, x, shape, to)
    return _shaped(make, module, shape, to, lambda at: _product(make, values, weight, bias, at))


QUANTIZED: dict[type[QuantLinear], Callable[..., str]] = {
    StaticQuantLinear: _static,
    DynamicQuantLinear: _dynamic,
    GroupQuantLinear: _groups,
}
