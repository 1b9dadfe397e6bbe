"""Fingerprints and summary values of tensors, and the error between two outputs of a stage."""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from vlqc.ir.memory import release_pages

WORDS_PER_CHUNK = 1 << 17  # 64-bit words per step of a fingerprint
TOLERANCE = 1e-4  # largest `max_relative_error` of an equivalent rewrite; float32 rounding alone causes about 1e-6


def fingerprint(tensor: Tensor) -> int:
    """A 63-bit hash of the tensor's bytes, independent of device and number of processes; not cryptographic.

    The bytes are read as 64-bit words. Every word is multiplied by an odd constant that depends on its position, mixed,
    and summed modulo 2^64, so that changed, moved and swapped words change the hash. Chunks stay in the cache.
    """
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    total, padding = flat.numel(), -flat.numel() % 8
    if padding or flat.storage_offset() % 8:  # a view as int64 must start at a multiple of 8 bytes
        flat = torch.cat([flat, flat.new_zeros(padding)])
    words = flat.view(torch.int64)
    length = min(WORDS_PER_CHUNK, words.numel())
    multipliers = torch.arange(1, length + 1, device=words.device) * 0x9E3779B97F4A7C1 * 2 + 1
    buffers = torch.empty(2, length, dtype=torch.int64, device=words.device)
    for number, part in enumerate(torch.split(words, WORDS_PER_CHUNK)):
        mixed, shifted = buffers[:, : part.numel()]
        _logical_right_shift(part, 29, out=shifted)
        torch.bitwise_xor(part, shifted, out=mixed).mul_(multipliers[: part.numel()])
        _logical_right_shift(mixed, 32, out=shifted)
        total = (total * 1000003 + int(mixed.bitwise_xor_(shifted).sum()) + number) & 0x7FFFFFFFFFFFFFFF
    return total


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The fingerprint of each tensor, computed in parallel."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(zip(tensors, pool.map(_fingerprint_and_release, tensors.values()), strict=True))


def _fingerprint_and_release(tensor: Tensor) -> int:
    value = fingerprint(tensor)
    release_pages(tensor)
    return value


def _logical_right_shift(words: Tensor, bits: int, *, out: Tensor) -> None:
    """Unlike `>>`, does not copy the sign bit, with which a word and its complement would collide."""
    torch.bitwise_right_shift(words, bits, out=out).bitwise_and_((1 << (64 - bits)) - 1)


def digest(*tensors: Tensor, fingerprint_of: Callable[[Tensor], int] = fingerprint) -> str:
    """Eight hexadecimal digits of the fingerprints of one or several tensors, in this order.

    fingerprint_of: computes the fingerprints, e.g. a cached `fingerprint`.
    """
    total = 0
    for tensor in tensors:
        total = (total * 1000003 + fingerprint_of(tensor)) & 0x7FFFFFFFFFFFFFFF
    return f"{total:016x}"[-8:]


def absmax(tensor: Tensor) -> float:
    """max |tensor|; NaN if it contains NaN, 0 if it is empty. Allocates no temporary; |-128| of int8 is 128."""
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor.detach())
    return max(abs(float(low)), abs(float(high)))


def is_finite(tensor: Tensor) -> bool:
    """Whether the tensor contains neither NaN nor infinity. Allocates no temporary."""
    return not tensor.numel() or all(math.isfinite(end) for end in torch.aminmax(tensor.detach()))


def max_relative_error(reference: Tensor, other: Tensor) -> float:
    """Largest error of `other`, relative to the RMS of `reference` or to a larger value's own magnitude.

    Both are flat and of equal length. Infinite if `other` is not finite. Values beyond the RMS (massive activations)
    are relative to themselves, as their rounding error is.
    """
    if not is_finite(other):
        return float("inf")
    rms = reference.square().mean().sqrt().clamp(min=1e-30)
    return float(((reference - other) / torch.maximum(reference.abs(), rms)).abs().amax())
