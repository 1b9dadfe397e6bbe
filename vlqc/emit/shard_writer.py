"""Safetensors files written front to back, one tensor at a time, each byte once.

The header of the format stands before the data and lists every offset, which are known only at the end. So room for it
is reserved, the data follows, and the header is filled in last, padded with spaces as the format allows.
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
LENGTH_FIELD = 8  # the header's own length, little-endian, at the start of the file
CHUNK = 1 << 22
ENTRY_BYTES = 160  # of header per tensor beside its name: dtype, shape, two offsets, punctuation


DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Damaged(Exception):
    """What an interrupted run has left is not what it wrote."""


class ShardWriter:
    """Writes tensors into one file, or into several of at most `limit` bytes with an index.

    The format allows no gaps, and readers want aligned tensors: one whose size is no multiple of 8 bytes waits until
    its file is closed. A tensor larger than `limit` gets a file of its own.

    marked: `mark` will say what was written, so that another writer can go on from there: see `restore`.
    """

    def __init__(self, folder: Path, *, header_bytes: int, limit: int | None = None, marked: bool = False) -> None:
        self.folder, self.limit, self.marked = folder, limit, marked
        self.total_bytes = 0
        self.weight_map: dict[str, int] = {}
        self._header_bytes = -(-header_bytes // ALIGNMENT) * ALIGNMENT
        self._files: list[Path] = []
        self._file: BinaryIO | None = None
        self._entries: dict[str, dict[str, object]] = {}
        self._waiting: list[tuple[str, Tensor]] = []
        self._filled = 0
        self._promised = 0
        self._written: list[list[Any]] = []  # since the last mark, as their headers will have them
        self._held: list[tuple[str, Tensor]] = []  # since the last mark, those that wait
        self._digest = hashlib.sha256()  # of what was written since the last mark

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor of any device; InternalError for a name that was written before."""
        if name in self.weight_map:
            raise InternalError(f"{name} is written twice")
        tensor = tensor.detach().cpu().contiguous()
        size = tensor.numel() * tensor.element_size()
        if (
            self._file is not None
            and self.limit is not None
            and LENGTH_FIELD + self._header_bytes + self._promised + size > self.limit
        ):
            self._finish()
        if self._file is None:
            self._start()
        self._promised += size
        self.total_bytes += size
        self.weight_map[name] = len(self._files)
        if size % ALIGNMENT:
            self._waiting.append((name, tensor.clone()))
            self._held.append(self._waiting[-1])
        else:
            self._write(name, tensor)

    def sync(self) -> None:
        """Returns once all that was written to the open file is on the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def mark(self) -> dict[str, Any]:
        """What was written since the last mark, in JSON; it is on the disk when this returns."""
        self.sync()
        sync(self.folder)
        waiting = [
            [name, DTYPE_NAMES[it.dtype], list(it.shape), base64.b64encode(_raw(it)).decode()]
            for name, it in self._held
        ]
        made = {"written": self._written, "waiting": waiting, "sha256": self._digest.hexdigest()}
        self._written, self._held, self._digest = [], [], hashlib.sha256()
        return made

    def restore(self, marks: Sequence[dict[str, Any]]) -> None:
        """Goes back to the last of these marks, which another writer made: what was written behind it is cut off.

        To be called first, in the folder as it was left, complete or not. Damaged if a file is not what it was then.
        """
        for path in self.folder.glob("*.safetensors"):  # complete: the names tell the order
            number = re.search(r"-(\d{5})-of-\d{5}\.safetensors$", path.name)
            path.rename(self._partial(int(number[1]) - 1 if number else 0))
        begin = LENGTH_FIELD + self._header_bytes
        waiting: dict[str, Tensor] = {}
        for mark in marks:
            self._check(mark, begin)
            for name, dtype, shape, text in mark["waiting"]:
                raw = bytearray(base64.b64decode(text))
                waiting[name] = torch.frombuffer(raw, dtype=DTYPES[dtype]).reshape(shape)
            for name, dtype, shape, number, first, last in mark["written"]:
                if number >= len(self._files) + (self._file is not None):
                    self._leave(number)
                waiting.pop(name, None)
                self.weight_map[name] = number
                self.total_bytes += last - first
                self._entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}
                self._filled = last
        if waiting and self._file is None:
            self._leave(0)
        self._waiting = list(waiting.items())
        self.weight_map |= dict.fromkeys(waiting, len(self._files))
        self.total_bytes += sum(tensor.nbytes for tensor in waiting.values())
        self._promised = self._filled + sum(tensor.nbytes for tensor in waiting.values())
        if self._file is not None:
            self._file.truncate(begin + self._filled)
            self._file.seek(begin + self._filled)
        for path in self.folder.glob(".[0-9]*.partial"):
            if int(path.name[1:6]) >= len(self._files) + (self._file is not None):
                path.unlink()

    def _leave(self, number: int) -> None:
        """Takes the files before this number for complete, and opens this one."""
        if self._file is not None:
            self._file.close()
        self._files = [self._partial(each) for each in range(number)]
        path = self._partial(number)
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._entries, self._filled = {}, 0

    def _check(self, mark: dict[str, Any], begin: int) -> None:
        found = hashlib.sha256()
        for name, _, _, number, first, last in mark["written"]:
            try:
                with self._partial(number).open("rb") as file:
                    file.seek(begin + first)
                    for position in range(first, last, CHUNK):
                        found.update(file.read(min(CHUNK, last - position)))
            except FileNotFoundError:
                raise Damaged(f"the file of {name} is missing") from None
        if found.hexdigest() != mark["sha256"]:
            names = [entry[0] for entry in mark["written"]]
            raise Damaged(f"{names[0]} to {names[-1]} are not what was written")

    def _partial(self, number: int) -> Path:
        return self.folder / f".{number:05}.partial"

    def close(self, stem: str) -> None:
        """Completes the last file, names all of them after `stem`, and writes the index if there is one."""
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
        self._entries, self._filled, self._promised = {}, 0, 0

    def _write(self, name: str, tensor: Tensor) -> None:
        assert self._file is not None
        raw = _raw(tensor)
        self._file.write(raw)
        if self.marked:
            self._digest.update(raw)
        dtype, shape, offsets = DTYPE_NAMES[tensor.dtype], list(tensor.shape), [self._filled, self._filled + raw.nbytes]
        self._entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        self._written.append([name, dtype, shape, len(self._files), *offsets])
        self._filled += raw.nbytes

    def _finish(self) -> None:
        assert self._file is not None
        for name, tensor in sorted(self._waiting, key=lambda entry: (-entry[1].element_size(), entry[0])):
            self._write(name, tensor)
        self._waiting.clear()
        header = {"__metadata__": {"format": "pt"}, **self._entries}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > self._header_bytes:
            raise InternalError(f"a weight file's header needs {len(text)} bytes, {self._header_bytes} were reserved")
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._header_bytes) + text.ljust(self._header_bytes))
        if self.marked:
            self.sync()
        self._files.append(Path(self._file.name))
        self._file.close()
        self._file = None


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    raw: memoryview = tensor.flatten().view(torch.uint8).numpy().data
    return raw


def sync(path: Path) -> None:
    """Brings a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():  # some cannot sync a folder
            os.fsync(handle)
    finally:
        os.close(handle)
