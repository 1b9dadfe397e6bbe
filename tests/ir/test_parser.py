"""Text back into stages: exact round trips, and faults that point at the place."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import fx

from tests.support.exact_stage import text_after_rotation
from tests.support.small_stage import decided
from vlqc.errors import UserError
from vlqc.ir.parser import parse_stage
from vlqc.ir.printer import print_stage
from vlqc.ir.rotations import AppliedRotation, RotationKind
from vlqc.ir.snapshot import StageSnapshot, summarize
from vlqc.ir.stage import InputQuantization, Stage, WeightQuantization
from vlqc.ir.syntax import Unknown
from vlqc.kernels_ref.rotation import Rotation
from vlqc.targets.schemes import Scheme

GOLDENS = sorted((Path(__file__).parents[1] / "goldens").glob("**/*.vlqc"))
DECIDED = print_stage(decided())
ROTATED = text_after_rotation(1)
CACHED = next(path for path in GOLDENS if path.name == "after-lower-cache.vlqc").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", GOLDENS, ids=lambda file: str(file.stem))
def test_goldens_read_back_exactly(file: Path) -> None:
    """A line of any golden that the parser loses or alters."""
    text = file.read_text(encoding="utf-8")
    assert print_stage(parse_stage(text)) == text


def test_facts_survive() -> None:
    """Sites, quantization and summaries must arrive as values, not only as text that prints the same."""
    stage, parsed = decided(), parse_stage(DECIDED)
    assert (parsed.name, parsed.part, parsed.dtype) == ("visual.blocks.0", "vision", torch.bfloat16)
    qkv = parsed.sites["visual.blocks.0.attn.qkv"]
    assert (qkv.scheme, qkv.shape, qkv.source) == (Scheme.W8A8, (12, 4), "norm1")
    assert qkv.input == InputQuantization(0.03125, -3.0)
    assert parsed.sites["visual.blocks.0.mlp.down"].reason == 'kept "float" by request'
    weight = stage.sites[qkv.name].weight
    assert weight is not None
    assert parsed.weights[qkv.name] == [summarize(weight.integers), summarize(weight.scale)]
    assert parsed.tensors["visual.blocks.0.norm1.weight"] == summarize(stage.module.get_parameter("norm1.weight"))
    assert parsed.observations["mul"].rows == {"text": 2, "image": 1}
    original = {node.name: node for node in stage.graph.nodes}
    for node in parsed.graph.nodes:
        assert node.op == original[node.name].op
        assert repr(node.args) == repr(original[node.name].args)
        assert node.meta.get("shape") == original[node.name].meta.get("shape")
        if node.op == "call_function":
            assert node.target is original[node.name].target
    parsed.graph.lint()


def in_groups() -> Stage:
    """The decided stage with gate and up in 4-bit groups, and a qkv that gained a bias."""
    stage = decided()
    stage.sites["visual.blocks.0.attn.qkv"].added_bias = True
    for name in ("gate", "up"):
        site = stage.sites[f"visual.blocks.0.mlp.{name}"]
        assert site.weight is not None
        site.scheme, site.group_size, site.input, site.reason = Scheme.W4A8_DYNAMIC, 2, None, "by request"
        site.weight = WeightQuantization(site.weight.integers.clamp(-8, 7), site.weight.scale, torch.ones(6, 2) / 4)
    return stage


def test_groups_and_gained_biases_survive() -> None:
    """Facts of 4-bit weights and of added biases that are printed and lost, or read as something else."""
    stage = in_groups()
    text = print_stage(stage)
    parsed = parse_stage(text)
    assert print_stage(parsed) == text
    up, qkv = parsed.sites["visual.blocks.0.mlp.up"], parsed.sites["visual.blocks.0.attn.qkv"]
    assert (up.scheme, up.group_size, up.added_bias, up.reason) == (Scheme.W4A8_DYNAMIC, 2, False, "by request")
    assert (qkv.scheme, qkv.group_size, qkv.added_bias) == (Scheme.W8A8, None, True)
    weight = stage.sites[up.name].weight
    assert weight is not None
    assert parsed.weights[up.name] == [summarize(part) for part in weight.tensors()]
    assert len(parsed.weights[up.name]) == 3 and len(parsed.weights[qkv.name]) == 2


GROUP_FAULTS = [
    ("group_size=2", "group_size=two", "expected ' group_size=' and a whole number", " group_size=two"),
    (" added_bias", " gained_biases", "expected the end of the line", " gained_biases"),
    (" group_scale(", " group_scales(", "expected group_scale(", " group_scales("),
    ("scheme=W4A8_DYNAMIC group_size=2", "scheme=W4A8_DYNAMIC", "expected the end of the line", " group_scale("),
]


@pytest.mark.parametrize(("old", "new", "what", "under"), GROUP_FAULTS, ids=[new for _, new, _, _ in GROUP_FAULTS])
def test_faults_of_groups_point_at_the_place(old: str, new: str, what: str, under: str) -> None:
    """A slip in the new words that is passed over in silence: the site would lose its groups or its bias."""
    text = print_stage(in_groups())
    assert old in text
    with pytest.raises(UserError) as caught:
        parse_stage(text.replace(old, new, 1))
    (fault,) = caught.value.faults
    _, shown, caret = fault.where.split("\n")
    assert what in fault.what and shown[caret.index("^") :].startswith(under)


# ---- generated graphs ------------------------------------------------------------------------------------------------

ATOMS: st.SearchStrategy[Any] = st.one_of(
    st.integers(),
    st.floats(),
    st.text(),
    st.booleans(),
    st.none(),
    st.just(...),
    st.sampled_from([torch.float32, torch.int8, torch.bool, torch.contiguous_format, torch.strided]),
    st.sampled_from([torch.device("cpu"), torch.device("meta"), torch.device("cuda", 1)]),
    st.builds(slice, st.none() | st.integers(), st.none() | st.integers(), st.none() | st.integers()),
    st.builds(Unknown, st.text()),
)
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    ),
    max_leaves=6,
)


KINDS = ("function", "module", "method", "constant", "unknown")


def stage_of(graph: fx.Graph) -> Stage:
    return StageSnapshot("s", "language", torch.float16, graph)


@given(VALUES, VALUES)
@example(-math.inf, math.nan)
@example(-0.0, (1,))
@example("%x = '\" #\\", ((), [()], {}))
@example("\ud800", "a : float32[1]")
def test_any_argument_reads_back(first: Any, second: Any) -> None:
    """A literal whose type or value changes on the way: 1 for 1.0, a list for a tuple, -0.0, nan, strings with %x."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.add, (x, first, [x, (x, second)]), {"alpha": second})
    graph.output((node,))
    text = print_stage(stage_of(graph))
    parsed = parse_stage(text)
    again = next(found for found in parsed.graph.nodes if found.op == "call_function")
    assert print_stage(parsed) == text
    assert repr((again.args, again.kwargs)) == repr((node.args, node.kwargs))


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.text()), max_size=8), st.data())
def test_any_graph_reads_back(kinds: list[tuple[str, str]], data: st.DataObject) -> None:
    """Operations of every kind with any target, in any number, with and without a type."""
    graph = fx.Graph()
    nodes = [graph.placeholder("x")]
    for kind, target in kinds:
        args = tuple(data.draw(st.lists(st.sampled_from(nodes), max_size=2)))
        if kind == "constant":
            node = graph.create_node("get_attr", target)
        elif kind == "function":
            function: Any = data.draw(st.sampled_from([torch.relu, torch.Tensor.add, getattr]))
            node = graph.call_function(function, args)
        elif kind == "unknown":
            node = graph.create_node("call_function", Unknown(target), args, name="custom")
        else:
            node = graph.create_node(f"call_{kind}", target, args)
        if data.draw(st.booleans()):
            node.meta["shape"] = tuple(data.draw(st.lists(st.integers(0, 9), max_size=3)))
            node.meta["dtype"] = torch.int64
        nodes.append(node)
    graph.output(nodes[-1])
    text = print_stage(stage_of(graph))
    assert print_stage(parse_stage(text)) == text


NUMBERS = st.integers(0, 10**18 - 1)
LAYERS = st.text(max_size=3)


def unique(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(values, max_size=3, unique=True).map(tuple)


@st.composite
def rotations(draw: st.DrawFn, kind: RotationKind) -> AppliedRotation:
    """Any rotation that the text can show."""
    starts = st.lists(NUMBERS, min_size=1, max_size=3).map(tuple)
    writers = draw(st.dictionaries(LAYERS, starts, max_size=3))
    tables = tuple(layer for layer in writers if draw(st.booleans()))
    writers |= dict.fromkeys(tables, (0,))
    readers = draw(st.dictionaries(LAYERS, st.none() | LAYERS, max_size=3))
    parts = [f"{layer}.{part}" for layer in {**writers, **readers} for part in ("weight", "bias")]
    name = draw(st.text(st.characters(exclude_categories=["Cs"])))
    pairs = st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False))
    return AppliedRotation(
        kind, Rotation(max(1, draw(NUMBERS)), draw(NUMBERS), name, draw(st.booleans())), writers, readers,
        draw(unique(st.text())), tables, draw(unique(st.text())), draw(unique(NUMBERS)), draw(st.booleans()),
        {part: draw(pairs) for part in parts if draw(st.booleans())},
    )  # fmt: skip


@given(rotations(RotationKind.RESIDUAL), rotations(RotationKind.HEADS))
def test_any_rotation_reads_back(residual: AppliedRotation, heads: AppliedRotation) -> None:
    """Catches a fact of a rotation that the text omits or that is read as something else."""
    known = residual, heads
    graph = fx.Graph()
    graph.output((graph.placeholder("x"),))
    text = print_stage(StageSnapshot("s", "language", torch.float16, graph, rotations=known))
    assert parse_stage(text).rotations == known
    assert print_stage(parse_stage(text)) == text


@given(st.data())
def test_damaged_text_is_a_user_fault_or_still_text(data: st.DataObject) -> None:
    """No damage may end in another exception than UserError, nor in a stage that does not print and read back."""
    text = data.draw(st.sampled_from([DECIDED, ROTATED]))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 6)))
        text = text[:start] + data.draw(st.text(alphabet='%"()[]{}=,:.-01anx \n\\', max_size=4)) + text[end:]
    try:
        parsed = parse_stage(text)
    except UserError as error:
        assert error.faults
    else:
        printed = print_stage(parsed)
        assert print_stage(parse_stage(printed)) == printed


# ---- faults ----------------------------------------------------------------------------------------------------------

# replaced text, its replacement, text of the fault, the text under the caret
FAULTS = [
    ("torch.Tensor.add(%hidden", "torch.Tensor.ad(%hidden", "unknown function torch.Tensor.ad", "torch.Tensor.ad("),
    ("torch.Tensor.add(%hidden", "os.system(%hidden", "unknown function os.system", "os.system"),
    ("torch.Tensor.add(%hidden", "builtins.eval(%hidden", "unknown function builtins.eval", "builtins.eval"),
    ("torch.Tensor.add(%hidden", "torch.Tensor.__class__(%hidden", "unknown function", "torch.Tensor.__class__"),
    ("torch.Tensor.add(%hidden", "torch.hub.load(%hidden", "unknown function torch.hub.load", "torch.hub.load"),
    ("torch.Tensor.add(%hidden", '__import__("os").system(%hidden', "unknown function", "__import__"),
    (
        "(%hidden_states, %constant_0)",
        "(%hidden_state, %constant_0)",
        "%hidden_state is not defined above",
        "%hidden_state,",
    ),
    ("(%hidden_states, %constant_0)", "(hidden_states, %constant_0)", "expected a value", "hidden_states, "),
    ("(%hidden_states, %constant_0)", "(%hidden_states, 1 + 1)", "expected a value", "1 + 1"),
    ("(%hidden_states, %constant_0)", "(%hidden_states, [x for x in y])", "expected a value", "[x for"),
    ("(%hidden_states, %constant_0)", "(%hidden_states, %constant_0", "this is not an expression", "("),
    ("(%hidden_states, %constant_0)", "(%hidden_states, torch.float31)", "expected a value", "torch.float31"),
    ("(%hidden_states, %constant_0)", '(%hidden_states, torch.device("gpu"))', "expected a value", "torch.device"),
    ("(%hidden_states, %constant_0)", "(%hidden_states, **3)", "expected NAME=VALUE", "**3"),
    ("%observe = vlqc", "%add = vlqc", "%add is defined twice", "%add = vlqc"),
    ("%observe = vlqc", "observe = vlqc", "expected %NAME = ... or return ...", "observe"),
    ('module("visual.blocks.0.attn.proj")(', "module(5)(", "expected one string", "module(5)"),
    (": float32[2, 12]", ": flot32[2, 12]", "expected a dtype", "flot32"),
    ("part=vision dtype=bfloat16", "part=vision dtype=bflot16", "expected a dtype", "bflot16"),
    ("sites {", "site {", "expected sites or caches or edges or rotations or observations", "site {"),
    ('"visual.blocks.0.mlp.gate" [6, 4]', '"visual.blocks.0.mlp.gate" [6]', "expected a shape", " [6]"),
    ('reason="kept', 'reason="\\d kept', "this string cannot be read", '"\\d kept'),
    ("(%hidden_states, %constant_0)", "(%hidden_states, 1if)", "this is not an expression", "1if)"),
    ("scheme=FLOAT", "scheme=INT8", "expected one of W8A8, W8A8_DYNAMIC", "INT8"),
    ("input(scale=0.03125", "input(scale=0.0.3", "expected a number", "0.0.3"),
    ('norm1.bias" float32[4]', 'norm1.weight" float32[4]', "appears twice", " float32[4] absmax=1.5 "),
    ('norm1" 4 of 4', 'norm1" 4 from 4', "expected a count", " 4 from 4"),
    ("%mul channels=6", "%mul channel=6", "expected ' channels='", " channel=6"),
    ("kept=3 digest=78ad6b6f", "kept=3 digest=78AD6B6F", "expected digest=", " digest=78AD6B6F"),
]


ROTATION_FAULTS = [
    ("residual stream", "residual streams", "expected a space", "s "),
    ("residual stream", "stream", "expected residual stream or attention heads", "stream "),
    ("size=4", "size=0", "expected ' size=' and a positive number", " size=0"),
    ("size=2 seed=0", "size=2 seed=-1", "expected ' seed='", " seed=-1"),
    ("size=4 seed=0 done", "size=4 seed=0 undone", "expected the end of the line", " undone"),
    ('"model.embed_tokens"', '"\\ud800"', "a name must be Unicode text", '"\\ud800"'),
    ("output 0", "output first", "expected the position of an output", "first"),
    ("    output 0", "    outputs 0", "expected input, output, norm, columns, rows or table", "outputs 0"),
    ("at 8, 10", "at 8, -10", "expected the end of the line", ", -10"),
    ("at 8, 10", "at -8", "expected ' at ' and numbers of rows", " at -8"),
    ("absmax 1.25 -> 1.0625", "absmax 1.25", "expected  -> NUMBER", ")"),
    ('mlp.up_proj" after', 'mlp.gate_proj" after', "appears twice", " after"),
    ('norm "model.layers.0.norm2"', 'norm "model.layers.0.norm1"', "appears twice", ""),
]
CACHE_FAULTS = [
    ('k_proj" values', 'k_proj" value', "expected ' values '", " value "),
    ("[1, 2] at", "[1] at", "expected heads and their size", " [1] at"),
    ("at %scaled", "at scaled", "expected ' at %NODE'", " at scaled"),
    ("scheme=C8", "scheme=C4", "expected one of C8", "C4"),
    ("sqnr=51.26", "sqnr=much", "expected a number", "much"),
    ("key_scale(float32[2]", "key_scale(float31[2]", "expected a dtype", "float31"),
    ("text=2 image=4 key", "text=two image=4 key", "expected rows of a modality", " text=two"),
    ("queries=6", "queries=-6", "expected ' kept=' and ' queries='", " kept=6 queries=-6"),
]
PLACES = [(DECIDED, *fault) for fault in FAULTS] + [(ROTATED, *fault) for fault in ROTATION_FAULTS]
PLACES += [(CACHED, *fault) for fault in CACHE_FAULTS]


@pytest.mark.parametrize(("valid", "old", "new", "what", "under"), PLACES, ids=[place[2] for place in PLACES])
def test_faults_point_at_the_place(valid: str, old: str, new: str, what: str, under: str) -> None:
    """Catches a fault with a missing or wrong line number, or a caret at the wrong column."""
    assert old in valid
    text = valid.replace(old, new, 1)
    number = valid[: valid.index(old)].count("\n") + 1
    line = text.split("\n")[number - 1]
    with pytest.raises(UserError) as caught:
        parse_stage(text)
    assert len(caught.value.faults) == 1  # users of what the line would have defined are not faulted as well
    fault = caught.value.faults[0]
    assert what in fault.what
    place, shown, caret = fault.where.split("\n")
    assert place.startswith(f"line {number}, column ") and shown.strip() == line.strip()
    assert shown[caret.index("^") :].startswith(under)


def test_all_faults_at_once_with_near_misses() -> None:
    """Someone who edits a dump by hand should not find its faults one run at a time."""
    text = DECIDED.replace("torch.Tensor.permute(", "torch.Tensor.permut(").replace("scheme=FLOAT", "scheme=FLAOT")
    with pytest.raises(UserError) as caught:
        parse_stage(text)
    first, second = caught.value.faults
    assert "permut" in first.what and "permute" in first.fix
    assert "FLOAT" in second.what


@pytest.mark.parametrize("text", ["", "\n", "stage", 'stage "a" part=vision dtype=float32 {', "tensors {\n}\n"])
def test_incomplete_text(text: str) -> None:
    """Half a file, or none, is a fault of the input and not an empty stage."""
    with pytest.raises(UserError):
        parse_stage(text)


def test_nothing_is_imported_or_called() -> None:
    """Catches a text that imports a module or calls a function when it is parsed."""
    unused = "this"  # a module of the standard library that prints when it is imported
    sys.modules.pop(unused, None)
    call = f"{unused}.d(%hidden_states)"
    with pytest.raises(UserError):
        parse_stage(DECIDED.replace("torch.Tensor.add(%hidden_states, %constant_0)", call))
    named = parse_stage(DECIDED.replace("torch.Tensor.add(%hidden", f'unknown("{unused}.d")(%hidden'))
    assert unused not in sys.modules
    with pytest.raises(TypeError, match=r"this\.d"):
        next(node for node in named.graph.nodes if isinstance(node.target, Unknown)).target()


def test_deep_nesting_is_refused() -> None:
    """Thousands of brackets exhaust a recursive reader; that has to end as a fault of the text."""
    deep = "[" * 5000 + "]" * 5000
    with pytest.raises(UserError, match="not an expression"):
        parse_stage(DECIDED.replace("(%hidden_states, %constant_0)", f"(%hidden_states, {deep})"))


@pytest.mark.parametrize("digits", [19, 5000])
def test_a_number_that_is_too_long(digits: int) -> None:
    """Catches a ValueError of int() in place of an error that names the line."""
    huge = "9" * digits
    for old, new in (("float32[2, 4]", f"float32[2, {huge}]"), ("[12, 4] from", f"[{huge}, 4] from")):
        assert old in DECIDED
        with pytest.raises(UserError, match="line "):
            parse_stage(DECIDED.replace(old, new, 1))
