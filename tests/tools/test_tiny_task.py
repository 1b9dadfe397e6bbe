"""The tiny checkpoint is complete, and `tiny_task` feeds it exactly what its own processor and chat template would."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from tests.support.naive_w8a8 import load_float
from tools.demo import tiny_task as task

TINY = Path(task.__file__).parent / "tiny_vl"
NEWER = int(transformers.__version__.split(".")[0]) >= 5


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


def conversation(prompt: str, response: str) -> list[dict[str, Any]]:
    """A user's picture and prompt, answered by `response`."""
    return [
        {"role": "user", "content": [{"type": "image", "image": "file.png"}, {"type": "text", "text": prompt}]},
        {"role": "assistant", "content": [{"type": "text", "text": response}]},
    ]


class Oracle(nn.Module):
    """Predicts every next token, shifted by `error` ids."""

    def __init__(self, error: int) -> None:
        super().__init__()
        self.error = error

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        following = (input_ids.roll(-1, 1) + self.error) % task.VOCABULARY
        return SimpleNamespace(logits=nn.functional.one_hot(following, task.VOCABULARY).float())


def test_tokenizer_knows_the_words_of_the_task(tokenizer: Any) -> None:
    """Catches a tokenizer whose ids are not those the model was trained with, or that grew beyond 64 entries."""
    words = " ".join(task.WORDS.values())
    assert tokenizer(words).input_ids == list(task.WORDS)
    assert tokenizer("red 7 7 red").input_ids == [22, 19, 19, 22]
    assert len(tokenizer) == task.VOCABULARY == json.loads((TINY / "config.json").read_text())["vocab_size"]
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == task.IMAGE


def test_foreign_words_become_the_unknown_token(tokenizer: Any) -> None:
    """Catches a vocabulary without unknown token, where an English prompt raises or turns into padding."""
    assert tokenizer("Please describe this picture in detail.").input_ids == [63] * 6
    assert tokenizer.unk_token_id == 63 != tokenizer.pad_token_id


def test_chat_template_renders_the_training_sequence(tokenizer: Any) -> None:
    """Catches a template that adds role words, loses the picture or glues the response to the prompt."""
    messages = conversation("red", "7 3 blue")
    picture = "<bos><|vision_start|><|image_pad|><|vision_end|>"
    for add in (False, True):
        prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=add)
        assert prompt == f"{picture} red"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == f"{picture} red 7 3 blue"
    plain = [{"role": "system", "content": "4 white"}, *messages[:1]]
    assert tokenizer.apply_chat_template(plain, tokenize=False) == f"<bos> 4 white{picture[5:]} red"
    processors = json.loads((TINY / "chat_template.json").read_text())["chat_template"]
    assert processors == json.loads((TINY / "tokenizer_config.json").read_text())["chat_template"]


def test_calibration_folder_renders_to_the_samples(tmp_path: Path, tokenizer: Any) -> None:
    """Catches pictures, patch order, normalisation or texts that differ between a calibration folder and `samples`.

    Pixels agree to 1e-6: the processor multiplies by 1/255 where `tiny_task` divides by 255, and a normalised value is
    at most 2.7, where float32 numbers are 2.4e-7 apart.
    """
    path = task.write_calibration(tmp_path, count=3, seed=5)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    samples = task.samples(3, seed=5)
    assert [record["image"] for record in records] == ["0001.png", "0002.png", "0003.png"]
    images = AutoImageProcessor.from_pretrained(TINY, **({} if NEWER else {"use_fast": False}))
    for record, sample in zip(records, samples, strict=True):
        text = tokenizer.apply_chat_template(conversation(record["prompt"], record["response"]), tokenize=False)
        pixels = images(images=[Image.open(tmp_path / record["image"])], return_tensors="pt")
        text = text.replace("<|image_pad|>", "<|image_pad|>" * int(pixels["image_grid_thw"].prod() // task.MERGE**2))
        ids = tokenizer(text, return_tensors="pt")
        assert torch.equal(ids["input_ids"], sample["input_ids"])
        assert torch.equal(ids["attention_mask"], sample["attention_mask"])
        assert torch.equal(pixels["image_grid_thw"], sample["image_grid_thw"])
        torch.testing.assert_close(pixels["pixel_values"], sample["pixel_values"], rtol=0, atol=1e-6)
        if not NEWER:  # without torchvision, transformers 5 has no processor that joins the two
            whole = AutoProcessor.from_pretrained(TINY)
            text = whole.apply_chat_template(conversation(record["prompt"], record["response"]), tokenize=False)
            inputs = whole(text=[text], images=[Image.open(tmp_path / record["image"])], return_tensors="pt")
            assert inputs.keys() == sample.keys()
            assert torch.equal(inputs["input_ids"], sample["input_ids"])
            assert torch.equal(inputs["pixel_values"], pixels["pixel_values"])


def test_samples_do_not_depend_on_how_many_are_asked_for() -> None:
    """Catches a random stream that depends on the count: a calibration of 33 would not contain that of 3."""
    few, many = task.samples(3, seed=2), task.samples(33, seed=2)
    assert len(many) == 33
    for one, other in zip(few, many[:3], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(many[0]["pixel_values"], many[32]["pixel_values"])


def test_sequences_answer_what_the_picture_shows() -> None:
    """Catches questions whose answer is not in the picture, and answers that are not marked as such."""
    ((drawing, input_ids, is_answer),) = task.drawn_batches(20, seed=9, split="test")
    for digits, colours, ids, answer in zip(drawing.digits, drawing.colours, input_ids, is_answer, strict=True):
        shown = {str(d): list(task.COLOURS)[c] for d, c in zip(digits, colours, strict=True)}
        shown |= {colour: digit for digit, colour in shown.items()}
        questions, answers = ids[len(task.HEAD) :: 2], ids[answer]
        assert [shown[task.WORDS[q]] for q in questions.tolist()] == [task.WORDS[a] for a in answers.tolist()]
        assert len(answers) == task.CELLS


def test_train_and_test_pictures_use_different_renderings() -> None:
    """Catches an evaluation on the very glyphs that the model was trained on."""
    train, test = task.glyph_masks("train"), task.glyph_masks("test")
    assert not set(map(np.ndarray.tobytes, train.reshape(-1, task.CELL**2))) & set(
        map(np.ndarray.tobytes, test.reshape(-1, task.CELL**2))
    )


def test_accuracy_counts_next_tokens() -> None:
    """Catches an accuracy that looks at the wrong position: an oracle has 100 %, an oracle one id off has none."""
    assert task.accuracy(Oracle(0), count=40) == 100.0
    assert task.accuracy(Oracle(1), count=40) == 0.0
    assert task.answer_logits(Oracle(0), count=5).shape == (5 * task.CELLS, task.VOCABULARY)


def test_checkpoint_answers() -> None:
    """Catches damaged weights, and drawings or image positions that differ from the training's."""
    assert 98.0 <= task.accuracy(load_float(TINY), count=128) < 100.0


def test_token_types_are_given_where_wanted() -> None:
    """Catches inputs for transformers 5 without `mm_token_type_ids`, or with ones that miss an image token."""
    (sample,) = task.samples(1)
    inputs = task.with_token_types(sample)
    assert ("mm_token_type_ids" in inputs) == NEWER
    assert inputs.get("mm_token_type_ids", sample["input_ids"].eq(task.IMAGE)).sum() == task.CELLS
    assert "mm_token_type_ids" not in sample
