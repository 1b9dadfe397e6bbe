"""tools/checkpoints: the generated checkpoints are complete, reproducible and hard to quantize."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.support.naive_w8a8 import load_float, logits, quantized, signal_to_noise
from tools.checkpoints import outlier_checkpoint as outliers
from tools.checkpoints import smol_vl as smol
from tools.checkpoints.families import FAMILIES, Shape, patch_values, tensor_sizes, vocabulary

NEEDS_NEWER = ("qwen3", "qwen3_vl", "qwen3_vl_moe")
EVERY_FAMILY = [
    pytest.param(family, marks=pytest.mark.qwen3_vl if family in NEEDS_NEWER else ()) for family in FAMILIES
]
SMALL_SIZES = {"layers": 1, "hidden": 64, "intermediate": 96, "heads": 4, "vision_layers": 2, "vocabulary": 64}


def small(family: str) -> Shape:
    """One layer, with head sizes that every family allows; the vision MLP of Qwen2-VL has a whole ratio."""
    shape = replace(FAMILIES[family].shape, **SMALL_SIZES, vision_hidden=32, vision_intermediate=64)
    return replace(shape, deepstack=(1,)) if shape.deepstack else shape


@pytest.mark.parametrize(("dtype", "tied"), [("bfloat16", False), ("float16", True), ("float32", False)])
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_outlier_checkpoint_has_every_tensor(tmp_path: Path, family: str, dtype: str, tied: bool) -> None:
    """Catches a misnamed, missing or surplus tensor, a wrong shape or dtype, and a tied head written twice."""
    config = outliers.make(tmp_path, seed=3, dtype=dtype, tied=tied, shape=small(family), family=family)
    model_class = getattr(transformers, config["architectures"][0])
    _, loading = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    tensors = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == tensor_sizes(family, small(family), tied)
    assert ("lm_head.weight" in tensors) != tied
    assert json.loads((tmp_path / "config.json").read_text()) == config


@pytest.mark.parametrize("family", FAMILIES)
def test_outlier_checkpoint_is_reproducible(tmp_path: Path, family: str) -> None:
    """Catches an unseeded draw, and zero channels that change other values."""
    for name, seed, dead in (("one", 5, 0.0), ("two", 5, 0.0), ("three", 6, 0.0), ("dead", 5, 0.1)):
        outliers.make(tmp_path / name, seed, shape=small(family), dead=dead, family=family)
    one, two, three = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three
    alive, dead = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "dead"))
    assert all(not dead[name][dead[name] != alive[name]].any() for name in alive)
    assert any(bool((dead[name] != alive[name]).any()) for name in alive)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_outlier_checkpoint_is_hard_to_quantize(tmp_path: Path, family: str) -> None:
    """Catches outliers too weak or too strong: naive W8A8 has 7 to 14 dB on unseen samples."""
    config = outliers.make(tmp_path, seed=0, family=family)
    model = load_float(tmp_path)
    calibration, unseen = outliers.random_samples(config, 4, seed=1), outliers.random_samples(config, 4, seed=2)
    assert 7 < signal_to_noise(logits(model, unseen), logits(quantized(model, calibration), unseen)) < 14


@pytest.mark.parametrize("family", FAMILIES)
def test_side_files_match_the_model(tmp_path: Path, family: str) -> None:
    """Catches token ids or patch sizes of config.json that differ from those of the tokenizer or image processor."""
    config = outliers.make(tmp_path, shape=small(family), family=family)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    (sample,) = outliers.random_samples(config, 1)
    assert tokenizer.bos_token_id == sample["input_ids"][0, 0] and len(tokenizer) <= vocabulary(config)
    if "vision_config" not in config:
        assert not (tmp_path / "preprocessor_config.json").exists()
        assert set(sample) == {"input_ids", "attention_mask"}
        return
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == config["image_token_id"]
    processor = transformers.Qwen2VLImageProcessor.from_pretrained(tmp_path)
    processed = processor(Image.new("RGB", (300, 200)), return_tensors="pt")
    assert processed["pixel_values"].shape[1] == patch_values(config) == sample["pixel_values"].shape[1]
    image_tokens = int((sample["input_ids"] == config["image_token_id"]).sum())
    assert image_tokens * config["vision_config"]["spatial_merge_size"] ** 2 == len(sample["pixel_values"])


@pytest.mark.qwen3_vl
def test_last_expert_is_never_chosen(tmp_path: Path) -> None:
    """Catches a last expert that tokens are sent to, and another one without tokens."""
    config = outliers.make(tmp_path, seed=0, family="qwen3_vl_moe")
    model, text = load_float(tmp_path), config["text_config"]
    chosen: list[Tensor] = []

    def record(module: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        scores = inputs[0].reshape(-1, text["hidden_size"]) @ module.weight.T
        chosen.append(scores.topk(text["num_experts_per_tok"], -1).indices)

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_pre_hook(record)
    logits(model, outliers.random_samples(config, 8))
    tokens = torch.bincount(torch.cat(chosen).flatten(), minlength=text["num_experts"]).tolist()
    assert tokens[-1] == 0 and min(tokens[:-1]) > 0


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("qwen2_5_vl", {"heads": 3}),
        ("qwen2_vl", {"vision_intermediate": 100}),
        ("qwen3_vl", {"deepstack": (4,)}),
        ("qwen3_vl", {"experts": 8}),
        ("qwen3_vl_moe", {"experts": 0}),
        ("qwen2", {"value_heads": 3}),
        ("qwen3", {"vocabulary": 32}),
    ],
)
def test_sizes_that_do_not_fit(tmp_path: Path, family: str, sizes: dict[str, Any]) -> None:
    """Catches a checkpoint that no model class can load."""
    with pytest.raises(ValueError):
        outliers.make(tmp_path, shape=replace(FAMILIES[family].shape, **sizes), family=family)


def test_command_line_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback for sizes that do not fit, and default mergers of vision blocks that do not exist."""
    command = ["outlier_checkpoint.py", str(tmp_path / "model"), "--family", "qwen3_vl", "--vision-layers", "2"]
    monkeypatch.setattr("sys.argv", [*command, "--deepstack", "5"])
    with pytest.raises(SystemExit, match="2"):
        outliers.main()
    monkeypatch.setattr("sys.argv", command)
    outliers.main()
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["vision_config"]["deepstack_visual_indexes"] == [0, 1]


def test_smol_texts() -> None:
    """Catches calibration on texts of the evaluation, and an image whose tokens do not match its patches."""
    from pydoc_data.topics import topics

    texts = {text for text in topics.values() if len(text) >= smol.SHORTEST_TOPIC}
    halves = [{text for text in texts if text in smol.topic_text(half)} for half in (smol.CALIBRATION, smol.EVALUATION)]
    assert halves[0] | halves[1] == texts and all(halves) and not halves[0] & halves[1]
    samples = smol.text_samples(lambda text: [100 + ord(letter) % 128 for letter in text], smol.EVALUATION, 5, 64)
    assert [sample["input_ids"].shape for sample in samples] == [(1, 64)] * 5
    shown = smol.with_image(samples[0], seed=3)
    assert (shown["input_ids"] == smol.IMAGE).sum() * smol.MERGE**2 == len(shown["pixel_values"])


def test_smol_configuration_runs() -> None:
    """Catches sizes of the vision tower or of the rotary sections that do not fit the language model."""
    text = SimpleNamespace(
        hidden_size=192,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=3,
        intermediate_size=64,
        vocab_size=256,
        rope_theta=1e5,
        rms_norm_eps=1e-5,
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(smol.configuration(text)).eval()
    ids = torch.full((1, 8), 100)
    with torch.no_grad():
        sample = smol.with_image({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, seed=0)
        assert model(**sample).logits.isfinite().all()
