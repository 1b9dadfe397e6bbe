"""Keeps activations between stages within a memory budget; the rest is moved to memory-mapped files.

The suspended forwards hold their tensors in local variables of the model's code, which cannot be replaced. So the
tensor object stays and only its data is moved: every reference then reads from the file.
"""

import mmap
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

GIB = 1 << 30
MIN_BYTES = 1 << 16  # smaller tensors stay in memory


class ActivationOffload:
    """Tracks live CPU tensors and moves those that exceed the budget into files.

    folder: where the files are created. They are unlinked at once, so nothing is left after a crash.
    budget: GiB of CPU tensors that may stay in memory; None for no limit.
    resident, offloaded: bytes of live tracked tensors in memory, and bytes moved to files so far.
    """

    def __init__(self, folder: Path, budget: float | None) -> None:
        self.folder = folder
        self.max_resident = None if budget is None else int(budget * GIB)
        self.resident = self.offloaded = 0
        self._tracked: dict[int, tuple[weakref.ref[Tensor], mmap.mmap | None]] = {}

    def offload(self, *values: Any) -> None:
        """Tracks the tensors in nested values that are not used for a while, and moves data beyond the budget to disk.

        Raises OSError if the disk is full.
        """
        if self.max_resident is None:
            return
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu" and tensor.nbytes >= MIN_BYTES:
                if id(tensor) not in self._tracked:
                    self._track(tensor, self.max_resident)
                mapping = self._tracked[id(tensor)][1]
                if mapping is not None:
                    mapping.madvise(mmap.MADV_DONTNEED)  # drops the pages; the file keeps the data

    def _track(self, tensor: Tensor, max_resident: int) -> None:
        key, size = id(tensor), tensor.nbytes
        mapping = None
        if self.resident + size > max_resident:
            mapping = self._map_file(size)
            data = torch.frombuffer(mapping, dtype=tensor.dtype).view(tensor.shape)
            data.copy_(tensor.detach())
            tensor.data = data
            self.offloaded += size
        else:
            self.resident += size

        def untrack(_: object) -> None:
            self._tracked.pop(key, None)
            if mapping is None:
                self.resident -= size

        self._tracked[key] = weakref.ref(tensor, untrack), mapping

    def _map_file(self, size: int) -> mmap.mmap:
        """A mapping of an unnamed file. Its blocks are allocated, because a write to a full disk would raise SIGBUS."""
        with tempfile.TemporaryFile(dir=self.folder, buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, size)
            return mmap.mmap(file.fileno(), size)
