"""The text of a stage: what it shows, and that it changes exactly when the stage does."""

import ast
import dataclasses
import operator
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from tests.support.small_stage import decided, lowered, traced
from vlqc.ir.parser import parse_stage
from vlqc.ir.printer import print_stage
from vlqc.ir.snapshot import EdgeSummary, StageSnapshot
from vlqc.ir.stage import InputQuantization, Site, Stage, WeightQuantization
from vlqc.ir.syntax import find_function, function_name, literal, quote
from vlqc.targets.schemes import Scheme

STATES: dict[str, Callable[[], Stage]] = {"traced": traced, "decided": decided, "lowered": lowered}


@pytest.mark.parametrize("state", STATES)
def test_golden(state: str, golden: Callable[[str, str], None]) -> None:
    """Any change of the text form, or of what the recorder puts into a graph, shows here side by side."""
    golden(f"small_stage_{state}.vlqc", print_stage(STATES[state]()))


@pytest.mark.parametrize("state", STATES)
def test_text_is_deterministic_and_without_addresses(state: str) -> None:
    """An id, an address or a set's order in the text would make two runs of one command differ."""
    first, second = print_stage(STATES[state]()), print_stage(STATES[state]())
    assert first == second
    assert "0x" not in first


def test_every_weight_shows() -> None:
    """A rewrite of one value of one weight that left the text unchanged could not be seen in a dump."""
    stage = traced()
    before = print_stage(stage).splitlines()
    for name, parameter in stage.module.named_parameters():
        known = parameter.clone()
        parameter.view(-1)[-1] += 2**-20
        changed = [old for old, new in zip(before, print_stage(stage).splitlines(), strict=True) if old != new]
        parameter.copy_(known)
        assert len(changed) == 1 and changed[0].startswith(f'  "visual.blocks.0.{name}" ')


def test_weights_can_be_left_out() -> None:
    """The pass manager compares texts without weights: they are digested on their own, once."""
    text = print_stage(traced())
    before, _, rest = text.partition("tensors {\n")
    assert print_stage(traced(), tensors=False) == before + rest.partition("}\n")[2]


def test_no_edges_found_differs_from_not_looked() -> None:
    """Catches a text that does not distinguish "no edges found" from "edges not searched"."""
    stage = traced()
    without = print_stage(stage)
    stage.edges = ()
    assert "edges {\n}\n" in print_stage(stage) and "edges" not in without
    assert parse_stage(print_stage(stage)).edges == ()
    assert parse_stage(without).edges is None


def test_every_fact_of_a_site_shows() -> None:
    """A fact that a pass may change and the text leaves out: the manager would call the pass a liar, or not notice."""
    changes: dict[str, Callable[[Site], None]] = {
        "scheme": lambda site: setattr(site, "scheme", Scheme.W8A8_DYNAMIC),
        "group_size": lambda site: setattr(site, "group_size", 64),
        "added_bias": lambda site: setattr(site, "added_bias", True),
        "reason": lambda site: setattr(site, "reason", "else"),
        "input": lambda site: setattr(site, "input", InputQuantization(0.5, 0.0)),
        "integers": lambda site: set_part(site, 0),
        "scale": lambda site: set_part(site, 1),
        "group_scale": lambda site: set_part(site, 2),
    }
    known = {field.name for field in dataclasses.fields(Site)} - {"name", "target", "source", "shape"}
    assert known - {"weight"} == set(changes) - {"integers", "scale", "group_scale"}
    for what, change in changes.items():
        stage = decided()
        site = stage.sites["visual.blocks.0.mlp.up"]
        if what == "group_scale":
            set_part(site, 2)
        before = print_stage(stage, tensors=False).splitlines()
        change(site)
        after = print_stage(stage, tensors=False).splitlines()
        changed = [line for line, other in zip(before, after, strict=True) if line != other]
        assert len(changed) == 1 and changed[0].startswith('  "visual.blocks.0.mlp.up" '), what


def set_part(site: Site, number: int) -> None:
    """Adds 1 to a tensor of a site's weight; group scales are all ones if the weight has none."""
    assert site.weight is not None
    parts = [*site.weight.tensors(), torch.zeros(6, 2)][:3]
    parts[number] = parts[number] + 1
    site.weight = WeightQuantization(*parts[: max(number + 1, len(site.weight.tensors()))])


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.Tensor.reshape, "torch.Tensor.reshape"),
        (torch.reshape, "torch.reshape"),
        (nn.functional.gelu, "torch.nn.functional.gelu"),
        (nn.functional.softmax, "torch.nn.functional.softmax"),
        (torch.softmax, "torch.softmax"),
        (torch.split, "torch.split"),
        (torch.Tensor.__getitem__, "torch.Tensor.__getitem__"),
        (torch.Tensor.__rsub__, "torch.Tensor.__rsub__"),
        (operator.getitem, "operator.getitem"),
        (getattr, "builtins.getattr"),
    ],
)
def test_functions_are_named_by_where_they_are_found(function: object, name: str) -> None:
    """Two functions with one `__name__` (torch.softmax and torch.nn.functional.softmax) must not be mixed up."""
    assert function_name(function) == name
    assert find_function(name) is function


def test_what_has_no_notation_is_named() -> None:
    """A custom operator or an odd argument must not stop a dump, and the name must not contain an address."""
    assert function_name(lambda x: x).startswith('unknown("tests.ir.test_printer.')
    assert literal(torch.Generator()) == 'unknown("torch._C.Generator")'
    assert literal({"a": object()}) == '{"a": unknown("builtins.object")}'


@given(st.text() | st.text(alphabet="'\"\\%\n\x85\ud800{}"))
def test_strings_are_one_line_of_python(text: str) -> None:
    """A quote, backslash, line end or lone surrogate in a reason would break the line or read back differently."""
    quoted = quote(text)
    assert ast.literal_eval(quoted) == text
    assert quoted[0] == quoted[-1] == '"' and len(quoted.splitlines()) == 1


def test_arguments_named_like_keywords() -> None:
    """`random_(from=0, to=4)` records an argument that cannot be written NAME=VALUE."""
    graph = fx.Graph()
    value = graph.placeholder("x")
    graph.call_function(torch.Tensor.random_, (value,), {"from": 0, "to": 4})
    text = print_stage(StageSnapshot("s", "vision", torch.float16, graph))
    assert '%random_ = torch.Tensor.random_(%x, to=4, **{"from": 0})' in text
    parsed = parse_stage(text)
    assert dict(next(node for node in parsed.graph.nodes if node.op == "call_function").kwargs) == {"from": 0, "to": 4}


def test_edge_names_are_checkpoint_names() -> None:
    """Module paths of the installed transformers in the text would make dumps of two versions differ."""
    text = print_stage(decided())
    assert '  "visual.blocks.0.norm1" 4 of 4' in text
    edges = parse_stage(text).edges
    assert edges is not None and all(isinstance(edge, EdgeSummary) for edge in edges)
    # Independently: of the 12 outputs of qkv only the last third, v, reaches proj linearly.
    qkv = next(edge for edge in edges if edge.producer.endswith("attn.qkv"))
    assert (qkv.usable.used, qkv.usable.total) == (4, 12)
