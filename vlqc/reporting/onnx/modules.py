"""Modules of a stage as ONNX nodes: float and quantized linear layers, norms and activations.

A static W8A8 layer is QuantizeLinear -> DequantizeLinear -> MatMul with a DequantizeLinear of its int8 weight (one
scale per output channel) -> Add of a DequantizeLinear of its int32 bias, the pattern in which runtimes recognize int8
arithmetic. Dynamic layers compute the scale of each token before QuantizeLinear; W8A8_MIX layers are written in the
arithmetic that they are set to. W8A16 layers have float inputs, and no QuantizeLinear. 4-bit weights are INT4 with
blockwise DequantizeLinear.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlqc.kernels_ref.deq_scale import decode_deq_scale
from vlqc.kernels_ref.norm import ShiftedNorm
from vlqc.kernels_ref.quant_linear import QuantLinear
from vlqc.kernels_ref.quantize import INT8_MAX, SMALLEST_TOKEN_SCALE
from vlqc.reporting.onnx.builder import Builder
from vlqc.targets.schemes import Scheme

Shape = tuple[int, ...]


class UnsupportedOperation(Exception):
    """An operation without a rule. The message names it."""


def export_module(builder: Builder, module: nn.Module, name: str, x: str, shape: Shape, output: str) -> str:
    """Adds the nodes of a module and returns the name of its output. Raises UnsupportedOperation.

    name: checkpoint name of the module; x, shape: name and shape of its input; output: prefix for names.
    """
    if isinstance(module, nn.Linear):
        return _linear(builder, module, name, x, output)
    if isinstance(module, QuantLinear):
        return _quantized(builder, module, name, x, shape, output)
    if isinstance(module, ShiftedNorm):
        normalized = _norm(builder, module._norm[0], module.weight, name, x, f"{output}_unshifted")
        return builder.op("Add", normalized, builder.tensor(module.bias, f"{name}.bias"), output=output)
    if isinstance(module, nn.LayerNorm):
        inputs = [x, builder.tensor(module.weight, f"{name}.weight")]
        inputs += [builder.tensor(module.bias, f"{name}.bias")] if module.bias is not None else []
        return builder.op(
            "LayerNormalization", *inputs, output=output, axis=-len(module.normalized_shape), epsilon=module.eps
        )
    if type(module).__name__.endswith("RMSNorm"):
        return _norm(builder, module, module.get_parameter("weight"), name, x, output)
    if (activation := activation_of(module)) is not None:
        return export_activation(builder, activation, x, output)
    raise UnsupportedOperation(f"a module of class {type(module).__name__}")


def activation_of(module: nn.Module) -> str | None:
    """silu, gelu, gelu_tanh, relu or identity; None for other modules."""
    kind = type(module).__name__
    if kind in ("GELU", "GELUActivation"):
        return "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else "gelu"
    if isinstance(module, nn.Dropout) and module.training:
        return None
    known = {"SiLU": "silu", "SiLUActivation": "silu", "ReLU": "relu", "Identity": "identity", "Dropout": "identity"}
    return known.get(kind)


def export_activation(builder: Builder, kind: str, x: str, output: str) -> str:
    if kind == "silu":
        return builder.op("Mul", x, builder.op("Sigmoid", x, output=f"{output}_sigmoid"), output=output)
    if kind == "relu":
        return builder.op("Relu", x, output=output)
    if kind == "identity":
        return builder.op("Identity", x, output=output)
    return builder.op("Gelu", x, output=output, approximate="tanh" if kind == "gelu_tanh" else "none")


def _norm(builder: Builder, norm: Any, weight: Tensor, name: str, x: str, output: str) -> str:
    """x / sqrt(mean(x^2) + eps) * weight."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(eps, float):
        raise UnsupportedOperation(f"a norm of class {type(norm).__name__} without an epsilon")
    square = builder.op("Mul", x, x, output=f"{output}_square")
    mean = builder.op("ReduceMean", square, builder.numbers(-1), output=f"{output}_mean", keepdims=1)
    root = builder.op(
        "Sqrt", builder.op("Add", mean, builder.scalar(eps), output=f"{output}_eps"), output=f"{output}_root"
    )
    normalized = builder.op("Div", x, root, output=f"{output}_normalized")
    return builder.op("Mul", builder.tensor(weight, f"{name}.weight"), normalized, output=output)


# ---- linear layers ---------------------------------------------------------------------------------------------------


def _product(builder: Builder, x: str, weight: str, bias: str | None, output: str) -> str:
    """x [..., K] @ weight [N, K].T + bias."""
    transposed = builder.op("Transpose", weight, output=f"{output}_weight_transposed", perm=[1, 0])
    if bias is None:
        return builder.op("MatMul", x, transposed, output=output)
    return builder.op("Add", builder.op("MatMul", x, transposed, output=f"{output}_product"), bias, output=output)


def _linear(builder: Builder, linear: nn.Linear, name: str, x: str, output: str) -> str:
    bias = None if linear.bias is None else builder.tensor(linear.bias, f"{name}.bias")
    return _product(builder, x, builder.tensor(linear.weight, f"{name}.weight"), bias, output)


def _quantized(builder: Builder, module: QuantLinear, name: str, x: str, shape: Shape, output: str) -> str:
    spec = Scheme(module.scheme).spec
    if module.static_input:
        return _static(builder, module, name, x, shape, output)
    rounds_input = spec.activation.is_dynamic and not module.weight_only
    if spec.weight.per_group:
        return _groups(builder, module, name, x, shape, output, rounds_input=rounds_input)
    return _channels(builder, module, name, x, shape, output, rounds_input=rounds_input)


def _per_channel(builder: Builder, module: QuantLinear, name: str, output: str) -> str:
    """The int8 weight [N, K], dequantized by one scale per output channel."""
    weight = builder.tensor(module.weight, f"{name}.weight")
    scale = builder.tensor(module.weight_scale.float().flatten(), f"{name}.weight_scale")
    return builder.op("DequantizeLinear", weight, scale, output=f"{output}_weight", axis=0)


def _static(builder: Builder, module: QuantLinear, name: str, x: str, shape: Shape, output: str) -> str:
    """The int32 bias that runtimes expect is quant_bias + offset * sum of a row's integers, in units of deq_scale."""
    input_scale, input_offset, quant_bias = map(module.get_buffer, ("input_scale", "input_offset", "quant_bias"))
    scale = builder.tensor(input_scale.float().reshape(()), f"{name}.input_scale")
    zero = builder.tensor(input_offset.to(torch.int8).reshape(()), f"{name}.input_offset")
    q = builder.op("QuantizeLinear", _rows(builder, x, shape, output), scale, zero, output=f"{output}_input_q")
    values = builder.op("DequantizeLinear", q, scale, zero, output=f"{output}_input")
    steps = quant_bias.long() + int(input_offset) * module.weight.sum(1, dtype=torch.int64)
    if int(steps.abs().max()) >= 2**31:
        raise UnsupportedOperation(f"the bias of {name}, which has more than 32 bits without the offset of the input")
    deq_scale = builder.tensor(decode_deq_scale(module.get_buffer("deq_scale")), f"{name}.deq_scale")
    bias_q = builder.tensor(steps.to(torch.int32), f"{name}.bias_in_steps")
    bias = builder.op("DequantizeLinear", bias_q, deq_scale, output=f"{output}_bias", axis=0)
    weight = _per_channel(builder, module, name, output)
    return _shaped(builder, module, shape, output, lambda prefix: _product(builder, values, weight, bias, prefix))


def _rows(builder: Builder, x: str, shape: Shape, output: str) -> str:
    """[..., K] -> [M, K]: onnxruntime's optimizer handles quantized values correctly for matrices only."""
    return x if len(shape) == 2 else builder.op("Reshape", x, builder.numbers(-1, shape[-1]), output=f"{output}_tokens")


def _shaped(builder: Builder, module: QuantLinear, shape: Shape, output: str, product: Callable[[str], str]) -> str:
    """[M, N] -> [..., N]. product: called with a prefix, returns the name of [M, N]."""
    if len(shape) == 2:
        return product(output)
    return builder.op(
        "Reshape", product(f"{output}_rows"), builder.numbers(*shape[:-1], module.out_features), output=output
    )


def _per_token(builder: Builder, x: str, shape: Shape, output: str) -> str:
    """x [..., K] -> [M, K], quantized to int8 with one scale per token, and dequantized."""
    flat = _rows(builder, x, shape, output)
    absmax = builder.op(
        "ReduceMax",
        builder.op("Abs", flat, output=f"{output}_abs"),
        builder.numbers(-1),
        output=f"{output}_absmax",
        keepdims=0,
    )
    step = builder.op("Div", absmax, builder.scalar(INT8_MAX), output=f"{output}_step")
    scale = builder.op("Max", step, builder.scalar(SMALLEST_TOKEN_SCALE), output=f"{output}_token_scale")  # [M]
    # Without int8 zeros, onnxruntime's optimizer interprets the integers as unsigned.
    zero = builder.tensor(torch.zeros(math.prod(shape[:-1]), dtype=torch.int8), f"{output}_token_offset")
    q = builder.op("QuantizeLinear", flat, scale, zero, output=f"{output}_input_q", axis=0)
    return builder.op("DequantizeLinear", q, scale, zero, output=f"{output}_input", axis=0)


def _channels(
    builder: Builder, module: QuantLinear, name: str, x: str, shape: Shape, output: str, *, rounds_input: bool
) -> str:
    """int8 weights; the input is quantized per token, or float."""
    values = _per_token(builder, x, shape, output) if rounds_input else x
    bias = _bias(builder, module, name)
    weight = _per_channel(builder, module, name, output)
    if not rounds_input:
        return _product(builder, x, weight, bias, output)
    return _shaped(builder, module, shape, output, lambda prefix: _product(builder, values, weight, bias, prefix))


def _groups(
    builder: Builder, module: QuantLinear, name: str, x: str, shape: Shape, output: str, *, rounds_input: bool
) -> str:
    """4-bit weights. The scale of a block is the product of weight_scale and weight_scale_second."""
    if module.in_features % 2 and module.out_features % 2:
        raise UnsupportedOperation(f"the 4-bit weight of {name}, which has an odd number of values")
    second = module.get_buffer("weight_scale_second")
    weight = builder.op(
        "DequantizeLinear",
        builder.int4(module.weight, f"{name}.weight"),
        builder.tensor((module.weight_scale.float() * second.float()).contiguous(), f"{name}.weight_scale"),  # [N, K/G]
        output=f"{output}_weight",
        axis=1,
        block_size=module.group_size,
    )
    bias = _bias(builder, module, name)
    if not rounds_input:
        return _product(builder, x, weight, bias, output)
    values = _per_token(builder, x, shape, output)
    return _shaped(builder, module, shape, output, lambda prefix: _product(builder, values, weight, bias, prefix))


def _bias(builder: Builder, module: QuantLinear, name: str) -> str | None:
    return None if module.bias is None or module.weight_only else builder.tensor(module.bias.float(), f"{name}.bias")
