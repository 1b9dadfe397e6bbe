"""tools/checkpoints: the generated checkpoints are complete, reproducible and hard to quantize."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.support.naive_w8a8 import load_float, logits, quantized, signal_to_noise
from tools.checkpoints import outlier_checkpoint as outliers
from tools.checkpoints import smol_vl as smol

SMALL = outliers.Shape(
    layers=1,
    hidden=64,
    intermediate=96,
    heads=4,
    vision_hidden=32,
    vision_intermediate=44,
    vocabulary=64,
)


@pytest.mark.parametrize(("dtype", "tied"), [("bfloat16", False), ("float16", True), ("float32", False)])
def test_outlier_checkpoint_has_every_tensor(tmp_path: Path, dtype: str, tied: bool) -> None:
    """Catches a misnamed, missing or surplus tensor, a wrong shape or dtype, and a tied head written twice."""
    config = outliers.make(tmp_path, seed=3, dtype=dtype, tied=tied, shape=SMALL)
    _, loading = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    tensors = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert ("lm_head.weight" in tensors) != tied
    assert json.loads((tmp_path / "config.json").read_text()) == config


def test_outlier_checkpoint_is_reproducible(tmp_path: Path) -> None:
    """Catches an unseeded draw, and zero channels that change other values."""
    for name, seed, dead in (("one", 5, 0.0), ("two", 5, 0.0), ("three", 6, 0.0), ("dead", 5, 0.1)):
        outliers.make(tmp_path / name, seed, shape=SMALL, dead=dead)
    one, two, three = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three
    alive, dead = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "dead"))
    assert all(not dead[name][dead[name] != alive[name]].any() for name in alive)
    assert any(bool((dead[name] != alive[name]).any()) for name in alive)


def test_outlier_checkpoint_is_hard_to_quantize(tmp_path: Path) -> None:
    """Catches outliers too weak or too strong: naive W8A8 has 7 to 13 dB on unseen samples."""
    config = outliers.make(tmp_path, seed=0)
    model = load_float(tmp_path)
    calibration, unseen = outliers.random_samples(config, 4, seed=1), outliers.random_samples(config, 4, seed=2)
    assert 7 < signal_to_noise(logits(model, unseen), logits(quantized(model, calibration), unseen)) < 13


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
    model = Qwen2_5_VLForConditionalGeneration(smol.configuration(text)).eval()
    ids = torch.full((1, 8), 100)
    with torch.no_grad():
        sample = smol.with_image({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, seed=0)
        assert model(**sample).logits.isfinite().all()
