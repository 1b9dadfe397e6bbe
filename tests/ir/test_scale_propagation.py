"""Scale propagation finds exactly the edges that hold, in modules made by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.folded_edges import CALL, assert_holds
from vlqc.frontend.tracing import trace
from vlqc.ir.scale_propagation import find_edges, scales_its_channels
from vlqc.ir.stage import Edge


class Made(nn.Module):
    """A norm of 8 channels, Linears a..d from 8 to 8, a wide one from 8 to 24 and a narrow one; `body` uses them."""

    def __init__(self, body: Callable[["Made", Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = body
        self.norm = nn.LayerNorm(8)
        self.other = nn.LayerNorm(8)
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.wide, self.long, self.few = nn.Linear(8, 24), nn.Linear(16, 8), nn.Linear(4, 8)
        self.both = nn.Bilinear(4, 4, 8)
        self.act = nn.GELU()
        self.gru = nn.GRU(8, 8)
        self.prelu = nn.PReLU(8)
        self.register_buffer("order", torch.tensor([7, 6, 5, 4, 3, 2, 1, 0]))
        self.register_buffer("row", torch.tensor([2, 0, 1, 2]))
        for name, parameter in self.named_parameters():
            if "norm" in name or "other" in name:
                nn.init.uniform_(parameter, 0.5, 2.0)
        self.double().requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def edges_of(body: Callable[[Made, Tensor], Any]) -> tuple[Made, dict[str, Edge]]:
    made = Made(body)
    edges = find_edges(made, trace(made, CALL, "made"))
    return made, {edge.producer: edge for edge in edges}


def by_view_in_place(m: Made, x: Tensor) -> Tensor:
    n, blank = m.norm(x), torch.ones_like(x)
    view = blank[:]
    view.mul_(n)
    return m.a(n) + m.b(blank)  # type: ignore[no-any-return]


def into_a_slot(m: Made, x: Tensor) -> Tensor:
    n, slots = m.norm(x), torch.zeros_like(x)
    slots[:, :2] = n[:, :2]
    return m.a(n) + m.b(slots)  # type: ignore[no-any-return]


def overwritten(m: Made, x: Tensor) -> Tensor:
    n = m.norm(x)
    n[..., 0] = 1
    return m.a(n)  # type: ignore[no-any-return]


def by_out(m: Made, x: Tensor) -> Tensor:
    n, blank = m.norm(x), torch.empty_like(x)
    torch.mul(n, 2, out=blank)
    return m.a(n) + m.b(blank)  # type: ignore[no-any-return]


def into_two_inputs(m: Made, x: Tensor) -> Tensor:
    first, second = m.norm(x).chunk(2, -1)
    return m.both(first, second) + m.few(second)  # type: ignore[no-any-return]


def tuple_of_a_leaf(m: Made, x: Tensor) -> Tensor:
    return m.gru(m.norm(x))[0]  # type: ignore[no-any-return]


def added_in_place(m: Made, x: Tensor) -> Tensor:
    n = m.norm(x)
    kept = n.view(2, 4, 8)
    kept += x
    return m.a(n)  # type: ignore[no-any-return]


NOT_EDGES: dict[str, Callable[[Made, Tensor], Any]] = {
    "residual tap": lambda m, x: m.a(n := m.norm(x)) + n,
    "returned beside": lambda m, x: (m.a(n := m.norm(x)), n),
    "returned inside": lambda m, x: {"hidden": m.a(n := m.norm(x)), "kept": [n]},
    "function between": lambda m, x: m.b(functional.silu(m.a(x))),
    "module between": lambda m, x: m.b(m.act(m.a(x))),
    "square": lambda m, x: m.b(m.a(x) ** 2),
    "times itself": lambda m, x: m.b((n := m.norm(x)) * n),
    "reciprocal": lambda m, x: m.b(1 / m.norm(x)),
    "divisor": lambda m, x: m.b(x / m.norm(x)),
    "plus a constant": lambda m, x: m.b(m.norm(x) + 1),
    "plus the input": lambda m, x: m.b(x + m.norm(x)),
    "two producers added": lambda m, x: m.c(m.a(x) + m.b(x)),
    "two norms subtracted": lambda m, x: m.c(m.norm(x) - m.other(x)),
    "into another norm": lambda m, x: m.a(m.act(m.other(m.norm(x) * 2))),
    "mean over channels": lambda m, x: m.a(m.norm(x).mean(-1, keepdim=True).expand(-1, -1, 8)),
    "sum over channels": lambda m, x: m.a(m.norm(x).cumsum(-1)),
    "softmax": lambda m, x: m.a(m.norm(x).softmax(-1)),
    "multiplied from the left": lambda m, x: m.b(m.norm(x) @ torch.ones(8, 8, dtype=x.dtype)),
    "function of a weight": lambda m, x: functional.linear(m.norm(x), m.b.weight),
    "query": lambda m, x: m.b(functional.scaled_dot_product_attention(m.norm(x), x, x)),
    "key": lambda m, x: m.b(functional.scaled_dot_product_attention(x, m.norm(x), x)),
    "mask": lambda m, x: m.b(functional.scaled_dot_product_attention(x, x, x, m.norm(x)[..., :4])),
    "score": lambda m, x: m.b((m.norm(x) @ x.transpose(1, 2)) @ x),
    "values over channels": lambda m, x: m.few(
        functional.scaled_dot_product_attention(x[..., :4], x[..., :4], m.norm(x).transpose(1, 2)[:, :4, :4])
    ),
    "shared consumer": lambda m, x: m.a(m.norm(x)) + m.a(x),
    "shared producer": lambda m, x: m.a(m.norm(x)) + m.b(m.norm(2 * x)),
    "channels as rows": lambda m, x: m.few(m.norm(x).transpose(1, 2)),
    "channels mixed by row": lambda m, x: m.few(m.norm(x).reshape(2, 8, 4)),
    "permuted by data": lambda m, x: m.a(m.norm(x)[..., m.order]),
    "permuted by data, all dimensions": lambda m, x: m.a(m.norm(x)[:, :, m.order]),
    "selected by data": lambda m, x: m.a(m.norm(x).index_select(-1, m.order)),
    "masked": lambda m, x: m.a((n := m.norm(x))[(n.detach() * 0 + x) > -99].view(2, 4, 8)),
    "repeated by data": lambda m, x: m.a(m.norm(x).repeat_interleave(m.order * 0 + 1, -1)),
    "rounded quotient": lambda m, x: m.a(torch.div(m.norm(x), 0.3, rounding_mode="floor")),
    "whole numbers": lambda m, x: m.a(m.norm(x).to(torch.int32).double()),
    "bits": lambda m, x: m.a((m.norm(x).view(torch.int64) // 2).view(torch.float64)),
    "written through a view": by_view_in_place,
    "written into a slot": into_a_slot,
    "written over": overwritten,
    "written into out": by_out,
    "added in place to a view": added_in_place,
    "two inputs of one leaf": into_two_inputs,
    "leaf that returns a tuple": tuple_of_a_leaf,
    "never consumed": lambda m, x: m.norm(x).sum() * 0 + x,
}


@pytest.mark.parametrize("body", NOT_EDGES.values(), ids=NOT_EDGES.keys())
def test_where_there_is_no_edge_none_is_claimed(body: Callable[[Made, Tensor], Any]) -> None:
    """Catches an edge of a producer whose scale affects more than the columns of linear layers that are called once."""
    assert edges_of(body)[1] == {}


EVERY = [0, 1, 2, 3, 4, 5, 6, 7]
TURNED = [3, 2, 1, 0, 7, 6, 5, 4]
THIRD = list(range(16, 24))
NONE = [-1] * 8
# body -> producer -> consumer -> channel of each column
EDGES: dict[str, tuple[Callable[[Made, Tensor], Any], dict[str, dict[str, list[int]]]]] = {
    "norm to two": (lambda m, x: m.a(n := m.norm(x)) * m.act(m.b(n)), {"norm": {"a": EVERY, "b": EVERY}, "a": {}}),
    "up and gate": (lambda m, x: m.c(functional.silu(m.a(x)) * m.b(x)), {"b": {"c": EVERY}}),
    "by name": (lambda m, x: m.c(torch.mul(input=m.a(x), other=x)), {"a": {"c": EVERY}}),
    "divided": (lambda m, x: m.c(m.a(x) / (1 + x * x)), {"a": {"c": EVERY}}),
    "same scale added": (lambda m, x: m.c((y := m.a(x)) * 2 + y * x), {"a": {"c": EVERY}}),
    "turned around": (lambda m, x: m.a(m.norm(x)[..., TURNED]), {"norm": {"a": TURNED}}),
    "halves swapped": (
        lambda m, x: m.a(torch.cat(tensors=m.norm(x).chunk(2, -1)[::-1], dim=-1)),
        {"norm": {"a": [4, 5, 6, 7, 0, 1, 2, 3]}},
    ),
    "one half is used up": (
        lambda m, x: m.few((n := m.norm(x))[..., 4:]) + functional.relu(n[..., :4]).sum(),
        {"norm": {"few": [4, 5, 6, 7]}},
    ),
    "one half of the columns": (
        lambda m, x: m.long(torch.cat([x, m.norm(x)], -1)),
        {"norm": {"long": NONE + EVERY}},
    ),
    "two producers side by side": (
        lambda m, x: m.long(torch.cat([m.a(x), m.norm(x)], -1)),
        {"a": {"long": EVERY + NONE}, "norm": {"long": NONE + EVERY}},
    ),
    "each channel twice": (
        lambda m, x: m.long(m.norm(x).repeat_interleave(2, -1)),
        {"norm": {"long": [channel for channel in EVERY for _ in range(2)]}},
    ),
    "two rows side by side": (lambda m, x: m.long(m.norm(x).reshape(-1, 16)), {"norm": {"long": EVERY + EVERY}}),
    "rows chosen by data": (lambda m, x: m.a(m.norm(x)[:, m.row]), {"norm": {"a": EVERY}}),
    "rows selected by data": (lambda m, x: m.a(m.norm(x).index_select(1, m.row)), {"norm": {"a": EVERY}}),
    "shaped like another": (
        lambda m, x: m.a(m.norm(x).view_as(x).reshape_as(x)[:, :1].expand_as(x)),
        {"norm": {"a": EVERY}},
    ),
    "rows turned": (lambda m, x: m.a(m.norm(x).permute(1, 0, 2).contiguous()), {"norm": {"a": EVERY}}),
    "fused qkv": (
        lambda m, x: m.a(functional.scaled_dot_product_attention(*m.wide(x).chunk(3, -1))),
        {"wide": {"a": THIRD}},
    ),
    "attention by hand": (
        lambda m, x: m.a((x @ x.transpose(1, 2)).softmax(-1) @ m.b(x)),
        {"b": {"a": EVERY}},
    ),
    "grouped queries": (
        lambda m, x: m.long(
            functional.scaled_dot_product_attention(
                torch.cat([x, x], -1).view(2, 4, 4, 4).transpose(1, 2),
                x.view(2, 4, 2, 4).transpose(1, 2),
                m.b(x).view(2, 4, 2, 4).transpose(1, 2),
                enable_gqa=True,
            ).transpose(1, 2).reshape(2, 4, 16)
        ),
        {"b": {"long": [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]}},
    ),
    "a tap behind an independent product": (
        lambda m, x: m.a(m.norm(x) * m.act(m.b(x))),
        {"norm": {"a": EVERY}},
    ),
    "multiplied in place": (lambda m, x: m.a(m.norm(x).mul_(x).div_(2)), {"norm": {"a": EVERY}}),
    "transposed attribute": (lambda m, x: m.a(m.norm(x).mT.mT), {"norm": {"a": EVERY}}),
    "another dtype and back": (lambda m, x: m.a(m.norm(x).float().to(x.dtype)), {"norm": {"a": EVERY}}),
}  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), EDGES.values(), ids=EDGES.keys())
def test_edges_and_their_maps(body: Callable[[Made, Tensor], Any], expected: dict[str, dict[str, list[int]]]) -> None:
    """Catches a missing edge, and a column mapped to the wrong channel."""
    made, edges = edges_of(body)
    actual = {
        producer: {target: channels.tolist() for target, channels in edge.consumers.items()}
        for producer, edge in edges.items()
    }
    assert actual == {producer: consumers for producer, consumers in expected.items() if consumers}
    for edge in edges.values():
        assert_holds(made, edge, CALL)


def test_edges_come_in_the_order_of_the_graph() -> None:
    """Catches an order that depends on how modules are registered: dumps and results would not be comparable."""
    edges = edges_of(lambda m, x: m.a(m.other(m.c(m.b(x)))) + m.d(m.norm(x)))[1]
    assert list(edges) == ["b", "other", "norm"]


def test_what_has_the_shape_of_a_norm() -> None:
    """Catches a convolution, an embedding or a scalar gain that is taken for a norm."""
    assert scales_its_channels(nn.LayerNorm(8), 8)
    assert scales_its_channels(nn.RMSNorm(8), 8)
    assert not scales_its_channels(nn.LayerNorm(8), 4)
    assert not scales_its_channels(nn.LayerNorm(8, elementwise_affine=False), 8)
    assert not scales_its_channels(nn.Embedding(8, 8), 8)
    assert not scales_its_channels(nn.Conv1d(8, 8, 1), 8)
    assert not scales_its_channels(nn.PReLU(1), 8)
