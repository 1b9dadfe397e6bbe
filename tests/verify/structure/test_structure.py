"""Verification of every tensor of a folder: presence, dtype, shape, description, and the keys of the config."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.compiled_folder import make_content
from tests.support.damaged_folder import QKV, Change, Q, add, float_weight, rename, reshape, texts
from vlqc.verify import verify_folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_correct_folder_passes(tmp_path: Path, dtype: str, tied: bool, both: bool, parts: int) -> None:
    """Catches a rule that rejects a folder which both engines load."""
    content = make_content(dtype=dtype, tied=tied, both=both)
    content.parts = parts
    result = verify_folder(content.write(tmp_path / "out"))
    assert (texts(result), result.ok, result.warnings) == ("", True, [])
    engines = ["vLLM Ascend 0.10.2rc2 and later", "MindIE 2.2.RC1 and later"]
    assert result.facts["loads in"] == engines[: 2 if both else 1]
    assert result.engine == ("both" if both else "vllm-ascend")
    assert result.examined["tensors"] == len(content.tensors)


def test_a_model_type_without_a_family_is_one_fault(tmp_path: Path) -> None:
    """Catches findings that only follow from the missing family, which hide what is wrong."""
    content = make_content()
    content.config["model_type"] = "nonsense"
    path = content.write(tmp_path / "out")
    (path / "preprocessor_config.json").unlink()
    result = verify_folder(path)
    assert [(fault.check, fault.what) for fault in result.faults] == [("config", "unsupported model type 'nonsense'")]
    assert result.warnings == [] and "layers per scheme" not in result.facts


# ---- damaged content: name, change, check that must fail, what the fault must name --------------------------------


CONTENT_DAMAGES: dict[str, tuple[Change, str, str]] = {
    "a tensor is missing": (lambda c: c.tensors.pop(f"{Q}.quant_bias"), "tensors", f"{Q}.quant_bias"),
    "a norm is missing": (lambda c: c.tensors.pop("model.norm.weight"), "tensors", "model.norm.weight"),
    "a bias is missing": (lambda c: c.tensors.pop(f"{QKV}.bias"), "tensors", f"{QKV}.bias"),
    "a surplus tensor": (lambda c: add(c, "model.rotary.inv_freq", [1.0], "F32"), "tensors", "model.rotary.inv_freq"),
    "a surplus companion": (lambda c: add(c, "lm_head.input_scale", [1.0], "F32"), "tensors", "lm_head.input_scale"),
    "an unexpected bias": (lambda c: add(c, "lm_head.bias", [0.0] * 48, "BF16"), "tensors", "lm_head.bias"),
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
    "another scheme for a companion": (
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
    "a quantized cache": (lambda c: c.description.update({"kv_quant_type": "C8"}), "description", "kv_quant_type"),
    "quantized attention": (
        lambda c: c.description.update({"fa_quant_type": "FAQuant"}),
        "description",
        "fa_quant_type",
    ),
    "a group size without groups": (lambda c: c.description.update({"group_size": 64}), "description", "group_size"),
    "another correction": (
        lambda c: c.description.update({"quant_bias_correction": 1}),
        "description",
        "quant_bias_correction",
    ),
    "no version": (lambda c: c.description.pop("version"), "description", "version"),
    "another model_quant_type": (
        lambda c: c.description.update({"model_quant_type": "W8A8_DYNAMIC"}),
        "description",
        "model_quant_type",
    ),
    "quantization_config": (lambda c: c.config.update({"quantization_config": {}}), "config", "quantization_config"),
    "a float32 config": (lambda c: c.config.update({"torch_dtype": "float32"}), "config", "torch_dtype"),
    "two dtypes": (lambda c: c.config.update({"dtype": "float16"}), "config", "dtype is 'float16'"),
    "a list as dtype": (lambda c: c.config.update({"torch_dtype": ["bfloat16"]}), "config", "torch_dtype"),
    "no dtype": (lambda c: c.config.pop("torch_dtype"), "config", "torch_dtype"),
    "a size as text": (lambda c: c.config.update({"hidden_size": "64"}), "config", "hidden_size"),
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
    """Catches a rule of the format that is not checked: each damage alone must fail its check and be named."""
    change, check, named = CONTENT_DAMAGES[damage]
    content = make_content()
    change(content)
    result = verify_folder(content.write(tmp_path / "out"))
    assert any(finding.check == check and named in f"{finding.where} {finding.what}" for finding in result.faults), (
        texts(result)
    )


MINDIE_DAMAGES: dict[str, tuple[Change, str]] = {
    "quantize is another type": (lambda c: c.config.update({"quantize": "w8a8_dynamic"}), "quantize"),
    "the vision key is missing": (lambda c: c.config["vision_config"].pop("quantize"), "vision_config.quantize"),
    "a nested config": (lambda c: c.config.update({"text_config": dict(c.config)}), "text_config"),
    "a float qkv in a quantized tower": (lambda c: float_weight(c, QKV), QKV),
}


@pytest.mark.parametrize("damage", MINDIE_DAMAGES)
def test_rules_of_mindie_alone(tmp_path: Path, damage: str) -> None:
    """Catches a folder for MindIE that only vLLM Ascend loads, and MindIE's rules applied to vLLM Ascend."""
    change, named = MINDIE_DAMAGES[damage]
    content = make_content(both=True)
    change(content)
    folder = content.write(tmp_path / "out")
    assert named in texts(verify_folder(folder, engine="both"))
    assert named in texts(verify_folder(folder, engine="mindie"))
    assert texts(verify_folder(folder, engine="vllm-ascend")) == ""


def test_the_type_that_only_the_description_names(tmp_path: Path) -> None:
    """Catches a version of MindIE said to take the type from the description, which only later ones do; a folder said
    not to load in those; and a key that the folder has lost since it was written."""
    content = make_content(both=True)
    del content.config["quantize"]
    folder = content.write(tmp_path / "out")
    assert verify_folder(folder).facts["loads in"][1] == "MindIE 3.0.0alpha1 and later"
    assert verify_folder(folder, engine="mindie@3.0.0").ok
    assert "quantize is missing" in texts(verify_folder(folder, engine="mindie@2.2"))
    (folder / "vlqc_report.json").write_text('{"target": "vllm-ascend"}')
    assert "quantize" not in texts(verify_folder(folder))
    (folder / "vlqc_report.json").write_text('{"target": "both"}')
    result = verify_folder(folder)
    assert "quantize is missing" in texts(result) and result.engine == "both"
    del content.config["vision_config"]["quantize"]  # of a vision tower that is quantized
    assert len(verify_folder(content.write(tmp_path / "tower")).facts["loads in"]) == 1


INPUT_NORM = "model.layers.0.input_layernorm"


def test_a_norm_bias_must_be_one_that_vllm_ascend_applies(tmp_path: Path) -> None:
    """Catches a folded shift that vLLM Ascend ignores because no key of the description contains norm.bias."""
    content = make_content()
    add(content, "visual.blocks.0.norm1.bias", np.zeros(32), "BF16")
    result = verify_folder(content.write(tmp_path / "vision"))
    assert [(fault.check, fault.where) for fault in result.faults] == [("engine rules", "visual.blocks.0.norm1.bias")]
    assert result.facts["loads in"] == ["no known engine version"]
    add(content, f"{INPUT_NORM}.bias", np.zeros(64), "BF16")
    assert verify_folder(content.write(tmp_path / "both")).ok


NORM_DAMAGES: dict[str, tuple[Change, str]] = {
    "a consumer is float": (
        lambda c: [float_weight(c, f"model.layers.0.self_attn.{member}_proj") for member in "qkv"],
        f"[engine rules] {INPUT_NORM}.bias: ",
    ),
    "no copy of the bias": (
        lambda c: (c.tensors.pop(f"{INPUT_NORM}.module.bias"), c.description.pop(f"{INPUT_NORM}.module.bias")),
        f"{INPUT_NORM}.bias: {INPUT_NORM}.module.bias",
    ),
    "another copy of the bias": (
        lambda c: c.tensors[f"{INPUT_NORM}.module.bias"].flip(5, 1),
        f"[engine rules] {INPUT_NORM}.module.bias: ",
    ),
    "another copy of the weight": (
        lambda c: c.tensors[f"{INPUT_NORM}.module.weight"].flip(5, 1),
        f"[engine rules] {INPUT_NORM}.module.weight: ",
    ),
    "a copy without a bias": (
        lambda c: add(c, "visual.merger.ln_q.module.weight", np.ones(32), "BF16", "W8A8"),
        "[engine rules] visual.merger.ln_q.weight: visual.merger.ln_q.module.weight",
    ),
    "another scheme for a copy": (
        lambda c: c.description.update({f"{INPUT_NORM}.module.weight": "FLOAT"}),
        f"[description] {INPUT_NORM}.module.weight",
    ),
}


@pytest.mark.parametrize("damage", NORM_DAMAGES)
def test_a_norm_bias_must_be_one_that_mindie_applies(tmp_path: Path, damage: str) -> None:
    """Catches a folded shift that MindIE ignores, or applies for some of a norm's consumers only."""
    change, named = NORM_DAMAGES[damage]
    content = make_content(mindie=True, shift=True)
    change(content)
    assert named in texts(verify_folder(content.write(tmp_path / "out")))


def test_one_folder_for_both_has_no_norm_bias(tmp_path: Path) -> None:
    """Catches a shift in a folder for both: vLLM Ascend does not support copies of norms, without which only later
    versions of MindIE are known to read the bias."""
    content = make_content(both=True, shift=True)
    folder = content.write(tmp_path / "out")
    result = verify_folder(folder)
    assert result.ok and f"{INPUT_NORM}.bias" in [warning.where for warning in result.warnings]
    assert result.facts["loads in"][1] == "MindIE 3.0.0alpha1 and later"
    assert f"{INPUT_NORM}.bias" in texts(verify_folder(folder, engine="mindie@2.2"))
    assert texts(verify_folder(folder, engine="vllm-ascend")) == ""
    add(content, f"{INPUT_NORM}.module.bias", np.zeros(64), "BF16")
    result = verify_folder(content.write(tmp_path / "repeated"), engine="vllm-ascend")
    assert f"[tensors] {INPUT_NORM}.module.bias: " in texts(result)
