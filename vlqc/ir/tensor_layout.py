"""How a tensor lies in memory, so that another can lie the same way: the last bits of arithmetic may depend on it."""

from collections.abc import Sequence

import torch
from torch import Tensor

LINE = 64  # elements: a tensor comes back as far from a multiple of that as it was


def span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """How many elements lie between the first and the last one of a tensor, both included."""
    if 0 in shape:
        return 0
    return int(1 + sum((length - 1) * step for length, step in zip(shape, stride, strict=True)))


def bytes_of(tensor: Tensor) -> Tensor:
    """uint8 [n]: what a tensor spans, gaps included; the same memory."""
    return tensor.detach().as_strided((span(tensor.shape, tensor.stride()),), (1,)).view(torch.uint8)


def offset_of(tensor: Tensor) -> int:
    """Elements from the last multiple of LINE in its storage to its begin."""
    return int(tensor.storage_offset()) % LINE


def laid_out(
    dtype: torch.dtype,
    shape: Sequence[int],
    stride: Sequence[int],
    offset: int,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """A tensor that lies so, and its bytes [n], which are still to be filled."""
    flat = torch.empty(offset + span(shape, stride), dtype=dtype, device=device)[offset:]
    return flat.as_strided(tuple(shape), tuple(stride)), flat.view(torch.uint8)
