"""assign-precision: the reference exclusions, uniform groups, and nothing that an engine refuses."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.support.chosen_precision import (
    FLOAT_IN_REFERENCE,
    GROUPS,
    QUANTIZED_IN_REFERENCE,
    REFERENCE_REASON,
    F,
    S,
    choose,
    members_with,
)
from tests.support.exact_stage import text_after
from tests.support.random_stage import decoder, staged, through
from tests.support.reference_schemes import assignment_faults
from vlqc.families.layer_names import layer_pattern
from vlqc.families.qwen3_vl_moe import QWEN3_VL_MOE
from vlqc.ir.execution import Call
from vlqc.ir.printer import print_stage
from vlqc.ir.stage import Site, Stage
from vlqc.passes.assign_precision import AssignPrecision
from vlqc.pipeline.registry import parse_pipeline, print_pipeline
from vlqc.targets.precision import Decision, choose_scheme
from vlqc.targets.schemes import Scheme


def test_golden(golden: Callable[[str, str], None]) -> None:
    """Any change of what the pass decides for the exact stage shows here as text."""
    golden("after-assign-precision.vlqc", text_after("assign-precision"))


@pytest.mark.parametrize("target", ["vllm-ascend", "mindie", "both"])
def test_reference_exclusions(target: str) -> None:
    """A layer that the reference script keeps in float quantized by default, or one that it quantizes left out."""
    for name in FLOAT_IN_REFERENCE:
        assert choose(members_with(name), target=target) == Decision(Scheme.FLOAT, REFERENCE_REASON), name
    for name in QUANTIZED_IN_REFERENCE:
        assert choose(members_with(name), target=target) == Decision(Scheme.W8A8), name


@pytest.mark.parametrize(
    ("name", "target", "refused"),
    [
        ("visual.blocks.3.mlp.down_proj", "vllm-ascend", ""),
        ("visual.blocks.3.mlp.down_proj", "mindie", "MindIE"),  # MindIE always builds it in float
        ("visual.blocks.3.mlp.down_proj", "both", "MindIE"),
        ("model.layers.27.mlp.down_proj", "both", ""),
        ("visual.merger.mlp.2", "both", ""),
        ("lm_head", "vllm-ascend", "vLLM Ascend"),
        ("model.layers.27.self_attn.gate", "both", "vLLM Ascend and MindIE"),  # a layer without a rule
    ],
)
def test_without_the_reference_only_engines_decide(name: str, target: str, refused: str) -> None:
    """A scheme that an engine of the target refuses, or fear of one that it accepts."""
    decision = choose(members_with(name), fallback="none", target=target)
    if refused:
        reason = f"W8A8 is not supported here by {refused}"
        where = {"vllm-ascend": "vLLM Ascend runs", "mindie": "MindIE runs", "both": "both vLLM Ascend and MindIE run"}
        assert decision == Decision(Scheme.FLOAT, reason, f"W8A8 only where {where[target]} it; elsewhere FLOAT")
    else:
        assert decision == Decision(Scheme.W8A8)


@pytest.mark.parametrize("fallback", ["reference", "none"])
@pytest.mark.parametrize("target", ["vllm-ascend", "mindie", "both"])
def test_engines_accept_what_comes_out(fallback: str, target: str) -> None:
    """Catches groups with two schemes or an unsupported one, by the engines' own check of assignments."""
    stage = decoder()
    through(stage, AssignPrecision(fallback=fallback, target=target))  # type: ignore[arg-type]
    schemes = {site.name: site.scheme or Scheme.FLOAT for site in stage.sites.values()}
    assert assignment_faults(target, schemes) == []
    assert all(len({(site.scheme, site.reason) for site in members}) == 1 for members in stage.groups().values())
    floats = {name for name, scheme in schemes.items() if scheme == Scheme.FLOAT}
    assert floats == ({"model.layers.0.mlp.down_proj"} if fallback == "reference" else set())


class Unequal(nn.Module):
    """gate and up read different rows, so that one engine's fused group is two groups of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ("gate_proj", "up_proj", "down_proj")})

    def forward(self, rows: Tensor) -> Tensor:
        lowered: Tensor = self.mlp["down_proj"](self.mlp["gate_proj"](rows).relu() * self.mlp["up_proj"](rows + 1))
        return lowered


def unequal() -> Stage:
    return staged(Unequal().requires_grad_(False), [Call(0, (torch.ones(3, 4),), {})])


def test_fused_member_that_reads_another_input() -> None:
    """Engines multiply gate and up as one matrix with one input scale: two inputs must never be quantized apart."""
    stage = through(unequal(), AssignPrecision(fallback="none"))
    assert len(stage.notes) == 2 and all("stays float: the engine fuses it with" in note for note in stage.notes)
    reasons = {site.target: (site.scheme, site.reason) for site in stage.sites.values()}
    why = "the engine fuses it with model.layers.0.mlp.{}, which reads another input"
    assert reasons == {
        "mlp.gate_proj": (Scheme.FLOAT, why.format("up_proj")),
        "mlp.up_proj": (Scheme.FLOAT, why.format("gate_proj")),
        "mlp.down_proj": (Scheme.W8A8, ""),
    }


def test_one_refused_member_keeps_its_whole_group_float() -> None:
    """Catches a further layer that reads the same node as q, k and v but gets another scheme."""
    members = [*members_with(GROUPS[0][0]), Site("model.layers.27.extra", "extra", "x", (4, 4))]
    for order in (members, members[::-1]):
        decision = choose(order, target="both")
        assert (decision.scheme, decision.reason) == (
            Scheme.FLOAT,
            "W8A8 is not supported here by vLLM Ascend and MindIE",
        )


# ---- exclude and include ---------------------------------------------------------------------------------------------


def test_exclude_takes_the_whole_group_and_says_so() -> None:
    """Catches q in float with quantized k and v, which engines refuse, and notes for entirely excluded groups."""
    q, k, v = (f"model.layers.*.self_attn.{part}_proj" for part in "qkv")
    members = members_with(GROUPS[0][0])
    alone = choose(members, exclude=("*.q_proj",))
    assert alone == Decision(F, "excluded by *.q_proj", f"{k}, {v} stay float with {q}, which --exclude names")
    two = choose(members, exclude=("*.27.self_attn.[qk]_proj",))
    assert two.scheme == F and two.note == f"{v} stays float with {q}, which --exclude names"
    assert choose(members, exclude=("model.layers.27.*",)) == Decision(F, "excluded by model.layers.27.*")
    assert choose(members, exclude=("model.layers.2.*", "*.o_proj")) == Decision(S)
    assert choose(members, exclude=("*.Q_PROJ",)) == Decision(S)  # checkpoint names are what they are


def test_excluding_one_expert_says_that_all_stay_float() -> None:
    """Catches experts in float without a note, and a reason that is not true of the layer that it is printed for."""
    experts = {f"model.language_model.layers.0.mlp.experts.{number}.down_proj": None for number in range(3)}
    decision = choose_scheme(
        experts, family=QWEN3_VL_MOE, scheme=Scheme.W8A8_DYNAMIC, target="vllm-ascend", exclude=("*.experts.2.*",)
    )
    why = "all experts of a layer have one scheme"
    note = f"{why}: excluding *.experts.2.* keeps all 3 in float"
    assert decision == Decision(Scheme.FLOAT, f"{why}, and *.experts.2.* excludes some", note)


def test_include_overrides_the_reference_but_no_engine() -> None:
    """A layer that the user wants quantized left in float, or one quantized that the engine builds in float."""
    down, merger = members_with("model.layers.27.mlp.down_proj"), members_with("visual.merger.mlp.0")
    assert choose(down) == choose(down, include=("visual.*",)) == Decision(F, REFERENCE_REASON)
    assert choose(down, include=("*.mlp.down_proj",)) == Decision(S)
    assert choose(merger, include=("visual.merger.*",)) == Decision(S)
    vision_down = members_with("visual.blocks.3.mlp.down_proj")
    assert choose(vision_down, include=("*.down_proj",), target="both").scheme == F
    assert choose(vision_down, include=("*.down_proj",), target="vllm-ascend") == Decision(S)
    assert choose(members_with("lm_head"), include=("lm_head",), target="vllm-ascend").scheme == F


def test_exclude_wins_over_include() -> None:
    """The same layer named by both: float is the word that costs nothing."""
    down = members_with("model.layers.27.mlp.down_proj")
    decision = choose(down, exclude=("*.27.*",), include=("*.down_proj",))
    assert decision == Decision(F, "excluded by *.27.*")


def test_globs_reach_a_stage() -> None:
    """Options that `choose` honors and `run` loses; reason and notes must arrive where they are printed."""
    stage = through(decoder(), AssignPrecision(exclude=("*.gate_proj",), include=("*.down_proj",)))
    schemes = {site.target: site.scheme for site in stage.sites.values()}
    assert [target for target, scheme in schemes.items() if scheme == F] == ["mlp.gate_proj", "mlp.up_proj"]
    gate, up = (f"model.layers.*.mlp.{part}_proj" for part in ("gate", "up"))
    assert stage.notes == [f"{up} stays float with {gate}, which --exclude names"]
    assert print_stage(stage).count('scheme=FLOAT reason="excluded by *.gate_proj"') == 2


@pytest.mark.parametrize(
    ("layer", "pattern"),
    [
        ("model.layers.13.mlp.up_proj", "model.layers.*.mlp.up_proj"),
        ("visual.merger.mlp.2", "visual.merger.mlp.2"),  # a position in a Sequential, no block number
        ("lm_head", "lm_head"),
    ],
)
def test_layer_pattern(layer: str, pattern: str) -> None:
    """Catches one note per layer instead of one per layer pattern."""
    assert layer_pattern(layer) == pattern


# ---- the pass --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_DYNAMIC", "W4A8_DYNAMIC", "FLOAT"])
def test_second_run_changes_nothing(scheme: str) -> None:
    """Catches a pass that always reports a change."""
    step, stage = AssignPrecision(scheme=scheme), decoder()  # type: ignore[arg-type]
    assert step.run(stage) is True
    text = print_stage(stage)
    assert step.run(stage) is False and print_stage(stage) == text


def test_everything_float_on_request() -> None:
    """`scheme=FLOAT` has to reach every site."""
    stage = through(decoder(), AssignPrecision(scheme="FLOAT", fallback="none"))
    assert {site.scheme for site in stage.sites.values()} == {Scheme.FLOAT}


def test_seed_is_an_alias_of_reference() -> None:
    """Catches pipeline texts of earlier versions that are refused, and an alias that is printed."""
    parsed = parse_pipeline("assign-precision{fallback=seed}")
    assert parsed == [AssignPrecision(fallback="reference")]
    assert print_pipeline(parsed) == "assign-precision"


def test_the_old_word_for_the_reference_exclusions() -> None:
    """Catches a pipeline built in Python for 0.1 that quantizes layers which it left in float."""
    with pytest.warns(DeprecationWarning):
        assert AssignPrecision(fallback="seed") == AssignPrecision(fallback="reference")  # type: ignore[arg-type]
    for values in ({"fallback": "nothing"}, {"scope": "nothing"}):
        with pytest.raises(ValueError, match="must be"):
            AssignPrecision(**values)  # type: ignore[arg-type]
