"""Pipelines as text, and the manager that holds passes to their word."""

import dataclasses
import typing
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from little_stage import decided, traced

from vlqc.engines import Scheme
from vlqc.errors import InternalError, UserError
from vlqc.ir import Stage
from vlqc.parser import parse_stage
from vlqc.pipeline import REGISTRY, Pass, PassManager, load_pass, parse_pipeline, print_pipeline
from vlqc.printer import print_stage

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


def options_of(kind: type[Pass]) -> st.SearchStrategy[Pass]:
    """Instances of a pass with any value in each of its options."""
    values: dict[str, st.SearchStrategy[Any]] = {}
    for field in dataclasses.fields(kind):
        wanted = typing.get_type_hints(kind)[field.name]
        if typing.get_origin(wanted) is Literal:
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
        ("unknown pass 'smoth-m2'", "did you mean smooth-m2?"),
        ("every-option has no option 'cout=3'", "did you mean count?"),
        ("every-option: count=x cannot be used", "a whole number is wanted"),
        ("every-option: share=y cannot be used", "a number is wanted"),
        ("every-option: word=fer cannot be used", "choose from near, far"),
        ("every-option: switch=si cannot be used", "true or false is wanted"),
        ("quantize-weights has no option 'bits=4'", "quantize-weights takes no options"),
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


# ---- the manager -----------------------------------------------------------------------------------------------------


def pass_of(kind: str, work: Any, name: str = "made-up") -> Pass:
    """A third-party pass: a frozen dataclass that derives from Pass and defines run, nothing else."""
    body = {"name": name, "kind": kind, "summary": "", "run": lambda self, stage: work(stage)}
    made = type("MadeUp", (Pass,), body)
    step: Pass = typing.cast(Any, dataclass(frozen=True)(made))()
    return step


def scale_weight(stage: Stage) -> bool:
    stage.live.get_parameter("mlp.up.weight").mul_(2)
    return True


def decide(stage: Stage) -> bool:
    for site in stage.sites.values():
        site.scheme, site.reason = Scheme.FLOAT, "by request"
    return True


def test_third_party_passes_run() -> None:
    """The public API: a subclass of Pass, run by PassManager, seen by its callbacks and timed."""
    seen: list[Any] = []
    manager = PassManager(
        [pass_of("analysis", decide, "decide"), pass_of("rewrite", scale_weight, "scale")],
        before=lambda stage, coming: seen.append(("before", coming.name)),
        after=lambda stage, number, done: seen.append((number, done.name, "by request" in print_stage(stage))),
    )
    manager.run(traced())
    assert seen == [("before", "decide"), (0, "decide", True), ("before", "scale"), (1, "scale", True)]
    assert set(manager.seconds) == {"decide", "scale"}


def test_a_pass_without_run_says_so() -> None:
    """Forgetting run must not look like a pass that changed nothing."""
    with pytest.raises(TypeError, match="define run"):
        PassManager([Pass()]).run(traced())


def test_an_analysis_must_not_change_weights() -> None:
    """An observer that altered what it observes, named with the weight, even if it owns up to a change."""
    for says in (True, False):
        step = pass_of("analysis", lambda stage, says=says: scale_weight(stage) and says)
        with pytest.raises(InternalError, match=r"is an analysis but changed mlp\.up\.weight of visual\.blocks\.0"):
            PassManager([step]).run(traced())


CHANGES: dict[str, Any] = {
    "a weight": scale_weight,
    "a weight behind autograd's back": lambda stage: stage.live.get_parameter("norm1.bias").data[3].add_(2**-20),
    "a buffer": lambda stage: stage.live.get_buffer("position").add_(1),
    "a module": lambda stage: stage.live.register_buffer("new", torch.zeros(1)),
    "a scheme": decide,
    "a reason": lambda stage: setattr(stage.sites["visual.blocks.0.mlp.down"], "reason", "else"),
    "edges": lambda stage: setattr(stage, "edges", ()),
    "an argument in the graph": lambda stage: setattr(
        stage.node("reshape"), "args", (stage.node("attn_qkv"), 2, -1, 2, 2)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_rewrite_that_hides_a_change(change: str) -> None:
    """Whoever skips work because "nothing changed" would go on with stale text or statistics."""

    def work(stage: Stage) -> bool:
        CHANGES[change](stage)
        return False

    with pytest.raises(InternalError, match=r"made-up changed something but says it did not, in visual\.blocks\.0"):
        PassManager([pass_of("rewrite", work)]).run(traced())
    PassManager([pass_of("rewrite", lambda stage: work(stage) or True)]).run(traced())


@pytest.mark.parametrize("kind", ["analysis", "rewrite"])
def test_a_pass_that_claims_a_change(kind: str) -> None:
    """A pass that always says True makes every loop that runs until nothing changes endless."""
    PassManager([pass_of(kind, lambda stage: False)]).run(decided())
    with pytest.raises(InternalError, match="says it changed something but did not") as caught:
        PassManager([pass_of(kind, lambda stage: True)]).run(decided())
    assert caught.value.exit_code == 70


def test_the_second_pass_is_held_to_what_the_first_left() -> None:
    """The evidence is carried from pass to pass: the change of the first must not be blamed on the second."""
    first = pass_of("rewrite", scale_weight)
    PassManager([first, pass_of("analysis", lambda stage: False)]).run(traced())
    with pytest.raises(InternalError, match="liar"):
        PassManager([first, pass_of("analysis", lambda stage: True, "liar")]).run(traced())


def test_an_invalid_stage_is_refused_with_all_its_faults() -> None:
    """A broken stage must stop at the pass that broke it, with every fault and the text of the stage."""

    def work(stage: Stage) -> bool:
        decide(stage)
        stage.sites["visual.blocks.0.mlp.up"].scheme = None
        stage.live.get_parameter("norm2.weight").fill_(torch.nan)
        return True

    with pytest.raises(InternalError) as caught:
        PassManager([pass_of("rewrite", work)]).run(traced())
    message = str(caught.value)
    assert "visual.blocks.0 is not valid after made-up" in message
    assert "several schemes" in message and "norm2.weight has NaN" in message
    assert '\nstage "visual.blocks.0" part=vision' in message


def test_without_verify_nothing_is_checked() -> None:
    """Verification reads every weight; who turns it off pays nothing, and is told nothing."""
    after: list[int] = []
    step = pass_of("analysis", scale_weight)
    PassManager([step], verify=False, after=lambda stage, number, done: after.append(number)).run(traced())
    assert after == [0]


def test_passes_that_only_decide_run_on_parsed_stages() -> None:
    """A dump can be tried against another assignment without its weights."""
    stage = parse_stage(print_stage(traced()))
    PassManager([pass_of("analysis", decide)]).run(stage)
    assert print_stage(stage).count('scheme=FLOAT reason="by request"') == 5
    with pytest.raises(InternalError, match="did not"):
        PassManager([pass_of("analysis", decide)]).run(stage)


def test_the_table_imports_nothing_until_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registered pass of a package that is not installed must fail when it is used, not when vlqc starts."""
    asked: list[str] = []

    def fake(name: str) -> ModuleType:
        asked.append(name)
        module = ModuleType(name)
        module.__dict__["Thing"] = EveryOption
        return module

    monkeypatch.setitem(REGISTRY, "thing", "not_installed.anywhere:Thing")
    monkeypatch.setattr("vlqc.pipeline.importlib.import_module", fake)
    assert asked == [] and load_pass("thing") is EveryOption and asked == ["not_installed.anywhere"]
