"""Patterns of --exclude and --include: those that match nothing are faults, with a suggestion."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support import tiny
from vlqc.errors import UserError
from vlqc.families.family import ModelFamily
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.families.qwen3_vl import QWEN3_VL
from vlqc.families.qwen3_vl_moe import QWEN3_VL_MOE
from vlqc.ir.rotations import RotationPlan
from vlqc.options.options import Options
from vlqc.pipeline.layer_selection import check_engines, check_globs, check_layers, check_schemes

LAYERS = [
    "visual.blocks.0.attn.qkv",
    "visual.merger.mlp.0",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.down_proj",
    "lm_head",
]


@pytest.mark.parametrize(
    "pattern",
    ["*", "lm_head", "visual.*", "*.down_proj", "model.layers.[0-3].mlp.*", "*q_proj", "visual.merger.mlp.?"],
)
def test_patterns_that_match(pattern: str) -> None:
    """Catches a pattern that is refused although it matches a layer."""
    check_globs(iter(LAYERS), exclude=(pattern,))
    check_globs(LAYERS, exclude=(pattern, pattern), include=(pattern,))


def test_nothing_given() -> None:
    """Catches a fault without any pattern."""
    check_globs(LAYERS, exclude=(), include=())
    check_globs([])


@pytest.mark.parametrize(
    ("pattern", "fix"),
    [
        ("lm_haed", "did you mean lm_head?"),
        ("model.layers.0.mlp.downproj", "model.layers.0.mlp.down_proj"),
        ("LM_HEAD", "layers are named like visual.blocks.0.attn.qkv, lm_head"),  # letters' cases count
        ("x", "layers are named like visual.blocks.0.attn.qkv, lm_head"),
        ("model.layers.0.mlp.down_proj.weight", "did you mean model.layers.0.mlp.down_proj"),  # a tensor, no layer
    ],
)
def test_patterns_that_match_nothing(pattern: str, fix: str) -> None:
    """Catches an exclusion without effect: its layer would be quantized."""
    with pytest.raises(UserError) as caught:
        check_globs(LAYERS, include=(pattern,))
    (fault,) = caught.value.faults
    assert fault.what == f"--include {pattern} matches no layer" and fix in fault.fix
    assert caught.value.exit_code == 2


def test_all_faults_at_once() -> None:
    """Catches one fault per run, and a fault without its flag."""
    with pytest.raises(UserError) as caught:
        check_globs(LAYERS, exclude=("a.*", "visual.*", "b.*"), include=("c.*",))
    assert [fault.what.split(" matches")[0] for fault in caught.value.faults] == [
        "--exclude a.*",
        "--exclude b.*",
        "--include c.*",
    ]


def test_a_model_without_layers() -> None:
    """Catches an IndexError for a model without layers."""
    with pytest.raises(UserError, match="matches no layer"):
        check_globs([], exclude=("*",))


def test_nothing_that_is_left() -> None:
    """Catches a compilation that quantizes nothing."""
    options = Options.from_user(model_path=tiny.TINY, save_directory="out", exclude=["*"])
    with pytest.raises(UserError, match="nothing would be quantized"):
        check_layers(tiny.float_model(), options)


def test_exclusions_with_a_target_that_does_not_run_the_scheme() -> None:
    """Catches "nothing would be quantized" for a folder that only the target's version or engine does not load."""
    low_bit = {"w_bit": 4, "is_dynamic": True, "is_lowbit": True, "open_outlier": False}
    for options in ({"target": "vllm-ascend@0.10.1"}, {"mindie_format": True, **low_bit}):
        chosen = Options.from_user(model_path=tiny.TINY, save_directory="out", exclude=["*.o_proj"], **options)
        check_layers(tiny.float_model(), chosen)


@pytest.mark.parametrize(
    ("family", "chosen", "runs"),
    [
        (QWEN2_5_VL, {"is_dynamic": True, "target": "mindie"}, True),
        (QWEN3_VL, {"is_dynamic": True, "target": "mindie"}, False),  # its vision tower must be static
        (QWEN3_VL, {"is_dynamic": True, "target": "vllm-ascend"}, True),
        (QWEN3_VL, {"target": "both"}, True),
        (QWEN3_VL, {"target": "vllm-ascend@0.15"}, True),  # a warning: other versions load it
    ],
)
def test_schemes_that_no_version_runs_together(family: ModelFamily, chosen: dict[str, Any], runs: bool) -> None:
    """Catches a compilation of hours for a folder that its engine refuses, and one refused that it loads."""
    options = Options.from_user(model_path=tiny.TINY, save_directory="out", **chosen)
    layers = {layer.replace("*", "0"): (64, 64) for layer in family.layers()}
    if runs:
        check_schemes(layers, family, options)
    else:
        with pytest.raises(UserError, match="no version of MindIE loads W8A8_DYNAMIC"):
            check_schemes(layers, family, options)


EXPERTS = [f"model.language_model.layers.0.mlp.experts.{number}.down_proj" for number in range(3)]


@pytest.mark.parametrize(
    ("family", "layers", "exclude", "what"),
    [
        (QWEN3_VL_MOE, EXPERTS, "*.experts.2.*", f"{EXPERTS[2]} is FLOAT"),  # not its first expert
        (
            QWEN3_VL,
            [
                f"model.visual.blocks.{number}.{layer}"
                for number in range(2)
                for layer in ("attn.qkv", "mlp.linear_fc1")
            ],
            "model.visual.*",
            "model.visual.blocks.0.attn.qkv is FLOAT while model.language_model.layers.0.self_attn.q_proj is W8A8, "
            "and 3 more like it",
        ),
    ],
)
def test_the_error_of_an_exclusion(family: ModelFamily, layers: list[str], exclude: str, what: str) -> None:
    """Catches an error that names a layer that the user did not exclude, and one error per layer."""
    options = Options.without_paths(exclude=[exclude])
    quantized = [f"model.language_model.layers.0.self_attn.{member}_proj" for member in "qkv"]
    with pytest.raises(UserError) as caught:
        check_schemes(dict.fromkeys([*quantized, *layers], (64, 64)), family, options)
    (fault,) = caught.value.faults
    assert fault.what == what and f"--exclude {exclude}" in fault.where and "--target vllm-ascend" in fault.fix


def test_layers_that_all_engines_run_in_float() -> None:
    """Catches --include that is ignored without an error."""
    options = Options.from_user(model_path=tiny.TINY, save_directory="out", include=["lm_head", "*"])
    with pytest.raises(UserError) as caught:
        check_layers(tiny.float_model(), options)
    assert [fault.what for fault in caught.value.faults] == ["--include lm_head: lm_head stays float"]


@pytest.mark.parametrize(
    ("target", "config", "untied", "refused"),
    [
        ("vllm-ascend", {"vision_config": {"deepstack_visual_indexes": [0, 1]}}, "", ""),
        ("mindie", {"vision_config": {"deepstack_visual_indexes": [0, 1]}}, "", "2 outputs of the vision tower"),
        ("both", {"vision_config": {"deepstack_visual_indexes": [0]}}, "", "1 output of the vision tower"),
        ("mindie", {"vision_config": {}}, "", ""),
        ("vllm-ascend", {"text_config": {"tie_word_embeddings": True}}, "", "tied to the embedding"),
        ("vllm-ascend", {"text_config": {"tie_word_embeddings": True}}, "lm_head", ""),
    ],
)
def test_a_model_that_an_engine_does_not_run(target: str, config: dict[str, Any], untied: str, refused: str) -> None:
    """Catches a compilation that ends in an internal error, because the engine runs no such model, and one refused
    although --rotate all unties it."""
    checkpoint = SimpleNamespace(config={"text_config": {}, **config}, folder=Path("float"))
    model: Any = SimpleNamespace(
        family=QWEN3_VL_MOE, checkpoint=checkpoint, rotation_plan=RotationPlan(untied_head=untied)
    )
    options = Options.without_paths(target=target)
    if not refused:
        return check_engines(model, options)
    with pytest.raises(UserError, match=refused) as caught:
        check_engines(model, options)
    assert ("--target vllm-ascend" in caught.value.faults[0].fix) == ("outputs" in refused or "output of" in refused)


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"kv_cache": "int8"}, "an int8 KV cache of a float16 model"),
        ({"scheme": "w8a8_mix"}, "W8A8_MIX of a float16 model"),
        ({"target": "vllm-ascend"}, ""),
    ],
)
def test_strict_target_knows_the_dtype(options: dict[str, Any], refused: str) -> None:
    """Catches a compilation with --strict_target that no version loads, or that all load and is refused."""
    model: Any = SimpleNamespace(
        family=QWEN2_5_VL,
        checkpoint=SimpleNamespace(config={}, folder=Path("float")),
        rotation_plan=RotationPlan(),
        emitted_dtype=torch.float16,
    )
    check_engines(model, Options.without_paths(**options))
    strict = Options.without_paths(**options, strict_target=True)
    if not refused:
        return check_engines(model, strict)
    with pytest.raises(UserError, match=refused):
        check_engines(model, strict)
    model.emitted_dtype = torch.bfloat16
    return check_engines(model, strict)
