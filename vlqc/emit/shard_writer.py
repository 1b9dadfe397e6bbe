"""Writes safetensors files one tensor at a time.

The format's header precedes the data and lists all offsets, which are known only at the end. So space for the header is
reserved, the data is appended, and the header is written last, padded with spaces as the format allows.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vlqc.errors import InternalError

DTYPE_NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.int8: "I8",
}  # fmt: skip
ALIGNMENT = 8
LENGTH_FIELD = 8  # bytes of the header length, little-endian, at the start of the file
CHUNK = 1 << 22
ENTRY_BYTES = 160  # of header per tensor besides its name: dtype, shape, two offsets, punctuation
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Damaged(Exception):
    """Files of an interrupted run have changed since it wrote them."""


class ShardWriter:
    """Writes tensors into one file, or into several of at most `limit` bytes with an index.

    The format allows no gaps, and readers expect aligned tensors: a tensor whose size is not a multiple of 8 bytes is
    held back until its file is closed. A tensor larger than `limit` gets a file of its own.

    header_bytes: reserved for each file's header; resumable: `commit` will record what was written, so that another
    writer can continue from there with `restore`.
    """

    def __init__(self, folder: Path, *, header_bytes: int, limit: int | None = None, resumable: bool = False) -> None:
        self.folder, self.limit, self.resumable = folder, limit, resumable
        self.total_bytes = 0
        self.weight_map: dict[str, int] = {}
        self._header_bytes = -(-header_bytes // ALIGNMENT) * ALIGNMENT
        self._files: list[Path] = []
        self._file: BinaryIO | None = None
        self._entries: dict[str, dict[str, object]] = {}
        self._unaligned: list[tuple[str, Tensor]] = []  # held back until the file is closed
        self._filled = 0  # bytes of data in the open file
        self._planned = 0  # the same, with those held back
        self._written: list[list[Any]] = []  # header entries since the last commit
        self._held_back: list[tuple[str, Tensor]] = []  # since the last commit
        self._digest = hashlib.sha256()  # of the data written since the last commit

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor from any device; InternalError for a name that was written before."""
        if name in self.weight_map:
            raise InternalError(f"{name} is written twice")
        tensor = tensor.detach().cpu().contiguous()
        size = tensor.numel() * tensor.element_size()
        if (
            self._file is not None
            and self.limit is not None
            and LENGTH_FIELD + self._header_bytes + self._planned + size > self.limit
        ):
            self._finish()
        if self._file is None:
            self._start()
        self._planned += size
        self.total_bytes += size
        self.weight_map[name] = len(self._files)
        if size % ALIGNMENT:
            self._unaligned.append((name, tensor.clone()))
            self._held_back.append(self._unaligned[-1])
        else:
            self._write(name, tensor)

    def sync(self) -> None:
        """Waits until everything written to the open file is on the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def commit(self) -> dict[str, Any]:
        """A JSON record of what was written since the last commit; it is on the disk when this returns."""
        self.sync()
        sync(self.folder)
        held_back = [
            [name, DTYPE_NAMES[tensor.dtype], list(tensor.shape), base64.b64encode(_raw(tensor)).decode()]
            for name, tensor in self._held_back
        ]
        record = {"written": self._written, "held_back": held_back, "sha256": self._digest.hexdigest()}
        self._written, self._held_back, self._digest = [], [], hashlib.sha256()
        return record

    def restore(self, records: Sequence[dict[str, Any]]) -> None:
        """Returns to the state of the last of another writer's commits; cuts off what was written after it.

        To be called before anything else, in the folder as the other writer left it, whether it was closed or not.
        Damaged if a file has changed since.
        """
        for path in self.folder.glob("*.safetensors"):  # of a closed writer: the names give the order
            number = re.search(r"-(\d{5})-of-\d{5}\.safetensors$", path.name)
            path.rename(self._partial(int(number[1]) - 1 if number else 0))
        begin = LENGTH_FIELD + self._header_bytes
        unaligned: dict[str, Tensor] = {}
        for record in records:
            self._check(record, begin)
            for name, dtype, shape, text in record["held_back"]:
                raw = bytearray(base64.b64decode(text))
                unaligned[name] = torch.frombuffer(raw, dtype=DTYPES[dtype]).reshape(shape)
            for name, dtype, shape, number, first, last in record["written"]:
                if number >= len(self._files) + (self._file is not None):
                    self._reopen(number)
                unaligned.pop(name, None)
                self.weight_map[name] = number
                self.total_bytes += last - first
                self._entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}
                self._filled = last
        if unaligned and self._file is None:
            self._reopen(0)
        self._unaligned = list(unaligned.items())
        self.weight_map |= dict.fromkeys(unaligned, len(self._files))
        self.total_bytes += sum(tensor.nbytes for tensor in unaligned.values())
        self._planned = self._filled + sum(tensor.nbytes for tensor in unaligned.values())
        if self._file is not None:
            self._file.truncate(begin + self._filled)
            self._file.seek(begin + self._filled)
        for path in self.folder.glob(".[0-9]*.partial"):
            if int(path.name[1:6]) >= len(self._files) + (self._file is not None):
                path.unlink()

    def _reopen(self, number: int) -> None:
        """Opens this file of another writer; those before it are complete."""
        if self._file is not None:
            self._file.close()
        self._files = [self._partial(each) for each in range(number)]
        path = self._partial(number)
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._entries, self._filled = {}, 0

    def _check(self, record: dict[str, Any], begin: int) -> None:
        """Damaged unless the data that a record describes has its digest. begin: offset of the data in a file."""
        digest = hashlib.sha256()
        for name, _, _, number, first, last in record["written"]:
            try:
                with self._partial(number).open("rb") as file:
                    file.seek(begin + first)
                    for position in range(first, last, CHUNK):
                        digest.update(file.read(min(CHUNK, last - position)))
            except FileNotFoundError:
                raise Damaged(f"the file of {name} is missing") from None
        if digest.hexdigest() != record["sha256"]:
            names = [entry[0] for entry in record["written"]]
            raise Damaged(f"{names[0]} to {names[-1]} have changed since they were written")

    def _partial(self, number: int) -> Path:
        return self.folder / f".{number:05}.partial"

    def close(self, stem: str) -> None:
        """Completes the last file, renames all to `stem`, numbered if there is a limit, and then writes an index."""
        if self._file is None and not self._files:
            self._start()
        if self._file is not None:
            self._finish()
        if self.limit is None:
            self._files[0].rename(self.folder / f"{stem}.safetensors")
            return
        names = [f"{stem}-{k + 1:05}-of-{len(self._files):05}.safetensors" for k in range(len(self._files))]
        for path, name in zip(self._files, names, strict=True):
            path.rename(self.folder / name)
        index = {
            "metadata": {"total_size": self.total_bytes},
            "weight_map": {tensor: names[number] for tensor, number in sorted(self.weight_map.items())},
        }
        path = self.folder / f"{stem}.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _start(self) -> None:
        self._file = self._partial(len(self._files)).open("wb")
        self._file.seek(LENGTH_FIELD + self._header_bytes)
        self._entries, self._filled, self._planned = {}, 0, 0

    def _write(self, name: str, tensor: Tensor) -> None:
        assert self._file is not None
        raw = _raw(tensor)
        self._file.write(raw)
        if self.resumable:
            self._digest.update(raw)
        dtype, shape, offsets = DTYPE_NAMES[tensor.dtype], list(tensor.shape), [self._filled, self._filled + raw.nbytes]
        self._entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        self._written.append([name, dtype, shape, len(self._files), *offsets])
        self._filled += raw.nbytes

    def _finish(self) -> None:
        assert self._file is not None
        for name, tensor in sorted(self._unaligned, key=lambda entry: (-entry[1].element_size(), entry[0])):
            self._write(name, tensor)
        self._unaligned.clear()
        header = {"__metadata__": {"format": "pt"}, **self._entries}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > self._header_bytes:
            raise InternalError(f"a weight file's header needs {len(text)} bytes, {self._header_bytes} were reserved")
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._header_bytes) + text.ljust(self._header_bytes))
        if self.resumable:
            self.sync()
        self._files.append(Path(self._file.name))
        self._file.close()
        self._file = None


def most_header_bytes(data: int, header_bytes: int, limit: int | None) -> int:
    """An upper bound of the headers of all files with so many bytes of tensors, whatever their order; exact for one
    file. header_bytes, limit: as for `ShardWriter`, and the limit is larger than the header."""
    size = LENGTH_FIELD + -(-header_bytes // ALIGNMENT) * ALIGNMENT
    if limit is None or size + data <= limit:
        return size
    return size * (2 * data // max(limit - size, 1) + 1)  # two files that follow each other hold more than the limit


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    raw: memoryview = tensor.flatten().view(torch.uint8).numpy().data
    return raw


def sync(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():  # not all can sync folders
            os.fsync(handle)
    finally:
        os.close(handle)
