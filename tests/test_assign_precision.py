"""assign-precision: the seed's exclusions, uniform groups, and nothing that an engine refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact_stage import text_after
from random_stage import decoder, staged, through
from torch import Tensor, nn

from vlqc.engines import Scheme, assignment_faults
from vlqc.ir import Call, Site, Stage
from vlqc.passes.assign_precision import AssignPrecision, Decision, kind_of
from vlqc.printer import print_stage

# Every linear of the model: by the seed's list these stay float ...
FLOAT_BY_SEED = (
    "visual.blocks.3.mlp.down_proj",
    "visual.merger.mlp.0",
    "visual.merger.mlp.2",
    "model.layers.27.mlp.down_proj",
    "lm_head",
)
# ... and these do not.
QUANTIZED_BY_SEED = (
    "visual.blocks.3.attn.qkv",
    "visual.blocks.3.attn.proj",
    "visual.blocks.3.mlp.gate_proj",
    "visual.blocks.3.mlp.up_proj",
    *(f"model.layers.27.self_attn.{part}_proj" for part in "qkvo"),
    "model.layers.27.mlp.gate_proj",
    "model.layers.27.mlp.up_proj",
)
GROUPS = (
    ("model.layers.27.self_attn.q_proj", "model.layers.27.self_attn.k_proj", "model.layers.27.self_attn.v_proj"),
    ("model.layers.27.mlp.gate_proj", "model.layers.27.mlp.up_proj"),
    ("visual.blocks.3.mlp.gate_proj", "visual.blocks.3.mlp.up_proj"),
)


SEEDS = "kept in float by the seed's exclusions"


def members_with(name: str, shape: tuple[int, int] = (64, 256)) -> list[Site]:
    names = next((group for group in GROUPS if name in group), (name,))
    return [Site(member, member, "x", shape) for member in names]


def choose(members: list[Site], **options: Any) -> Decision:
    return AssignPrecision(**options).choose(members)


def test_golden(golden: Callable[[str, str], None]) -> None:
    """Any change of what the pass decides for the exact stage shows here as text."""
    golden("after-assign-precision.vlqc", text_after("assign-precision"))


@pytest.mark.parametrize("target", ["vllm-ascend", "mindie", "both"])
def test_seed_exclusions(target: str) -> None:
    """A layer that the reference script keeps in float quantized by default, or one that it quantizes left out."""
    for name in FLOAT_BY_SEED:
        assert choose(members_with(name), target=target) == Decision(Scheme.FLOAT, SEEDS), name
    for name in QUANTIZED_BY_SEED:
        assert choose(members_with(name), target=target) == Decision(Scheme.W8A8), name


@pytest.mark.parametrize(
    ("name", "target", "refused"),
    [
        ("visual.blocks.3.mlp.down_proj", "vllm-ascend", False),
        ("visual.blocks.3.mlp.down_proj", "mindie", True),  # built in float there, whatever the folder says
        ("visual.blocks.3.mlp.down_proj", "both", True),
        ("model.layers.27.mlp.down_proj", "both", False),
        ("visual.merger.mlp.2", "both", False),
        ("lm_head", "vllm-ascend", True),
        ("model.layers.27.self_attn.gate", "both", True),  # a layer that no table knows
    ],
)
def test_without_the_seed_only_engines_decide(name: str, target: str, refused: bool) -> None:
    """A scheme that an engine of the target refuses, or fear of one that it accepts."""
    decision = choose(members_with(name), fallback="none", target=target)
    if refused:
        reason = f"W8A8 is not accepted here by {target}"
        assert decision == Decision(Scheme.FLOAT, reason, f"W8A8 only where {target} runs it; elsewhere FLOAT")
    else:
        assert decision == Decision(Scheme.W8A8)


@pytest.mark.parametrize("fallback", ["seed", "none"])
@pytest.mark.parametrize("target", ["vllm-ascend", "mindie", "both"])
def test_engines_accept_what_comes_out(fallback: str, target: str) -> None:
    """A group with two schemes or a refused one: checked by the engine table's own rule for finished assignments."""
    stage = decoder()
    through(stage, AssignPrecision(fallback=fallback, target=target))  # type: ignore[arg-type]
    schemes = {site.name: site.scheme or Scheme.FLOAT for site in stage.sites.values()}
    assert assignment_faults(target, schemes) == []
    assert all(len({(site.scheme, site.reason) for site in members}) == 1 for members in stage.groups().values())
    floats = {name for name, scheme in schemes.items() if scheme == Scheme.FLOAT}
    assert floats == ({"model.layers.0.mlp.down_proj"} if fallback == "seed" else set())


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
    """A stranger that reads the same rows as q, k and v: one group of the graph, so one scheme."""
    members = [*members_with(GROUPS[0][0]), Site("model.layers.27.extra", "extra", "x", (4, 4))]
    for order in (members, members[::-1]):
        decision = choose(order, target="both")
        assert (decision.scheme, decision.reason) == (Scheme.FLOAT, "W8A8 is not accepted here by both")


# ---- every scheme for every target -----------------------------------------------------------------------------------

# Kinds of layers as the engines tell them apart, by one group of each; stated from the engines' own rules:
# what W8A8, W8A8_DYNAMIC and W4A8_DYNAMIC become there with `fallback=none` and a group size that divides everything.
S, D, G, F = Scheme.W8A8, Scheme.W8A8_DYNAMIC, Scheme.W4A8_DYNAMIC, Scheme.FLOAT
KINDS = {
    "vision qkv": "visual.blocks.3.attn.qkv",
    "vision proj": "visual.blocks.3.attn.proj",
    "vision gate": "visual.blocks.3.mlp.gate_proj",
    "vision down": "visual.blocks.3.mlp.down_proj",
    "merger": "visual.merger.mlp.2",
    "q": "model.layers.27.self_attn.q_proj",
    "o": "model.layers.27.self_attn.o_proj",
    "gate": "model.layers.27.mlp.gate_proj",
    "down": "model.layers.27.mlp.down_proj",
    "lm_head": "lm_head",
}
# target: for each wanted scheme, what the kinds above get in their order
EXPECTED = {
    "vllm-ascend": {
        S: (S, S, S, S, S, S, S, S, S, F),
        D: (D, D, D, D, D, D, D, D, D, F),
        G: (D, D, D, D, D, D, G, G, G, F),
    },
    "vllm-ascend@0.18": {
        S: (S, S, S, S, S, S, S, S, S, F),
        D: (D, D, D, D, D, D, D, D, D, F),
        G: (D, D, D, D, D, D, G, G, G, F),
    },
    "vllm-ascend@0.11": {  # before 0.16 no per-token arithmetic in vision
        S: (S, S, S, S, S, S, S, S, S, F),
        D: (F, F, F, F, F, D, D, D, D, F),
        G: (F, F, F, F, F, D, G, G, G, F),
    },
    "vllm-ascend@0.27": {  # W4A8 was removed: by the rules of those versions that had it
        S: (S, S, S, S, S, S, S, S, S, F),
        D: (D, D, D, D, D, D, D, D, D, F),
        G: (D, D, D, D, D, D, G, G, G, F),
    },
    "mindie": {  # vision down_proj is built in float; per-token arithmetic in the language model only
        S: (S, S, S, F, S, S, S, S, S, F),
        D: (F, F, F, F, F, D, D, D, D, F),
        G: (G, G, G, G, G, G, G, G, G, G),  # no version runs it, so no rule keeps anything from it
    },
    "mindie@2.2": {S: (S, S, S, F, S, S, S, S, S, F), D: (F, F, F, F, F, D, D, D, D, F), G: (G,) * 10},
    "both": {S: (S, S, S, F, S, S, S, S, S, F), D: (F, F, F, F, F, D, D, D, D, F), G: (G,) * 10},
}


@pytest.mark.parametrize("wanted", [S, D, G])
@pytest.mark.parametrize("target", EXPECTED)
def test_every_scheme_for_every_target(target: str, wanted: Scheme) -> None:
    """A layer in a scheme that its engine refuses, or left in float without need; the whole table, layer by layer."""
    expected = dict(zip(KINDS, EXPECTED[target][wanted], strict=True))
    options: dict[str, Any] = {"scheme": str(wanted), "target": target}
    found = {kind: choose(members_with(layer), fallback="none", **options).scheme for kind, layer in KINDS.items()}
    assert found == expected
    for kind, layer in KINDS.items():
        decision = choose(members_with(layer), fallback="none", **options)
        note = f"{wanted} only where {target} runs it; elsewhere {decision.scheme}"
        assert decision.note == (note if decision.scheme != wanted else "")
        assert bool(decision.reason) == (decision.scheme != wanted)
        by_seed = choose(members_with(layer), **options)  # the seed keeps more in float, and never less
        assert by_seed == (Decision(F, SEEDS) if layer in FLOAT_BY_SEED else decision), kind
        assert choose(members_with(layer), fallback="none", scope="all", **options) == Decision(wanted)
        assert choose(members_with(layer), scheme="FLOAT", fallback="none", target=target) == Decision(F)


def test_w4a8_of_the_seed_for_vllm_ascend() -> None:
    """The mix that loads: 4 bits for o, gate and up only; q, k, v (biases!) and vision per token; one note about it."""
    notes = set()
    for name in QUANTIZED_BY_SEED:
        decision = choose(members_with(name), scheme="W4A8_DYNAMIC", target="vllm-ascend")
        four_bits = name.startswith("model.") and not name.endswith(("q_proj", "k_proj", "v_proj"))
        assert decision.scheme == (G if four_bits else D), name
        notes.add(decision.note)
    assert notes == {"", "W4A8_DYNAMIC only where vllm-ascend runs it; elsewhere W8A8_DYNAMIC"}


def test_dynamic_for_mindie_says_once_that_vision_stays_float() -> None:
    """A note per layer, or none at all: what is shown once must be one and the same sentence."""
    notes = [choose(members_with(layer), scheme="W8A8_DYNAMIC", target="mindie").note for layer in KINDS.values()]
    assert set(notes) == {"", "W8A8_DYNAMIC only where mindie runs it; elsewhere FLOAT"}


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ((64, 192), "its 192 inputs are no multiple of the group of 128"),
        ((60, 256), "its 60 outputs are no multiple of 8"),
    ],
)
@pytest.mark.parametrize("scope", ["engine", "all"])
def test_groups_that_do_not_fit(shape: tuple[int, int], why: str, scope: str) -> None:
    """A matrix whose columns or rows 4-bit groups do not divide: per token instead, said once per kind of layer."""
    options = {"scheme": "W4A8_DYNAMIC", "group_size": 128, "target": "vllm-ascend", "scope": scope}
    notes = set()
    for layer in range(3):
        decision = choose([Site(f"model.layers.{layer}.self_attn.o_proj", "o", "x", shape)], **options)
        assert (decision.scheme, decision.reason) == (D, why)
        notes.add(decision.note)
    assert notes == {f"model.layers.*.self_attn.o_proj is W8A8_DYNAMIC: {why}"}
    names = GROUPS[1]
    for odd in (0, 1):  # one member is enough
        members = [Site(name, name, "x", shape if number == odd else (64, 256)) for number, name in enumerate(names)]
        assert choose(members, **options).scheme == D


def test_an_obstacle_is_no_way_around_the_engine() -> None:
    """Per-token vision for a version that cannot run it, only because groups would not have fitted either."""
    qkv = [Site("visual.blocks.0.attn.qkv", "qkv", "x", (64, 200))]
    options = {"scheme": "W4A8_DYNAMIC", "group_size": 128}
    assert choose(qkv, target="vllm-ascend@0.11", **options).scheme == F
    assert choose(qkv, target="vllm-ascend@0.18", **options).scheme == D
    assert choose(qkv, target="vllm-ascend@0.18", **options).note.startswith("W4A8_DYNAMIC only where")
    assert (
        choose([Site("lm_head", "lm_head", "x", (60, 200))], target="vllm-ascend", fallback="none", **options).scheme
        == F
    )
    assert choose(qkv, target="mindie", **options).scheme == D  # no version runs it: only the storage decides


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_DYNAMIC", "W4A8_DYNAMIC"])
@pytest.mark.parametrize("target", ["vllm-ascend", "mindie", "both"])
@pytest.mark.parametrize("fallback", ["seed", "none"])
def test_what_is_assigned_can_be_loaded(scheme: str, target: str, fallback: str) -> None:
    """A group with two schemes, or one beside another that the engine refuses: the table's own check of the whole."""
    step = AssignPrecision(scheme=scheme, target=target, fallback=fallback, group_size=16)  # type: ignore[arg-type]
    stage = through(decoder(), step)
    schemes = {site.name: site.scheme or F for site in stage.sites.values()}
    if scheme != "W4A8_DYNAMIC" or target == "vllm-ascend":
        assert assignment_faults(target, schemes) == []
    for site in stage.sites.values():
        assert site.group_size == (16 if site.scheme == G else None)


def test_group_size_goes_when_the_scheme_does() -> None:
    """A group size left on a site that is assigned anew: its text would not read back, its weights would not fit."""
    stage = through(decoder(), AssignPrecision(scheme="W4A8_DYNAMIC", target="vllm-ascend", group_size=16))
    assert {site.group_size for site in stage.sites.values()} == {16, None}
    through(stage, AssignPrecision())
    assert {site.group_size for site in stage.sites.values()} == {None}


# ---- exclude and include ---------------------------------------------------------------------------------------------


def test_exclude_takes_the_whole_group_and_says_so() -> None:
    """q in float beside quantized k and v: engines refuse it. One that is excluded with all its group needs no note."""
    q, k, v = (f"model.layers.*.self_attn.{part}_proj" for part in "qkv")
    members = members_with(GROUPS[0][0])
    alone = choose(members, exclude=("*.q_proj",))
    assert alone == Decision(F, "excluded by *.q_proj", f"{k}, {v} stay float with {q}, which --exclude names")
    two = choose(members, exclude=("*.27.self_attn.[qk]_proj",))
    assert two.scheme == F and two.note == f"{v} stays float with {q}, which --exclude names"
    assert choose(members, exclude=("model.layers.27.*",)) == Decision(F, "excluded by model.layers.27.*")
    assert choose(members, exclude=("model.layers.2.*", "*.o_proj")) == Decision(S)
    assert choose(members, exclude=("*.Q_PROJ",)) == Decision(S)  # checkpoint names are what they are


def test_include_overrides_the_seed_but_no_engine() -> None:
    """A layer that the user wants quantized left in float, or one quantized that the engine builds in float."""
    down, merger = members_with("model.layers.27.mlp.down_proj"), members_with("visual.merger.mlp.0")
    assert choose(down) == choose(down, include=("visual.*",)) == Decision(F, SEEDS)
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
    """Options that `choose` honours and `run` loses; reason and notes must arrive where they are printed."""
    stage = through(decoder(), AssignPrecision(exclude=("*.gate_proj",), include=("*.down_proj",)))
    schemes = {site.target: site.scheme for site in stage.sites.values()}
    assert [target for target, scheme in schemes.items() if scheme == F] == ["mlp.gate_proj", "mlp.up_proj"]
    gate, up = (f"model.layers.*.mlp.{part}_proj" for part in ("gate", "up"))
    assert stage.notes == [f"{up} stays float with {gate}, which --exclude names"]
    assert print_stage(stage).count('scheme=FLOAT reason="excluded by *.gate_proj"') == 2


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        ("model.layers.13.mlp.up_proj", "model.layers.*.mlp.up_proj"),
        ("visual.merger.mlp.2", "visual.merger.mlp.2"),  # the second of two, not one of many
        ("lm_head", "lm_head"),
    ],
)
def test_kind_of(layer: str, kind: str) -> None:
    """A note per layer instead of per kind: 28 sentences that say the same."""
    assert kind_of(layer) == kind


# ---- the pass --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_DYNAMIC", "W4A8_DYNAMIC", "FLOAT"])
def test_second_run_changes_nothing(scheme: str) -> None:
    """A pass that always claims a change is refused by the manager as a lie."""
    step, stage = AssignPrecision(scheme=scheme), decoder()  # type: ignore[arg-type]
    assert step.run(stage) is True
    text = print_stage(stage)
    assert step.run(stage) is False and print_stage(stage) == text


def test_everything_float_on_request() -> None:
    """`scheme=FLOAT` has to reach every site."""
    stage = through(decoder(), AssignPrecision(scheme="FLOAT", fallback="none"))
    assert {site.scheme for site in stage.sites.values()} == {Scheme.FLOAT}
