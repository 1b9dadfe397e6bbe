"""The outlier checkpoint is complete, reproducible, and as hard to quantize as it says."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from tests.support.naive_w8a8 import load_float, logits, quantized, signal_to_noise
from tools.checkpoints import outlier_checkpoint as maker

SMALL = maker.Shape(
    layers=1,
    hidden=64,
    intermediate=96,
    heads=4,
    value_heads=2,
    vision_hidden=32,
    vision_intermediate=44,
    vocabulary=64,
)


@pytest.fixture(scope="module")
def standard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("standard")
    maker.make(folder, seed=0)
    return folder


@pytest.mark.parametrize(("dtype", "tied"), [("bfloat16", False), ("float16", True), ("float32", False)])
def test_transformers_finds_every_tensor(tmp_path: Path, dtype: str, tied: bool) -> None:
    """Catches a misnamed, missing or surplus tensor, a wrong shape, a wrong dtype, and a tied head written twice."""
    config = maker.make(tmp_path, seed=3, dtype=dtype, tied=tied, shape=SMALL)
    _, loading = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    tensors = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert ("lm_head.weight" in tensors) != tied and config["tie_word_embeddings"] == tied
    assert json.loads((tmp_path / "config.json").read_text()) == config
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    """Catches an unseeded draw or an order of tensors that varies."""
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        maker.make(tmp_path / name, seed, shape=SMALL)
    one, two, three = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three


def test_folder_works_with_text(standard: Path) -> None:
    """Catches side files that were not copied, or a config whose image token is not the tokenizer's."""
    config = json.loads((standard / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(standard)
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == config["image_token_id"]
    assert tokenizer.bos_token_id == config["bos_token_id"] == maker.MASSIVE_TOKEN
    assert (standard / "preprocessor_config.json").exists() and tokenizer.chat_template


def test_one_token_is_massive_and_the_rest_is_not(standard: Path) -> None:
    """Catches a massive activation that is missing, spreads to other tokens, or fades inside the language model."""
    model = load_float(standard)
    config = json.loads((standard / "config.json").read_text())
    (sample,) = maker.random_samples(config, 1, seed=1)
    streams = []
    for name, module in model.named_modules():
        if name.endswith("post_attention_layernorm"):
            module.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0][0].abs().amax(-1)))
    logits(model, [sample])
    assert len(streams) == config["num_hidden_layers"]
    for peaks in streams:  # [tokens]
        assert 350 < peaks[0] < 450
        assert peaks[1:].max() < 40


def test_norms_have_outlier_channels_in_both_towers(standard: Path) -> None:
    """Catches a norm that was left out: each has a few channels 5 to 24 times the others."""
    tensors = load_file(standard / "model.safetensors")
    norms = [name for name in tensors if tensors[name].ndim == 1 and "norm" in name and name != "model.norm.weight"]
    norms.append("visual.merger.ln_q.weight")
    assert len(norms) == 2 * 2 + 2 * 2 + 1
    for name in norms:
        weight = tensors[name].float()
        strong = weight > 4 * weight.median()
        assert 3 <= strong.sum() <= 0.05 * len(weight)
        assert weight.max() < 40


def test_dead_channels_are_the_only_difference(tmp_path: Path) -> None:
    """Catches dead channels that are not dead, a norm or tower without any, and a draw that moves everything else."""
    maker.make(tmp_path / "alive", seed=7, dtype="float32", shape=SMALL)
    maker.make(tmp_path / "dead", seed=7, dtype="float32", shape=SMALL, dead=0.1)
    alive, dead = (load_file(tmp_path / name / "model.safetensors") for name in ("alive", "dead"))
    changed = {name for name in alive if not torch.equal(alive[name], dead[name])}
    norms = {name for name in alive if ("norm" in name or "ln_q" in name) and name != "model.norm.weight"}
    assert {name.removesuffix(".bias").removesuffix(".weight") for name in changed - norms} == {
        "visual.blocks.0.attn.qkv",
        "visual.blocks.0.mlp.up_proj",
        "visual.blocks.1.attn.qkv",
        "visual.blocks.1.mlp.up_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.mlp.up_proj",
    }
    assert norms <= changed
    for name in changed:
        other = alive[name] != dead[name]
        assert not dead[name][other].any()
        killed = other.flatten(1).any(1) if other.ndim > 1 else other
        assert 0.02 <= killed.float().mean() <= 0.15
        assert "qkv" not in name or not killed[: 2 * len(killed) // 3].any()


def test_naive_quantization_loses_as_much_as_promised(standard: Path) -> None:
    """Catches outliers too weak or too strong: W8A8 without smoothing gives 7 to 13 dB on unseen samples."""
    config = json.loads((standard / "config.json").read_text())
    model = load_float(standard)
    calibration, unseen = maker.random_samples(config, 4, seed=1), maker.random_samples(config, 4, seed=2)
    assert 7 < signal_to_noise(logits(model, unseen), logits(quantized(model, calibration), unseen)) < 13


def test_random_samples_are_valid_and_varied() -> None:
    """Catches inputs whose image tokens do not match the picture, without massive token, or all of one size."""
    config = maker.config_of(maker.Shape(), "bfloat16", tied=False)
    samples = maker.random_samples(config, 8, seed=4)
    for sample in samples:
        ids, grid = sample["input_ids"], sample["image_grid_thw"]
        assert (ids == config["image_token_id"]).sum() * 4 == grid.prod() == len(sample["pixel_values"])
        assert ids[0, 0] == maker.MASSIVE_TOKEN and (ids == maker.MASSIVE_TOKEN).sum() == 1
        assert ids.max() < config["vocab_size"] and sample["attention_mask"].all()
    assert len({tuple(sample["image_grid_thw"][0].tolist()) for sample in samples}) >= 3
    again = maker.random_samples(config, 2, seed=4)
    assert torch.equal(again[1]["pixel_values"], samples[1]["pixel_values"])


def test_impossible_sizes_are_refused(tmp_path: Path) -> None:
    """Catches a checkpoint that fails only when the model runs: heads that do not divide, too small a vocabulary."""
    for shape in (maker.Shape(heads=3), maker.Shape(value_heads=3), maker.Shape(vocabulary=63)):
        with pytest.raises(ValueError):
            maker.make(tmp_path / "never", shape=shape)
    assert not (tmp_path / "never").exists()
