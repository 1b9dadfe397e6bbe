"""Traced graphs are complete: interpreted, they compute the same bits as the module."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from tests.support import tiny
from vlqc.errors import UserError
from vlqc.frontend.tracing import trace
from vlqc.ir.execution import Call, input_tensors


class Replay(fx.Interpreter):
    """Interprets a graph with the module that it was traced from."""

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "get_attr":
            value = super().run_node(n)
            if isinstance(value, Tensor) and n.op != "output":
                assert (tuple(value.shape), value.dtype) == (n.meta["shape"], n.meta["dtype"]), n
            return value
        return self.fetch_attr(n.meta["path"]) if n.meta["path"] else n.meta["constant"]


def copied(call: Call) -> Call:
    """A copy of the arguments, because modules may write into them."""
    args, kwargs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (call.args, call.kwargs))
    return Call(call.sample, args, kwargs)


@torch.no_grad()
def replay(module: nn.Module, graph: fx.Graph, call: Call) -> tuple[Tensor, ...]:
    call = copied(call)
    inputs = dict(input_tensors(module, call.args, call.kwargs))
    expected = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    outputs: tuple[Tensor, ...] = Replay(module, graph=graph).run(*(inputs[name] for name in expected))
    return outputs


@torch.no_grad()
def assert_complete(module: nn.Module, graph: fx.Graph, call: Call) -> None:
    mine = copied(call)
    expected = tiny.tensors_of(module(*mine.args, **mine.kwargs))
    got = replay(module, graph, call)
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


# ---- the real model --------------------------------------------------------------------------------------------------


@pytest.mark.every_transformers
@pytest.mark.parametrize("name", ["visual.blocks.0", "visual.blocks.1", "visual.merger", "model.layers.0"])
def test_graph_computes_the_same_output(name: str) -> None:
    """Catches an operation that is missing in the graph of a windowed block, full block, merger or decoder layer."""
    stage = tiny.recorded_stages()[name]
    graph = trace(stage.module, stage.call, name)
    graph.lint()
    assert_complete(stage.module, graph, stage.call)
    for one, other in zip(replay(stage.module, graph, stage.call), tiny.tensors_of(stage.output), strict=True):
        assert torch.equal(one, other)


@pytest.mark.every_transformers
def test_tracing_needs_no_weights() -> None:
    """Catches a tracer that reads weights, or does not remove its hooks."""
    model, recorded = tiny.float_model(), tiny.recorded_stages()
    for name in ("visual.blocks.0", "visual.merger", "model.layers.0"):
        bare = model.stages[name]
        graph = trace(bare, recorded[name].call, name)
        assert all(parameter.is_meta for parameter in bare.parameters())
        assert not any(child._forward_hooks or child._forward_pre_hooks for child in bare.modules())
        assert str(graph) == str(trace(recorded[name].module, recorded[name].call, name))
        assert_complete(recorded[name].module, graph, recorded[name].call)


@pytest.mark.every_transformers
def test_every_leaf_is_one_node() -> None:
    """Catches a norm that is traced into (it could not start an edge), and a Linear traced as a function."""
    for stage in tiny.recorded_stages().values():
        called = [n.target for n in trace(stage.module, stage.call, stage.name).nodes if n.op == "call_module"]
        owners = {path for path, child in stage.module.named_modules() if any(True for _ in child.parameters(False))}
        assert owners <= set(called)
        assert len(called) == len(set(called))


# ---- synthetic modules -----------------------------------------------------------------------------------------------


class FunctionModule(nn.Module):
    """A module whose `forward` is a function of itself and the input; attributes are children or tensors."""

    def __init__(self, body: Callable[..., Any], **children: Any) -> None:
        super().__init__()
        self.body = body
        for name, child in children.items():
            if isinstance(child, Tensor) and not isinstance(child, nn.Parameter):
                self.register_buffer(name, child)
            else:
                setattr(self, name, child)

    def forward(self, rows: Tensor, more: Any = None) -> Any:
        return self.body(self, rows) if more is None else self.body(self, rows, more)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_place(m: FunctionModule, x: Tensor) -> Tensor:
    y = x.clone()
    y += 1
    view = y[:, :2]
    view.mul_(3)
    y.add_(x, alpha=2)
    return m.a(y)  # type: ignore[no-any-return]


def set_item(m: FunctionModule, x: Tensor) -> Tensor:
    y = torch.zeros(4, 4)
    y[1:3, :2] = x[1:3, 2:]
    y[..., -1] = 7
    y[x > 0] = -1
    return m.a(y)  # type: ignore[no-any-return]


def attributes(m: FunctionModule, x: Tensor) -> Tensor:
    return m.a(x.T) + x.mT + x.data  # type: ignore[no-any-return]


def several(m: FunctionModule, x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    values, places = torch.max(x, dim=-1)
    q, k, v, rest = m.a(x).unbind(-1)
    return first.sum() + second * values[:, None] + places[:, None] + torch.stack([q, k + v + rest], -1)  # type: ignore[no-any-return]


def gather(m: FunctionModule, x: Tensor) -> Tensor:
    return m.a(x[m.index])[:, m.index]  # type: ignore[no-any-return]


def many_outputs(m: FunctionModule, x: Tensor) -> Any:
    y = m.a(x)
    return y, None, (x, y + 1)


def mapping(m: FunctionModule, x: Tensor) -> Any:
    return {"hidden": m.a(x), "extra": x * 2}


def loop(m: FunctionModule, x: Tensor) -> Tensor:
    for step in range(3):
        x = m.a(x) if step != 1 else torch.nn.functional.gelu(x)
    return x


def conditions(m: FunctionModule, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return m.a(x) if x.shape[0] == 4 else m.a(x) * 0  # type: ignore[no-any-return]


def new_tensors(m: FunctionModule, x: Tensor) -> Tensor:
    mask = torch.tril(torch.ones(4, 4)) + torch.tensor([1.0, 2, 3, 4]) + torch.arange(4)
    return m.a(x) * mask + x.new_full((4,), 0.5) + torch.full_like(x, 2)  # type: ignore[no-any-return]


def own_tensors(m: FunctionModule, x: Tensor) -> Tensor:
    return m.a(x) * m.gain + m.shift + m.inner.gain  # type: ignore[no-any-return]


def by_keyword(m: FunctionModule, x: Tensor) -> Tensor:
    return torch.cat(tensors=[m.a(input=x), x], dim=-1).mul(other=x.repeat(1, 2))


def untouched(m: FunctionModule, x: Tensor) -> Any:
    return x


def unused(m: FunctionModule, x: Tensor) -> Tensor:
    m.a(x)
    return x + 1


BODIES = [
    in_place, set_item, attributes, several, gather, many_outputs, mapping, loop, conditions, new_tensors, own_tensors,
    by_keyword, untouched, unused,
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_whatever_a_block_does_is_recorded(body: Callable[..., Any]) -> None:
    """Catches missing in-place writes, item assignments, attributes, outputs, constants or parameters."""
    inner = nn.Module()
    inner.gain = nn.Parameter(numbers(4, seed=3))
    module = FunctionModule(
        body,
        a=nn.Linear(4, 4),
        gain=nn.Parameter(numbers(4, seed=1)),
        shift=numbers(4, seed=2),
        inner=inner,
        index=torch.tensor([3, 0, 2, 1]),
    )
    call = Call(0, (numbers(4, 4),), {})
    graph = trace(module, call, "module")
    graph.lint()
    output = module(*call.args)
    if isinstance(output, tuple):
        output = [output[0], *output[2]]
    expected = tiny.tensors_of(output)
    for one, other in zip(replay(module, graph, call), expected, strict=True):
        assert torch.equal(one, other)


def test_parameters_outside_leaves_are_read_when_the_graph_runs() -> None:
    """Catches a graph that keeps the meta tensor, or the current value, of a parameter that is loaded later."""
    module = FunctionModule(
        own_tensors, a=nn.Linear(4, 4), gain=nn.Parameter(numbers(4)), shift=numbers(4), inner=nn.Module()
    )
    module.inner.gain = nn.Parameter(numbers(4))
    call = Call(0, (numbers(4, 4),), {})
    real = {name: parameter.data for name, parameter in module.named_parameters()}
    for owner, name in ((module, "gain"), (module.inner, "gain"), (module.a, "weight"), (module.a, "bias")):
        setattr(owner, name, nn.Parameter(torch.empty_like(getattr(owner, name), device="meta"), requires_grad=False))
    graph = trace(module, call, "module")
    paths = [node.meta["path"] for node in graph.nodes if node.op == "get_attr"]
    assert paths == ["gain", "shift", "inner.gain"]
    for path, value in real.items():
        owner, _, name = path.rpartition(".")
        setattr(module.get_submodule(owner), name, nn.Parameter(value * 2, requires_grad=False))
    module.shift += 1
    assert_complete(module, graph, call)


def test_inputs_have_readable_names() -> None:
    """Catches placeholders with the same name, and two for the same tensor."""
    x, y = numbers(4, 4), numbers(4, 4, seed=1)
    module = FunctionModule(lambda m, rows, more: m.a(rows) + more[0] + more[1]["angle"], a=nn.Linear(4, 4))
    graph = trace(module, Call(0, (x,), {"more": (y, {"angle": x + y, "unused": "word"})}), "module")
    assert [node.target for node in graph.nodes if node.op == "placeholder"] == ["rows", "more_0", "more_1"]


def test_what_a_leaf_does_inside_is_not_recorded() -> None:
    """Catches nodes for the operations inside a leaf, and a leaf within a leaf."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * torch.nn.functional.normalize(x.float()).to(x.dtype)

    module = FunctionModule(lambda m, x: m.act(m.norm(x)), norm=Norm(), act=nn.GELU())
    graph = trace(module, Call(0, (numbers(2, 4),), {}), "module")
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "call_module", "output"]


def test_a_block_that_cannot_be_run_is_an_error_of_the_user() -> None:
    """Catches a traceback for a block whose control flow depends on tensor values."""
    module = FunctionModule(lambda m, x: m.a(x.reshape(3, 5)), a=nn.Linear(5, 5))
    with pytest.raises(UserError, match=r"block\.7"):
        trace(module, Call(0, (numbers(4, 4),), {}), "block.7")
    assert not module.a._forward_hooks and not module.a._forward_pre_hooks
    assert torch.is_grad_enabled()
