"""What is said of a tensor in few bytes: a number that changes with any of its bits, its largest magnitude.

And of two of them: how far the outputs of a stage lie apart, and what of it is rounding.
"""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

WORDS_PER_CHUNK = 1 << 17  # of 8 bytes, in a fingerprint
TOLERANCE = 1e-4  # of the RMS of the output, or of a value larger than that: float32 leaves about 1e-6


def fingerprint(tensor: Tensor) -> int:
    """A 63-bit number of the tensor's bytes, the same on every device and world; not cryptographic.

    Bytes are read as 64-bit words; word i is multiplied by an odd constant that depends on i, all summed modulo 2^64,
    so that a changed, moved or swapped word shows. A chunk stays in the cache.
    """
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    total, padding = flat.numel(), -flat.numel() % 8
    if padding or flat.storage_offset() % 8:  # a view as words starts at a whole word
        flat = torch.cat([flat, flat.new_zeros(padding)])
    words = flat.view(torch.int64)
    length = min(WORDS_PER_CHUNK, words.numel())
    multipliers = torch.arange(1, length + 1, device=words.device) * 0x9E3779B97F4A7C1 * 2 + 1
    room = torch.empty(2, length, dtype=torch.int64, device=words.device)
    for number, part in enumerate(torch.split(words, WORDS_PER_CHUNK)):
        mixed, shifted = room[:, : part.numel()]
        _shift_into(shifted, part, 29)
        torch.bitwise_xor(part, shifted, out=mixed).mul_(multipliers[: part.numel()])
        _shift_into(shifted, mixed, 32)
        total = (total * 1000003 + int(mixed.bitwise_xor_(shifted).sum()) + number) & 0x7FFFFFFFFFFFFFFF
    return total


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The fingerprint of each tensor, several at a time: a single one is read as fast as one processor can."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(zip(tensors, pool.map(fingerprint, tensors.values()), strict=True))


def _shift_into(room: Tensor, words: Tensor, bits: int) -> None:
    """Logical shift to the right (`>>` copies the sign bit: a word and its complement would come out the same)."""
    torch.bitwise_right_shift(words, bits, out=room).bitwise_and_((1 << (64 - bits)) - 1)


def digest(*tensors: Tensor, known: Callable[[Tensor], int] = fingerprint) -> str:
    """Eight hexadecimal digits of the fingerprints of one or several tensors, in this order.

    known: what gives the fingerprints.
    """
    total = 0
    for tensor in tensors:
        total = (total * 1000003 + known(tensor)) & 0x7FFFFFFFFFFFFFFF
    return f"{total:016x}"[-8:]


def absmax(tensor: Tensor) -> float:
    """max |tensor|; NaN if there is one, 0 if it is empty. By minimum and maximum: no temporary, and |-128| is 128."""
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor.detach())
    return max(abs(float(low)), abs(float(high)))


def is_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity, found without a temporary: they spread to minimum or maximum."""
    return not tensor.numel() or all(math.isfinite(end) for end in torch.aminmax(tensor.detach()))


def difference(before: Tensor, after: Tensor) -> float:
    """Largest deviation between two flat outputs, as a share of the RMS of the first; infinite if not finite.

    A massive activation is rounded in steps of its own size: a value beyond the RMS is judged by itself.
    """
    if not is_finite(after):
        return float("inf")
    rms = before.square().mean().sqrt().clamp(min=1e-30)
    return float(((before - after) / torch.maximum(before.abs(), rms)).abs().amax())
