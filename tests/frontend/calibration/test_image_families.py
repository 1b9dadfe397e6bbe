"""Images of Qwen2-VL and Qwen3-VL -> model inputs, compared with arithmetic in this file and with transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.support.calibration_files import BOS, END, PAD, START, UNKNOWN, lines, write_image
from tools.checkpoints import outlier_checkpoint as outliers
from vlqc.errors import UserError
from vlqc.families.qwen2_vl import QWEN2_VL
from vlqc.families.qwen3_vl import QWEN3_VL
from vlqc.frontend.calibration.conversation import Conversation, ImageRef
from vlqc.frontend.calibration.dataset import load_samples
from vlqc.frontend.calibration.processor import SampleProcessor
from vlqc.frontend.calibration.samples import check_samples
from vlqc.frontend.calibration.sources import PROMPT
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.streamed_model import StreamedModel

QWEN3_VL_CASE = pytest.param("qwen3_vl", marks=pytest.mark.qwen3_vl)
EVERY_FAMILY = pytest.mark.parametrize("family", ["qwen2_vl", QWEN3_VL_CASE])


def make(tmp_path: Path, family: str) -> Path:
    outliers.make(tmp_path / "model", family=family)
    return tmp_path / "model"


def patches_by_hand(path: Path, side: int, mean: float) -> np.ndarray:
    """Patches in 2 x 2 groups; each patch as channel, frame (the image twice), row, column."""
    values = (np.asarray(Image.open(path)).astype(np.float64) / 255 - mean) / mean  # [H, W, 3]
    patches = []
    for top in range(0, values.shape[0], 2 * side):
        for left in range(0, values.shape[1], 2 * side):
            for row, column in ((0, 0), (0, side), (side, 0), (side, side)):
                patch = values[top + row :, left + column :][:side, :side].transpose(2, 0, 1)
                patches.append(np.stack([patch, patch], axis=1).ravel())
    return np.stack(patches)


@pytest.mark.qwen3_vl
def test_tensors_of_qwen3_vl(tmp_path: Path) -> None:
    """Catches the patch size, normalization or token size of Qwen2.5-VL."""
    path = write_image(tmp_path / "a.png", 256, 288)  # 72 image tokens, above the least number of Qwen3-VL
    (sample,) = load_samples(make(tmp_path, "qwen3_vl"), path).samples
    np.testing.assert_allclose(sample["pixel_values"].numpy(), patches_by_hand(path, 16, 0.5), atol=2e-6)
    assert sample["image_grid_thw"].tolist() == [[1, 18, 16]]
    expected = [BOS, START, *[PAD] * 72, END, *[UNKNOWN] * len(PROMPT.split())]
    assert sample["input_ids"].tolist() == [expected]


@pytest.mark.qwen3_vl
@pytest.mark.parametrize(("width", "height", "tokens"), [(28, 28, 64), (320, 192, 77), (256, 256, 64), (4096, 32, 128)])
def test_limits_of_qwen3_vl(tmp_path: Path, width: int, height: int, tokens: int) -> None:
    """Catches `size` of the published settings that is not read: without it the least number of tokens is 4."""
    model = make(tmp_path, "qwen3_vl")
    settings = json.loads((model / "preprocessor_config.json").read_text())
    assert settings["size"] == {"longest_edge": 16777216, "shortest_edge": 65536} and "min_pixels" not in settings
    (sample,) = load_samples(model, write_image(tmp_path / "a.png", width, height)).samples
    assert int((sample["input_ids"] == PAD).sum()) == tokens == len(sample["pixel_values"]) // 4


@EVERY_FAMILY
def test_samples_fit_the_model(tmp_path: Path, family: str) -> None:
    """Catches inputs that the checks reject: another token id, number of image features or patch size."""
    model = make(tmp_path, family)
    write_image(tmp_path / "a.png", 333, 200)
    write_image(tmp_path / "b.png", 640, 320, seed=1)
    entries = ({"image": ["a.png", "b.png"], "prompt": "red", "response": "7"}, {"prompt": "green"})
    source = lines(tmp_path / "q.jsonl", *entries)
    two, text = check_samples(load_samples(model, source).samples, StreamedModel.open(Checkpoint(model)))
    assert len(two["image_grid_thw"]) == 2 and text.keys() == {"input_ids", "attention_mask"}
    tokens = two["image_grid_thw"].prod(-1) // 4
    limit = two["input_ids"].shape[1] - int(tokens.sum()) + 140
    small, _ = load_samples(model, source, max_tokens=limit).samples
    assert limit - 20 < small["input_ids"].shape[1] <= limit


@EVERY_FAMILY
def test_settings_of_newer_transformers(tmp_path: Path, family: str) -> None:
    """Catches settings in processor_config.json that are not read, or read with other limits."""
    model = make(tmp_path, family)
    path = write_image(tmp_path / "a.png", 200, 100)
    (expected,) = load_samples(model, path).samples
    settings = json.loads((model / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").unlink()
    kept = {name: value for name, value in settings.items() if name not in ("min_pixels", "max_pixels")}
    (model / "processor_config.json").write_text(json.dumps({"image_processor": kept}))
    (sample,) = load_samples(model, path).samples
    assert all(torch.equal(sample[name], expected[name]) for name in expected)


def test_classes_of_other_families(tmp_path: Path) -> None:
    """Catches an image processor class of one family that is accepted for another one."""
    model = make(tmp_path, "qwen2_vl")
    settings = json.loads((model / "preprocessor_config.json").read_text())
    settings["image_processor_type"] = "Qwen2_5_VLImageProcessor"
    path = write_image(tmp_path / "a.png")
    (model / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"preprocessor_config\.json[\s\S]*Qwen2-VL uses Qwen2VLImageProcessor"):
        load_samples(model, path)
    (model / "preprocessor_config.json").unlink()
    (model / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    with pytest.raises(UserError, match=r"processor_config\.json[\s\S]*Qwen2-VL uses Qwen2VLImageProcessor"):
        load_samples(model, path)


@pytest.mark.parametrize(("inputs", "system"), [(QWEN2_VL.inputs, True), (QWEN3_VL.inputs, False)], ids=["2", "3"])
def test_the_form_without_a_template(tmp_path: Path, inputs: Any, system: bool) -> None:
    """Catches a system prompt that the family's template does not have, or one that is missing."""
    processor = SampleProcessor(make(tmp_path, "qwen2_vl"), inputs)
    processor._template = None
    processor._tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    first = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" if system else ""
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert processor._chat_text(Conversation.from_prompt((ImageRef(b""),), "Hi")) == (
        f"{first}<|im_start|>user\n{image}Hi<|im_end|>\n<|im_start|>assistant\n"
    )


if transformers.__version__.startswith("4.57"):

    @pytest.mark.qwen3_vl
    def test_equal_to_the_stock_processor(tmp_path: Path) -> None:
        """Catches any difference from Qwen3-VL's own processor.

        It is built from its parts, because its video processor needs torchvision. The limits are given to its image
        processor as pixels: without torchvision that one ignores `size`.
        """
        model = make(tmp_path, "qwen3_vl")
        path = write_image(tmp_path / "a.png", 333, 200)
        settings = json.loads((model / "preprocessor_config.json").read_text())
        limits = {"min_pixels": settings["size"]["shortest_edge"], "max_pixels": settings["size"]["longest_edge"]}
        stock: Any = object.__new__(transformers.Qwen3VLProcessor)
        stock.image_processor = transformers.Qwen2VLImageProcessor.from_dict(settings | limits)
        stock.tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        stock.image_token, stock.video_token = "<|image_pad|>", "<|video_pad|>"
        stock.image_token_id, stock.video_token_id = PAD, PAD + 1
        content = [{"type": "image", "image": str(path)}, {"type": "text", "text": PROMPT}]
        messages = [{"role": "user", "content": content}]
        template = json.loads((model / "chat_template.json").read_text())["chat_template"]
        text = stock.tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        with Image.open(path) as image:  # 333 x 200 in units of 32 pixels
            expected = stock(text=[text], images=[image.resize((320, 192))], return_tensors="pt")
        (sample,) = load_samples(model, path).samples
        assert set(sample) == {"input_ids", "attention_mask", "pixel_values", "image_grid_thw"}
        assert all(torch.equal(sample[name], expected[name]) for name in sample)
