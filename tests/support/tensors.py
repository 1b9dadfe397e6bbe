"""Tensors in the safetensors format, written with NumPy only."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
ITEM = {"BF16": 2, "F16": 2, "F32": 4, "I8": 1, "I32": 4, "I64": 8}


@dataclass
class Tensor:
    """One tensor, as bytes in a file."""

    dtype: str
    shape: list[int]
    data: bytes

    def flip(self, byte: int, bits: int) -> None:
        """Flips bits of one byte."""
        changed = bytearray(self.data)
        changed[byte] ^= bits
        self.data = bytes(changed)


def stored(values: Array, dtype: str) -> Tensor:
    """Values -> a tensor of that dtype code, rounding half to even."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
        data = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
    else:
        kinds = {"F16": np.float16, "F32": np.float32, "I8": np.int8, "I32": np.int32, "I64": np.int64}
        data = np.asarray(values).astype(kinds[dtype])
    return Tensor(dtype, list(np.shape(values)), np.ascontiguousarray(data).tobytes())


def rounded(values: Array, dtype: str) -> Array:
    """The float32 values that `stored` keeps."""
    tensor = stored(values, dtype)
    if dtype == "BF16":
        bits = np.frombuffer(tensor.data, np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(tensor.shape)
    return np.frombuffer(tensor.data, np.float16).astype(np.float32).reshape(tensor.shape)


def safetensors_bytes(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Header length, header, data: the whole format."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for name, tensor in tensors.items():
        end = position + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(tensor.data for tensor in tensors.values())
