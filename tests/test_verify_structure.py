"""vlqc.verify, the form of a folder: files, index, config, description, every tensor's presence, dtype and shape."""

import ast
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiled_folder import Content, make_content, safetensors_bytes, stored
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

import vlqc
from vlqc.errors import InternalError, UserError
from vlqc.verify import Report, require_sound, verify_folder

Q = "model.layers.0.self_attn.q_proj"
QKV = "visual.blocks.0.attn.qkv"
WEIGHTS = "quant_model_weight_w8a8.safetensors"
INDEX = WEIGHTS + ".index.json"


def texts(report: Report) -> str:
    return "\n".join(f"[{finding.check}] {finding.where}: {finding.what}" for finding in report.findings)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_correct_folder_passes(tmp_path: Path, dtype: str, tied: bool, both: bool, parts: int) -> None:
    """Catches any rule that refuses what both engines load."""
    content = make_content(dtype=dtype, tied=tied, both=both)
    content.parts = parts
    report = verify_folder(content.write(tmp_path / "out"))
    assert (texts(report), report.ok, report.warnings) == ("", True, [])
    engines = ["vLLM Ascend 0.10.2rc2 and later", "MindIE 2.2.RC1 and later"]
    assert report.facts["loads in"] == engines[: 2 if both else 1]
    assert report.engine == ("both" if both else "vllm-ascend")
    assert report.examined["tensors"] == len(content.tensors)


# ---- damage to the content: what is done -> the check that must fail, and what it must name ----------------------

Change = Callable[[Content], object]


def rename(content: Content, old: str, new: str) -> None:
    for names in (content.tensors, content.description):
        names[new] = names.pop(old)


def float_weight(content: Content, layer: str) -> None:
    """One quantized layer left in float, correctly described."""
    for suffix in ("weight_scale", "weight_offset", "input_scale", "input_offset", "quant_bias", "deq_scale"):
        del content.tensors[f"{layer}.{suffix}"], content.description[f"{layer}.{suffix}"]
    content.tensors[f"{layer}.weight"] = content.source[f"{layer}.weight"]
    content.description[f"{layer}.weight"] = "FLOAT"


def reshape(content: Content, name: str, shape: list[int]) -> None:
    content.tensors[name].shape = shape


def add(content: Content, name: str, values: object, dtype: str, word: str | None = "FLOAT") -> None:
    content.tensors[name] = stored(np.asarray(values), dtype)
    if word:
        content.description[name] = word


CONTENT_DAMAGES: dict[str, tuple[Change, str, str]] = {
    "a tensor is missing": (lambda c: c.tensors.pop(f"{Q}.quant_bias"), "tensors", f"{Q}.quant_bias"),
    "a norm is missing": (lambda c: c.tensors.pop("model.norm.weight"), "tensors", "model.norm.weight"),
    "a bias is missing": (lambda c: c.tensors.pop(f"{QKV}.bias"), "tensors", f"{QKV}.bias"),
    "a surplus tensor": (lambda c: add(c, "model.rotary.inv_freq", [1.0], "F32"), "tensors", "model.rotary.inv_freq"),
    "a surplus companion": (lambda c: add(c, "lm_head.input_scale", [1.0], "F32"), "tensors", "lm_head.input_scale"),
    "a bias where there is none": (lambda c: add(c, "lm_head.bias", [0.0] * 48, "BF16"), "tensors", "lm_head.bias"),
    "names of newer transformers": (
        lambda c: rename(c, f"{QKV}.weight", f"model.{QKV}.weight"),
        "tensors",
        f"model.{QKV}.weight",
    ),
    "a wrong shape": (lambda c: reshape(c, f"{Q}.weight", [32, 128]), "tensors", f"{Q}.weight"),
    "a scale without its second dimension": (
        lambda c: reshape(c, f"{Q}.weight_scale", [64]),
        "tensors",
        f"{Q}.weight_scale",
    ),
    "a 0-dimensional scale": (lambda c: reshape(c, f"{Q}.input_scale", []), "tensors", "shape [] instead of [1]"),
    "a float tensor in float32": (
        lambda c: add(c, "model.norm.weight", np.ones(64), "F32"),
        "tensors",
        "dtype F32 instead of BF16",
    ),
    "quant_bias in int64": (lambda c: add(c, f"{Q}.quant_bias", np.ones(64), "I64", "W8A8"), "tensors", "I64"),
    "deq_scale as in float16 folders": (
        lambda c: add(c, f"{Q}.deq_scale", np.ones(64), "I64", "W8A8"),
        "tensors",
        f"{Q}.deq_scale",
    ),
    "no description of a layer": (lambda c: c.description.pop(f"{Q}.weight"), "description", f"{Q}.weight"),
    "no description of the head": (lambda c: c.description.pop("lm_head.weight"), "description", "lm_head.weight"),
    "no description of a companion": (lambda c: c.description.pop(f"{Q}.deq_scale"), "description", f"{Q}.deq_scale"),
    "a companion under another word": (
        lambda c: c.description.update({f"{Q}.deq_scale": "FLOAT"}),
        "description",
        f"{Q}.deq_scale",
    ),
    "a bias described as quantized": (
        lambda c: c.description.update({f"{Q}.bias": "W8A8"}),
        "description",
        f"{Q}.bias",
    ),
    "an unknown scheme": (lambda c: c.description.update({f"{Q}.weight": "W7A7"}), "description", "W7A7"),
    "a scheme that the tensors do not have": (
        lambda c: c.description.update({"model.layers.0.mlp.down_proj.weight": "W4A8_DYNAMIC"}),
        "description",
        "W4A8_DYNAMIC",
    ),
    "a description of nothing": (lambda c: c.description.update({"a.weight": "FLOAT"}), "description", "a.weight"),
    "a nested description": (lambda c: c.description.update({"layers": {}}), "description", "layers"),
    "no version": (lambda c: c.description.pop("version"), "description", "version"),
    "another model_quant_type": (
        lambda c: c.description.update({"model_quant_type": "W8A8_DYNAMIC"}),
        "description",
        "model_quant_type",
    ),
    "quantization_config": (lambda c: c.config.update({"quantization_config": {}}), "config", "quantization_config"),
    "a float32 config": (lambda c: c.config.update({"torch_dtype": "float32"}), "config", "torch_dtype"),
    "no dtype": (lambda c: c.config.pop("torch_dtype"), "config", "torch_dtype"),
    "a size that is none": (lambda c: c.config.update({"hidden_size": "64"}), "config", "hidden_size"),
    "heads that do not fit": (lambda c: c.config.update({"num_key_value_heads": 3}), "config", "num_key_value_heads"),
    "no vision_config": (lambda c: c.config.pop("vision_config"), "config", "vision_config"),
    "tied, and stored twice": (lambda c: c.config.update({"tie_word_embeddings": True}), "config", "lm_head.weight"),
    "one layer more in the config": (
        lambda c: c.config.update({"num_hidden_layers": 3}),
        "tensors",
        "model.layers.2.self_attn.q_proj",
    ),
    "a split group": (lambda c: float_weight(c, Q), "engine rules", "q_proj FLOAT"),
    "metadata without format": (lambda c: setattr(c, "metadata", None), "files", "format"),
    "metadata of another framework": (lambda c: setattr(c, "metadata", {"format": "tf"}), "files", "format"),
}


@pytest.mark.parametrize("damage", CONTENT_DAMAGES)
def test_damaged_content_is_named(tmp_path: Path, damage: str) -> None:
    """Catches a rule of the format that verify forgets: each damage alone must fail its check and be named."""
    change, check, named = CONTENT_DAMAGES[damage]
    content = make_content()
    change(content)
    report = verify_folder(content.write(tmp_path / "out"))
    assert any(finding.check == check and named in f"{finding.where} {finding.what}" for finding in report.findings), (
        texts(report)
    )


MINDIE_DAMAGES: dict[str, tuple[Change, str]] = {
    "quantize is missing": (lambda c: c.config.pop("quantize"), "quantize"),
    "quantize is another type": (lambda c: c.config.update({"quantize": "w8a8_dynamic"}), "quantize"),
    "the vision key is missing": (lambda c: c.config["vision_config"].pop("quantize"), "vision_config.quantize"),
    "a nested config": (lambda c: c.config.update({"text_config": dict(c.config)}), "nested"),
    "a float qkv in a quantized tower": (lambda c: float_weight(c, QKV), QKV),
}


@pytest.mark.parametrize("damage", MINDIE_DAMAGES)
def test_rules_of_mindie_alone(tmp_path: Path, damage: str) -> None:
    """Catches a folder announced for MindIE that only vLLM Ascend loads, and MindIE's rules applied to vLLM Ascend."""
    change, named = MINDIE_DAMAGES[damage]
    content = make_content(both=True)
    change(content)
    folder = content.write(tmp_path / "out")
    assert named in texts(verify_folder(folder, engine="both"))
    assert named in texts(verify_folder(folder, engine="mindie"))
    assert texts(verify_folder(folder, engine="vllm-ascend")) == ""


INPUT_NORM = "model.layers.0.input_layernorm"


def test_a_norm_bias_must_be_one_that_vllm_ascend_applies(tmp_path: Path) -> None:
    """Catches a folded shift that vLLM Ascend drops silently because no description key contains norm.bias."""
    content = make_content()
    add(content, "visual.blocks.0.norm1.bias", np.zeros(32), "BF16")
    report = verify_folder(content.write(tmp_path / "vision"))
    assert texts(report) == "[engine rules] visual.blocks.0.norm1.bias: this bias would be dropped"
    assert report.facts["loads in"] == ["no known engine version"]
    add(content, f"{INPUT_NORM}.bias", np.zeros(64), "BF16")
    assert verify_folder(content.write(tmp_path / "both")).ok


NORM_DAMAGES: dict[str, tuple[Change, str]] = {
    "a consumer is float": (
        lambda c: [float_weight(c, f"model.layers.0.self_attn.{member}_proj") for member in "qkv"],
        f"{INPUT_NORM}.bias: this bias would be dropped",
    ),
    "no copy of the bias": (
        lambda c: (c.tensors.pop(f"{INPUT_NORM}.module.bias"), c.description.pop(f"{INPUT_NORM}.module.bias")),
        f"{INPUT_NORM}.bias: {INPUT_NORM}.module.bias is missing",
    ),
    "another copy of the bias": (
        lambda c: c.tensors[f"{INPUT_NORM}.module.bias"].flip(5, 1),
        f"{INPUT_NORM}.module.bias: it differs from {INPUT_NORM}.bias",
    ),
    "another copy of the weight": (
        lambda c: c.tensors[f"{INPUT_NORM}.module.weight"].flip(5, 1),
        f"{INPUT_NORM}.module.weight: it differs from {INPUT_NORM}.weight",
    ),
    "a copy without a bias": (
        lambda c: add(c, "visual.merger.ln_q.module.weight", np.ones(32), "BF16", "W8A8"),
        "visual.merger.ln_q.module.weight is there without a bias",
    ),
    "a copy under another word": (
        lambda c: c.description.update({f"{INPUT_NORM}.module.weight": "FLOAT"}),
        f"[description] {INPUT_NORM}.module.weight",
    ),
}


@pytest.mark.parametrize("damage", NORM_DAMAGES)
def test_a_norm_bias_must_be_one_that_mindie_applies(tmp_path: Path, damage: str) -> None:
    """Catches a folded shift that MindIE drops, or applies to some of a norm's readers only."""
    change, named = NORM_DAMAGES[damage]
    content = make_content(mindie=True, shift=True)
    change(content)
    assert named in texts(verify_folder(content.write(tmp_path / "out")))


def test_one_folder_for_both_has_no_norm_bias(tmp_path: Path) -> None:
    """Catches a shift in a folder for both: MindIE wants the norms repeated, vLLM Ascend knows no such tensors."""
    content = make_content(both=True, shift=True)
    folder = content.write(tmp_path / "out")
    assert f"{INPUT_NORM}.module.weight is missing" in texts(verify_folder(folder))
    assert texts(verify_folder(folder, engine="vllm-ascend")) == ""
    add(content, f"{INPUT_NORM}.module.bias", np.zeros(64), "BF16")
    report = verify_folder(content.write(tmp_path / "repeated"), engine="vllm-ascend")
    assert f"{INPUT_NORM}.module.bias: this tensor does not belong to the model" in texts(report)


# ---- every scheme and layout -----------------------------------------------------------------------------------------

O = "model.layers.0.self_attn.o_proj"  # noqa: E741
W4A8 = {"scheme": "W4A8_DYNAMIC"}
ALL, NONE = "all", ["no known engine version"]
# scheme, what else make_content is told -> which versions load it in bfloat16, and in float16
CORRECT: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({}, ["vLLM Ascend 0.10.2rc2 and later"], ["vLLM Ascend 0.10.2rc2 and later"]),
    ({"shift": True}, ["vLLM Ascend 0.10.2rc2 and later"], ["vLLM Ascend 0.10.2rc2 and later"]),
    ({"mindie": True}, ["MindIE 2.2.RC1 and later"], ["MindIE 2.2.RC1 and later"]),
    ({"mindie": True, "shift": True}, ["MindIE 2.2.RC1 and later"], ["MindIE 2.2.RC1 and later"]),
    ({"scheme": "W8A8_DYNAMIC"}, ["vLLM Ascend 0.16 and later"], NONE),
    ({"scheme": "W8A8_DYNAMIC", "mindie": True}, ["MindIE 2.2.RC1 and later"], ["MindIE 2.2.RC1 and later"]),
    (W4A8, ["vLLM Ascend 0.16 to 0.26.0rc"], NONE),
    (W4A8 | {"scope": ALL}, NONE, NONE),
    (W4A8 | {"mindie": True}, NONE, NONE),
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("options", "in_bfloat16", "in_float16"), CORRECT)
def test_every_correct_folder_passes(
    tmp_path: Path, options: dict[str, Any], in_bfloat16: list[str], in_float16: list[str], dtype: str, tied: bool
) -> None:
    """Catches any rule that refuses a right scheme, layout or dtype, and a wrong promise of who loads it."""
    content = make_content(dtype=dtype, tied=tied, **options)
    folder, source = content.write(tmp_path / "out"), content.write_source(tmp_path / "float")
    report = verify_folder(folder, model_path=source)
    assert texts(report) == ""
    loads_in = in_bfloat16 if dtype == "bfloat16" else in_float16
    assert report.facts["loads in"] == loads_in
    assert [warning.what for warning in report.warnings] == (["no version loads it"] if loads_in == NONE else [])
    assert report.examined["float weights"] == len(content.source)
    assert report.facts.get("group size") == (64 if options.get("scheme") == "W4A8_DYNAMIC" else None)


@pytest.mark.parametrize(
    ("options", "engine", "expected"),
    [
        ({}, "vllm-ascend@0.10.2rc2", ""),
        ({}, "vllm-ascend@0.10", "vLLM Ascend 0.10 does not load it"),
        ({"scheme": "W8A8_DYNAMIC"}, "vllm-ascend@0.18", ""),
        ({"scheme": "W8A8_DYNAMIC"}, "vllm-ascend@0.15", "vLLM Ascend 0.15 does not load it"),
        ({"scheme": "W8A8_DYNAMIC"}, "mindie", "quantize is None instead of 'w8a8_dynamic'"),
        ({"scheme": "W8A8_DYNAMIC", "mindie": True}, "mindie@2.2", ""),
        ({"scheme": "W8A8_DYNAMIC", "mindie": True}, "vllm-ascend", "vLLM Ascend finds no description"),
        ({"scheme": "W8A8_DYNAMIC", "dtype": "float16"}, "vllm-ascend", "no version of vLLM Ascend loads it"),
        (W4A8, "vllm-ascend@0.26.0rc1", ""),
        (W4A8, "vllm-ascend@0.26", "vLLM Ascend 0.26 does not load it"),
        (W4A8 | {"scope": ALL}, "vllm-ascend", "self_attn.q_proj is W4A8_DYNAMIC, and 1 more of its kind"),
        (W4A8 | {"mindie": True}, "mindie", "no version of MindIE loads it"),
    ],
)
def test_a_named_engine_must_load_the_folder(
    tmp_path: Path, options: dict[str, Any], engine: str, expected: str
) -> None:
    """Catches exit code 0 for a folder that the very engine which the user named refuses, and the other way round."""
    report = verify_folder(make_content(**options).write(tmp_path / "out"), engine=engine)
    assert (expected in texts(report)) if expected else (texts(report) == "")
    assert report.engine == engine


def test_what_no_version_loads_has_no_further_rules(tmp_path: Path) -> None:
    """Catches faults about MindIE's vision tower in a folder of 4 bits, where a layer's inputs made no whole groups: it
    is W8A8_DYNAMIC there, and no version loads the folder anyway."""
    content = make_content(scheme="W4A8_DYNAMIC", mindie=True, wide={"hidden_size": 96}, group_size=64)
    report = verify_folder(content.write(tmp_path / "out"))
    assert texts(report) == ""
    assert report.facts["layers per scheme"]["W8A8_DYNAMIC"] > 0
    assert [warning.what for warning in report.warnings] == ["no version loads it"]


def test_lm_head_in_integers_is_never_right(tmp_path: Path) -> None:
    """Catches a folder that no version loads, passed with a warning although nobody could ever want it."""
    content = make_content(scheme="W8A8_DYNAMIC", dtype="float16")
    for suffix, values in (("weight", np.ones((48, 64))), ("weight_scale", np.ones((48, 1)))):
        add(content, f"lm_head.{suffix}", values, "I8" if suffix == "weight" else "F32", "W8A8_DYNAMIC")
    add(content, "lm_head.weight_offset", np.zeros((48, 1)), "F32", "W8A8_DYNAMIC")
    assert "[engine rules] lm_head: lm_head is W8A8_DYNAMIC" in texts(verify_folder(content.write(tmp_path / "out")))


def test_a_slow_group_size_is_a_warning(tmp_path: Path) -> None:
    """Catches silence about groups for which the engine's kernels are not written."""
    report = verify_folder(make_content(scheme="W4A8_DYNAMIC", group_size=32).write(tmp_path / "out"))
    assert report.ok
    assert [warning.what for warning in report.warnings] == ["group_size is 32"]


def describe(content: Content, word: str, *layers: str) -> None:
    for name in content.description:
        if name.rpartition(".")[0] in layers and not name.endswith(".bias"):
            content.description[name] = word


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
    "a group_size that is none": (
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
    """Catches a tensor or key of 4-bit weights that verify forgets."""
    change, check, named = GROUP_DAMAGES[damage]
    content = make_content(scheme="W4A8_DYNAMIC")
    change(content)
    report = verify_folder(content.write(tmp_path / "out"))
    assert any(finding.check == check and named in f"{finding.where} {finding.what}" for finding in report.findings), (
        texts(report)
    )


def test_outputs_that_the_int4_operator_does_not_take(tmp_path: Path) -> None:
    """Catches 4-bit layers whose outputs are no multiple of eight."""
    folder = make_content(scheme="W4A8_DYNAMIC", wide={"intermediate_size": 180}).write(tmp_path / "out")
    report = verify_folder(folder)
    assert {finding.where for finding in report.findings} == {
        f"model.layers.{index}.mlp.{name}_proj" for index in range(2) for name in ("gate", "up")
    }
    assert report.facts["loads in"] == NONE


LAYOUT_DAMAGES: dict[str, tuple[dict[str, Any], Callable[[Path], object], str]] = {
    "the description of another type": (
        {},
        lambda f: (f / "quant_model_description_w8a8.json").rename(f / "quant_model_description_w4a8.json"),
        "names this file quant_model_description_w8a8.json",
    ),
    "no options": ({}, lambda f: edit(f / "config.json", lambda c: c.pop("quantization_config")), "is missing"),
    "a group size that MindIE refuses": (
        {},
        lambda f: edit(f / "config.json", lambda c: c.update(quantization_config={"group_size": 512})),
        "quantization_config.group_size is 512",
    ),
    "no group size": (
        W4A8,
        lambda f: edit(f / "config.json", lambda c: c.update(quantization_config={})),
        "quantization_config.group_size is None",
    ),
    "a vision key beside a float tower": (
        {"scheme": "W8A8_DYNAMIC"},
        lambda f: edit(f / "config.json", lambda c: c["vision_config"].update(quantize="w8a8")),  # type: ignore[attr-defined]
        "vision_config.quantize is 'w8a8' instead of None",
    ),
    "everybody may write a file": ({}, lambda f: (f / "config.json").chmod(0o666), "everybody may write"),
    "everybody may write the folder": ({}, lambda f: f.chmod(0o777), "everybody may write"),
}


@pytest.mark.parametrize("damage", LAYOUT_DAMAGES)
def test_damaged_layouts_of_mindie_are_named(tmp_path: Path, damage: str) -> None:
    """Catches a rule of MindIE's own layout that verify forgets."""
    options, change, named = LAYOUT_DAMAGES[damage]
    folder = make_content(mindie=True, **options).write(tmp_path / "out")
    change(folder)
    assert named in texts(verify_folder(folder))


def test_permissions_of_a_folder_for_both_are_a_warning(tmp_path: Path) -> None:
    """Catches exit code 1 for a mode that only one of the two engines minds, and that a copy changes anyway."""
    folder = make_content(both=True).write(tmp_path / "out")
    (folder / "config.json").chmod(0o666)
    report = verify_folder(folder)
    assert report.ok
    assert [warning.where for warning in report.warnings] == ["config.json"]


def test_4_bits_beyond_4_bits(tmp_path: Path) -> None:
    """Catches a byte of MindIE's unpacked layout that no nibble can be."""
    content = make_content(scheme="W4A8_DYNAMIC", mindie=True)
    content.tensors[f"{O}.weight"].flip(3 * 128 + 5, 0x50)
    assert "[integers] model.layers.0.self_attn.o_proj.weight:" in texts(verify_folder(content.write(tmp_path / "out")))


# ---- damage to the files ---------------------------------------------------------------------------------------------


def edit(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_header(path: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def overlap(header: dict[str, dict[str, object]]) -> None:
    header["a"] = header[f"{Q}.deq_scale"] | {"data_offsets": header[f"{Q}.bias"]["data_offsets"], "shape": [32]}


FILE_DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), "files", "truncated"),
    "cut inside the header": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:50]), "files", "header"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "files", "header"),
    "a huge header": (lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 62) + b"{}"), "files", "header"),
    "bytes behind the end": (lambda f: (f / WEIGHTS).open("ab").write(b"12"), "files", "unused bytes"),
    "no JSON in the header": (lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 4) + b"{{{{"), "files", "header"),
    "a header of nested lists": (
        lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000),
        "files",
        "header",
    ),
    "overlapping tensors": (lambda f: edit_header(f / WEIGHTS, overlap), "files", "inside the tensor before it"),
    "a shape beyond all memory": (
        lambda f: edit_header(f / WEIGHTS, lambda h: h[f"{Q}.weight"].update(shape=[1 << 60, 1 << 60])),
        "files",
        f"{Q}.weight",
    ),
    "a negative size": (
        lambda f: edit_header(f / WEIGHTS, lambda h: h[f"{Q}.weight"].update(shape=[-64, -64])),
        "files",
        f"{Q}.weight",
    ),
    "an unknown dtype": (
        lambda f: edit_header(f / WEIGHTS, lambda h: h[f"{Q}.weight"].update(dtype="I4")),
        "files",
        "I4",
    ),
    "an entry that is none": (lambda f: edit_header(f / WEIGHTS, lambda h: h.update(a=[1])), "files", "'a'"),  # type: ignore[call-arg]
    "a stray weight file": (lambda f: (f / "model.safetensors").write_bytes(b""), "files", "model.safetensors"),
    "a stray index": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "files",
        "model.safetensors.index",
    ),
    "a file named after another type": (
        lambda f: (f / WEIGHTS).rename(f / "quant_model_weight_w4a8_dynamic.safetensors"),
        "files",
        "w4a8_dynamic",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "files", "no quant_model_weight"),
    "no config": (lambda f: (f / "config.json").unlink(), "config", "missing"),
    "a broken config": (lambda f: (f / "config.json").write_text("{"), "config", "JSON"),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[]"), "config", "object"),
    "no description": (lambda f: (f / "quant_model_description.json").unlink(), "description", "missing"),
    "a key twice": (
        lambda f: (f / "quant_model_description.json").write_text('{"version": "1.0.0", "version": "1.0.0"}'),
        "description",
        "twice",
    ),
}


@pytest.mark.parametrize("damage", FILE_DAMAGES)
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    """Catches a traceback, or silence, on files that a broken disk, copy or tool leaves behind."""
    change, check, named = FILE_DAMAGES[damage]
    folder = make_content().write(tmp_path / "out")
    change(folder)
    report = verify_folder(folder)
    assert any(finding.check == check and named in f"{finding.where} {finding.what}" for finding in report.findings), (
        texts(report)
    )


PART = "quant_model_weight_w8a8-00002-of-00003.safetensors"
INDEX_DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda f: (f / INDEX).unlink(), "missing"),
    "a wrong total_size": (lambda f: edit(f / INDEX, lambda i: i["metadata"].update(total_size=1)), "total_size"),  # type: ignore[attr-defined]
    "a tensor not listed": (
        lambda f: edit(f / INDEX, lambda i: i["weight_map"].pop("lm_head.weight")),
        "does not list",
    ),  # type: ignore[attr-defined]
    "a tensor in the wrong file": (
        lambda f: edit(f / INDEX, lambda i: i["weight_map"].update({"lm_head.weight": "x"})),  # type: ignore[attr-defined]
        "places 'lm_head.weight'",
    ),
    "a tensor that is nowhere": (
        lambda f: edit(f / INDEX, lambda i: i["weight_map"].update({"a": PART})),  # type: ignore[attr-defined]
        "no file contains",
    ),
    "no weight_map": (lambda f: (f / INDEX).write_text("{}"), "no weight_map"),
    "a missing part": (lambda f: (f / PART).unlink(), "2 of 3 are missing"),
    "a part of another set": (
        lambda f: (f / PART).rename(f / "quant_model_weight_w8a8-00002-of-00004.safetensors"),
        "do not belong together",
    ),
    "a tensor in two files": (
        lambda f: (f / "quant_model_weight_w8a8-00001-of-00003.safetensors").write_bytes((f / PART).read_bytes()),
        "is also in",
    ),
}


@pytest.mark.parametrize("damage", INDEX_DAMAGES)
def test_damaged_shards_are_named(tmp_path: Path, damage: str) -> None:
    """Catches an index that engines would follow into missing or doubled tensors."""
    change, named = INDEX_DAMAGES[damage]
    content = make_content()
    content.parts = 3
    folder = content.write(tmp_path / "out")
    change(folder)
    assert named in texts(verify_folder(folder))


@given(position=st.integers(0, 60_000), junk=st.binary(min_size=1, max_size=40), cut=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_make_it_raise(tmp_path: Path, position: int, junk: bytes, cut: bool) -> None:
    """Catches a traceback (or a huge allocation) on random damage to header or data."""
    folder = tmp_path / "out"
    if not folder.exists():
        make_content().write(folder)
    whole = safetensors_bytes(make_content().tensors, {"format": "pt"})
    end = whole[position + len(junk) :] if not cut else b""
    (folder / WEIGHTS).write_bytes(whole[:position] + junk + end)
    report = verify_folder(folder)
    assert report.examined["files"] > 0
    assert not cut or not report.ok


# ---- what is no fault ------------------------------------------------------------------------------------------------


def test_missing_side_files_are_warnings(tmp_path: Path) -> None:
    """Catches exit code 1 for a folder made from ready tensors, whose model has no tokenizer."""
    content = make_content()
    content.side_files = False
    report = verify_folder(content.write(tmp_path / "out"))
    assert report.ok
    assert [finding.where for finding in report.warnings] == [
        "a tokenizer",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "generation_config.json",
    ]


def test_a_nested_config_is_fine_for_vllm_ascend(tmp_path: Path) -> None:
    """Catches sizes read from the wrong level of a nested config."""
    content = make_content()
    outer = ("architectures", "model_type", "torch_dtype", "vision_config", "tie_word_embeddings")
    text = {key: content.config.pop(key) for key in list(content.config) if key not in outer}
    content.config["text_config"] = text
    assert texts(verify_folder(content.write(tmp_path / "out"))) == ""


# ---- bad input, report, independence ---------------------------------------------------------------------------------


def test_what_is_no_compiled_folder_is_the_users_mistake(tmp_path: Path) -> None:
    """Catches a traceback, or a report of 300 missing tensors, for a wrong path."""
    content = make_content()
    with pytest.raises(UserError, match="does not exist"):
        verify_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="looks like a float checkpoint"):
        verify_folder(content.write_source(tmp_path / "float"))
    with pytest.raises(UserError, match="is not a compiled folder"):
        verify_folder(tmp_path)
    folder = content.write(tmp_path / "out")
    with pytest.raises(UserError, match="did you mean vllm-ascend"):
        verify_folder(folder, engine="vllm_ascend")
    with pytest.raises(UserError, match="--model_path"):
        verify_folder(folder, calib_images=tmp_path)
    with pytest.raises(UserError, match=r"no \*.safetensors"):
        verify_folder(folder, model_path=tmp_path / "nowhere")


def test_the_report_reads_and_repeats(tmp_path: Path) -> None:
    """Catches a report that hides a fault on screen, or JSON that differs between two runs."""
    content = make_content()
    content.tensors.pop(f"{Q}.quant_bias")
    folder = content.write(tmp_path / "out")
    report = verify_folder(folder)
    assert report.to_json() == verify_folder(folder).to_json()
    read = json.loads(report.to_json())
    assert read["ok"] is False
    assert read["faults"][0]["where"] == Q
    assert {"check": "tensors", "examined": 141, "faults": 1, "warnings": 0} in read["checks"]
    console = Console(width=200, record=True, quiet=False, file=(tmp_path / "screen").open("w"))
    report.render(console)
    shown = console.export_text()
    assert "FAIL" in shown
    assert f"missing: {Q}.quant_bias" in shown
    assert "what to do: compile again" in shown


def test_many_faults_are_shortened_on_screen_only(tmp_path: Path) -> None:
    """Catches a screen full of one kind of fault with the others out of sight."""
    content = make_content()
    for name in [name for name in content.tensors if name.endswith(".weight_offset")]:
        content.tensors[name] = stored(np.ones(content.tensors[name].shape), "F32")
    content.tensors |= {f"stray.{number}": stored(np.ones(1), "F32") for number in range(30)}
    report = verify_folder(content.write(tmp_path / "out"))
    console = Console(width=200, record=True, file=(tmp_path / "screen").open("w"))
    report.render(console)
    shown = console.export_text()
    assert "and 10 more in [tensors]" in shown
    assert "weight_offset" in shown
    assert sum(finding.check == "tensors" for finding in report.findings) == 30


def test_require_sound(tmp_path: Path) -> None:
    """Catches a compiler that hands over a folder in which it could have found the fault itself."""
    content = make_content()
    require_sound(content.write(tmp_path / "good"))
    content.tensors.pop("model.norm.weight")
    with pytest.raises(InternalError, match=r"model\.norm"):
        require_sound(content.write(tmp_path / "bad"))


def test_the_proof_is_independent_of_what_it_proves() -> None:
    """Catches an import, direct or through other vlqc modules, of the emitter or the passes."""
    root = Path(vlqc.__file__).parent
    seen: set[str] = set()
    waiting = [f"vlqc.verify.{path.stem}" for path in (root / "verify").glob("*.py")]
    while waiting:
        module = waiting.pop().removesuffix(".__init__")
        if module in seen or not module.startswith("vlqc."):
            continue
        seen.add(module)
        path = root.joinpath(*module.split(".")[1:])
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not file.exists():
            continue  # a name imported from a module, followed as if it were one
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                waiting += [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
    assert {"vlqc.verify.structure", "vlqc.engines", "vlqc.lockstep", "vlqc.runtime"} <= seen
    assert [module for module in sorted(seen) if module.startswith(("vlqc.emit", "vlqc.passes"))] == []
