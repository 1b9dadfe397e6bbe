"""Safetensors files written front to back, one tensor at a time, each byte once.

The header of the format stands before the data and lists every offset, which are known only at the end. So room for it
is reserved, the data follows, and the header is filled in last, padded with spaces as the format allows.
"""

import json
import os
import struct
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from vlqc.errors import InternalError

DTYPE_NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.int8: "I8",
}  # fmt: skip
ALIGNMENT = 8
LENGTH_FIELD = 8  # the header's own length, little-endian, at the start of the file
ENTRY_BYTES = 160  # of header per tensor beside its name: dtype, shape, two offsets, punctuation


class ShardWriter:
    """Writes tensors into one file, or into several of at most `limit` bytes with an index.

    The format allows no gaps, and readers want aligned tensors: one whose size is no multiple of 8 bytes waits until
    its file is closed. A tensor larger than `limit` gets a file of its own.
    """

    def __init__(self, folder: Path, *, header_bytes: int, limit: int | None = None) -> None:
        self.folder, self.limit = folder, limit
        self.total_bytes = 0
        self.weight_map: dict[str, int] = {}
        self._header_bytes = -(-header_bytes // ALIGNMENT) * ALIGNMENT
        self._files: list[Path] = []
        self._file: BinaryIO | None = None
        self._entries: dict[str, dict[str, object]] = {}
        self._waiting: list[tuple[str, Tensor]] = []
        self._filled = 0
        self._promised = 0

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
        else:
            self._write(name, tensor)

    def sync(self) -> None:
        """Returns once all that was written to the open file is on the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

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
        path = self.folder / f".{len(self._files):05}.partial"
        self._file = path.open("wb")
        self._file.seek(LENGTH_FIELD + self._header_bytes)
        self._entries, self._filled, self._promised = {}, 0, 0

    def _write(self, name: str, tensor: Tensor) -> None:
        assert self._file is not None
        raw = tensor.flatten().view(torch.uint8).numpy()
        self._file.write(raw.data)
        offsets = [self._filled, self._filled + raw.nbytes]
        self._entries[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
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
        self._files.append(Path(self._file.name))
        self._file.close()
        self._file = None
