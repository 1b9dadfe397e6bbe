"""Nested values with tensors as JSON plus raw bytes; strides and alignment of the tensors are preserved.

The last bits of floating-point arithmetic may depend on strides and alignment, so a restored tensor has the same ones.
Nothing is unpickled: a manipulated file can hold wrong numbers, but no code.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

ALIGNMENT = 64  # elements: the storage offset is preserved modulo this
PLAIN_TYPES = (type(None), bool, int, float, str)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)}  # fmt: skip


class NotSerializable(Exception):
    """A value contains something other than tensors and plain data. The message is the name of its type or dtype."""


def serialize(value: Any, write: Callable[[Tensor], int]) -> Any:
    """Value -> JSON. Raises NotSerializable.

    value: tensors, None, bool, int, float and str, nested in tuples, lists and dicts with str keys.
    write: called with each tensor; returns an integer by which `deserialize` finds its data, such as a file offset.
    """
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise NotSerializable(dtype)
        layout = [dtype, list(value.shape), list(value.stride()), aligned_offset(value)]
        return {"tensor": [*layout, value.device.type != "cpu", write(value)]}
    if type(value) in (tuple, list):
        return {type(value).__name__: [serialize(item, write) for item in value]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: serialize(item, write) for key, item in value.items()}}
    if type(value) in PLAIN_TYPES:
        return value
    raise NotSerializable(type(value).__name__)


def deserialize(spec: Any, read: Callable[[Tensor, int], None], device: torch.device) -> Any:
    """The inverse of `serialize`.

    spec: what `serialize` returned. read: called with an uninitialized uint8 tensor [n] to fill, and what `write`
    returned. device: of tensors that were not on the CPU.
    """
    if not isinstance(spec, dict):
        return spec
    ((kind, content),) = spec.items()
    if kind == "tensor":
        dtype, shape, stride, offset, on_device, location = content
        tensor, data = empty_strided(DTYPES[dtype], shape, stride, offset)
        read(data, location)
        return tensor.to(device) if on_device else tensor
    if kind == "dict":
        return {key: deserialize(item, read, device) for key, item in content.items()}
    values = [deserialize(item, read, device) for item in content]
    return tuple(values) if kind == "tuple" else values


def placeholder(spec: Any, device: torch.device) -> Any:
    """A value of the same structure whose floats are NaN, so that any use of it shows, and whose integers are 0."""

    def clear(tensor: Tensor) -> Tensor:
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.zero_()

    value = deserialize(spec, lambda data, location: None, device)
    return tree_map_only(Tensor, clear, value)


# ---- memory layout ---------------------------------------------------------------------------------------------------


def span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Number of elements in the storage from the first to the last element of a tensor, gaps included."""
    if 0 in shape:
        return 0
    return int(1 + sum((length - 1) * step for length, step in zip(shape, stride, strict=True)))


def raw_bytes(tensor: Tensor) -> Tensor:
    """uint8 [n]: a view of the part of the storage that a tensor spans, gaps included."""
    return tensor.detach().as_strided((span(tensor.shape, tensor.stride()),), (1,)).view(torch.uint8)


def aligned_offset(tensor: Tensor) -> int:
    """The storage offset modulo ALIGNMENT, in elements."""
    return int(tensor.storage_offset()) % ALIGNMENT


def empty_strided(
    dtype: torch.dtype,
    shape: Sequence[int],
    stride: Sequence[int],
    offset: int,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """An uninitialized tensor with this layout, and a uint8 view [n] of the memory that it spans."""
    flat = torch.empty(offset + span(shape, stride), dtype=dtype, device=device)[offset:]
    return flat.as_strided(tuple(shape), tuple(stride)), flat.view(torch.uint8)
