"""Linears that multiply in bfloat16 where nothing is lost in their weights, for runs that only observe.

Weights of a bfloat16 checkpoint are exact in it, and processors multiply it two to four times faster than float32.
Inputs and products are rounded to 8 bits (some 52 dB below the signal, as in an engine that runs the float model);
everything between the Linears stays float32. Proofs never run so.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

ROWS_COMPARED = 64  # at a time: temporaries stay in the cache


def exact_bfloat16(tensor: Tensor) -> Tensor | None:
    """The same values in bfloat16; None where it does not hold them all."""
    half = torch.empty(tensor.shape, dtype=torch.bfloat16, device=tensor.device)
    for part, there in zip(torch.split(tensor.detach(), ROWS_COMPARED), torch.split(half, ROWS_COMPARED), strict=True):
        there.copy_(part)
        if not torch.equal(there.float(), part):
            return None
    return half


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for it; without, float32 is as fast and more exact."""
    if device.type != "cpu":
        return True
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


@contextmanager
def bfloat16_linears(root: nn.Module) -> Iterator[None]:
    """Inside, Linears below `root` whose weights bfloat16 holds exactly multiply in it, and need half the memory.

    Afterwards all is as it was: float32, bit by bit.
    """
    with ExitStack() as undo:
        for module in root.modules():
            if type(module) is nn.Linear and "forward" not in module.__dict__:
                weight = module.weight
                if weight.dtype == torch.float32 and multiplies_bfloat16(weight.device):
                    half = exact_bfloat16(weight)
                    if half is not None:
                        undo.callback(_restore, module)
                        weight.data = half
                        module.forward = _product(module)  # type: ignore[method-assign, assignment]
        yield


def _product(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(rows: Tensor) -> Tensor:
        product = nn.functional.linear(rows.to(torch.bfloat16), linear.weight).to(rows.dtype)
        return product if linear.bias is None else product.add_(linear.bias)

    return forward


def _restore(linear: nn.Linear) -> None:
    del linear.__dict__["forward"]
    linear.weight.data = linear.weight.data.float()
