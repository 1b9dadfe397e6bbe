"""Reads and checks the header of a safetensors file: dtype, shape and byte range of every tensor.

The one reader of headers in vlqc. It is independent of the writer in `vlqc.emit` and trusts neither the header nor the
length of the file. Unlike `safetensors.safe_open` it lists all faults and rejects a name that is given twice, of which
other readers silently keep the last entry.
"""

import math
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlqc.files import parse_json
from vlqc.formatting import excerpt

LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
NAME = 120  # characters of a tensor's name in a message
LENGTH_BYTES = 8  # little-endian length of the JSON that follows
ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """dtype code, shape, and the offsets in the file (not in the data section) where the data begins and ends."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """tensors: name -> entry, without those whose entry is wrong; metadata: `__metadata__`; faults: one text each."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, Any]
    faults: list[str]


def read_header_bytes(path: Path) -> bytes:
    """The length field and the JSON of a header. OSError; ValueError if the file is not regular or too short."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may never end
        raise ValueError("it is not a regular file")
    with path.open("rb") as file:
        field = file.read(LENGTH_BYTES)
        length = int.from_bytes(field, "little")
        if len(field) < LENGTH_BYTES or length > min(status.st_size - LENGTH_BYTES, LONGEST_HEADER):
            claim = f"it claims a header of {length} bytes in a file of {status.st_size}"
            raise ValueError(f"{claim}: truncated, or not a safetensors file")
        return field + file.read(length)


def read_header(path: Path) -> Header:
    """Header of a safetensors file. OSError or ValueError if it cannot be read; faults of entries are in the result.

    The size of a tensor whose dtype is not in ITEM_SIZES is not checked.
    """
    raw = read_header_bytes(path)
    header = parse_json(raw[LENGTH_BYTES:].decode())
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    data, size = len(raw), path.stat().st_size
    tensors: dict[str, TensorEntry] = {}
    faults: list[str] = []
    ranges: list[tuple[int, int, str]] = []
    for name, values in header.items():
        entry = _entry(values, data)
        if isinstance(entry, str):
            faults.append(f"tensor {excerpt(name, NAME)}: {entry}")
            continue
        ranges.append((entry.begin, entry.end, name))
        if entry.end > size:
            where = f"ends at byte {excerpt(entry.end)} of a file of {size}"
            faults.append(f"tensor {excerpt(name, NAME)} {where}: the file is truncated")
        else:
            tensors[name] = entry
    faults += _layout_faults(ranges, data, size)
    return Header(tensors, metadata if isinstance(metadata, dict) else {}, faults)


def _entry(values: Any, data: int) -> TensorEntry | str:
    """One value of the header -> the entry, or what is wrong with it. data: offset of the data section."""
    if not isinstance(values, dict):
        return "its header entry is not an object"
    dtype, shape, offsets = (values.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str):
        return f"its dtype {excerpt(dtype)} is not a string"
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        return f"its shape {excerpt(shape)} is not a list of sizes"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        return f"its data_offsets {excerpt(offsets)} are not two integers"
    begin, end = offsets
    if not 0 <= begin <= end:
        return f"its data_offsets {excerpt(offsets)} are not a range of bytes"
    if dtype in ITEM_SIZES and end - begin != math.prod(shape) * ITEM_SIZES[dtype]:
        return f"{dtype} {excerpt(shape)} does not fill bytes {excerpt(begin)} to {excerpt(end)}"
    return TensorEntry(dtype, tuple(shape), data + begin, data + end)


def _layout_faults(ranges: list[tuple[int, int, str]], data: int, size: int) -> list[str]:
    """(begin, end, name) of all tensors must fill bytes data..size without gap or overlap."""
    faults = []
    position = data
    for begin, end, name in sorted(ranges):
        if begin < position:
            where = f"(byte {excerpt(begin)}, expected {excerpt(position)})"
            faults.append(f"tensor {excerpt(name, NAME)} begins inside the tensor before it {where}")
        elif begin > position:
            faults.append(f"{excerpt(begin - position)} unused bytes before tensor {excerpt(name, NAME)}")
        position = max(position, end)
    if size > position:
        faults.append(f"{size - position} unused bytes at the end")
    return faults
