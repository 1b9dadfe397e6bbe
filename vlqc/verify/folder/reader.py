"""Reads tensors from safetensors files, and JSON files, with NumPy alone; faults are returned, not raised.

Independent of the writer in `vlqc.emit`, so that a mistake there cannot hide here. At most one tensor, or a slice of
its rows, is in memory at a time.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlqc.families.family import TensorSlice
from vlqc.files import parse_json, read_regular_file
from vlqc.formatting import excerpt
from vlqc.frontend.checkpoint.header import read_header

Array = npt.NDArray[Any]

# safetensors dtype code -> NumPy dtype of the stored bits (bfloat16 has no NumPy dtype: its bits are read as uint16)
STORED = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
FLOATS = ("BF16", "F16", "F32", "F64")
CHUNK_ELEMENTS = 1 << 22  # rows are read in slices of about this many elements


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: dtype code, shape and the offset in the file where its data begins."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * STORED[self.dtype].itemsize

    def read(self) -> Array:
        """The whole tensor in its shape: integers as stored; BF16, F16 and F32 as float32, F64 as float64."""
        return self._elements(0, self.count).reshape(self.shape)

    def rows(self) -> Iterator[tuple[int, Array]]:
        """(first row, slice of rows) over the first dimension, as in `read`; a 0-dimensional tensor is one row."""
        first_dimension = self.shape[0] if self.shape else 1
        row = self.count // first_dimension if first_dimension else 0
        step = 2 * max(1, CHUNK_ELEMENTS // max(2 * row, 1))  # even: two rows of 4 bits may share their bytes
        for start in range(0, first_dimension, step):
            stop = min(start + step, first_dimension)
            yield start, self.part(start, stop)

    def part(self, start: int, stop: int) -> Array:
        """Rows start..stop of the first dimension, values as in `read`."""
        row = self.count // self.shape[0] if self.shape and self.shape[0] else 1
        return self._elements(start * row, stop * row).reshape(stop - start, *self.shape[1:])

    def _elements(self, start: int, stop: int) -> Array:
        dtype = STORED[self.dtype]
        offset = self.begin + start * dtype.itemsize
        values = np.fromfile(self.file, dtype, stop - start, offset=offset)
        if values.size != stop - start:
            raise OSError(f"{self.file.name} became shorter while it was read")
        if self.dtype == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32) if self.dtype == "F16" else values


@dataclass(frozen=True)
class StoredMatrix(StoredTensor):
    """A matrix inside a stored tensor of three dimensions, read as a tensor of its own. whole: that tensor."""

    whole: StoredTensor
    place: TensorSlice

    @classmethod
    def at(cls, name: str, whole: StoredTensor, place: TensorSlice) -> "StoredMatrix":
        """The matrix at a place of `whole`, under the name of its linear layer's weight."""
        return cls(name, whole.file, whole.dtype, place.shape(whole.shape), whole.begin, whole, place)

    def _elements(self, start: int, stop: int) -> Array:
        rows, columns = self.whole.shape[1:]
        first = self.place.index * rows * columns
        if not self.place.transposed:
            first += self.place.begin * columns
            return self.whole._elements(first + start, first + stop)
        stored = self.whole._elements(first, first + rows * columns).reshape(rows, columns)
        return stored[:, self.place.begin : self.place.end].T.reshape(-1)[start:stop]


def round_to(dtype: str, values: Array) -> Array:
    """float32 or float64 values -> the nearest values of BF16, F16 or F32 (half to even), as float32."""
    values = np.asarray(values, np.float32)
    if dtype == "F32":
        return values
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(values), rounded.astype(np.uint32).view(np.float32), values)


def read_json_object(path: Path) -> tuple[dict[str, Any] | None, str]:
    """File -> (object, "") or (None, what is wrong). NaN and a key that is given twice are wrong."""
    content, error = read_json(path)
    if error:
        return None, error
    return (content, "") if isinstance(content, dict) else (None, "is not a JSON object")


def read_json(path: Path) -> tuple[Any, str]:
    """File -> (value, "") or (None, what is wrong)."""
    if not path.is_file():
        return None, "is not a regular file"  # reading a pipe or a device may never end
    try:
        return parse_json(read_regular_file(path).decode()), ""
    except (OSError, ValueError) as error:
        return None, f"cannot be read as JSON: {error}"


def read_tensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any], list[str]]:
    """safetensors file -> (tensors by name, metadata, faults); a tensor whose header entry is wrong is left out."""
    try:
        header = read_header(path)
    except (OSError, ValueError) as error:
        return {}, {}, [f"the header cannot be read: {error}"]
    faults = header.faults + [
        f"tensor {excerpt(name, 120)}: unsupported dtype {excerpt(entry.dtype)}"
        for name, entry in header.tensors.items()
        if entry.dtype not in STORED
    ]
    tensors = {
        name: StoredTensor(name, path, entry.dtype, entry.shape, entry.begin)
        for name, entry in header.tensors.items()
        if entry.dtype in STORED
    }
    return tensors, header.metadata, faults
