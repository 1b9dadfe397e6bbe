"""Seeded Hadamard rotations: orthogonal matrices that spread outliers over all channels (QuaRot, arXiv 2404.00456)."""

import functools
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

LARGEST_PALEY_ORDER = 512
# Sylvester matrices are split into factors of 2^4: of 4 to 128, they are the fastest for PyTorch's matmul on a CPU. A
# factor of 2 or 4 is slow if all others make up less than 64, and is then multiplied with them.
SPLIT_EXPONENT = 4
LARGEST_JOINED, LARGEST_JOINT_ORDER = 4, 128
# What a CPU works on should stay in its cache: with 64 MiB it takes eight times as long. Other devices start fewer
# kernels with larger pieces.
CPU_PIECE_BYTES = 2 * 2**20
DEVICE_PIECE_BYTES = 32 * 2**20

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix R [size, size], the same on every machine; multiplies in float32 and is never formed.

    R = diag(signs) (I (x) H) / sqrt(order): size / order blocks of one Hadamard matrix H, the Kronecker product of a
    Sylvester and a Paley matrix (`hadamard_orders`). Element i of `signs` is -1 if bit i of SHAKE-256("{name}:{seed}")
    is set, counted from the least significant bit of the first byte, else 1.

    keeps_mean: R is followed by the Householder reflection that maps 1^T R back to 1^T. Rows then keep their mean, so
    LayerNorm commutes with R. Elements change by about 1 / size.

    Results depend neither on the number of threads nor on how rows are divided: an element is a sum of few products
    with +-1 in one order.
    """

    size: int
    seed: int
    name: str  # of what is rotated: other names have other signs
    keeps_mean: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"the size of a rotation must be positive, got {self.size}")

    @property
    def orders(self) -> tuple[int, int]:
        """Orders of the Sylvester and the Paley matrix whose Kronecker product is H."""
        return hadamard_orders(self.size)

    @property
    def order(self) -> int:
        """Order of H: the number of channels that a block mixes. 1 if no matrix fits an odd size: only signs change."""
        return math.prod(self.orders)

    @property
    def blocks(self) -> int:
        """Number of blocks; 1 if H mixes all channels."""
        return self.size // self.order

    @torch.no_grad()
    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x float [..., size] -> x R, float32 on the same device. Raises ValueError for another size or dtype."""
        return self._multiply_rows(x, torch.empty(x.shape, dtype=torch.float32, device=x.device), transposed=False)

    @torch.no_grad()
    def unrotate(self, x: torch.Tensor) -> torch.Tensor:
        """x float [..., size] -> x R^T, float32 on the same device. Raises ValueError for another size or dtype."""
        return self._multiply_rows(x, torch.empty(x.shape, dtype=torch.float32, device=x.device), transposed=True)

    @torch.no_grad()
    def rotate_(self, x: torch.Tensor) -> torch.Tensor:
        """x float32 [..., size], any strides -> x, overwritten with x R. Raises ValueError for another size or dtype.

        For a weight that reads the rotated channels. If it reads several inputs side by side, pass [N, inputs, size].
        """
        _expect_float32(x)
        return self._multiply_rows(x, x, transposed=False)

    @torch.no_grad()
    def rotate_columns_(self, x: torch.Tensor) -> torch.Tensor:
        """x float32 [size, ...] -> x, overwritten with R^T x. Raises ValueError for another size or dtype.

        For a weight or a bias that writes the rotated channels. The dimensions after the first must have strides that
        allow to view them as one (RuntimeError).
        """
        _expect_float32(x)
        if x.dim() < 1 or x.shape[0] != self.size:
            raise ValueError(f"expected [{self.size}, ...], got {list(x.shape)}")
        columns = x.view(self.size, -1)  # [size, K]
        multiply = _Multiplication(self, columns, transposed=False)
        for piece in torch.split(columns, multiply.capacity // self.size, dim=1) if x.numel() else ():
            piece.copy_(multiply(piece, inner=piece.shape[1]))
        return x

    def _multiply_rows(self, x: torch.Tensor, out: torch.Tensor, transposed: bool) -> torch.Tensor:
        """x float [..., size] -> out float32 [..., size], which may be x: x R, or x R^T if transposed."""
        if not x.is_floating_point() or x.dim() < 1 or x.shape[-1] != self.size:
            raise ValueError(f"expected float [..., {self.size}], got {x.dtype} {list(x.shape)}")
        multiply = _Multiplication(self, x, transposed)
        for piece, target in zip(_pieces(x, multiply.capacity), _pieces(out, multiply.capacity), strict=True):
            target.copy_(multiply(piece, inner=1))
        return out


@functools.cache
def hadamard_orders(size: int) -> tuple[int, int]:
    """size -> orders (s, p) of a Sylvester matrix (a power of two) and a Paley matrix, with s * p dividing size.

    p is 1 for a power of two, else the smallest order up to 512 with s * p = size. If there is none: p = 1, and s is
    the largest power of two that divides size.
    """
    power = size & -size
    odd = size // power
    if odd > 1:
        for two in (2**exponent for exponent in range(2, power.bit_length())):
            if odd * two <= LARGEST_PALEY_ORDER and paley_prime(odd * two):
                return power // two, odd * two
    return power, 1


def paley_prime(order: int) -> int | None:
    """The prime q of Paley's first (q = 3 mod 4, order q + 1) or second construction (q = 1 mod 4, order 2 (q + 1))."""
    if order % 4:
        return None
    candidates = (q for q, remainder in ((order - 1, 3), (order // 2 - 1, 1)) if q % 4 == remainder and q > 1)
    return next((q for q in candidates if all(q % d for d in range(2, math.isqrt(q) + 1))), None)


@functools.cache
def sylvester_matrix(order: int) -> Array:
    """order, a power of two -> H float32 [order, order] of +-1: H[i, j] = (-1)^(number of common bits of i and j)."""
    h = np.ones((1, 1), np.float32)
    while len(h) < order:
        h = np.block([[h, h], [h, -h]])
    return h


@functools.cache
def paley_matrix(order: int) -> Array:
    """order, of one of Paley's constructions -> H float32 [order, order] of +-1 with H H^T = order I.

    Q[i, j] is 1 if i - j is a nonzero square modulo the prime q, 0 if i = j, else -1.
    First construction: I + [[0, 1], [-1, Q]].
    Second construction: [[0, 1], [1, Q]] (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]].
    """
    q = paley_prime(order)
    if q is None:
        raise ValueError(f"there is no Paley matrix of order {order}")
    residue = np.full(q, -1, np.float32)
    residue[np.arange(q) ** 2 % q] = 1
    residue[0] = 0
    core = np.ones((q + 1, q + 1), np.float32)
    core[0, 0] = 0
    core[1:, 1:] = residue[np.subtract.outer(np.arange(q), np.arange(q)) % q]
    if q % 4 == 3:
        core[1:, 0] = -1
        return core + np.eye(q + 1, dtype=np.float32)
    ones, diagonal = np.array([[1, 1], [1, -1]], np.float32), np.array([[1, -1], [-1, -1]], np.float32)
    return np.kron(core, ones) + np.kron(np.eye(q + 1, dtype=np.float32), diagonal)


@functools.cache
def _factors(size: int) -> tuple[Array, ...]:
    """Matrices of +-1 whose Kronecker product is H."""
    sylvester, paley = hadamard_orders(size)
    exponent = sylvester.bit_length() - 1
    first, count = 2 ** (exponent % SPLIT_EXPONENT), exponent // SPLIT_EXPONENT
    factors = [sylvester_matrix(order) for order in (first, *[2**SPLIT_EXPONENT] * count) if order > 1]
    if paley > 1:
        factors.append(paley_matrix(paley))
    if len(factors) == 2 and first <= LARGEST_JOINED and sylvester * paley <= LARGEST_JOINT_ORDER:
        factors = [np.kron(*factors)]
    return tuple(factors)


@functools.lru_cache(maxsize=64)
def _scaled_signs(rotation: Rotation) -> Array:
    """signs / sqrt(order), float32 [size, 1]."""
    digest = hashlib.shake_256(f"{rotation.name}:{rotation.seed}".encode()).digest(-(-rotation.size // 8))
    bits = np.unpackbits(np.frombuffer(digest, np.uint8), count=rotation.size, bitorder="little")
    scale = np.float32(1 / math.sqrt(rotation.order))
    return np.where(bits, -scale, scale)[:, None]


@functools.lru_cache(maxsize=64)
def _reflection(rotation: Rotation) -> Array:
    """u float32 [size, 1] with |u|^2 = 2: I - u u^T exchanges 1 and v, where v^T is 1^T times the Hadamard rotation.

    u is proportional to 1 - v, and 0 if v = 1. Its parts are exact or rounded once in float64: equal on all machines.
    """
    sums = np.sign(_scaled_signs(rotation)).astype(np.float64).reshape(rotation.blocks, -1)  # [blocks, order]
    for factor in _factors(rotation.size):  # each turns the first dimension of what is left to the last
        sums = np.moveaxis(sums.reshape(rotation.blocks, len(factor), -1), 1, 2) @ factor
    difference = 1 - sums.reshape(-1, 1) / math.sqrt(rotation.order)
    norm = math.sqrt(math.fsum((difference**2).flat))
    return (difference * (math.sqrt(2) / norm if norm else 0)).astype(np.float32)


class _Multiplication:
    """Multiplies pieces of a tensor by R or R^T on its device, in two buffers of `capacity` elements."""

    def __init__(self, rotation: Rotation, x: torch.Tensor, transposed: bool) -> None:
        """x: what will be multiplied; its device and number of elements decide where and how large the buffers are."""
        piece = CPU_PIECE_BYTES if x.device.type == "cpu" else DEVICE_PIECE_BYTES
        self.capacity = max(rotation.size, min(piece // 4, x.numel()))
        self._size, self._transposed = rotation.size, transposed
        self._buffers = [torch.empty(self.capacity, dtype=torch.float32, device=x.device) for _ in range(2)]
        self._signs = torch.from_numpy(_scaled_signs(rotation)).to(x.device)  # [size, 1]
        self._factors = [torch.from_numpy(factor).to(x.device) for factor in _factors(rotation.size)]
        self._reflection = torch.from_numpy(_reflection(rotation)).to(x.device) if rotation.keeps_mean else None

    def __call__(self, piece: torch.Tensor, inner: int) -> torch.Tensor:
        """piece float [..., size], or [..., size, inner] if `inner` is above 1 -> its product, a view of a buffer."""
        x, spare = (buffer[: piece.numel()].view(-1, self._size, inner) for buffer in self._buffers)
        x.view(piece.shape).copy_(piece)
        if self._transposed:
            self._reflect(x, spare)
            x = self._times_hadamard(x, spare).mul_(self._signs)
        else:
            product = self._times_hadamard(x.mul_(self._signs), spare)
            self._reflect(product, x if product is spare else spare)
            x = product
        return x.view(piece.shape)

    def _times_hadamard(self, x: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
        """x [outer, size, inner] times I (x) H along its second dimension -> one of the two, which are overwritten."""
        inner = x.shape[2]
        for factor in reversed(self._factors):
            order = len(factor)
            h = factor.T if self._transposed else factor
            if inner == 1:
                torch.mm(x.view(-1, order), h, out=spare.view(-1, order))
            else:
                blocks = x.view(-1, order, inner)
                torch.bmm(h.T.expand(len(blocks), order, order), blocks, out=spare.view(-1, order, inner))
            inner *= order
            x, spare = spare, x
        return x

    def _reflect(self, x: torch.Tensor, spare: torch.Tensor) -> None:
        """x [outer, size, inner] -> x - (x . u) u along its second dimension, in place. `spare` is overwritten."""
        if self._reflection is not None:
            along = _pairwise_sum_(torch.mul(x, self._reflection, out=spare)).clone()  # [outer, 1, inner]
            x.sub_(torch.mul(along, self._reflection, out=spare))


def _pairwise_sum_(x: torch.Tensor) -> torch.Tensor:
    """x [outer, size, inner], overwritten -> its sum along the second dimension, [outer, 1, inner], a view of x.

    The order of torch.sum depends on the other dimensions and on the number of threads; this one does not.
    """
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        if x.shape[1] % 2:
            x[:, :1] += x[:, -1:]
        x = x[:, :half].add_(x[:, half : 2 * half])
    return x


def _pieces(x: torch.Tensor, capacity: int) -> Iterator[torch.Tensor]:
    """Views of x [..., size] with at most `capacity` elements, which is at least size, that cover it in order."""
    if x.numel() <= capacity:
        yield x
    elif x.dim() > 2 and x[0].numel() > capacity:
        for part in x:
            yield from _pieces(part, capacity)
    else:
        yield from torch.split(x, capacity // x[0].numel())


def _expect_float32(x: torch.Tensor) -> None:
    if x.dtype != torch.float32:
        raise ValueError(f"only float32 is rotated in place, got {x.dtype}")
