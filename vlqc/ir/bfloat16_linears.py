"""Linear layers that multiply in bfloat16 while samples are only observed.

Inputs and products are rounded to 8 bits, about 50 dB below the signal, as in an engine that runs the float model. All
other operations stay in float32. Afterwards the weights are float32 again, with the same bits. There are two cases:

* A weight that bfloat16 represents exactly is converted, which halves its memory.
* Any other weight is multiplied in float32, unless the caller asks for rounding: a rotated weight of a bfloat16
  checkpoint has more bits than the engine will see. It is split in its own memory, row by row: K bfloat16 values, then
  the K remainders that restore the float32 values.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from vlqc.ir.memory import is_file_backed

ROWS_PER_STEP = 64  # rows compared or split at a time, so that temporaries stay in the cache


def exact_bfloat16(tensor: Tensor) -> Tensor | None:
    """The same values in bfloat16; None if bfloat16 cannot represent all of them."""
    half = torch.empty(tensor.shape, dtype=torch.bfloat16, device=tensor.device)
    for source, target in zip(
        torch.split(tensor.detach(), ROWS_PER_STEP), torch.split(half, ROWS_PER_STEP), strict=True
    ):
        target.copy_(source)
        if not torch.equal(target.float(), source):
            return None
    return half


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16 instructions; without them float32 is as fast and more exact."""
    if device.type != "cpu":
        return True
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


@contextmanager
def bfloat16_linears(root: nn.Module, *, round_weights: bool = False) -> Iterator[None]:
    """Linear layers below `root` whose weights bfloat16 represents exactly multiply in bfloat16.

    round_weights: round the weights of all others to bfloat16, too, except those in files.
    """
    with ExitStack() as undo:
        for module in root.modules():
            if type(module) is nn.Linear and "forward" not in module.__dict__:
                weight = module.weight
                if weight.dtype == torch.float32 and multiplies_bfloat16(weight.device) and not is_file_backed(weight):
                    half = exact_bfloat16(weight)
                    if half is not None:
                        undo.callback(_restore_exact, module)
                    elif round_weights and weight.is_contiguous():
                        half = split_bfloat16(weight.data)
                        undo.callback(_restore_split, module, weight.data)
                    else:
                        continue
                    weight.data = half
                    module.forward = _bfloat16_forward(module)  # type: ignore[method-assign, assignment]
        yield


def split_bfloat16(tensor: Tensor) -> Tensor:
    """Splits a contiguous float32 [N, K] in place; returns its values in bfloat16 [N, K], a view with row stride 2 K.

    With the bits of a value as int32, its remainder is the lower half as a signed int16, and its bfloat16 value the
    upper half of bits - remainder: the nearest one, of two equally near ones that of larger magnitude. So every bit
    pattern is restored. Matrix products take the row stride as it is, without a copy.
    """
    columns = tensor.shape[1]
    for bits, halves in zip(
        torch.split(tensor.view(torch.int32), ROWS_PER_STEP),
        torch.split(tensor.view(torch.int16), ROWS_PER_STEP),
        strict=True,
    ):
        remainder = bits.to(torch.int16)
        upper = (bits + 0x8000).bitwise_right_shift_(16)
        halves[:, :columns] = upper
        halves[:, columns:] = remainder
    return tensor.view(torch.bfloat16)[:, :columns]


def join_bfloat16(tensor: Tensor) -> None:
    """Restores a tensor [N, K] that `split_bfloat16` has split."""
    columns = tensor.shape[1]
    for bits, halves in zip(
        torch.split(tensor.view(torch.int32), ROWS_PER_STEP),
        torch.split(tensor.view(torch.int16), ROWS_PER_STEP),
        strict=True,
    ):
        upper = halves[:, :columns].to(torch.int32).bitwise_left_shift_(16)
        bits.copy_(upper.add_(halves[:, columns:]))


def _bfloat16_forward(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(rows: Tensor) -> Tensor:
        product = nn.functional.linear(rows.to(torch.bfloat16), linear.weight).to(rows.dtype)
        return product if linear.bias is None else product.add_(linear.bias)

    return forward


def _restore_exact(linear: nn.Linear) -> None:
    linear.__dict__.pop("forward", None)
    linear.weight.data = linear.weight.data.float()


def _restore_split(linear: nn.Linear, tensor: Tensor) -> None:
    """tensor: the float32 weight in whose memory the parts are."""
    linear.__dict__.pop("forward", None)
    join_bfloat16(tensor)
    linear.weight.data = tensor
