"""assign-precision: what becomes of every scheme on every layer, for every target."""

import re
from typing import Any

import pytest

from tests.support.chosen_precision import (
    FLOAT_IN_REFERENCE,
    GROUPS,
    QUANTIZED_IN_REFERENCE,
    REFERENCE_REASON,
    D,
    F,
    G,
    S,
    choose,
    members_with,
)
from tests.support.random_stage import decoder, through
from tests.support.reference_schemes import assignment_faults
from vlqc.ir.stage import Site
from vlqc.passes.assign_precision import AssignPrecision
from vlqc.targets.precision import Decision
from vlqc.targets.schemes import Scheme
from vlqc.targets.target import parse_target

# Kinds of layers as the engines tell them apart, by one group of each; stated from the engines' own rules:
# what W8A8, W8A8_DYNAMIC and W4A8_DYNAMIC become there with `fallback=none` and a group size that divides everything.
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
    "vllm-ascend@0.11": {  # before 0.16 no per-token activations in vision
        S: (S, S, S, S, S, S, S, S, S, F),
        D: (F, F, F, F, F, D, D, D, D, F),
        G: (F, F, F, F, F, D, G, G, G, F),
    },
    "vllm-ascend@0.27": {  # W4A8 was removed: by the rules of those versions that had it
        S: (S, S, S, S, S, S, S, S, S, F),
        D: (D, D, D, D, D, D, D, D, D, F),
        G: (D, D, D, D, D, D, G, G, G, F),
    },
    "mindie": {  # vision down_proj is built in float; per-token activations in the language model only
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
    schemes = {kind: choose(members_with(layer), fallback="none", **options).scheme for kind, layer in KINDS.items()}
    assert schemes == expected
    for kind, layer in KINDS.items():
        decision = choose(members_with(layer), fallback="none", **options)
        engines = parse_target(target)
        runs = f"{engines.text} runs" if len(engines.engines) == 1 else f"both {engines.text} run"
        note = f"{wanted} only where {runs} it; elsewhere {decision.scheme}"
        assert decision.note == (note if decision.scheme != wanted else "")
        assert bool(decision.reason) == (decision.scheme != wanted)
        by_reference = choose(
            members_with(layer), **options
        )  # the reference script keeps more in float, and never less
        assert by_reference == (Decision(F, REFERENCE_REASON) if layer in FLOAT_IN_REFERENCE else decision), kind
        assert choose(members_with(layer), fallback="none", scope="all", **options) == Decision(wanted)
        assert choose(members_with(layer), scheme="FLOAT", fallback="none", target=target) == Decision(F)


def named_in(note: str) -> list[str]:
    """The schemes and engines that a note names, in order."""
    return re.findall(r"\b(W\dA\d\w*|FLOAT|vLLM Ascend|MindIE)\b", note)


def test_w4a8_of_the_reference_for_vllm_ascend() -> None:
    """The mix that loads: 4 bits for o, gate and up only; q, k, v (biases!) and vision per token; one note about it."""
    notes = set()
    for name in QUANTIZED_IN_REFERENCE:
        decision = choose(members_with(name), scheme="W4A8_DYNAMIC", target="vllm-ascend")
        four_bits = name.startswith("model.") and not name.endswith(("q_proj", "k_proj", "v_proj"))
        assert decision.scheme == (G if four_bits else D), name
        notes.add(decision.note)
    (note,) = notes - {""}
    assert "" in notes and named_in(note) == [G, "vLLM Ascend", D]


def test_dynamic_for_mindie_says_once_that_vision_stays_float() -> None:
    """A note per layer, or none at all: what is shown once must be one and the same sentence."""
    notes = [choose(members_with(layer), scheme="W8A8_DYNAMIC", target="mindie").note for layer in KINDS.values()]
    (note,) = set(notes) - {""}
    assert "" in notes and named_in(note) == [D, "MindIE", F]


@pytest.mark.parametrize(
    ("shape", "numbers"),
    [
        ((64, 192), {"192", "128"}),  # inputs, size of a group
        ((60, 256), {"60", "8"}),  # outputs, multiple that engines need
    ],
)
@pytest.mark.parametrize("scope", ["engine", "all"])
def test_groups_that_do_not_fit(shape: tuple[int, int], numbers: set[str], scope: str) -> None:
    """Catches 4-bit weights whose shape the groups do not divide: they are per token with one note."""
    options = {"scheme": "W4A8_DYNAMIC", "group_size": 128, "target": "vllm-ascend", "scope": scope}
    notes = set()
    for layer in range(3):
        decision = choose([Site(f"model.layers.{layer}.self_attn.o_proj", "o", "x", shape)], **options)
        assert decision.scheme == D and set(re.findall(r"\d+", decision.reason)) == numbers
        notes.add(decision.note)
    (note,) = notes
    assert "model.layers.*.self_attn.o_proj" in note and named_in(note) == [D] and note.endswith(decision.reason)
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
@pytest.mark.parametrize("fallback", ["reference", "none"])
def test_what_is_assigned_can_be_loaded(scheme: str, target: str, fallback: str) -> None:
    """Catches combinations of schemes that the engine refuses, by its check of whole assignments."""
    step = AssignPrecision(scheme=scheme, target=target, fallback=fallback, group_size=16)  # type: ignore[arg-type]
    stage = through(decoder(), step)
    schemes = {site.name: site.scheme or F for site in stage.sites.values()}
    if scheme != "W4A8_DYNAMIC" or target == "vllm-ascend":
        assert assignment_faults(target, schemes) == []
    for site in stage.sites.values():
        assert site.group_size == (16 if site.scheme == G else None)


def test_group_size_goes_when_the_scheme_does() -> None:
    """Catches a stale group size on a site that is assigned another scheme."""
    stage = through(decoder(), AssignPrecision(scheme="W4A8_DYNAMIC", target="vllm-ascend", group_size=16))
    assert {site.group_size for site in stage.sites.values()} == {16, None}
    through(stage, AssignPrecision())
    assert {site.group_size for site in stage.sites.values()} == {None}
