"""Rotation analysis in random small graphs: every basis that is found can be rotated."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.ir.test_scale_propagation_small_graphs import STEP, Program
from tests.support import tiny
from tests.support.folded_edges import CALL, INPUT
from vlqc.frontend.tracing import trace
from vlqc.ir.execution import Call
from vlqc.ir.rotatable import find_rotatable
from vlqc.ir.rotation_analysis import Basis, GraphBases, find_bases, subtracts_mean


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


@settings(max_examples=100)
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


class Little(nn.Module):
    """An embedding, a branch behind a norm, a final norm and a head; `step` changes the stream or its use."""

    def __init__(
        self, step: Callable[[Any, Tensor, Tensor], Tensor] | None = None, norm: type[nn.Module] = nn.LayerNorm
    ):
        super().__init__()
        torch.manual_seed(0)
        self.step = step or (lambda little, x, ids: x)
        self.embed, self.other = nn.Embedding(16, 8), nn.Embedding(16, 8)
        self.norm, self.final = norm(8), norm(8)
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 5)
        self.conv = nn.Conv1d(8, 8, 1, groups=2)
        self.scale = nn.Parameter(torch.rand(8))
        self.requires_grad_(requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.step(self, x + self.fc(self.norm(x)), ids)
        logits: Tensor = self.head(self.final(x))
        return logits


def zeros_written(little: Any, x: Tensor, ids: Tensor) -> Tensor:
    blank = torch.zeros_like(x)
    blank[:, :3] = little.scale
    return x + blank


def view_changed(little: Any, x: Tensor, ids: Tensor) -> Tensor:
    x = x.clone()
    x[..., :3].mul_(2)
    return x


def channels_chosen(little: Any, x: Tensor, ids: Tensor) -> Tensor:
    return torch.where((little.scale > 0.5)[:, None].transpose(0, 1), x, little.other(ids))


def rows_chosen(little: Any, x: Tensor, ids: Tensor) -> Tensor:
    return torch.where((ids > 3)[..., None], x, little.other(ids))


class Plus(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (8,), 1 + self.weight, self.bias)


IDS = torch.arange(12).view(2, 6)
OBSTACLES: dict[str, Any] = {
    "written zeros": zeros_written,
    "view changed in place": view_changed,
    "mask of channels": channels_chosen,
    "factor per channel": lambda little, x, ids: x * little.scale,
    "branch scaled per channel": lambda little, x, ids: x + little.scale * little.other(ids),
    "grouped convolution": lambda little, x, ids: x + little.conv(little.other(ids).transpose(1, 2)).transpose(1, 2),
    "activation": lambda little, x, ids: x.relu(),
    "norm added": lambda little, x, ids: x + little.norm(x),
    "norm scaled": lambda little, x, ids: x + little.fc(0.5 * little.norm(x)),
    "second reader": lambda little, x, ids: x * x.sum(-1, keepdim=True).sigmoid(),
    "weight read": lambda little, x, ids: x * little.embed.weight.abs().max(),
    "embedding called twice": lambda little, x, ids: x + little.embed(ids + 1),
    "fixed part joined": lambda little, x, ids: x + (lambda y: y + 0 * y.relu())(little.other(ids)),
}


def streams(module: Little, stages: dict[str, GraphBases] | None = None) -> list[Any]:
    found = find_rotatable(module, trace(module, Call(0, (IDS,), {}), "little"), stages or {}, str)
    return [each for each in found if "embed" in each.writers]


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_does_not_commute_is_an_obstacle(name: str) -> None:
    """Catches an operation, a write or a second use of a parameter after which a rotation would change the output."""
    assert all(stream.obstacle for stream in streams(Little(OBSTACLES[name])))


def test_norms_whose_weight_is_no_factor_are_obstacles() -> None:
    """Catches a norm that multiplies by 1 + weight: folding its weight changes the output."""
    assert [bool(stream.obstacle) for stream in streams(Little(norm=Plus))] == [True]


@pytest.mark.parametrize("step", [None, rows_chosen])
def test_streams_without_obstacle(step: Any) -> None:
    """Catches an analysis that excludes plain sums, or rows selected by a mask of rows."""
    (stream,) = streams(Little(step))
    assert not stream.obstacle and stream.keeps_mean and set(stream.norms) == {"norm", "final"}
