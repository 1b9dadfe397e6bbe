"""Files with what stages returned, so that a resumed run does not run finished stages again."""

from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vlqc.ir.serialization import deserialize, raw_bytes, serialize


class OutputsWriter:
    """Writes the outputs of one stage into one file, one sample after the other."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")

    def add(self, value: Any) -> Any:
        """Appends the tensors of a value; returns the rest as JSON, for `read_output`.

        Raises NotSerializable, or OSError if the disk is full.
        """
        return serialize(value, self._write)

    def close(self) -> None:
        self._file.close()

    def _write(self, tensor: Tensor) -> int:
        offset = self._file.tell()
        self._file.write(raw_bytes(tensor).cpu().numpy().data)
        return offset


def read_output(path: Path, spec: Any, device: torch.device) -> Any:
    """A value that `OutputsWriter.add` wrote. spec: what `add` returned; device: of tensors that were not on the CPU.

    Raises OSError if the file is too short.
    """
    with path.open("rb", buffering=0) as file:

        def read(data: Tensor, offset: int) -> None:
            file.seek(offset)
            rest = data.numpy().data
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise OSError(f"{path.name} is shorter than expected")
                rest = rest[count:]

        return deserialize(spec, read, device)
