"""Names of layers in the options, as other transformers versions and vLLM write them."""

from pathlib import Path

import pytest

from tests.support import tiny
from vlqc.errors import UserError
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.families.qwen3_vl import QWEN3_VL
from vlqc.options.options import Options
from vlqc.pipeline.layer_selection import check_layers


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("model.language_model.layers.3.*", "model.layers.3.*"),
        ("model.language_model*", "model*"),
        ("*language_model*up_proj", "*model*up_proj"),
        ("*.language_model.layers.0.*", "*model.layers.0.*"),
        ("language_model.model.layers.*", "model.layers.*"),
        ("language_model.lm_head", "lm_head"),
        ("model.visual.*", "visual.*"),
        ("model.visual*", "visual*"),
        ("*.qkv", "*.qkv"),
        ("visual.blocks.[01].*", "visual.blocks.[01].*"),
        ("model.layers.*", "model.layers.*"),
        ("model.*", "model.*"),
    ],
)
def test_patterns_of_qwen2_5_vl(pattern: str, expected: str) -> None:
    """Catches a name of newer transformers that matches nothing, and a pattern that comes to match another part."""
    assert QWEN2_5_VL.name_pattern(pattern) == expected == QWEN2_5_VL.name_pattern(expected)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("visual.blocks.*", "model.visual.blocks.*"),
        ("visual*", "model.visual*"),
        ("model.layers.0.*", "model.language_model.layers.0.*"),
        ("model.language_model.layers.0.*", "model.language_model.layers.0.*"),
        ("*.mlp.*", "*.mlp.*"),
    ],
)
def test_patterns_of_qwen3_vl(pattern: str, expected: str) -> None:
    """Catches the shorter names of Qwen2.5-VL that match nothing."""
    assert QWEN3_VL.name_pattern(pattern) == expected


def test_options_hold_checkpoint_names(tmp_path: Path) -> None:
    """Catches patterns that are converted for one reader of the options and not for another."""
    options = Options.from_user(
        model_path=tiny.TINY,
        save_directory=tmp_path / "out",
        exclude=("model.visual.*", "visual.*"),
        include=("model.language_model.layers.*.mlp.down_proj",),
        dump_ir=tmp_path / "dump",
        dump_stages=("model.visual.merger",),
    )
    assert options.exclude == ("visual.*",) and options.include == ("model.layers.*.mlp.down_proj",)
    assert options.dump_stages == ("visual.merger",)
    with pytest.raises(UserError, match="they contradict each other"):
        Options.from_user(
            model_path=tiny.TINY, save_directory=tmp_path / "out", exclude="model.visual.*", include="visual.*"
        )


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens", "visual.patch_embed.proj", "*layernorm"])
def test_what_is_float_in_any_case(tmp_path: Path, name: str) -> None:
    """Catches lists of layers of other tools that are refused for what stays float anyway, and a wrong reason."""
    model = tiny.float_model(tiny.TINY)
    given = {"model_path": tiny.TINY, "save_directory": tmp_path / "out"}
    check_layers(model, Options.from_user(**given, exclude=name))
    with pytest.raises(UserError, match="engines run it in float"):
        check_layers(model, Options.from_user(**given, include=name))


@pytest.mark.parametrize(
    ("name", "value"),
    [("rotate", "none"), ("anti_method", "m4"), ("act_method", 1), ("weight_method", "round"), ("exclude", "*.qkv")],
)
def test_options_that_the_pipeline_replaces(tmp_path: Path, name: str, value: object) -> None:
    """Catches an option that has no effect beside --pipeline and is accepted."""
    given = {"model_path": tiny.TINY, "save_directory": tmp_path / "out", "pipeline": "insert-observers"}
    Options.from_user(**given)
    with pytest.raises(UserError, match=f"--{name} .* with --pipeline"):
        Options.from_user(**given, **{name: value})
