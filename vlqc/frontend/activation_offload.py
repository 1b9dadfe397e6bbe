"""What the samples hold between two stages, within a bound of memory: what is beyond lies in files and is mapped.

The suspended forwards hold their tensors in local variables of the model's own code, out of reach. So a tensor is not
replaced: its values move, under the same object, and whoever holds it reads them from the file when they are wanted.
"""

import mmap
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

GIB = 1 << 30
SMALLEST = 1 << 16  # bytes: smaller tensors are not worth a file


class ActivationOffload:
    """Counts tensors while they live, and moves into files those that would exceed the budget.

    folder: on the disk that is to hold them; files have no name there, so that nothing is left whatever happens;
    budget: GiB of tensors on the CPU that may stay in memory, None for all.
    """

    def __init__(self, folder: Path, budget: float | None) -> None:
        self.folder = folder
        self.most = None if budget is None else int(budget * GIB)
        self.resident = self.spilled = 0
        self._known: dict[int, tuple[weakref.ref[Tensor], mmap.mmap | None]] = {}

    def settle(self, *held: Any) -> None:
        """To be called when nobody works with these tensors for a while; they may be anywhere in tuples and dicts.

        OSError if the disk is full.
        """
        if self.most is None:
            return
        for tensor in tree_flatten(held)[0]:
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu" and tensor.nbytes >= SMALLEST:
                if id(tensor) not in self._known:
                    self._admit(tensor, self.most)
                mapped = self._known[id(tensor)][1]
                if mapped is not None:
                    mapped.madvise(mmap.MADV_DONTNEED)  # out of this process: the values stay in the file

    def _admit(self, tensor: Tensor, most: int) -> None:
        key, size = id(tensor), tensor.nbytes
        mapped = None
        if self.resident + size > most:
            mapped = self._mapping(size)
            there = torch.frombuffer(mapped, dtype=tensor.dtype).view(tensor.shape)
            there.copy_(tensor.detach())
            tensor.data = there
            self.spilled += size
        else:
            self.resident += size

        def forget(_: object) -> None:
            self._known.pop(key, None)
            if mapped is None:
                self.resident -= size

        self._known[key] = weakref.ref(tensor, forget), mapped

    def _mapping(self, size: int) -> mmap.mmap:
        """Zeros in a file without a name, whose room on the disk is certain."""
        with tempfile.TemporaryFile(dir=self.folder, buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, size)
            return mmap.mmap(file.fileno(), size)
