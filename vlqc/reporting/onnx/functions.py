"""Functions that stages call, as ONNX nodes. A graph is recorded for fixed shapes, and so is what comes of it here.

A rule gets the node's arguments with values in place of nodes: the name of a value in the ONNX graph as `Value`, a list
of them for what returns several, or a real tensor where it depends on integers alone (see `export.known`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlqc.reporting.onnx.builder import TYPES, Builder
from vlqc.reporting.onnx.modules import NoRule, export_activation

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """A value of the ONNX graph."""

    name: str
    shape: Shape
    dtype: torch.dtype


@dataclass(frozen=True)
class Rules:
    """One node on its way: where it goes, what it is called, of what shape and dtype its value is; None: several."""

    make: Builder
    to: str
    shape: Shape | None
    dtype: torch.dtype | None

    def value(self, name: str) -> Value:
        assert self.shape is not None and self.dtype is not None
        return Value(name, self.shape, self.dtype)

    def input(self, given: Any, like: torch.dtype = torch.float32) -> str:
        """An operand as a name: a value, a tensor or a number."""
        if isinstance(given, Value):
            return given.name
        if isinstance(given, Tensor):
            return self.make.tensor(given, f"{self.to}_constant")
        if isinstance(given, int | float) and like == torch.float32:
            return self.make.scalar(float(given))
        if isinstance(given, int):
            return self.make.tensor(torch.tensor(given, dtype=like), f"{self.to}_constant")
        raise NoRule(f"an operand that is a {type(given).__name__}")

    def op(self, kind: str, *inputs: str, **attributes: Any) -> Value:
        return self.value(self.make.op(kind, *inputs, to=self.to, **attributes))


def _reshape(it: Rules, x: Value, *_: Any, **__: Any) -> Value:
    assert it.shape is not None
    return it.op("Reshape", x.name, it.make.numbers(*it.shape))


def _same(it: Rules, x: Value, *_: Any, **__: Any) -> Value:
    return it.op("Identity", x.name)


def _cast(it: Rules, x: Value, *_: Any, **__: Any) -> Value:
    assert it.dtype is not None
    if it.dtype == x.dtype:
        return it.op("Identity", x.name)
    if it.dtype not in TYPES:
        raise NoRule(f"a cast to {it.dtype}")
    return it.value(it.make.cast(x.name, it.dtype, to=it.to))


def _transpose(it: Rules, x: Value, dim0: int, dim1: int) -> Value:
    order = list(range(len(x.shape)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return it.op("Transpose", x.name, perm=order)


def _permute(it: Rules, x: Value, *dims: Any) -> Value:
    order = dims[0] if len(dims) == 1 and isinstance(dims[0], tuple | list) else dims
    return it.op("Transpose", x.name, perm=[dim % len(x.shape) for dim in order])


def _expand(it: Rules, x: Value, *_: Any, **__: Any) -> Value:
    assert it.shape is not None
    return it.op("Expand", x.name, it.make.numbers(*it.shape))


def _split(it: Rules, x: Value, size: Any, dim: int = 0) -> list[Value]:
    axis = dim % len(x.shape)
    total = x.shape[axis]
    sizes = [min(size, total - begin) for begin in range(0, total, size)] if isinstance(size, int) else list(size)
    return _cut(it, x, sizes, axis)


def _chunk(it: Rules, x: Value, chunks: int, dim: int = 0) -> list[Value]:
    return _split(it, x, -(-x.shape[dim] // chunks), dim)


def _cut(it: Rules, x: Value, sizes: list[int], axis: int) -> list[Value]:
    names = [f"{it.to}_{number}" for number in range(len(sizes))]
    outputs = it.make.ops("Split", x.name, it.make.numbers(*sizes), to=names, axis=axis)
    return [
        Value(name, (*x.shape[:axis], size, *x.shape[axis + 1 :]), x.dtype)
        for name, size in zip(outputs, sizes, strict=True)
    ]


def _unbind(it: Rules, x: Value, dim: int = 0) -> list[Value]:
    axis = dim % len(x.shape)
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    parts = _cut(it, x, [1] * x.shape[axis], axis)
    squeezed = [it.make.op("Squeeze", part.name, it.make.numbers(axis), to=f"{part.name}_only") for part in parts]
    return [Value(name, shape, x.dtype) for name in squeezed]


def _getitem(it: Rules, x: Any, index: Any) -> Any:
    if isinstance(x, list):
        return x[index]
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [part for part in parts if not isinstance(part, Tensor)]:
        place = next(number for number, part in enumerate(parts) if part is Ellipsis)
        taken = sum(part is not None and part is not Ellipsis for part in parts)
        parts[place : place + 1] = [slice(None)] * (len(x.shape) - taken)
    name, axis = x.name, 0
    for part in parts:
        if part is None:
            continue
        if isinstance(part, slice):
            begin, end, step = (_whole(bound) for bound in (part.start, part.stop, part.step))
            begin, end, step = slice(begin, end, step).indices(x.shape[axis])
            if (begin, end, step) != (0, x.shape[axis], 1):
                bounds = (it.make.numbers(number) for number in (begin, end, axis, step))
                name = it.make.op("Slice", name, *bounds, to=f"{it.to}_slice")
        elif isinstance(part, Tensor) and part.dtype in (torch.int64, torch.int32) and part.ndim <= 1:
            name = it.make.op("Gather", name, it.make.tensor(part.long(), f"{it.to}_index"), axis=axis)
        elif isinstance(part, int):
            picked = it.make.numbers(part % x.shape[axis])
            name = it.make.op("Gather", name, picked, axis=axis, to=f"{it.to}_picked")
        else:
            raise NoRule(f"an index that is a {type(part).__name__}")
        axis += 1
    assert it.shape is not None
    return it.op("Reshape", name, it.make.numbers(*it.shape))


def _whole(bound: Any) -> int | None:
    """The bound of a slice as a number; a tensor that is known holds one."""
    return bound if bound is None else int(bound)


def _index_select(it: Rules, x: Value, dim: int, index: Tensor) -> Value:
    if not isinstance(index, Tensor):
        raise NoRule("an index that depends on what goes through the stage")
    return it.op("Gather", x.name, it.make.tensor(index.long(), f"{it.to}_index"), axis=dim % len(x.shape))


def _cat(it: Rules, tensors: Any, dim: int = 0) -> Value:
    assert it.shape is not None
    return it.op("Concat", *(it.input(part) for part in tensors), axis=dim % len(it.shape))


def _binary(kind: str) -> Callable[..., Value]:
    def rule(it: Rules, left: Any, right: Any) -> Value:
        return it.op(kind, it.input(left, _dtype(right)), it.input(right, _dtype(left)))

    return rule


def _reversed(kind: str) -> Callable[..., Value]:
    return lambda it, left, right: _binary(kind)(it, right, left)


def _dtype(value: Any) -> torch.dtype:
    return value.dtype if isinstance(value, Value | Tensor) else torch.float32


def _unary(kind: str) -> Callable[..., Value]:
    return lambda it, x: it.op(kind, x.name)


def _activation(kind: str) -> Callable[..., Value]:
    def rule(it: Rules, x: Value, *_: Any, approximate: str = "none", **__: Any) -> Value:
        wanted = "gelu_tanh" if kind == "gelu" and approximate == "tanh" else kind
        return it.value(export_activation(it.make, wanted, x.name, it.to))

    return rule


def _softmax(it: Rules, x: Value, dim: int = -1, dtype: Any = None, **_: Any) -> Value:
    return it.op("Softmax", x.name, axis=dim)


def _matmul(it: Rules, left: Any, right: Any) -> Value:
    return it.op("MatMul", it.input(left), it.input(right))


def _attention(
    it: Rules, query: Value, key: Value, value: Value, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Value:  # fmt: skip
    """softmax(query key^T * scale + mask) value, written out."""
    if dropout_p:
        raise NoRule("dropout")
    keys, values = key.name, value.name
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        keys, values = (_repeat_heads(it, one, query.shape[-3] // key.shape[-3]) for one in (key, value))
    order = list(range(len(key.shape)))
    turned = it.make.op("Transpose", keys, to=f"{it.to}_keys", perm=[*order[:-2], order[-1], order[-2]])
    factor = it.make.scalar(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    scores = it.make.op("MatMul", it.make.op("Mul", query.name, factor, to=f"{it.to}_scaled"), turned, to=f"{it.to}_qk")
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    if attn_mask is not None:
        mask = it.input(attn_mask)
        if attn_mask.dtype == torch.bool:
            nothing = it.make.scalar(-math.inf)
            scores = it.make.op("Where", mask, scores, nothing, to=f"{it.to}_masked")
        else:
            scores = it.make.op("Add", scores, mask, to=f"{it.to}_masked")
    return it.op("MatMul", it.make.op("Softmax", scores, to=f"{it.to}_shares", axis=-1), values)


def _repeat_heads(it: Rules, x: Value, times: int) -> str:
    """[..., H, S, D] -> [..., H * times, S, D], each head so often in a row."""
    before, (heads, rows, depth) = x.shape[:-3], x.shape[-3:]
    apart = it.make.op("Reshape", x.name, it.make.numbers(*before, heads, 1, rows, depth), to=f"{it.to}_heads")
    more = it.make.op("Expand", apart, it.make.numbers(*before, heads, times, rows, depth), to=f"{it.to}_repeated")
    return it.make.op("Reshape", more, it.make.numbers(*before, heads * times, rows, depth), to=f"{it.to}_all_heads")


def _observe(it: Rules, x: Value) -> Value:
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
