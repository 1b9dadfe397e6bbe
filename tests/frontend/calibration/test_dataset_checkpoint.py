"""The files of a checkpoint that calibration uses: tokenizer, chat template, image processor settings."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import dynamic_module_utils

from tests.support.calibration_files import END, PAD, START, TINY, lines, model_without, write_image
from vlqc.errors import UserError
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.frontend.calibration.conversation import Conversation, ImageRef, Turn
from vlqc.frontend.calibration.dataset import load_samples
from vlqc.frontend.calibration.processor import SampleProcessor


def test_checkpoint_without_tokenizer_or_settings(tmp_path: Path) -> None:
    """Catches an exception of transformers, or network access, for an incomplete checkpoint."""
    path = write_image(tmp_path / "a.png")
    model = model_without(tmp_path, "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
    with pytest.raises(UserError, match="has no tokenizer") as caught:
        load_samples(model, path)
    assert "samples=" in str(caught.value)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, model / name)
    with pytest.raises(UserError, match=r"preprocessor_config\.json") as caught:
        load_samples(model, path)
    assert "samples=" in str(caught.value)
    text_only = lines(tmp_path / "q.jsonl", {"prompt": "red"})
    assert "1 calibration prompt" in load_samples(model, text_only).notes[-1]
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer in .* cannot be loaded"):
        load_samples(model, path)


def test_settings_of_newer_transformers(tmp_path: Path) -> None:
    """Catches image settings in processor_config.json, with `size` instead of min_pixels, that are not read."""
    path = write_image(tmp_path / "a.png", 280, 280)
    model = model_without(tmp_path, "preprocessor_config.json")
    settings = json.loads((TINY / "preprocessor_config.json").read_text())
    kept = {name: value for name, value in settings.items() if name not in ("min_pixels", "max_pixels")}
    small = {**kept, "size": {"shortest_edge": 3136, "longest_edge": 100 * 28 * 28 // 4}}
    (model / "processor_config.json").write_text(json.dumps({"image_processor": small}))
    (nested,) = load_samples(model, path).samples
    assert nested["image_grid_thw"].tolist() == [[1, 10, 10]]
    (model / "processor_config.json").unlink()
    (model / "preprocessor_config.json").write_text(json.dumps(small))
    (flat,) = load_samples(model, path).samples
    assert torch.equal(nested["pixel_values"], flat["pixel_values"])


def test_checkpoint_without_chat_template(tmp_path: Path) -> None:
    """Catches a checkpoint without a chat template that cannot be calibrated."""
    model = model_without(tmp_path, "chat_template.json", "tokenizer_config.json")
    config = json.loads((TINY / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    calibration = load_samples(model, write_image(tmp_path / "a.png"))
    assert calibration.samples[0]["input_ids"][0, :8].tolist() == [START, *[PAD] * 6, END]
    assert "no chat template" in calibration.notes[0]


def test_unmarked_turns_and_marked_ones(tmp_path: Path) -> None:
    """Catches a default chat form that differs from Qwen2.5-VL's template."""
    processor = SampleProcessor(TINY, QWEN2_5_VL.inputs)
    processor._template = None
    question = Conversation.from_prompt((ImageRef(b""),), "Hi")
    answered = Conversation((Turn("user", ("Hi",)), Turn("assistant", ("Ho",))))
    assert processor._chat_text(question) == "<|vision_start|><|image_pad|><|vision_end|>Hi"
    processor._tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    assert processor._chat_text(question) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert processor._chat_text(answered).endswith("<|im_start|>assistant\nHo<|im_end|>\n")


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    """Catches a tokenizer with another image token id than the model's."""
    model = model_without(tmp_path)
    config = json.loads((TINY / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "image_token_id": 6}))
    with pytest.raises(UserError, match=r"id 5 in the tokenizer and 6 in config\.json"):
        load_samples(model, write_image(tmp_path / "a.png"))


def test_image_token_inside_a_prompt(tmp_path: Path) -> None:
    """Catches a prompt with image tokens that have no image."""
    source = lines(tmp_path / "q.jsonl", {"prompt": "what is <|image_pad|>"})
    with pytest.raises(UserError, match="stands for an image") as caught:
        load_samples(TINY, source)
    assert caught.value.faults[0].where == f"{source} line 1"


def test_own_code_needs_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches code from the checkpoint that runs, or a prompt on the terminal, without --trust_remote_code."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = model_without(tmp_path)
    config = json.loads((TINY / "tokenizer_config.json").read_text())
    config.update(auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]}, tokenizer_class="OwnTokenizer")
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (model / "own.py").write_text(
        f"from transformers import PreTrainedTokenizerFast\nopen({str(ran)!r}, 'w').close()\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    path = write_image(tmp_path / "a.png")
    try:
        load_samples(model, path)  # 5.x goes on with the tokenizer class that config.json implies, 4.x gives up
    except UserError as error:
        assert "--trust_remote_code True" in str(error)
    assert not ran.exists()
    assert load_samples(model, path, trust_remote_code=True).samples
    assert ran.exists()


@pytest.mark.every_transformers
def test_settings_that_fail_for_every_image(tmp_path: Path) -> None:
    """Catches a fault of the image settings that is reported once per image, as a fault of the images."""
    model = model_without(tmp_path)
    settings = json.loads((TINY / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").write_text(json.dumps({**settings, "do_resize": False, "patch_size": 13}))
    (tmp_path / "images").mkdir()
    for name in "abc":
        write_image(tmp_path / "images" / f"{name}.png")
    with pytest.raises(UserError) as caught:
        load_samples(model, tmp_path / "images", skip_bad_images=True)
    (fault,) = caught.value.faults
    assert fault.where == str(model / "preprocessor_config.json")


@pytest.mark.every_transformers
def test_class_of_the_first_release(tmp_path: Path) -> None:
    """Catches a class name of the family that the installed transformers version does not have."""
    path = write_image(tmp_path / "a.png")
    model = model_without(tmp_path)
    settings = json.loads((TINY / "preprocessor_config.json").read_text())
    for name in ("Qwen2_5_VLImageProcessor", "Qwen2VLImageProcessorPil", "Qwen2VLImageProcessorFast"):
        (model / "preprocessor_config.json").write_text(json.dumps({**settings, "image_processor_type": name}))
        (sample,), (expected,) = load_samples(model, path).samples, load_samples(TINY, path).samples
        assert torch.equal(sample["pixel_values"], expected["pixel_values"])
