"""`float_as`: what layers get in place of FLOAT."""

from dataclasses import replace
from typing import Any

import pytest

from vlqc.families.family import ModelFamily, Role
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.families.qwen3_vl_moe import QWEN3_VL_MOE
from vlqc.targets.advice import engine_notes
from vlqc.targets.precision import Decision, choose_scheme
from vlqc.targets.rules import layer_faults
from vlqc.targets.schemes import Scheme, floats
from vlqc.targets.vllm_ascend import VllmAscend

WEIGHT_ONLY, FLOAT = Scheme("W8A16"), Scheme.FLOAT
DOWN, MERGER, VISION_DOWN = "model.layers.7.mlp.down_proj", "visual.merger.mlp.0", "visual.blocks.3.mlp.down_proj"
ROUTER = "model.language_model.layers.3.mlp.gate"


def choose(layer: str, family: ModelFamily = QWEN2_5_VL, **options: Any) -> Decision:
    values: dict[str, Any] = {
        "scheme": Scheme("W8A8"), "target": "vllm-ascend", "fallback": "reference", "float_as": WEIGHT_ONLY,
    }  # fmt: skip
    return choose_scheme({layer: (64, 256)}, family=family, **(values | options))


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_DYNAMIC", "W8A8_MIX", "W4A8_DYNAMIC"])
def test_reference_exclusions_where_the_engine_runs_it(scheme: str) -> None:
    """Catches a layer that stays float although the engine runs W8A16, and one that no engine then loads."""
    chosen = {layer: choose(layer, scheme=Scheme(scheme)) for layer in (DOWN, MERGER, VISION_DOWN)}
    assert [decision.scheme for decision in chosen.values()] == [WEIGHT_ONLY, FLOAT, FLOAT]
    assert "reference" in chosen[DOWN].reason and not chosen[DOWN].note
    assert "W8A16 is not supported here by vLLM Ascend" in chosen[MERGER].reason
    assert not layer_faults("vllm-ascend", QWEN2_5_VL, {layer: each.scheme for layer, each in chosen.items()})
    assert choose(DOWN, scheme=Scheme(scheme), float_as=FLOAT).scheme == FLOAT


def test_what_stays_float() -> None:
    """Catches W8A16 in layers that the user excludes, in routers, and in an engine or version without it."""
    assert choose(DOWN, exclude=("*.down_proj",)) == Decision(FLOAT, "excluded by *.down_proj")
    assert choose("lm_head").scheme == FLOAT
    assert choose(ROUTER, QWEN3_VL_MOE).scheme == FLOAT and "router" in choose(ROUTER, QWEN3_VL_MOE).reason
    for target in ("both", "mindie", "vllm-ascend@0.11"):
        assert choose(DOWN, target=target).scheme == FLOAT
    assert choose(DOWN, target="vllm-ascend@0.18").scheme == WEIGHT_ONLY
    assert choose(DOWN, include=("*.down_proj",)) == Decision(Scheme("W8A8"))


def test_the_substitute_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches W8A16 where the engine runs the substitute, and FLOAT where it runs neither but W8A16."""
    qkv = "visual.blocks.3.attn.qkv"
    assert choose(qkv, scheme=Scheme("W4A8_DYNAMIC")).scheme == Scheme("W8A8_DYNAMIC")
    rules = [
        rule if rule.scheme == WEIGHT_ONLY else replace(rule, roles=tuple(set(rule.roles) - {Role.DOWN}))
        for rule in VllmAscend.rules["qwen2_5_vl"]
    ]
    monkeypatch.setattr(VllmAscend, "rules", {"qwen2_5_vl": tuple(rules)})
    decision = choose(DOWN, fallback="none")
    assert decision.scheme == WEIGHT_ONLY and decision.note.endswith("elsewhere W8A16")
    assert choose(DOWN, fallback="none", float_as=FLOAT).scheme == FLOAT


def test_a_search_begins_with_what_the_engine_runs() -> None:
    """Catches a group that stays float, and is not measured, although the target runs it in another scheme; and one
    that begins in a scheme with which the engine refuses the folder."""
    static, dynamic, qkv = Scheme("W8A8"), Scheme("W8A8_DYNAMIC"), "visual.blocks.3.attn.qkv"
    begin: dict[str, Any] = {"fallback": "none", "float_as": FLOAT, "substitutes": [static, dynamic, WEIGHT_ONLY]}
    assert choose(qkv, scheme=WEIGHT_ONLY, **begin).scheme == static
    assert choose(DOWN, scheme=WEIGHT_ONLY, **begin).scheme == WEIGHT_ONLY
    assert choose(qkv, scheme=WEIGHT_ONLY, exclude=("visual.*",), **begin).scheme == FLOAT
    assert choose(qkv, scheme=dynamic, target="vllm-ascend@0.15", **begin).scheme == static
    assert choose(qkv, scheme=dynamic, target="mindie", **begin).scheme == FLOAT  # no static layer beside dynamic ones


def test_a_reason_is_said_once() -> None:
    """Catches the reason for FLOAT twice where the scheme in place of float is the one that was asked for."""
    assert choose(MERGER, scheme=WEIGHT_ONLY, fallback="none").reason == "W8A16 is not supported here by vLLM Ascend"


def test_notes_name_the_versions_of_both() -> None:
    """Catches a note with the versions that load W8A8 alone, of which the first ones do not run W8A16."""
    (note,) = engine_notes("vllm-ascend", QWEN2_5_VL, Scheme("W8A8"), float_as=WEIGHT_ONLY)
    assert "0.13" in note and "W8A8 and W8A16" in note
    assert engine_notes("vllm-ascend", QWEN2_5_VL, Scheme("W8A8")) == []


def test_only_schemes_with_float_inputs() -> None:
    """Catches a scheme in place of float that quantizes inputs, for which such layers are float in the first place."""
    assert set(floats()) == {FLOAT, *(each for each in Scheme if not each.spec.activation.is_quantized)}


def test_reference_exclusions_with_float_inputs() -> None:
    """Catches an explicit --fallback reference that has no effect on a scheme with float inputs."""
    assert choose(DOWN, scheme=WEIGHT_ONLY, float_as=FLOAT).scheme == FLOAT
    assert choose(DOWN, scheme=WEIGHT_ONLY, float_as=FLOAT, fallback="none").scheme == WEIGHT_ONLY
