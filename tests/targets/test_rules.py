"""vlqc.targets.rules and the engines' own rules: which schemes each engine runs on which layer."""

import subprocess
import sys

import pytest
from packaging.version import Version

from tests.support.reference_schemes import (
    DYNAMIC,
    FLOAT,
    MIX,
    W4A8,
    W8A8,
    W8A16,
    assignment_faults,
    reference_assignment,
)
from vlqc.errors import UserError
from vlqc.families.qwen2 import QWEN2
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.targets.mindie import MINDIE
from vlqc.targets.rules import run_together, supported_schemes, supports_scheme, target_supporting
from vlqc.targets.schemes import Scheme
from vlqc.targets.target import ENGINES, Target
from vlqc.targets.vllm_ascend import VLLM_ASCEND

LAYER = "model.layers.3"
BLOCK = "visual.blocks.0"


@pytest.mark.parametrize(
    ("layer", "members"),
    [
        (f"{LAYER}.self_attn.k_proj", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        (f"{LAYER}.mlp.up_proj", ["mlp.gate_proj", "mlp.up_proj"]),
        (f"{LAYER}.self_attn.o_proj", ["self_attn.o_proj"]),
        (f"{LAYER}.mlp.down_proj", ["mlp.down_proj"]),
        (f"{BLOCK}.mlp.gate_proj", ["mlp.gate_proj", "mlp.up_proj"]),
        (f"{BLOCK}.attn.qkv", ["attn.qkv"]),
    ],
)
def test_fused_groups(layer: str, members: list[str]) -> None:
    """Catches a group that is split or mixed across blocks, which engines load without an error and compute wrongly."""
    prefix = ".".join(layer.split(".")[:3])
    assert QWEN2_5_VL.fused_group(layer) == tuple(f"{prefix}.{member}" for member in members)


@pytest.mark.parametrize("layer", ["lm_head", "visual.merger.mlp.0", "model.norm", "something.else"])
def test_a_layer_outside_every_group_stands_alone(layer: str) -> None:
    """Catches a pattern that swallows layers which no engine fuses."""
    assert QWEN2_5_VL.fused_group(layer) == (layer,)


# layer, schemes that vLLM Ascend runs, schemes that MindIE runs
SUPPORTED = [
    (f"{LAYER}.self_attn.q_proj", {FLOAT, W8A8, DYNAMIC, MIX}, {FLOAT, W8A8, DYNAMIC}),
    (f"{LAYER}.self_attn.o_proj", {FLOAT, W8A8, DYNAMIC, W4A8, MIX, W8A16}, {FLOAT, W8A8, DYNAMIC}),
    (f"{LAYER}.mlp.gate_proj", {FLOAT, W8A8, DYNAMIC, W4A8, MIX, W8A16}, {FLOAT, W8A8, DYNAMIC}),
    (f"{LAYER}.mlp.down_proj", {FLOAT, W8A8, DYNAMIC, W4A8, MIX, W8A16}, {FLOAT, W8A8, DYNAMIC}),
    (f"{BLOCK}.attn.qkv", {FLOAT, W8A8, DYNAMIC, MIX}, {FLOAT, W8A8}),
    (f"{BLOCK}.attn.proj", {FLOAT, W8A8, DYNAMIC, MIX}, {FLOAT, W8A8}),
    (f"{BLOCK}.mlp.up_proj", {FLOAT, W8A8, DYNAMIC, MIX}, {FLOAT, W8A8}),
    (f"{BLOCK}.mlp.down_proj", {FLOAT, W8A8, DYNAMIC, MIX}, {FLOAT}),
    ("visual.merger.mlp.2", {FLOAT, W8A8, DYNAMIC, MIX}, {FLOAT, W8A8}),
    ("visual.patch_embed.proj", {FLOAT}, {FLOAT}),
    ("model.embed_tokens", {FLOAT}, {FLOAT}),
    (f"{LAYER}.input_layernorm", {FLOAT}, {FLOAT}),
    ("lm_head", {FLOAT}, {FLOAT}),
    ("some.other.layer", {FLOAT}, {FLOAT}),
]


@pytest.mark.parametrize(("layer", "vllm_ascend", "mindie"), SUPPORTED)
def test_supported_schemes(layer: str, vllm_ascend: set[Scheme], mindie: set[Scheme]) -> None:
    """Catches a scheme offered where an engine refuses it, and `both` being anything but the intersection."""
    assert supported_schemes("vllm-ascend", QWEN2_5_VL, layer) == vllm_ascend
    assert supported_schemes("mindie", QWEN2_5_VL, layer) == mindie
    assert supported_schemes("both", QWEN2_5_VL, layer) == vllm_ascend & mindie


def test_an_unknown_target_is_refused() -> None:
    """Catches a misspelt target that is treated as one without rules, and so without limits."""
    with pytest.raises(UserError, match="vllm-ascend"):
        supported_schemes("vllm", QWEN2_5_VL, "lm_head")


# versions at the ends of the rules: target, layer, schemes in bfloat16, schemes in float16
O_PROJ, QKV = f"{LAYER}.self_attn.o_proj", f"{BLOCK}.attn.qkv"
VERSIONED = [
    ("vllm-ascend@0.10.2rc1", O_PROJ, {FLOAT}, {FLOAT}),
    ("vllm-ascend@0.10.2rc2", O_PROJ, {FLOAT, W8A8}, {FLOAT, W8A8}),
    ("vllm-ascend@0.10.2rc2", QKV, {FLOAT, W8A8}, {FLOAT, W8A8}),
    ("vllm-ascend@0.11.0rc1", O_PROJ, {FLOAT, W8A8}, {FLOAT, W8A8}),
    ("vllm-ascend@0.11", O_PROJ, {FLOAT, W8A8, DYNAMIC, W4A8}, {FLOAT, W8A8, W4A8}),
    ("vllm-ascend@0.11", f"{LAYER}.self_attn.v_proj", {FLOAT, W8A8, DYNAMIC}, {FLOAT, W8A8}),
    ("vllm-ascend@0.15.9", QKV, {FLOAT, W8A8}, {FLOAT, W8A8}),
    ("vllm-ascend@0.16.0", QKV, {FLOAT, W8A8, DYNAMIC, MIX}, {FLOAT, W8A8}),
    ("vllm-ascend@0.18", O_PROJ, {FLOAT, W8A8, DYNAMIC, W4A8, MIX, W8A16}, {FLOAT, W8A8, W4A8, W8A16}),
    ("vllm-ascend@0.26.0rc2", O_PROJ, {FLOAT, W8A8, DYNAMIC, W4A8, MIX, W8A16}, {FLOAT, W8A8, W4A8, W8A16}),
    ("vllm-ascend@0.26.0.dev1", O_PROJ, {FLOAT, W8A8, DYNAMIC, W4A8, MIX, W8A16}, {FLOAT, W8A8, W4A8, W8A16}),
    ("vllm-ascend@0.26", O_PROJ, {FLOAT, W8A8, DYNAMIC, MIX, W8A16}, {FLOAT, W8A8, W8A16}),
    ("vllm-ascend@1.0", O_PROJ, {FLOAT, W8A8, DYNAMIC, MIX, W8A16}, {FLOAT, W8A8, W8A16}),
    ("mindie@2.1", O_PROJ, {FLOAT}, {FLOAT}),
    ("mindie@2.2.RC1", O_PROJ, {FLOAT, W8A8, DYNAMIC}, {FLOAT, W8A8, DYNAMIC}),
    ("mindie@2.2", QKV, {FLOAT, W8A8}, {FLOAT, W8A8}),
    ("both", O_PROJ, {FLOAT, W8A8, DYNAMIC}, {FLOAT, W8A8}),
]


@pytest.mark.parametrize(("target", "layer", "bfloat16", "float16"), VERSIONED)
def test_supported_schemes_of_a_version(target: str, layer: str, bfloat16: set[Scheme], float16: set[Scheme]) -> None:
    """Catches an end of a version range that is off by one, and an ignored dtype."""
    assert supported_schemes(target, QWEN2_5_VL, layer, "bfloat16") == bfloat16
    assert supported_schemes(target, QWEN2_5_VL, layer, "float16") == float16
    assert supported_schemes(target, QWEN2_5_VL, layer) == bfloat16 | float16


@pytest.mark.parametrize(
    ("target", "scheme", "runs", "rules"),
    [
        ("vllm-ascend", W4A8, True, Target((VLLM_ASCEND,))),
        ("vllm-ascend@0.18", W4A8, True, Target((VLLM_ASCEND,), "0.18")),
        ("vllm-ascend@0.27", W4A8, False, Target((VLLM_ASCEND,))),
        ("mindie", W4A8, False, None),
        ("both", W4A8, False, None),
        ("both", W8A8, True, Target((VLLM_ASCEND, MINDIE))),
        ("mindie@2.1", FLOAT, True, Target((MINDIE,), "2.1")),
    ],
)
def test_target_supporting(target: str, scheme: Scheme, runs: bool, rules: Target | None) -> None:
    """Catches a scheme given to layers that no version runs in it, because the named version does not run it at all."""
    assert supports_scheme(target, QWEN2_5_VL, scheme) == runs
    assert target_supporting(target, QWEN2_5_VL, scheme) == rules


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (f"{BLOCK}.attn.qkv", "vision"),
        ("visual.patch_embed.proj", "vision"),
        ("visual.merger.ln_q", "merger"),
        (f"{LAYER}.mlp.up_proj", "language"),
        ("model.embed_tokens", "language"),
        ("lm_head", "other"),
    ],
)
def test_parts(name: str, part: str) -> None:
    """Catches the merger counted as vision, or lm_head as language, in the summaries."""
    assert QWEN2_5_VL.part(name) == part


def test_reference_exclusions() -> None:
    """Catches an exclusion of the reference script lost, or one too many."""
    layers = [layer for layer, _, _ in SUPPORTED if not layer.startswith("some.")]
    floats = [layer for layer in layers if QWEN2_5_VL.stays_float_in_reference(layer)]
    assert floats == [
        f"{LAYER}.mlp.down_proj",
        f"{BLOCK}.mlp.down_proj",
        "visual.merger.mlp.2",
        "visual.patch_embed.proj",
        "model.embed_tokens",
        "lm_head",
    ]


def test_the_reference_assignment_is_legal_in_both_engines() -> None:
    """Catches rules that refuse the reference folder, which both engines load."""
    assert assignment_faults("both", reference_assignment()) == []


# what is changed -> targets that must refuse it
ILLEGAL = [
    ({"model.layers.1.self_attn.q_proj": FLOAT}, {"vllm-ascend", "both"}),  # MindIE runs the members unfused
    ({"model.layers.1.self_attn.q_proj": DYNAMIC}, {"vllm-ascend", "mindie", "both"}),
    ({"visual.blocks.1.mlp.up_proj": FLOAT}, {"vllm-ascend", "mindie", "both"}),
    ({"lm_head": W8A8}, {"vllm-ascend", "mindie", "both"}),
    ({"visual.blocks.1.mlp.down_proj": W8A8}, {"mindie", "both"}),
    ({"visual.blocks.1.attn.qkv": FLOAT}, {"mindie", "both"}),  # the tower is quantized, one qkv is not
    ({"model.layers.0.mlp.down_proj": DYNAMIC}, {"mindie", "both"}),  # dynamic with a quantized tower
    ({"model.layers.0.self_attn.o_proj": W4A8}, {"mindie", "both"}),
    ({"model.layers.0.mlp.down_proj": W8A8}, set()),
    ({"model.layers.0.mlp.down_proj": DYNAMIC, "visual.blocks.0.attn.qkv": W4A8}, {"vllm-ascend", "mindie", "both"}),
    ({"visual.merger.mlp.0": W8A8}, set()),
    ({"visual.blocks.0.attn.proj": FLOAT}, set()),
]


@pytest.mark.parametrize(("change", "refusing"), ILLEGAL)
def test_illegal_assignments(change: dict[str, Scheme], refusing: set[str]) -> None:
    """Catches a rule of one engine not applied, or applied to the other engine."""
    targets = {"vllm-ascend", "mindie", "both"}
    schemes = reference_assignment() | change
    assert {target for target in targets if assignment_faults(target, schemes)} == refusing


def test_a_float_vision_tower_is_legal_in_mindie() -> None:
    """Catches the qkv-in-every-block rule applied to a tower that is float as a whole."""
    schemes = {name: FLOAT if name.startswith("visual.") else DYNAMIC for name in reference_assignment()}
    schemes |= {"lm_head": FLOAT, "model.embed_tokens": FLOAT}
    assert assignment_faults("mindie", schemes) == []


def test_mindie_runs_one_scheme_beside_float() -> None:
    """Catches static and per-token layers in one MindIE folder, whose single `quantize` key cannot name both; and a
    float member in a per-token group, which only static groups may have."""
    dynamic = {
        name: DYNAMIC if "proj" in name and name.startswith("model") else FLOAT for name in reference_assignment()
    }
    assert assignment_faults("mindie", dynamic) == []
    faults = assignment_faults("mindie", dynamic | {"model.layers.0.self_attn.o_proj": W8A8})
    assert ["o_proj is W8A8 while" in fault.what for fault in faults] == [True]
    faults = assignment_faults("mindie", dynamic | {"model.layers.0.mlp.up_proj": FLOAT})
    assert [fault.where for fault in faults] == ["model.layers.0.mlp.gate_proj"]
    assert assignment_faults("vllm-ascend", dynamic | {"model.layers.0.self_attn.o_proj": W8A8}) == []


def test_versions_of_rules_are_in_order() -> None:
    """Catches a new rule whose end lies before its beginning, or with an invalid version."""
    assert len(QWEN2_5_VL.reference_float) == 6
    for engine in ENGINES:
        for rule in engine.rules_of(QWEN2_5_VL):
            assert Version(rule.since) < Version(rule.before or "9999")


def test_no_torch_is_imported() -> None:
    """Catches an import that makes the option checks (before anything is loaded) wait for torch."""
    code = "import sys, vlqc.targets.rules; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize(
    ("schemes", "together"),
    [([MIX, FLOAT], True), ([MIX, DYNAMIC], False), ([W8A8, MIX], False), ([W8A8, DYNAMIC], False)],
)
def test_mindie_runs_one_scheme_in_a_text_model(schemes: list[Scheme], together: bool) -> None:
    """Catches W8A8_MIX next to a scheme that the one type in config.json does not name."""
    assert run_together("mindie", QWEN2, schemes) == together
    assert run_together("vllm-ascend", QWEN2, schemes)
