"""Rotation analysis in random small graphs: every basis that is found can be rotated."""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.ir.test_scale_propagation_small_graphs import STEP, Program
from tests.support import tiny
from tests.support.folded_edges import CALL, INPUT
from vlqc.frontend.tracing import trace
from vlqc.ir.rotation_analysis import Basis, find_bases, subtracts_mean


def orthogonal(size: int, *, keeps_mean: bool) -> Tensor:
    """R float64 [size, size]; with keeps_mean, R 1 = 1."""
    random = torch.Generator().manual_seed(size)
    q = torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64))[0]
    if not keeps_mean:
        return q
    inner = torch.eye(size, dtype=torch.float64)
    if size > 1:
        inner[1:, 1:] = orthogonal(size - 1, keeps_mean=False)
    basis = torch.cat([torch.ones(size, 1, dtype=torch.float64), q[:, 1:]], 1)
    frame = torch.linalg.qr(basis)[0]  # its first column is parallel to the all-ones vector
    return frame @ inner @ frame.T


@torch.no_grad()
def rotated(program: nn.Module, basis: Basis) -> tuple[nn.Module, Tensor]:
    """A copy with a rotated basis, or heads of it, and the rotation."""
    other = copy.deepcopy(program)
    starts, size = basis.heads or ((0,), basis.size)
    r = orthogonal(size, keeps_mean=basis.keeps_mean)
    for target in basis.writers:
        linear = other.get_submodule(target)
        for start in starts:
            block = slice(start, start + size)
            linear.weight[block], linear.bias[block] = r.T @ linear.weight[block], linear.bias[block] @ r
    for target, (columns, norm) in basis.readers.items():
        linear = other.get_submodule(target)
        if norm is not None:
            weight, bias = (getattr(program.get_submodule(norm), name)[columns] for name in ("weight", "bias"))
            linear.bias += linear.weight @ bias
            linear.weight *= weight
        blocks = linear.weight.view(linear.weight.shape[0], -1, size)
        linear.weight.copy_((blocks @ r).flatten(1))
    for target in basis.norms:
        other.get_submodule(target).weight.fill_(1)
        other.get_submodule(target).bias.zero_()
    return other, r


def can_be_rotated(basis: Basis) -> bool:
    starts, size = basis.heads or ((0,), basis.size)
    channels = torch.cat([torch.arange(start, start + size) for start in starts])
    whole = basis.heads is None or (
        not (basis.inputs or basis.outputs or basis.norms)
        and len(torch.unique(channels)) == len(channels)
        and all(
            len(columns) % size == 0
            and all(int(block[0]) in starts and bool((block.diff() == 1).all()) for block in torch.split(columns, size))
            for columns, _ in basis.readers.values()
        )
    )
    return whole and not bool(basis.fixed[channels].any())


@torch.no_grad()
def check_bases(program: Program) -> int:
    """Rotates every basis on its own; returns how many have both writers and readers."""
    bases = [basis for basis in find_bases(program, trace(program, CALL, "program")).bases if can_be_rotated(basis)]
    before = tiny.tensors_of(program(INPUT))
    for basis in bases:
        other, r = rotated(program, basis)
        after = tiny.tensors_of(other(INPUT @ r if basis.inputs else INPUT))
        positions = {position for _, position in basis.outputs}
        for position, (one, two) in enumerate(zip(before, after, strict=True)):
            expected = one @ r if position in positions else one
            assert torch.allclose(expected, two, rtol=1e-9, atol=1e-9 * float(one.abs().max())), basis
    return sum(bool(basis.writers and basis.readers) for basis in bases)


@settings(max_examples=200)
@given(st.lists(STEP, min_size=1, max_size=6), st.sampled_from([False, False, False, True]))
def test_whatever_is_found_can_be_rotated(steps: list[tuple[str, int, int]], tap: bool) -> None:
    """Catches a basis, or heads, whose rotation changes an output."""
    check_bases(Program(steps, tap))


def test_bases_of_small_graphs_are_found() -> None:
    """Catches an analysis that excludes sums, layouts, attention or merged rows."""
    for name in ("row chosen", "first row", "doubled", "heads", "two rows", "attended", "attending"):
        assert check_bases(Program([("linear", 1, 0), (name, 0, 1), ("linear", 0, 0)], tap=False)) >= 1, name
    assert check_bases(Program([("linear", 1, 0), ("linear", 2, 0), ("plus", 0, 1)], tap=False)) == 1
    assert check_bases(Program([("linear", 1, 0), ("times", 0, 2), ("linear", 0, 0)], tap=False)) == 0
    assert check_bases(Program([("linear", 1, 0), ("shifted", 0, 0)], tap=False)) == 0


def test_norms_by_what_they_compute() -> None:
    """Catches a norm that is taken for one that keeps or subtracts the mean, and a module that is none of both."""

    class Rms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(12))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    class Largest(Rms):
        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x / x.abs().amax(-1, keepdim=True)

    assert subtracts_mean(Rms(), 12) is False
    assert subtracts_mean(nn.LayerNorm(12), 12) is True
    assert subtracts_mean(Largest(), 12) is None
