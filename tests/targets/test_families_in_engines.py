"""What engines require of several layers of each family, and of its config.json. Their rows: test_engine_rows.py."""

from typing import Any

import pytest

from vlqc.families.family import ModelFamily, Role
from vlqc.families.qwen2 import QWEN2
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.families.qwen2_vl import QWEN2_VL
from vlqc.families.qwen3 import QWEN3
from vlqc.families.qwen3_vl import QWEN3_VL, Qwen3VL
from vlqc.families.qwen3_vl_moe import QWEN3_VL_MOE
from vlqc.targets.engine import Rule
from vlqc.targets.mindie import MINDIE
from vlqc.targets.precision import choose_scheme
from vlqc.targets.rules import folder_type, group_faults, layer_faults
from vlqc.targets.schemes import Scheme
from vlqc.targets.versions import supporting_versions
from vlqc.targets.vllm_ascend import VLLM_ASCEND, VllmAscend

W8A8, DYNAMIC, W4A8, FLOAT = Scheme.W8A8, Scheme.W8A8_DYNAMIC, Scheme.W4A8_DYNAMIC, Scheme.FLOAT
LANGUAGE = "model.language_model.layers"


def schemes_of(family: ModelFamily, **changes: Scheme) -> dict[str, Scheme]:
    """One vision block, one decoder layer and all else, W8A8 as the reference quantizes; changes: by role."""
    schemes = {
        layer.replace("*", "0"): FLOAT if family.stays_float_in_reference(layer) else W8A8 for layer in family.layers()
    }
    for role, scheme in changes.items():
        schemes |= {layer.replace("*", "0"): scheme for layer in family.layers(Role[role])}
    return schemes


LANGUAGE_DYNAMIC = {"QKV": DYNAMIC, "OUT": DYNAMIC, "UP": DYNAMIC}
FLOAT_TOWER = {"VISION_QKV": FLOAT, "VISION_PROJ": FLOAT, "VISION_UP": FLOAT}
WITH_EXPERTS = {"UP": FLOAT, "EXPERT_UP": DYNAMIC, "EXPERT_DOWN": DYNAMIC, "ROUTER": FLOAT}
# family, changes to `schemes_of`, whether vLLM Ascend runs all layers together, whether MindIE does
TOGETHER: list[tuple[ModelFamily, dict[str, Scheme], bool, bool]] = [
    (QWEN2_5_VL, {"VISION_PROJ": FLOAT}, True, True),
    (QWEN2_VL, {}, True, True),
    (QWEN2_VL, {"VISION_PROJ": FLOAT}, True, False),  # one graph reads the static tensors of qkv, proj and fc1
    (QWEN2_VL, {"VISION_UP": FLOAT}, True, False),
    (QWEN2_VL, FLOAT_TOWER, True, True),
    (QWEN2_VL, LANGUAGE_DYNAMIC | FLOAT_TOWER, True, True),
    (QWEN2_VL, LANGUAGE_DYNAMIC, True, False),
    (QWEN3_VL, {}, True, True),
    (QWEN3_VL, {"VISION_PROJ": FLOAT}, True, True),
    (QWEN3_VL, {"VISION_QKV": FLOAT}, True, False),
    (QWEN3_VL, {"VISION_UP": FLOAT}, True, False),
    (QWEN3_VL, FLOAT_TOWER, True, False),  # the tower takes the `quantize` of the model
    (QWEN3_VL, LANGUAGE_DYNAMIC, True, True),
    (QWEN3_VL, {"QKV": DYNAMIC}, True, False),
    (QWEN3_VL_MOE, WITH_EXPERTS, True, True),
    (QWEN3_VL_MOE, WITH_EXPERTS | {"EXPERT_DOWN": FLOAT}, False, False),
    (QWEN3_VL_MOE, WITH_EXPERTS | {"EXPERT_UP": FLOAT, "EXPERT_DOWN": FLOAT}, True, False),
    (QWEN3_VL_MOE, WITH_EXPERTS | FLOAT_TOWER, True, False),
    (QWEN2, {}, True, True),
    (QWEN2, LANGUAGE_DYNAMIC, True, True),
    (QWEN3, {"QKV": DYNAMIC}, True, False),
]


@pytest.mark.parametrize(("family", "changes", "vllm_ascend", "mindie"), TOGETHER)
def test_layers_that_run_together(
    family: ModelFamily, changes: dict[str, Scheme], vllm_ascend: bool, mindie: bool
) -> None:
    """Catches a folder that an engine refuses as a whole although it runs each of its layers."""
    schemes = schemes_of(family, **changes)
    for engine, runs in ((VLLM_ASCEND, vllm_ascend), (MINDIE, mindie)):
        assert layer_faults(engine, family, schemes) == []
        assert (group_faults(engine, family, schemes) == []) == runs


@pytest.mark.parametrize(
    ("family", "member", "runs"),
    [
        (QWEN2_VL, "self_attn.q_proj", True),
        (QWEN2_VL, "mlp.up_proj", True),
        (QWEN3_VL, "self_attn.q_proj", False),  # always one matrix
        (QWEN3_VL, "mlp.up_proj", True),
        (QWEN2, "self_attn.q_proj", False),
        (QWEN3, "mlp.up_proj", False),  # in 3.0.0 only
    ],
)
def test_float_members_of_a_fused_group_in_mindie(family: ModelFamily, member: str, runs: bool) -> None:
    """Catches a mixed group that MindIE multiplies as one matrix of floats."""
    schemes = schemes_of(family)
    (layer,) = (layer for layer in schemes if layer.endswith(member))
    assert (group_faults("mindie", family, schemes | {layer: FLOAT}) == []) == runs


def test_experts_of_different_schemes() -> None:
    """Catches an expert in another scheme than the first one, which vLLM Ascend would read in that one's."""
    names = [f"{LANGUAGE}.{block}.mlp.experts.{index}.up_proj" for block in (0, 1) for index in (0, 1)]
    assert VLLM_ASCEND.group_faults(QWEN3_VL_MOE, dict.fromkeys(names, DYNAMIC)) == []
    schemes = dict.fromkeys(names, DYNAMIC) | {names[3]: W4A8}
    assert [fault.where for fault in VLLM_ASCEND.group_faults(QWEN3_VL_MOE, schemes)] == [names[3]]
    schemes[names[2]] = W4A8  # layers may differ
    assert VLLM_ASCEND.group_faults(QWEN3_VL_MOE, schemes) == []


@pytest.mark.parametrize("target", ["vllm-ascend", "mindie", "both"])
def test_experts_are_dynamic_where_w8a8_is_asked_for(target: str) -> None:
    """Catches experts left in float because no engine runs them with static scales."""
    layers = {layer: (64, 64) for layer in QWEN3_VL_MOE.layers(Role.EXPERT_UP)}
    decision = choose_scheme(layers, family=QWEN3_VL_MOE, scheme=W8A8, target=target)
    assert decision.scheme == DYNAMIC and "W8A8" in decision.note


def test_folder_type() -> None:
    """Catches MindIE reading static attention next to experts as `w8a8`, with which it does not find the experts'
    scales; vLLM Ascend does not read the type, so that a folder for both has MindIE's."""
    schemes = schemes_of(QWEN3_VL_MOE, **WITH_EXPERTS)
    assert folder_type("vllm-ascend", QWEN3_VL_MOE, schemes) == W8A8
    assert folder_type("mindie", QWEN3_VL_MOE, schemes) == folder_type("both", QWEN3_VL_MOE, schemes) == DYNAMIC
    assert folder_type("both", QWEN2_5_VL, schemes_of(QWEN2_5_VL) | {"x": DYNAMIC}) == W8A8
    config = {"text_config": {}, "vision_config": {}}
    assert MINDIE.reads_config(QWEN3_VL_MOE, schemes, config | {"quantize": "w8a8_dynamic"})
    assert not MINDIE.reads_config(QWEN3_VL_MOE, schemes, config | {"quantize": "w8a8"})


@pytest.mark.parametrize(
    ("family", "changes", "config", "loads"),
    [
        (QWEN3_VL, {}, {"vision_config": {"deepstack_visual_indexes": [1, 2, 4]}}, (True, True)),
        (QWEN3_VL, {}, {"vision_config": {"deepstack_visual_indexes": [1]}}, (True, False)),
        (QWEN3_VL, {}, {"vision_config": {"deepstack_visual_indexes": []}}, (True, False)),
        (QWEN3_VL, {}, {"text_config": {"tie_word_embeddings": True}}, (True, True)),
        (QWEN3_VL_MOE, WITH_EXPERTS, {"vision_config": {"deepstack_visual_indexes": [0, 1]}}, (True, False)),
        (QWEN3_VL_MOE, WITH_EXPERTS, {"text_config": {"tie_word_embeddings": True}}, (False, False)),
        (QWEN3_VL_MOE, WITH_EXPERTS, {"text_config": {"tie_word_embeddings": False}}, (True, True)),
    ],
)
def test_models_that_an_engine_does_not_run(
    family: ModelFamily, changes: dict[str, Scheme], config: dict[str, Any], loads: tuple[bool, bool]
) -> None:
    """Catches a promise for models with other numbers of deepstack mergers than MindIE's three, and for tied models
    with experts, whose output head both engines load from the files."""
    schemes = schemes_of(family, **changes)
    config = config | {"quantize": folder_type("mindie", family, schemes).lower()}
    assert tuple(engine.reads_config(family, schemes, config) for engine in (VLLM_ASCEND, MINDIE)) == loads


def test_each_family_of_mindie_has_rules_about_several_layers() -> None:
    """Catches a family with rows and without a loader, of which MindIE would be said to run any combination."""
    assert MINDIE.rules.keys() == MINDIE.loaders.keys()


def test_versions_with_a_gap() -> None:
    """Catches a gap closed by taking the first version and the last end, and versions in the gap that are accepted."""
    versions = supporting_versions(VLLM_ASCEND, QWEN3_VL, schemes_of(QWEN3_VL), "bfloat16")
    assert versions is not None and versions.ranges == (("0.13.0rc2", "0.14.0rc1"), ("0.18", None))
    inside = {version: version in versions for version in ("0.12", "0.13", "0.13.0rc1", "0.16.0rc1", "0.18.0", "0.27")}
    assert inside == {"0.12": False, "0.13": True, "0.13.0rc1": False, "0.16.0rc1": False, "0.18.0": True, "0.27": True}
    assert str(versions) == "vLLM Ascend 0.13.0rc2 to before 0.14.0rc1, 0.18 and later"
    schemes = schemes_of(QWEN3_VL, QKV=W4A8, VISION_QKV=DYNAMIC)
    versions = supporting_versions(VLLM_ASCEND, QWEN3_VL, schemes, "bfloat16")
    assert versions is not None and versions.ranges == (("0.18", "0.26"),)


def test_ranges_that_touch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches two ranges without a gap printed as two, and an order that depends on the rules' order."""
    roles = (Role.QKV,)
    rules = (Rule(W8A8, roles, "0.14"), Rule(W8A8, roles, "0.12", before="0.14"), Rule(W8A8, roles, "0.10", "0.11"))
    monkeypatch.setattr(VllmAscend, "rules", {"qwen2": rules})
    versions = supporting_versions(VLLM_ASCEND, QWEN2, {QWEN2.layers(Role.QKV)[0]: W8A8}, "bfloat16")
    assert versions is not None and versions.ranges == (("0.10", "0.11"), ("0.12", None))


def test_a_family_without_rows() -> None:
    """Catches a promise for a family that no engine lists."""

    class Other(Qwen3VL):
        name = "other"

    assert supporting_versions(VLLM_ASCEND, Other(), {}, "bfloat16") is None
    assert VLLM_ASCEND.first_version(Other()) is None and MINDIE.first_version(QWEN2_VL) == "2.1.RC1"
