"""Safe reading of safetensors files and JSON: whatever the bytes are, the answer is tensors or a list of faults.

Written for verification, so it trusts nothing: neither the header nor the file's length. Independent of the compiler's
own reader and writer, so that a mistake there cannot hide here. One tensor, or a slice of its rows, in memory at a
time.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlqc.files import json_value, ordinary_bytes

Array = npt.NDArray[Any]

# safetensors dtype code -> NumPy type of the stored bits (bfloat16 has no NumPy type: its bits are read as uint16)
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
HEADER_LIMIT = 100_000_000  # bytes; safetensors' own limit
NO_FILE = "is not an ordinary file"  # a pipe or a device may never end
CHUNK_ELEMENTS = 1 << 22  # rows are read in slices of about this many elements


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: file, dtype code, shape and the byte its data begins at."""

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
        """The whole tensor: integers as stored, floats as float32 (float64 stays), in the tensor's shape."""
        return self._elements(0, self.count).reshape(self.shape)

    def rows(self) -> Iterator[tuple[int, Array]]:
        """(first row, slice of rows) over the first dimension, values as in `read`. 0 dimensions are one row."""
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
        kind = STORED[self.dtype]
        offset = self.begin + start * kind.itemsize
        values = np.fromfile(self.file, kind, stop - start, offset=offset)
        if values.size != stop - start:
            raise OSError(f"{self.file.name} became shorter while it was read")
        if self.dtype == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32) if self.dtype == "F16" else values


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


def read_json(path: Path) -> tuple[dict[str, Any] | None, str]:
    """File -> (object, "") or (None, what is wrong in words). NaN, and a key given twice, are wrong."""
    content, trouble = json_in(path)
    if trouble:
        return None, trouble
    return (content, "") if isinstance(content, dict) else (None, "is not a JSON object")


def json_in(path: Path) -> tuple[Any, str]:
    """File -> (what it says, "") or (None, what is wrong in words)."""
    if not path.is_file():
        return None, NO_FILE
    try:
        return json_value(ordinary_bytes(path).decode()), ""
    except (OSError, ValueError) as error:
        return None, f"cannot be read as JSON: {error}"


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} appears twice")
    return content


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any], list[str]]:
    """safetensors file -> (tensors by name, metadata, what is wrong in words), without tensors whose entry is wrong."""
    if not path.is_file():
        return {}, {}, [f"it {NO_FILE}"]
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, HEADER_LIMIT):
                return {}, {}, [f"the header claims {length} bytes in a file of {size}: truncated, or not safetensors"]
            text = file.read(length)
        header = json.loads(text, object_pairs_hook=_object_without_repeats)
    except (OSError, ValueError, RecursionError) as error:
        return {}, {}, [f"the header cannot be read: {error}"]
    if not isinstance(header, dict):
        return {}, {}, ["the header is not a JSON object"]
    metadata = header.pop("__metadata__", {})
    faults: list[str] = []
    tensors = {}
    spans = []
    for name, entry in header.items():
        span = _span(entry)
        if isinstance(span, str):
            faults.append(f"tensor {name!r}: {span}")
            continue
        begin, end = span
        spans.append((begin, end, name))
        if 8 + length + end > size:
            faults.append(f"tensor {name!r} ends at byte {8 + length + end} of a file of {size}: the file is truncated")
            continue
        tensors[name] = StoredTensor(name, path, entry["dtype"], tuple(entry["shape"]), 8 + length + begin)
    faults += _layout_faults(spans, size - 8 - length)
    return tensors, metadata if isinstance(metadata, dict) else {}, faults


def _span(entry: Any) -> tuple[int, int] | str:
    """Header entry -> (begin, end) of its data, or what is wrong with it."""
    if not isinstance(entry, dict):
        return "its header entry is not an object"
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in STORED:
        return f"unknown dtype {dtype!r}"
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        return f"its shape {shape!r} is not a list of sizes"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        return f"its data_offsets {offsets!r} are not two numbers"
    begin, end = offsets
    if begin < 0 or end - begin != math.prod(shape) * STORED[dtype].itemsize:
        return f"{dtype} {shape} does not fill bytes {begin} to {end}"
    return begin, end


def _layout_faults(spans: list[tuple[int, int, str]], available: int) -> list[str]:
    """Tensors must follow each other without gap or overlap, up to the end of the file."""
    faults = []
    position = 0
    for begin, end, name in sorted(spans):
        if begin < position:
            faults.append(f"tensor {name!r} begins inside the tensor before it (byte {begin}, expected {position})")
        elif begin > position:
            faults.append(f"{begin - position} unused bytes before tensor {name!r}")
        position = max(position, end)
    if available > position:
        faults.append(f"{available - position} unused bytes at the end")
    return faults
