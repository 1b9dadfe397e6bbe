"""Every scheme in every layout and dtype, some tied: compiled, verified, loaded back, compared."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlqc
from tests.support.naive_w8a8 import signal_to_noise
from tools.bench import scheme_table
from tools.bench.scheme_table import LAYOUTS, SCHEMES, Source, make_source, measure
from tools.checkpoints import outlier_checkpoint as make_outlier_checkpoint

# dB of the logits with seed 0, over all layouts and dtypes; far above those of the reference tool.
LEAST = {"W8A8 m2": 28, "W8A8 m4": 28, "W8A8_DYNAMIC m2": 32}
LEAST_W4A8 = 12
pytestmark = pytest.mark.slow
# Every scheme in every layout and dtype; every two of these and of tied and untied together.
COMBINATIONS = [
    pytest.param((dtype, bool(number % 2)), scheme, layout, id=f"{scheme}, {layout}, {dtype}{', tied' * (number % 2)}")
    for first, dtype in enumerate(scheme_table.DTYPES)
    for second, scheme in enumerate(SCHEMES, first)
    for number, layout in enumerate(LAYOUTS, second)
]


@pytest.fixture(scope="module")
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    dtype, tied = request.param
    return make_source(tmp_path_factory.mktemp("source") / "float", dtype, tied, seed=0)


def test_the_combinations_are_pairwise() -> None:
    """Catches two values that never occur together, after a change of the lists."""
    values = [(*combination.values[0], *combination.values[1:]) for combination in COMBINATIONS]
    every = list(itertools.product(scheme_table.DTYPES, (False, True), SCHEMES, LAYOUTS))
    for pair in itertools.combinations(range(4), 2):
        assert {tuple(each[i] for i in pair) for each in values} == {tuple(each[i] for i in pair) for each in every}


@pytest.mark.parametrize(("source", "scheme", "layout"), COMBINATIONS, indirect=["source"])
def test_every_combination(source: Source, tmp_path: Path, scheme: str, layout: str) -> None:
    """Catches a tensor, scheme, key or file that is wrong in one combination, and integers with wrong scales."""
    row = measure(source, tmp_path / "out", scheme, layout)
    assert row.faults == ()
    assert row.sqnr > LEAST.get(scheme, LEAST_W4A8)
    mindie, fp16 = layout == "mindie", source.dtype == "float16"
    if scheme.startswith("W8A8 "):
        expected = (
            ["MindIE 2.2.RC1 and later"] if mindie else ["vLLM Ascend 0.10.2rc2 and later", "MindIE 2.2.RC1 and later"]
        )
    elif scheme.startswith("W8A8_DYNAMIC"):
        expected = ["MindIE 2.2.RC1 and later"] if mindie else [] if fp16 else ["vLLM Ascend 0.16 and later"]
    elif scheme == "W4A8 group 64, m4" and not mindie and not fp16:
        expected = ["vLLM Ascend 0.16 and later, before 0.26"]
    else:
        expected = []  # no version loads it
    assert list(row.loads_in) == expected


def test_parts_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches part_file_size that loses tensors: several files must hold the same ones as a single file."""
    source = make_source(tmp_path / "float", "bfloat16", False, seed=0)
    measure(source, tmp_path / "one", "W8A8 m2", "default")
    monkeypatch.setattr("vlqc.emit.folder_writer.GIB", 2**20)
    vlqc.compile(
        model_path=source.folder, save_directory=tmp_path / "parts", samples=source.calibration, part_file_size=3
    )
    files = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size <= 3 * 2**20 for file in files)
    parts = {name: value for file in files for name, value in load_file(file).items()}
    whole = load_file(tmp_path / "one" / "quant_model_weight_w8a8.safetensors")
    assert parts.keys() == whole.keys() and all(torch.equal(parts[name], whole[name]) for name in whole)
    assert vlqc.verify_folder(tmp_path / "parts").ok


def newer(folder: Path, target: Path) -> None:
    """The same checkpoint as newer transformers save it: other tensor names, a nested config."""
    target.mkdir()
    new_names = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if name.startswith("model."):
            name = f"model.language_model.{name.removeprefix('model.')}"
        new_names[f"model.{name}" if name.startswith("visual.") else name] = value
    save_file(new_names, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    outside = {"architectures", "model_type", "vision_config", "tie_word_embeddings", "torch_dtype"}
    outside |= {key for key in config if key.endswith("_token_id") and key[:3] not in ("bos", "eos", "pad")}
    text = {key: value for key, value in config.items() if key not in outside}
    rotary = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    nested = {key: value for key, value in config.items() if key in outside}
    nested["dtype"] = nested.pop("torch_dtype")
    nested["text_config"] = {**text, "rope_parameters": rotary, "model_type": "qwen2_5_vl_text"}
    (target / "config.json").write_text(json.dumps(nested))


@pytest.mark.every_transformers
def test_names_of_newer_transformers(tmp_path: Path) -> None:
    """Catches names or config keys that older engines do not know."""
    source = make_source(tmp_path / "old", "bfloat16", False, seed=0)
    newer(source.folder, tmp_path / "new")
    for name in ("old", "new"):
        vlqc.compile(model_path=tmp_path / name, save_directory=tmp_path / f"{name}-c", samples=source.calibration)
    old, new = (load_file(tmp_path / f"{n}-c" / "quant_model_weight_w8a8.safetensors") for n in ("old", "new"))
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    config = json.loads((tmp_path / "new-c" / "config.json").read_text())
    assert "text_config" not in config and config["torch_dtype"] == "bfloat16" and "dtype" not in config
    assert config["hidden_size"] == 512 and config["rope_scaling"]["mrope_section"]
    logits = scheme_table.run(vlqc.load(tmp_path / "new-c"), source.unseen)
    assert signal_to_noise(source.logits, logits) > LEAST["W8A8 m2"]


@pytest.mark.parametrize("options", [{}, {"anti_method": "m4", "mindie_format": True}], ids=["vllm-ascend", "mindie"])
def test_shift(tmp_path: Path, options: dict[str, object]) -> None:
    """Catches a norm bias that is dropped, added twice, or not compensated by the consumers."""
    source = make_source(tmp_path / "float", "bfloat16", False, seed=0)
    save = tmp_path / "out"
    vlqc.compile(model_path=source.folder, save_directory=save, samples=source.calibration, shift=True, **options)
    assert vlqc.verify_folder(save, model_path=source.folder).faults == []
    tensors = load_file(save / "quant_model_weight_w8a8.safetensors")
    for norm in ("input_layernorm", "post_attention_layernorm"):
        assert bool(tensors[f"model.layers.0.{norm}.bias"].any())
        assert (f"model.layers.0.{norm}.module.bias" in tensors) == ("mindie_format" in options)
    assert "model.layers.0.mlp.gate_proj.bias" not in tensors
    assert signal_to_noise(source.logits, scheme_table.run(vlqc.load(save), source.unseen)) > LEAST["W8A8 m2"]


def test_exclude_and_include(tmp_path: Path) -> None:
    """Catches globs that match too little or too much, split a fused group, or silently match nothing."""
    config = make_outlier_checkpoint.make(tmp_path / "float", seed=0)
    samples = make_outlier_checkpoint.random_samples(config, 2)
    common = {"model_path": tmp_path / "float", "samples": samples, "overwrite": True}
    save = tmp_path / "out"
    result = vlqc.compile(
        save_directory=save, exclude=("model.layers.1.self_attn.k_proj",), include=("*.down_proj",), **common
    )
    schemes = json.loads((save / "quant_model_description.json").read_text())
    float_layers = {f"model.layers.1.self_attn.{member}_proj" for member in "qkv"}
    for name in (n for n in schemes if n.startswith("model.layers.") and n.endswith("proj.weight")):
        assert schemes[name] == ("FLOAT" if name.removesuffix(".weight") in float_layers else "W8A8"), name
    assert any("k_proj" in note and "q_proj" in note for note in result.notes)
    with pytest.raises(vlqc.UserError, match=r"--exclude model\.layer\.1.* matches no layer[\s\S]*did you mean"):
        vlqc.compile(save_directory=save, exclude=("model.layer.1.self_attn.k_proj",), **common)
    vlqc.compile(
        save_directory=save, exclude=("lm_head",), **common
    )  # float in any case, but lists for other tools contain it


def test_strict_target(tmp_path: Path) -> None:
    """Catches a long compilation of a folder that the target does not load."""
    config = make_outlier_checkpoint.make(tmp_path / "float", seed=0)
    samples = make_outlier_checkpoint.random_samples(config, 1)
    low_bit = {"w_bit": 4, "is_dynamic": True, "is_lowbit": True, "open_outlier": False, "group_size": 64}
    common = {"model_path": tmp_path / "float", "samples": samples, "save_directory": tmp_path / "out", **low_bit}
    with pytest.raises(vlqc.UserError, match="MindIE"):
        vlqc.compile(mindie_format=True, strict_target=True, **common)
    assert not (tmp_path / "out").exists()
    result = vlqc.compile(mindie_format=True, **common)
    assert result.engines == [] and any("MindIE" in note for note in result.notes)


@pytest.mark.parametrize("options", [{}, {"is_dynamic": True}, {"shift": True}], ids=str)
def test_a_target_that_names_mindie_gets_its_layout(tmp_path: Path, options: dict[str, object]) -> None:
    """Catches a folder for MindIE without the config keys that MindIE needs."""
    config = make_outlier_checkpoint.make(tmp_path / "float", seed=0)
    samples = make_outlier_checkpoint.random_samples(config, 2)
    save = tmp_path / "out"
    result = vlqc.compile(
        model_path=tmp_path / "float", save_directory=save, samples=samples, target="mindie@2.2.RC1", **options
    )
    assert result.engines == ["MindIE 2.2.RC1 and later"]
    assert vlqc.verify_folder(save, engine="mindie@2.2.RC1").ok


def test_exclusions_that_mindie_does_not_load(tmp_path: Path) -> None:
    """Catches an unsupported exclusion that is reported only after the compilation, as an internal error."""
    config = make_outlier_checkpoint.make(tmp_path / "float", seed=0)
    samples = make_outlier_checkpoint.random_samples(config, 2)
    common = {"model_path": tmp_path / "float", "samples": samples, "save_directory": tmp_path / "out"}
    glob = ("visual.blocks.0.attn.qkv",)
    with pytest.raises(vlqc.UserError, match=r"attn\.qkv[\s\S]*--exclude[\s\S]*MindIE[\s\S]*--target vllm-ascend"):
        vlqc.compile(exclude=glob, **common)
    assert vlqc.compile(exclude=glob, target="vllm-ascend", **common).engines


@pytest.mark.parametrize("group_size", [64, 128, 256])
def test_unsmoothed_groups_follow_from_the_float_weights(tmp_path: Path, group_size: int) -> None:
    """Catches a comparison with the source that reports coarse rounding as damage."""
    source = make_source(tmp_path / "float", "bfloat16", False, seed=0)
    options = {**scheme_table.LOW_BIT, "group_size": group_size, "anti_method": "none", "w4a8_scope": "all"}
    vlqc.compile(model_path=source.folder, save_directory=tmp_path / "out", samples=source.calibration[:1], **options)
    assert vlqc.verify_folder(tmp_path / "out", model_path=source.folder).faults == []


def test_smoothing_all_into_the_weights(tmp_path: Path) -> None:
    """Catches a verification that rejects alpha 0: with equal column maxima, many integers are at their limit."""
    source = make_source(tmp_path / "float", "bfloat16", False, seed=0)
    save = tmp_path / "out"
    common = {"model_path": source.folder, "save_directory": save, "samples": source.calibration[:2]}
    vlqc.compile(anti_method="m4", anti_alpha=0, **common)
    assert vlqc.verify_folder(save, model_path=source.folder).ok
