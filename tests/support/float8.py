"""8-bit floats with scales, and the numbers that they stand for, computed element by element."""

import torch
from torch import Tensor


def float8_weight(shape: tuple[int, ...], block: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(stored weight, scales [.., row blocks, column blocks], the bfloat16 weight that they stand for)."""
    random = torch.Generator().manual_seed(seed)
    stored = torch.randn(shape, generator=random).mul(100).to(torch.float8_e4m3fn)
    rows, columns = -(-shape[-2] // block[0]), -(-shape[-1] // block[1])
    scale = torch.rand(*shape[:-2], rows, columns, generator=random) + 0.01
    meant = stored.float()
    for row in range(shape[-2]):
        for column in range(shape[-1]):
            meant[..., row, column] *= scale[..., row // block[0], column // block[1]]
    return stored, scale, meant.to(torch.bfloat16)
