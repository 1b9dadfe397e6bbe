"""Functions that stages call, as ONNX nodes with fixed shapes.

A rule gets the arguments of a node of the traced graph. Nodes among them are replaced by a `Value`, by a list of them
for functions with several outputs, or by a constant tensor if they depend on integer inputs only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlqc.reporting.onnx.builder import TYPES, Builder, type_of
from vlqc.reporting.onnx.modules import UnsupportedOperation, export_activation

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """A value of the ONNX graph."""

    name: str
    shape: Shape
    dtype: torch.dtype


@dataclass(frozen=True)
class NodeExporter:
    """Exports one node of the traced graph.

    output: prefix for the names of its values. shape, dtype: of its value; None if it has several.
    """

    builder: Builder
    output: str
    shape: Shape | None
    dtype: torch.dtype | None

    def value(self, name: str) -> Value:
        assert self.shape is not None and self.dtype is not None
        return Value(name, self.shape, self.dtype)

    def input(self, operand: Any, like: torch.dtype = torch.float32) -> str:
        """Name of an operand, which is a value, a tensor or a number. like: dtype of a number."""
        if isinstance(operand, Value):
            return operand.name
        if isinstance(operand, Tensor):
            return self.builder.tensor(operand, f"{self.output}_constant")
        if isinstance(operand, int | float) and like == torch.float32:
            return self.builder.scalar(float(operand))
        if isinstance(operand, int):
            return self.builder.tensor(torch.tensor(operand, dtype=like), f"{self.output}_constant")
        raise UnsupportedOperation(f"an operand that is a {type(operand).__name__}")

    def intermediate(self, kind: str, *inputs: str, suffix: str, **attributes: Any) -> str:
        """Adds a node for an intermediate result and returns its name."""
        return self.builder.op(kind, *inputs, output=f"{self.output}_{suffix}", **attributes)

    def op(self, kind: str, *inputs: str, **attributes: Any) -> Value:
        """Adds the node of the result."""
        return self.value(self.builder.op(kind, *inputs, output=self.output, **attributes))


def _reshape(node: NodeExporter, x: Value, *_: Any, **__: Any) -> Value:
    assert node.shape is not None
    return node.op("Reshape", x.name, node.builder.numbers(*node.shape))


def _same(node: NodeExporter, x: Value, *_: Any, **__: Any) -> Value:
    return node.op("Identity", x.name)


def _cast(node: NodeExporter, x: Value, *_: Any, **__: Any) -> Value:
    assert node.dtype is not None
    if node.dtype == x.dtype:
        return node.op("Identity", x.name)
    if node.dtype not in TYPES:
        raise UnsupportedOperation(f"a cast to {node.dtype}")
    return node.op("Cast", x.name, to=type_of(node.dtype))


def _transpose(node: NodeExporter, x: Value, dim0: int, dim1: int) -> Value:
    order = list(range(len(x.shape)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return node.op("Transpose", x.name, perm=order)


def _permute(node: NodeExporter, x: Value, *dims: Any) -> Value:
    order = dims[0] if len(dims) == 1 and isinstance(dims[0], tuple | list) else dims
    return node.op("Transpose", x.name, perm=[dim % len(x.shape) for dim in order])


def _expand(node: NodeExporter, x: Value, *_: Any, **__: Any) -> Value:
    assert node.shape is not None
    return node.op("Expand", x.name, node.builder.numbers(*node.shape))


def _split(node: NodeExporter, x: Value, size: Any, dim: int = 0) -> list[Value]:
    axis = dim % len(x.shape)
    total = x.shape[axis]
    sizes = [min(size, total - begin) for begin in range(0, total, size)] if isinstance(size, int) else list(size)
    return _cut(node, x, sizes, axis)


def _chunk(node: NodeExporter, x: Value, chunks: int, dim: int = 0) -> list[Value]:
    return _split(node, x, -(-x.shape[dim] // chunks), dim)


def _cut(node: NodeExporter, x: Value, sizes: list[int], axis: int) -> list[Value]:
    names = [f"{node.output}_{number}" for number in range(len(sizes))]
    outputs = node.builder.ops("Split", x.name, node.builder.numbers(*sizes), outputs=names, axis=axis)
    return [
        Value(name, (*x.shape[:axis], size, *x.shape[axis + 1 :]), x.dtype)
        for name, size in zip(outputs, sizes, strict=True)
    ]


def _unbind(node: NodeExporter, x: Value, dim: int = 0) -> list[Value]:
    axis = dim % len(x.shape)
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    parts = _cut(node, x, [1] * x.shape[axis], axis)
    squeezed = [
        node.builder.op("Squeeze", part.name, node.builder.numbers(axis), output=f"{part.name}_only") for part in parts
    ]
    return [Value(name, shape, x.dtype) for name in squeezed]


def _getitem(node: NodeExporter, x: Any, index: Any) -> Any:
    if isinstance(x, list):
        return x[index]
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [part for part in parts if not isinstance(part, Tensor)]:
        position = next(number for number, part in enumerate(parts) if part is Ellipsis)
        taken = sum(part is not None and part is not Ellipsis for part in parts)
        parts[position : position + 1] = [slice(None)] * (len(x.shape) - taken)
    name, axis = x.name, 0
    for part in parts:
        if part is None:
            continue
        if isinstance(part, slice):
            begin, end, step = (_whole(bound) for bound in (part.start, part.stop, part.step))
            begin, end, step = slice(begin, end, step).indices(x.shape[axis])
            if (begin, end, step) != (0, x.shape[axis], 1):
                bounds = (node.builder.numbers(number) for number in (begin, end, axis, step))
                name = node.intermediate("Slice", name, *bounds, suffix="slice")
        elif isinstance(part, Tensor) and part.dtype in (torch.int64, torch.int32) and part.ndim <= 1:
            name = node.builder.op("Gather", name, node.builder.tensor(part.long(), f"{node.output}_index"), axis=axis)
        elif isinstance(part, int):
            picked = node.builder.numbers(part % x.shape[axis])
            name = node.intermediate("Gather", name, picked, axis=axis, suffix="picked")
        else:
            raise UnsupportedOperation(f"an index that is a {type(part).__name__}")
        axis += 1
    assert node.shape is not None
    return node.op("Reshape", name, node.builder.numbers(*node.shape))


def _whole(bound: Any) -> int | None:
    """The bound of a slice as a number; it may be a constant tensor."""
    return bound if bound is None else int(bound)


def _index_select(node: NodeExporter, x: Value, dim: int, index: Tensor) -> Value:
    if not isinstance(index, Tensor):
        raise UnsupportedOperation("an index that is not constant")
    return node.op("Gather", x.name, node.builder.tensor(index.long(), f"{node.output}_index"), axis=dim % len(x.shape))


def _cat(node: NodeExporter, tensors: Any, dim: int = 0) -> Value:
    assert node.shape is not None
    return node.op("Concat", *(node.input(part) for part in tensors), axis=dim % len(node.shape))


def _binary(kind: str) -> Callable[..., Value]:
    def rule(node: NodeExporter, left: Any, right: Any) -> Value:
        return node.op(kind, node.input(left, _dtype(right)), node.input(right, _dtype(left)))

    return rule


def _reversed(kind: str) -> Callable[..., Value]:
    return lambda node, left, right: _binary(kind)(node, right, left)


def _dtype(value: Any) -> torch.dtype:
    return value.dtype if isinstance(value, Value | Tensor) else torch.float32


def _unary(kind: str) -> Callable[..., Value]:
    return lambda node, x: node.op(kind, x.name)


def _activation(kind: str) -> Callable[..., Value]:
    def rule(node: NodeExporter, x: Value, *_: Any, approximate: str = "none", **__: Any) -> Value:
        wanted = "gelu_tanh" if kind == "gelu" and approximate == "tanh" else kind
        return node.value(export_activation(node.builder, wanted, x.name, node.output))

    return rule


def _softmax(node: NodeExporter, x: Value, dim: int = -1, dtype: Any = None, **_: Any) -> Value:
    return node.op("Softmax", x.name, axis=dim)


def _matmul(node: NodeExporter, left: Any, right: Any) -> Value:
    return node.op("MatMul", node.input(left), node.input(right))


def _attention(
    node: NodeExporter, query: Value, key: Value, value: Value, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Value:  # fmt: skip
    """softmax(query key^T * scale + mask) value, as single operations."""
    if dropout_p:
        raise UnsupportedOperation("dropout")
    keys, values = key.name, value.name
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        keys, values = (_repeat_heads(node, one, query.shape[-3] // key.shape[-3]) for one in (key, value))
    order = list(range(len(key.shape)))
    transposed = node.intermediate("Transpose", keys, suffix="keys", perm=[*order[:-2], order[-1], order[-2]])
    factor = node.builder.scalar(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    scaled = node.intermediate("Mul", query.name, factor, suffix="scaled")
    scores = node.intermediate("MatMul", scaled, transposed, suffix="qk")
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    if attn_mask is not None:
        mask = node.input(attn_mask)
        if attn_mask.dtype == torch.bool:
            masked_value = node.builder.scalar(-math.inf)
            scores = node.intermediate("Where", mask, scores, masked_value, suffix="masked")
        else:
            scores = node.intermediate("Add", scores, mask, suffix="masked")
    return node.op("MatMul", node.intermediate("Softmax", scores, suffix="shares", axis=-1), values)


def _repeat_heads(node: NodeExporter, x: Value, times: int) -> str:
    """[..., H, S, D] -> [..., H * times, S, D], each head repeated in a row."""
    before, (heads, rows, depth) = x.shape[:-3], x.shape[-3:]
    split = node.intermediate("Reshape", x.name, node.builder.numbers(*before, heads, 1, rows, depth), suffix="heads")
    repeated = node.intermediate(
        "Expand", split, node.builder.numbers(*before, heads, times, rows, depth), suffix="repeated"
    )
    return node.intermediate(
        "Reshape", repeated, node.builder.numbers(*before, heads * times, rows, depth), suffix="all_heads"
    )


def _observe(node: NodeExporter, x: Value) -> Value:
    return x


def _rules() -> dict[str, Callable[..., Any]]:
    by_names: dict[str, Callable[..., Any]] = {
        "view reshape flatten unflatten unsqueeze squeeze view_as reshape_as": _reshape,
        "contiguous clone detach alias dropout": _same,
        "to float double half bfloat16 type type_as": _cast,
        "transpose swapaxes swapdims": _transpose,
        "permute": _permute,
        "expand expand_as": _expand,
        "split split_with_sizes": _split,
        "chunk": _chunk,
        "unbind": _unbind,
        "__getitem__ getitem": _getitem,
        "index_select": _index_select,
        "cat concat": _cat,
        "add __add__ __radd__ add_": _binary("Add"),
        "mul __mul__ __rmul__ multiply mul_": _binary("Mul"),
        "sub __sub__": _binary("Sub"),
        "__rsub__": _reversed("Sub"),
        "div __truediv__ true_divide divide": _binary("Div"),
        "pow __pow__": _binary("Pow"),
        "neg __neg__": _unary("Neg"),
        "sigmoid": _unary("Sigmoid"),
        "tanh": _unary("Tanh"),
        "sqrt": _unary("Sqrt"),
        "silu": _activation("silu"),
        "gelu": _activation("gelu"),
        "relu": _activation("relu"),
        "softmax": _softmax,
        "matmul __matmul__ bmm": _matmul,
        "scaled_dot_product_attention": _attention,
        "observe": _observe,
    }
    return {name: rule for names, rule in by_names.items() for name in names.split()}


RULES = _rules()
