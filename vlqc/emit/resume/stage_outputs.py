"""What stages returned, in files: so that a run that was interrupted can answer for stages that it does not run again.

A value is described in JSON: tensors by dtype, shape, strides and place in the file. Nothing is unpickled: a file that
somebody else put there can hold wrong numbers, but no code.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vlqc.ir.tensor_layout import bytes_of, laid_out, offset_of

PLAIN = (type(None), bool, int, float, str)
DTYPES = {str(it).removeprefix("torch."): it for it in (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)}  # fmt: skip


class CannotBeKept(Exception):
    """A value with something in it that is neither a tensor nor plain data."""


def described(value: Any, place: Callable[[Tensor], int]) -> Any:
    """A value as JSON; place: is shown every tensor and says where its bytes begin. CannotBeKept."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise CannotBeKept(dtype)
        on_device = value.device.type != "cpu"
        layout = [dtype, list(value.shape), list(value.stride()), offset_of(value)]
        return {"tensor": [*layout, on_device, place(value)]}
    if type(value) in (tuple, list):
        return {type(value).__name__: [described(each, place) for each in value]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: described(each, place) for key, each in value.items()}}
    if type(value) in PLAIN:
        return value
    raise CannotBeKept(type(value).__name__)


def rebuilt(description: Any, fill: Callable[[Tensor, int], None], device: torch.device) -> Any:
    """`described` backwards; fill: is shown bytes [n] of every tensor, to be filled, and where they begin."""
    if not isinstance(description, dict):
        return description
    ((kind, content),) = description.items()
    if kind == "tensor":
        dtype, shape, stride, offset, on_device, begin = content
        tensor, room = laid_out(DTYPES[dtype], shape, stride, offset)
        fill(room, begin)
        return tensor.to(device) if on_device else tensor
    if kind == "dict":
        return {key: rebuilt(each, fill, device) for key, each in content.items()}
    values = [rebuilt(each, fill, device) for each in content]
    return tuple(values) if kind == "tuple" else values


def placeholder(description: Any, device: torch.device) -> Any:
    """A value of that form in place of one that nobody reads: its floats are NaN, so that whoever did would show."""

    def unknown(tensor: Tensor) -> Tensor:
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.zero_()

    made = rebuilt(description, lambda flat, begin: None, device)
    return torch.utils._pytree.tree_map_only(Tensor, unknown, made)


class OutputsWriter:
    """Writes the values of one stage, one after the other, into one file."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")

    def add(self, value: Any) -> Any:
        """The value as JSON. CannotBeKept, or OSError if the disk is full."""
        return described(value, self._write)

    def close(self) -> None:
        self._file.close()

    def _write(self, tensor: Tensor) -> int:
        begin = self._file.tell()
        self._file.write(bytes_of(tensor).cpu().numpy().data)
        return begin


def read_value(path: Path, description: Any, device: torch.device) -> Any:
    """The value that `OutputsWriter.add` described, from its file."""
    with path.open("rb", buffering=0) as file:

        def fill(flat: Tensor, begin: int) -> None:
            file.seek(begin)
            rest = flat.numpy().data
            while rest:
                got = file.readinto(rest)
                if not got:
                    raise OSError(f"{path.name} became shorter while it was read")
                rest = rest[got:]

        return rebuilt(description, fill, device)
