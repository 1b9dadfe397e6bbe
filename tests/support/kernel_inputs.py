"""Inputs of the reference arithmetic, and the integers that their product must be, in NumPy."""

import numpy as np
import torch
from numpy.typing import NDArray


def sample(seed: int = 0, with_bias: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """x [2, 9, 24] with an offset, weight [10, 24], bias [10]; float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 9, 24, generator=generator) * 3 + 1
    bias = torch.randn(10, generator=generator) * 5 if with_bias else None
    return x, torch.randn(10, 24, generator=generator) * 0.1, bias


def numpy_matmul(xq: torch.Tensor, wq: torch.Tensor) -> NDArray[np.int64]:
    product: NDArray[np.int64] = xq.numpy().astype(np.int64) @ wq.numpy().astype(np.int64).T
    return product
