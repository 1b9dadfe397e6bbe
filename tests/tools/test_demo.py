"""tools/demo: the tiny checkpoint, its task, and the outliers that the demo adds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoTokenizer

from tests.support.naive_w8a8 import load_float, logits, quantized
from tools.demo import plant_outliers
from tools.demo import tiny_task as task

TINY = Path(task.__file__).parent / "tiny_vl"
NEWER = int(transformers.__version__.split(".")[0]) >= 5


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    plant_outliers.plant(TINY, folder)
    return folder


def test_tokenizer(tokenizer: Any) -> None:
    """Catches token ids that differ from those of the training, and a vocabulary without an unknown token."""
    assert tokenizer(" ".join(task.WORDS.values())).input_ids == list(task.WORDS)
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == task.IMAGE
    assert tokenizer("Please describe this picture in detail.").input_ids == [63] * 6


def test_calibration_files_render_to_the_samples(tmp_path: Path, tokenizer: Any) -> None:
    """Catches images, patch order, normalization or texts that differ between calibration files and `samples`."""
    path = task.write_calibration(tmp_path, count=3, seed=5)
    images = AutoImageProcessor.from_pretrained(TINY, **({} if NEWER else {"use_fast": False}))
    for line, sample in zip(path.read_text().splitlines(), task.samples(3, seed=5), strict=True):
        record = json.loads(line)
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": record["prompt"]}]},
            {"role": "assistant", "content": [{"type": "text", "text": record["response"]}]},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * task.CELLS), return_tensors="pt")
        pixels = images(images=[Image.open(tmp_path / record["image"])], return_tensors="pt")
        assert torch.equal(ids["input_ids"], sample["input_ids"])
        assert torch.equal(pixels["image_grid_thw"], sample["image_grid_thw"])
        # The processor multiplies by 1/255, `samples` divides by 255.
        torch.testing.assert_close(pixels["pixel_values"], sample["pixel_values"], rtol=0, atol=1e-6)


def test_samples_do_not_depend_on_their_number() -> None:
    """Catches a random stream that depends on the count."""
    few, many = task.samples(3, seed=2), task.samples(33, seed=2)
    assert len(many) == 33 and all(torch.equal(a[name], b[name]) for a, b in zip(few, many, strict=False) for name in a)


def test_splits_share_no_rendering() -> None:
    """Catches an evaluation on renderings of the training."""
    train, test = (
        set(map(np.ndarray.tobytes, task.glyph_masks(split).reshape(-1, task.CELL**2))) for split in ("train", "test")
    )
    assert not train & test


def test_accuracy_of_the_checkpoint() -> None:
    """Catches damaged weights, and drawings or image positions that differ from those of the training."""
    assert 98.0 <= task.accuracy(load_float(TINY), count=64) < 100.0


def test_outliers_keep_the_function(planted: Path) -> None:
    """Catches a wrong column, row or missing bias on any edge: alpha is a power of two, so logits stay the same."""
    samples = task.samples(3, seed=1, split="test")
    before, after = logits(load_float(TINY), samples), logits(load_float(planted), samples)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert {path.name for path in planted.iterdir()} == {path.name for path in TINY.iterdir()}


def test_outliers_break_naive_quantization(planted: Path) -> None:
    """Catches outliers without effect, which would make the demo and its tests meaningless."""
    calibration = task.samples(8, seed=0)
    assert task.accuracy(quantized(load_float(planted), calibration), count=32) < 30.0
    assert task.accuracy(quantized(load_float(TINY), calibration), count=32) > 98.0


def test_alpha_beyond_the_dtype_is_refused(tmp_path: Path) -> None:
    """Catches infinities in a float16 checkpoint, and a folder that is written nevertheless."""
    source = tmp_path / "half"
    source.mkdir()
    half = {name: tensor.half() for name, tensor in load_file(TINY / "model.safetensors").items()}
    save_file(half, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_bytes((TINY / "config.json").read_bytes())
    with pytest.raises(ValueError, match="too large"):
        plant_outliers.plant(source, tmp_path / "target", alpha=2.0**20)
    assert not (tmp_path / "target").exists()
