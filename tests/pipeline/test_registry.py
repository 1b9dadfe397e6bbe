"""Pipelines as text, their order, and what the options build."""

import dataclasses
import typing
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlqc.errors import UserError
from vlqc.ir.stage import Stage
from vlqc.options.options import Options
from vlqc.pipeline.registry import REGISTRY, Pass, check_order, load_pass, parse_pipeline, pipeline_text, print_pipeline

# ---- text ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EveryOption(Pass):
    """One option of each type that the text knows."""

    name: ClassVar[str] = "every-option"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    summary: ClassVar[str] = "only for tests"

    count: int = 3
    share: float = 0.5
    word: Literal["near", "far"] = "near"
    switch: bool = False
    limit: float | None = None
    names: tuple[str, ...] = ("a",)

    def __post_init__(self) -> None:
        if self.count == 13:
            raise ValueError("13 is not allowed")

    def run(self, stage: Stage) -> bool:
        return False


@pytest.fixture(autouse=True)
def third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that does not come with vlqc, registered as the documentation says: one line in the table."""
    monkeypatch.setitem(REGISTRY, "every-option", f"{__name__}:EveryOption")


NARROWER = {  # options that take fewer values than their type has
    "target": st.sampled_from(["vllm-ascend", "vllm-ascend@0.18", "mindie@2.2.RC1", "both"]),
    "alpha": st.none() | st.floats(0, 1),
    "bound": st.floats(1, allow_nan=False),
}


def options_of(kind: type[Pass]) -> st.SearchStrategy[Pass]:
    """Instances of a pass with any value in each of its options."""
    values: dict[str, st.SearchStrategy[Any]] = {}
    for field in dataclasses.fields(kind):
        wanted = typing.get_type_hints(kind)[field.name]
        if field.name in NARROWER:
            values[field.name] = NARROWER[field.name]
        elif typing.get_origin(wanted) is Literal:
            values[field.name] = st.sampled_from(typing.get_args(wanted))
        elif wanted in (int, bool):
            values[field.name] = st.integers(14, 10**9) if wanted is int else st.booleans()
        elif wanted is float:
            values[field.name] = st.floats(allow_nan=False)
        elif wanted == tuple[str, ...]:
            values[field.name] = st.lists(st.from_regex(r"[a-z.*0-9]{1,8}", fullmatch=True)).map(tuple)
        else:
            assert wanted == float | None, f"{kind.name}.{field.name}: teach this test the type {wanted}"
            values[field.name] = st.none() | st.floats(allow_nan=False)
    return st.builds(kind, **values)


PASSES = st.sampled_from(sorted(REGISTRY)).flatmap(lambda name: options_of(load_pass(name))) | options_of(EveryOption)


@given(st.lists(PASSES, min_size=1, max_size=4))
def test_every_pipeline_reads_back(passes: list[Pass]) -> None:
    """An option value that is printed in a form which reads back as another value, of any registered pass."""
    REGISTRY["every-option"] = f"{__name__}:EveryOption"
    text = print_pipeline(passes)
    assert parse_pipeline(text) == passes
    assert print_pipeline(parse_pipeline(text)) == text


def test_defaults_are_left_out() -> None:
    """`vlqc passes --explain` should show what was chosen, not forty defaults."""
    assert print_pipeline([EveryOption()]) == "every-option"
    assert print_pipeline([EveryOption(switch=True, names=("x", "y"))]) == "every-option{switch=true,names=x;y}"


def test_spaces_and_line_ends_are_free() -> None:
    """A pipeline is pasted from documentation with its line ends."""
    text = " every-option { count = 5 , word=far },\n every-option,\n"
    assert parse_pipeline(text) == [EveryOption(count=5, word="far"), EveryOption()]


def test_names_in_the_table_are_those_of_the_classes() -> None:
    """A pass that is registered under another name than its own prints a pipeline that does not read back."""
    for name in REGISTRY:
        kind = load_pass(name)
        assert kind.name == name and kind.kind in ("analysis", "rewrite") and kind.summary
        assert dataclasses.is_dataclass(kind)
        assert typing.cast(Any, kind).__dataclass_params__.frozen


def test_all_faults_at_once() -> None:
    """Someone with three mistakes in one line should not need three runs to find them."""
    with pytest.raises(UserError) as caught:
        parse_pipeline("smoth-m2,every-option{cout=3,count=x,share=y,word=fer,switch=si},quantize-weights{bits=4}")
    faults = [(fault.what, fault.why + fault.fix) for fault in caught.value.faults]
    expected = [
        ("unknown pass 'smoth-m2'", "did you mean smooth-m2 or smooth-m4?"),
        ("every-option has no option 'cout=3'", "did you mean count?"),
        ("every-option: count=x cannot be used", "a whole number is wanted"),
        ("every-option: share=y cannot be used", "a number is wanted"),
        ("every-option: word=fer cannot be used", "choose from near, far"),
        ("every-option: switch=si cannot be used", "true or false is wanted"),
        ("quantize-weights has no option 'bits=4'", "quantize-weights takes method"),
    ]
    assert faults == expected
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "the pipeline is empty"),
        (" , ", "the pipeline is empty"),
        ("every-option{count=3", "options must end with }"),
        ("every-option{count=3}x", "options must end with }"),
        ("every-option}", "unknown pass 'every-option}'"),
        ("every-option{count}", "every-option has no option 'count'"),
        ("every-option{count=1,count=2}", "count is given twice"),
        ("every-option{count=13}", "these options cannot be used"),
        ("{count=3}", "unknown pass ''"),
    ],
)
def test_malformed_text(text: str, what: str) -> None:
    """Text that is accepted by accident runs another pipeline than its author meant."""
    with pytest.raises(UserError) as caught:
        parse_pipeline(text)
    assert what in caught.value.faults[0].what


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("smooth-m4{alpha=1.5}", "alpha must lie between 0 and 1"),
        ("smooth-m4{alpha=nan}", "alpha must lie between 0 and 1"),
        ("smooth-m4{rounds=0}", "rounds and confirm must be 1 or more"),
        ("smooth-m4{bound=0.5}", "bound must be 1 or more"),
        ("smooth-m2{candidates=0}", "candidates and confirm must be 1 or more"),
        ("insert-observers{tokens=0}", "tokens and megabytes must be 1 or more"),
        ("assign-precision{group_size=0}", "group_size must be 1 or more"),
        ("assign-precision{target=vllm}", "known are vllm-ascend, mindie, both"),
    ],
)
def test_options_that_no_pass_can_use(text: str, why: str) -> None:
    """A number that would divide by zero, or search nothing, hours later: refused with the text it came in."""
    with pytest.raises(UserError) as caught:
        parse_pipeline(text)
    (fault,) = caught.value.faults
    assert fault.why == why


# ---- order -----------------------------------------------------------------------------------------------------------

BEGIN, END = "insert-observers,assign-precision,", "quantize-activations,quantize-weights,lower-linears"


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        (BEGIN + END, []),
        ("insert-observers,smooth-m2,assign-precision,smooth-m4," + END, []),  # searched as static, then as assigned
        (BEGIN + "shift-norms,smooth-m4,smooth-m4," + END, []),
        ("insert-observers", []),
        (END, ["quantize-activations needs insert-observers", "quantize-activations needs assign-precision"]),
        ("insert-observers,shift-norms,assign-precision," + END, ["shift-norms needs assign-precision before it"]),
        (BEGIN + END + ",smooth-m4", ["smooth-m4 stands after quantize-activations"]),
        (BEGIN + "lower-linears", ["lower-linears needs quantize-weights before it"]),
        (BEGIN + "quantize-weights,quantize-activations", ["quantize-activations stands after quantize-weights"]),
        ("assign-precision", ["the pipeline lacks insert-observers"]),
        ("insert-observers,split-window-attention", ["split-window-attention stands after insert-observers"]),
    ],
)
def test_order(text: str, faults: list[str]) -> None:
    """A pipeline that fails in the middle of the first stage, after the model was read: said before anything starts."""
    passes = parse_pipeline(text)
    if not faults:
        check_order(passes)
        return
    with pytest.raises(UserError) as caught:
        check_order(passes)
    found = [fault.what for fault in caught.value.faults]
    assert all(any(what.startswith(wanted) for what in found) for wanted in faults), found
    assert all(fault.fix and fault.where == "--pipeline" for fault in caught.value.faults)


# ---- what the options build ------------------------------------------------------------------------------------------

FOUR_BITS = {"w_bit": 4, "is_lowbit": True, "is_dynamic": True, "open_outlier": False}
PRESETS: list[tuple[dict[str, Any], str]] = [
    ({}, BEGIN + "smooth-m2," + END),
    ({"anti_method": "m4"}, BEGIN + "smooth-m4," + END),
    ({"anti_method": "m4", "anti_alpha": 0.5}, BEGIN + "smooth-m4{alpha=0.5}," + END),
    ({"anti_method": "none"}, BEGIN + END),
    (
        {"shift": True},  # the engines store a norm's bias under different names, so for one of them
        "insert-observers,assign-precision{target=vllm-ascend},shift-norms,smooth-m2," + END,
    ),
    (
        {"shift": True, "mindie_format": True, "anti_method": "m4"},
        "insert-observers,assign-precision{target=mindie},shift-norms,smooth-m4," + END,
    ),
    (
        {"act_method": 1},  # min-max clips nothing, and smoothing has to know
        BEGIN + "smooth-m2{clip=false}," + END.replace("activations", "activations{method=minmax}"),
    ),
    (
        {"act_method": 1, "anti_method": "m4"},
        BEGIN + "smooth-m4{clip=false}," + END.replace("activations", "activations{method=minmax}"),
    ),
    (
        {"modality_balance": False},
        BEGIN.replace("observers", "observers{balance=false}") + "smooth-m2," + END,
    ),
    (
        {"weight_method": "clip"},
        BEGIN + "smooth-m2{weights=clip}," + END.replace("weights", "weights{method=clip}"),
    ),
    (
        {"weight_method": "round", "anti_method": "m4", "anti_alpha": 0.25},
        BEGIN + "smooth-m4{alpha=0.25,weights=round}," + END.replace("weights", "weights{method=round}"),
    ),
    ({"propagate": "quantized"}, BEGIN + "smooth-m2," + END + ",propagate-quantized"),
    ({"fallback": "none"}, BEGIN.replace("precision", "precision{fallback=none}") + "smooth-m2," + END),
    (
        {"fallback": "auto", "min_sqnr": 30},  # the search comes last, among all groups
        BEGIN.replace("precision", "precision{fallback=none}")
        + "smooth-m2,"
        + END.replace("lower", "measure-sensitivity,lower"),
    ),
    ({"act_method": 3}, BEGIN + "smooth-m2," + END.replace("activations", "activations{method=automatic}")),
    (
        {"is_dynamic": True},
        "insert-observers,assign-precision{scheme=W8A8_DYNAMIC,target=vllm-ascend},smooth-m2," + END,
    ),
    (
        {"is_dynamic": True, "target": "MindIE@2.2"},
        "insert-observers,assign-precision{scheme=W8A8_DYNAMIC,target=mindie@2.2},smooth-m2," + END,
    ),
    (
        {**FOUR_BITS, "group_size": 256, "anti_method": "m4"},
        "insert-observers,assign-precision{scheme=W4A8_DYNAMIC,group_size=256,target=vllm-ascend},smooth-m4," + END,
    ),
    (
        {**FOUR_BITS, "w4a8_scope": "all"},
        "insert-observers,assign-precision{scheme=W4A8_DYNAMIC,target=vllm-ascend,scope=all},smooth-m2," + END,
    ),
    ({"mindie_format": True}, "insert-observers,assign-precision{target=mindie},smooth-m2," + END),
    (
        {"exclude": ["*.o_proj", "visual.*"], "include": "*.down_proj"},
        "insert-observers,assign-precision{exclude=*.o_proj;visual.*,include=*.down_proj},smooth-m2," + END,
    ),
    ({"pipeline": " insert-observers ,\n smooth-m4{ alpha = 0.50 }"}, "insert-observers,smooth-m4{alpha=0.5}"),
]


@pytest.mark.parametrize(("given", "text"), PRESETS, ids=[str(given) for given, _ in PRESETS])
def test_presets(given: dict[str, Any], text: str) -> None:
    """An option that reaches no pass, or the wrong one; passes in an order in which they cannot run."""
    built = pipeline_text(Options.without_paths(**given))
    assert built == ("" if "pipeline" in given else "split-window-attention,") + text
    assert print_pipeline(parse_pipeline(built)) == built
    if "pipeline" not in given:
        check_order(parse_pipeline(built))


def test_the_table_imports_nothing_until_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registered pass of a package that is not installed must fail when it is used, not when vlqc starts."""
    asked: list[str] = []

    def fake(name: str) -> ModuleType:
        asked.append(name)
        module = ModuleType(name)
        module.__dict__["Thing"] = EveryOption
        return module

    monkeypatch.setitem(REGISTRY, "thing", "not_installed.anywhere:Thing")
    monkeypatch.setattr("vlqc.pipeline.plugins.importlib.import_module", fake)
    assert asked == [] and load_pass("thing") is EveryOption and asked == ["not_installed.anywhere"]
