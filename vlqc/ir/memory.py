"""Memory of this process: tensors in files, whose pages can be dropped, and freed memory that goes back to the system.

The weights of all experts of a layer do not fit into memory in float32, but only one expert's are read at a time. So
they are mapped from files: every function runs on them unchanged, and `release_pages` drops what is not in use. The
files keep the data; the system writes them to the disk if it needs the memory.
"""

import ctypes
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


class _FileMapping(mmap.mmap):
    """A mapping of an unnamed file in `folder`. It ends with the last tensor that reads it."""

    folder: Path


_mappings: weakref.WeakValueDictionary[int, _FileMapping] = weakref.WeakValueDictionary()  # by address


def file_backed(shape: Sequence[int], dtype: torch.dtype, folder: Path) -> Tensor:
    """An uninitialized tensor in an unnamed file in `folder`, of which nothing is left after a crash.

    Its blocks are allocated, because a write to a full disk would raise SIGBUS. OSError if the disk is full.
    """
    size = math.prod(shape) * dtype.itemsize
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, size)
        mapping = _FileMapping(file.fileno(), size)
    mapping.folder = folder
    tensor = torch.frombuffer(mapping, dtype=dtype).view(tuple(shape))
    _mappings[tensor.data_ptr()] = mapping
    return tensor


def is_file_backed(tensor: Tensor) -> bool:
    """Whether `file_backed` created the memory of a tensor."""
    return tensor.data_ptr() in _mappings


def file_backed_copy(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of a tensor, in a file if `like` is in one, otherwise the tensor itself."""
    mapping = _mappings.get(like.data_ptr())
    if mapping is None:
        return tensor
    copy = file_backed(tensor.shape, tensor.dtype, mapping.folder)
    copy.copy_(tensor)
    release_pages(copy)
    return copy


def release_pages(*tensors: Tensor) -> None:
    """Drops the pages of file-backed tensors from memory; reading them again reads the file. No effect on others."""
    for tensor in tensors:
        if (mapping := _mappings.get(tensor.data_ptr())) is not None:
            mapping.madvise(mmap.MADV_DONTNEED)


def release_unused_memory() -> None:
    """Makes glibc return freed heap memory to the system; elsewhere does nothing.

    The temporaries of a stage have many sizes, so that the allocator keeps far more than it reuses.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
