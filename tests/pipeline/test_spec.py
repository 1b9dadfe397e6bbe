"""Pipelines as text: print_pipeline, parse_pipeline, and what a malformed text reports."""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlqc.errors import UserError
from vlqc.ir.stage import Stage
from vlqc.pipeline.pass_api import Pass
from vlqc.pipeline.registry import REGISTRY, load_pass, parse_pipeline, print_pipeline
from vlqc.targets.schemes import Scheme, floats


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
    "scheme": st.sampled_from([str(scheme) for scheme in Scheme]),
    "schemes": st.lists(st.sampled_from([str(scheme) for scheme in Scheme])).map(tuple),
    "substitutes": st.lists(st.sampled_from([str(scheme) for scheme in Scheme])).map(tuple),
    "float_as": st.sampled_from(floats()).map(str),
    "target": st.sampled_from(["vllm-ascend", "vllm-ascend@0.18", "mindie@2.2.RC1", "both"]),
    "alpha": st.none() | st.floats(0, 1),
    "bound": st.floats(1, allow_nan=False),
}


def options_of(kind: type[Pass]) -> st.SearchStrategy[Pass]:
    """Instances of a pass with any value in each of its options."""
    values: dict[str, st.SearchStrategy[Any]] = {}
    names = {"scheme": st.just("C8")} if kind.name == "quantize-cache" else {}
    narrower = NARROWER | names
    for field in dataclasses.fields(kind):
        expected = typing.get_type_hints(kind)[field.name]
        if field.name in narrower:
            values[field.name] = narrower[field.name]
        elif typing.get_origin(expected) is Literal:
            values[field.name] = st.sampled_from(typing.get_args(expected))
        elif expected in (int, bool):
            values[field.name] = st.integers(14, 10**9) if expected is int else st.booleans()
        elif expected is float:
            values[field.name] = st.floats(allow_nan=False)
        elif expected == tuple[str, ...]:
            values[field.name] = st.lists(st.from_regex(r"[a-z.*0-9]{1,8}", fullmatch=True)).map(tuple)
        else:
            assert expected == float | None, f"{kind.name}.{field.name}: teach this test the type {expected}"
            values[field.name] = st.none() | st.floats(allow_nan=False)
    return st.builds(kind, **values)


PASSES = st.sampled_from(sorted(REGISTRY)).flatmap(lambda name: options_of(load_pass(name))) | options_of(EveryOption)


@given(st.lists(PASSES, min_size=1, max_size=4))
def test_every_pipeline_reads_back(passes: list[Pass]) -> None:
    """Catches an option value that is printed in a form that parses to another value."""
    REGISTRY["every-option"] = f"{__name__}:EveryOption"
    text = print_pipeline(passes)
    assert parse_pipeline(text) == passes
    assert print_pipeline(parse_pipeline(text)) == text


def test_defaults_are_left_out() -> None:
    """Catches a text that repeats the defaults."""
    assert print_pipeline([EveryOption()]) == "every-option"
    assert print_pipeline([EveryOption(switch=True, names=("x", "y"))]) == "every-option{switch=true,names=x;y}"


def test_spaces_and_line_ends_are_free() -> None:
    """Catches a text with line breaks that does not parse."""
    text = " every-option { count = 5 , word=far },\n every-option,\n"
    assert parse_pipeline(text) == [EveryOption(count=5, word="far"), EveryOption()]


def test_all_faults_at_once() -> None:
    """Catches an error that reports only the first of several faults."""
    with pytest.raises(UserError) as caught:
        parse_pipeline("smoth-m2,every-option{cout=3,count=x,share=y,word=fer,switch=si},quantize-weights{bits=4}")
    expected = [
        ("unknown pass", "'smoth-m2'", "did you mean smooth-m2 or smooth-m4?"),
        ("every-option", "'cout'", "did you mean count?"),
        ("every-option", "count=x", "integer"),
        ("every-option", "share=y", "number"),
        ("every-option", "word=fer", "'near' or 'far'"),
        ("every-option", "switch=si", "boolean"),
        ("quantize-weights", "'bits'", "method"),
    ]
    for fault, words in zip(caught.value.faults, expected, strict=True):
        assert all(word in str(fault) for word in words), fault
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
        ("every-option{count=13}", "every-option: invalid options"),
        ("{count=3}", "unknown pass ''"),
    ],
)
def test_malformed_text(text: str, what: str) -> None:
    """Catches malformed text that is accepted."""
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
        ("assign-precision{target=vllm}", "did you mean vllm-ascend?"),
    ],
)
def test_options_that_no_pass_can_use(text: str, why: str) -> None:
    """Catches a value that would fail inside the pass, after the model is loaded."""
    with pytest.raises(UserError) as caught:
        parse_pipeline(text)
    (fault,) = caught.value.faults
    assert why in fault.why + fault.fix and fault.where == text
