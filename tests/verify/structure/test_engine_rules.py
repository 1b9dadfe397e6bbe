"""Verification of every scheme and layout: which engines load a folder, and the rules of each engine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.compiled_folder import make_content
from tests.support.damaged_folder import Change, add, describe, edit, texts
from vlqc.verify import verify_folder

O = "model.layers.0.self_attn.o_proj"  # noqa: E741
W4A8 = {"scheme": "W4A8_DYNAMIC"}
ALL, NONE = "all", ["no known engine version"]
# arguments of make_content, versions that load the folder in bfloat16, in float16
CORRECT: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({}, ["vLLM Ascend 0.10.2rc2 and later"], ["vLLM Ascend 0.10.2rc2 and later"]),
    ({"shift": True}, ["vLLM Ascend 0.10.2rc2 and later"], ["vLLM Ascend 0.10.2rc2 and later"]),
    ({"mindie": True}, ["MindIE 2.2.RC1 and later"], ["MindIE 2.2.RC1 and later"]),
    ({"mindie": True, "shift": True}, ["MindIE 2.2.RC1 and later"], ["MindIE 2.2.RC1 and later"]),
    ({"scheme": "W8A8_DYNAMIC"}, ["vLLM Ascend 0.16 and later"], NONE),
    ({"scheme": "W8A8_DYNAMIC", "mindie": True}, ["MindIE 2.2.RC1 and later"], ["MindIE 2.2.RC1 and later"]),
    (W4A8, ["vLLM Ascend 0.16 and later, before 0.26"], NONE),
    (W4A8 | {"scope": ALL}, NONE, NONE),
    (W4A8 | {"mindie": True}, NONE, NONE),
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("options", "in_bfloat16", "in_float16"), CORRECT)
def test_every_correct_folder_passes(
    tmp_path: Path, options: dict[str, Any], in_bfloat16: list[str], in_float16: list[str], dtype: str, tied: bool
) -> None:
    """Catches a rule that rejects a valid scheme, layout or dtype, and wrong versions in "loads in"."""
    content = make_content(dtype=dtype, tied=tied, **options)
    folder, source = content.write(tmp_path / "out"), content.write_source(tmp_path / "float")
    result = verify_folder(folder, model_path=source)
    assert texts(result) == ""
    loads_in = in_bfloat16 if dtype == "bfloat16" else in_float16
    assert result.facts["loads in"] == loads_in
    warnings = [(warning.check, warning.where) for warning in result.warnings]
    assert warnings == ([("engine rules", str(folder))] if loads_in == NONE else [])
    assert result.examined["float weights"] == len(content.source)
    assert result.facts.get("group size") == (64 if options.get("scheme") == "W4A8_DYNAMIC" else None)


@pytest.mark.parametrize(
    ("options", "engine", "expected"),
    [
        ({}, "vllm-ascend@0.10.2rc2", ""),
        ({}, "vllm-ascend@0.10", "vLLM Ascend 0.10 "),
        ({"scheme": "W8A8_DYNAMIC"}, "vllm-ascend@0.18", ""),
        ({"scheme": "W8A8_DYNAMIC"}, "vllm-ascend@0.15", "vLLM Ascend 0.15 "),
        ({"scheme": "W8A8_DYNAMIC"}, "mindie", "no version of MindIE loads the folder"),
        ({"scheme": "W8A8_DYNAMIC"}, "mindie@2.2", "config.json: quantize is missing"),
        ({"scheme": "W8A8_DYNAMIC", "mindie": True}, "mindie@2.2", ""),
        ({"scheme": "W8A8_DYNAMIC", "mindie": True}, "vllm-ascend", "quant_model_description_w8a8_dynamic.json: "),
        ({"scheme": "W8A8_DYNAMIC", "dtype": "float16"}, "vllm-ascend", "no version of vLLM Ascend"),
        (W4A8, "vllm-ascend@0.26.0rc1", ""),
        (W4A8, "vllm-ascend@0.26", "vLLM Ascend 0.26 "),
        (W4A8 | {"scope": ALL}, "vllm-ascend", "self_attn.q_proj is W4A8_DYNAMIC, and 1 more"),
        (W4A8 | {"mindie": True}, "mindie", "no version of MindIE"),
    ],
)
def test_a_named_engine_must_load_the_folder(
    tmp_path: Path, options: dict[str, Any], engine: str, expected: str
) -> None:
    """Catches a folder without faults that the named engine rejects, and the other way round."""
    result = verify_folder(make_content(**options).write(tmp_path / "out"), engine=engine)
    assert (expected in texts(result)) if expected else (texts(result) == "")
    assert result.engine == engine


@pytest.mark.parametrize(
    ("options", "engine", "advice"),
    [
        ({"scheme": "W8A8_DYNAMIC"}, "vllm-ascend@0.15", "--target vllm-ascend@0.15"),  # the vision tower in float
        (W4A8, "vllm-ascend@0.26", "--target vllm-ascend@0.26 --scheme w8a8_dynamic"),
    ],
)
def test_options_that_the_version_loads(tmp_path: Path, options: dict[str, Any], engine: str, advice: str) -> None:
    """Catches advice to compile again with options that give the same folder."""
    faults = verify_folder(make_content(**options).write(tmp_path / "out"), engine=engine).faults
    assert [fault.fix for fault in faults if "does not load" in fault.what] == [f"compile again with {advice}"]


def test_a_folder_that_no_version_loads_has_no_further_rules(tmp_path: Path) -> None:
    """Catches faults about MindIE's vision tower in a 4-bit folder in which some layers are W8A8_DYNAMIC, because their
    inputs are not divisible into groups, and which no version loads anyway."""
    content = make_content(scheme="W4A8_DYNAMIC", mindie=True, group_size=64)
    result = verify_folder(content.write(tmp_path / "out"))
    assert texts(result) == ""
    assert result.facts["layers per scheme"]["W8A8_DYNAMIC"] > 0
    assert [warning.check for warning in result.warnings] == ["engine rules"]


def test_lm_head_in_integers_is_never_right(tmp_path: Path) -> None:
    """Catches a mere warning for a layer that no engine ever quantizes."""
    content = make_content(scheme="W8A8_DYNAMIC", dtype="float16")
    for suffix, values in (("weight", np.ones((48, 64))), ("weight_scale", np.ones((48, 1)))):
        add(content, f"lm_head.{suffix}", values, "I8" if suffix == "weight" else "F32", "W8A8_DYNAMIC")
    add(content, "lm_head.weight_offset", np.zeros((48, 1)), "F32", "W8A8_DYNAMIC")
    assert "[engine rules] lm_head: lm_head is W8A8_DYNAMIC" in texts(verify_folder(content.write(tmp_path / "out")))


def test_a_slow_group_size_is_a_warning(tmp_path: Path) -> None:
    """Catches a missing warning about a group size that the engine's kernels do not prefer."""
    result = verify_folder(make_content(scheme="W4A8_DYNAMIC", group_size=32).write(tmp_path / "out"))
    assert result.ok
    assert [(warning.check, "32" in warning.what) for warning in result.warnings] == [("engine rules", True)]


GROUP_DAMAGES: dict[str, tuple[Change, str, str]] = {
    "no second scale": (lambda c: c.tensors.pop(f"{O}.weight_scale_second"), "tensors", f"{O}.weight_scale_second"),
    "no second offset": (lambda c: c.tensors.pop(f"{O}.weight_offset_second"), "tensors", f"{O}.weight_offset_second"),
    "no scale_bias": (lambda c: c.tensors.pop(f"{O}.scale_bias"), "tensors", f"{O}.scale_bias"),
    "a scale_bias that is not cut": (
        lambda c: add(c, f"{O}.scale_bias", np.ones((128, 1)), "F32"),
        "tensors",
        "128, 1",
    ),
    "a scale_bias in bfloat16": (
        lambda c: add(c, f"{O}.scale_bias", np.ones((128, 16)), "BF16"),
        "tensors",
        "dtype BF16 instead of F32",
    ),
    "an unpacked weight": (
        lambda c: add(c, f"{O}.weight", np.ones((128, 128)), "I8", "W4A8_DYNAMIC"),
        "tensors",
        "shape [128, 128] instead of [64, 128]",
    ),
    "an unsigned weight": (lambda c: setattr(c.tensors[f"{O}.weight"], "dtype", "U8"), "tensors", "U8 instead of I8"),
    "no group_size": (lambda c: c.description.pop("group_size"), "description", "group_size is None"),
    "a group_size as text": (
        lambda c: c.description.update(group_size="64"),
        "description",
        "group_size is '64'",
    ),
    "another group_size": (lambda c: c.description.update(group_size=128), "tensors", f"{O}.weight_scale_second"),
    "named after its other scheme": (
        lambda c: c.description.update(model_quant_type="W8A8_DYNAMIC"),
        "description",
        "instead of 'W4A8_DYNAMIC'",
    ),
    "files named after its other scheme": (lambda c: setattr(c, "type_name", "w8a8_dynamic"), "files", "w4a8_dynamic"),
    "a split group": (
        lambda c: describe(c, "W8A8_DYNAMIC", "model.layers.0.mlp.up_proj"),
        "engine rules",
        "up_proj W8A8_DYNAMIC",
    ),
}


@pytest.mark.parametrize("damage", GROUP_DAMAGES)
def test_damaged_groups_are_named(tmp_path: Path, damage: str) -> None:
    """Catches a tensor or key of 4-bit weights that is not checked."""
    change, check, named = GROUP_DAMAGES[damage]
    content = make_content(scheme="W4A8_DYNAMIC")
    change(content)
    result = verify_folder(content.write(tmp_path / "out"))
    assert any(finding.check == check and named in f"{finding.where} {finding.what}" for finding in result.faults), (
        texts(result)
    )


def test_outputs_that_the_int4_operator_does_not_support(tmp_path: Path) -> None:
    """Catches 4-bit layers whose number of outputs is not a multiple of 8."""
    folder = make_content(scheme="W4A8_DYNAMIC", wide={"intermediate_size": 180}).write(tmp_path / "out")
    result = verify_folder(folder)
    assert {finding.where for finding in result.faults} == {
        f"model.layers.{index}.mlp.{name}_proj" for index in range(2) for name in ("gate", "up")
    }
    assert result.facts["loads in"] == NONE


LAYOUT_DAMAGES: dict[str, tuple[dict[str, Any], Callable[[Path], object], str]] = {
    "the description of another type": (
        {},
        lambda f: (f / "quant_model_description_w8a8.json").rename(f / "quant_model_description_w4a8.json"),
        "quant_model_description_w8a8.json",
    ),
    "no options": (
        {},
        lambda f: edit(f / "config.json", lambda c: c.pop("quantization_config")),
        "config.json: quantization_config",
    ),
    "a group size that MindIE rejects": (
        {},
        lambda f: edit(f / "config.json", lambda c: c.update(quantization_config={"group_size": 512})),
        "quantization_config.group_size is 512",
    ),
    "no group size": (
        W4A8,
        lambda f: edit(f / "config.json", lambda c: c.update(quantization_config={})),
        "quantization_config.group_size is None",
    ),
    "a quantized cache": (
        {},
        lambda f: edit(f / "config.json", lambda c: c["quantization_config"].update(kv_quant_type="C8")),  # type: ignore[attr-defined]
        "quantization_config.kv_quant_type",
    ),
    "a vision key beside a float tower": (
        {"scheme": "W8A8_DYNAMIC"},
        lambda f: edit(f / "config.json", lambda c: c["vision_config"].update(quantize="w8a8")),  # type: ignore[attr-defined]
        "vision_config.quantize is 'w8a8' instead of None",
    ),
    "a file writable by all": ({}, lambda f: (f / "config.json").chmod(0o666), "[engine rules] config.json"),
    "a folder writable by all": ({}, lambda f: f.chmod(0o777), "[engine rules] out"),
}


@pytest.mark.parametrize("damage", LAYOUT_DAMAGES)
def test_damaged_layouts_of_mindie_are_named(tmp_path: Path, damage: str) -> None:
    """Catches a rule of MindIE's layout that is not checked."""
    options, change, named = LAYOUT_DAMAGES[damage]
    folder = make_content(mindie=True, **options).write(tmp_path / "out")
    change(folder)
    assert named in texts(verify_folder(folder))


def test_permissions_of_a_folder_for_both_are_a_warning(tmp_path: Path) -> None:
    """Catches a fault for a file mode that only one of two engines rejects and that a copy changes anyway."""
    folder = make_content(both=True).write(tmp_path / "out")
    (folder / "config.json").chmod(0o666)
    result = verify_folder(folder)
    assert result.ok
    assert [warning.where for warning in result.warnings] == ["config.json"]


def test_4_bits_beyond_4_bits(tmp_path: Path) -> None:
    """Catches a byte of MindIE's unpacked layout that is not a 4-bit integer."""
    content = make_content(scheme="W4A8_DYNAMIC", mindie=True)
    content.tensors[f"{O}.weight"].flip(3 * 128 + 5, 0x50)
    assert "[integers] model.layers.0.self_attn.o_proj.weight:" in texts(verify_folder(content.write(tmp_path / "out")))
