"""The largest values between layers, compared with what float16 holds.

An engine stores the output of every layer, and the sums between them, in the dtype of the model: beyond 65504 a float16
model computes Inf. The operators themselves accumulate in float32, so what happens inside them does not matter.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

INFINITE = torch.finfo(torch.float32).max  # stands for Inf and NaN, which JSON does not have
FLOAT16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True, order=True)
class Peak:
    """The largest absolute value that was seen, and where: "input of X" or "output of X"; value 0 before any."""

    value: float = 0.0
    where: str = ""


class PeakRecorder:
    """Keeps the largest absolute value of all float inputs and outputs of modules."""

    def __init__(self) -> None:
        self.peak = Peak()

    def add(self, name: str, values: object, kind: str) -> None:
        """values: arguments or return value of a module; name: of the module; kind: "input" or "output"."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                low, high = torch.aminmax(tensor)
                largest = max(-float(low), float(high))
                self.peak = max(self.peak, Peak(largest if math.isfinite(largest) else INFINITE, f"{kind} of {name}"))

    @contextmanager
    def watching(self, root: nn.Module, prefix: str = "") -> Iterator[None]:
        """Inside, the inputs and outputs of all modules without children below `root`, and the output of `root`, count.

        prefix: of their names.
        """
        handles = []
        for path, module in root.named_modules():
            is_leaf = next(module.children(), None) is None
            if not is_leaf and module is not root:
                continue
            name = ".".join(filter(None, (prefix, path)))

            def hook(module: nn.Module, args: object, output: object, name: str = name, leaf: bool = is_leaf) -> None:
                if leaf:
                    self.add(name, args, "input")
                self.add(name, output, "output")

            handles.append(module.register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
