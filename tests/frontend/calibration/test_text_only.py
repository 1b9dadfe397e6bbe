"""Calibration of text-only models: prompts from JSON lines, without an image processor or image token."""

import re
from pathlib import Path

import pytest

from tests.support.calibration_files import lines, write_image
from tests.support.text_checkpoint import byte_ids, write_text_checkpoint
from vlqc.errors import UserError
from vlqc.frontend.calibration.dataset import load_samples
from vlqc.options.fields import OptionFields

FAMILIES = pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])


def chat(prompt: str, response: str | None = None, system: str = "") -> str:
    """The conversation in the form of Qwen's templates, written out."""
    text = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    text += f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    return text if response is None else f"{text}{response}<|im_end|>\n"


@pytest.mark.every_transformers
@FAMILIES
def test_prompts_and_responses(tmp_path: Path, model_type: str) -> None:
    """Catches lines that need an image processor, a template that gets lists, image tensors, notes about images."""
    model = write_text_checkpoint(tmp_path / "model", model_type)
    entries = [{"prompt": "What is 2 + 3?"}, {"prompt": "Größe?", "response": "5 <|image_pad|>"}, {"prompt": "a"}]
    calibration = load_samples(model, lines(tmp_path / "q.jsonl", *entries))
    form, note = calibration.notes
    assert "3 samples in" in form and note.startswith("3 calibration prompts") and "image" not in note
    assert all(sample.keys() == {"input_ids", "attention_mask"} for sample in calibration.samples)
    expected = [byte_ids(chat(entry["prompt"], entry.get("response"))) for entry in entries]
    assert [sample["input_ids"][0].tolist() for sample in calibration.samples] == expected
    assert all(bool((sample["attention_mask"] == 1).all()) for sample in calibration.samples)


@pytest.mark.parametrize(("model_type", "system"), [("qwen2", "You are a helpful assistant."), ("qwen3", "")])
def test_the_form_without_a_template(tmp_path: Path, model_type: str, system: str) -> None:
    """Catches a default form with vision tokens, or the system prompt of another family."""
    model = write_text_checkpoint(tmp_path / "model", model_type, template=None)
    calibration = load_samples(model, lines(tmp_path / "q.jsonl", {"prompt": "Hi", "response": "Ho"}, {"prompt": "Hi"}))
    first, second = (sample["input_ids"][0].tolist() for sample in calibration.samples)
    assert first == byte_ids(chat("Hi", "Ho", system)) and second == byte_ids(chat("Hi", None, system))
    assert len(calibration.notes) == 3 and "no chat template" in calibration.notes[1]


def test_the_number_of_prompts(tmp_path: Path) -> None:
    """Catches a note about few prompts where there are enough, and none where there are not."""
    model = write_text_checkpoint(tmp_path / "model")
    counts = {}
    for count in (1, 29, 30, 31):
        source = lines(tmp_path / f"{count}.jsonl", *({"prompt": f"{number} + 1"} for number in range(count)))
        counts[count] = len(load_samples(model, source).notes)
    assert counts == {1: 2, 29: 2, 30: 1, 31: 1}


@FAMILIES
@pytest.mark.parametrize("source", ["default", "folder", "image", "text", "missing.jsonl"])
def test_images_are_refused(tmp_path: Path, model_type: str, source: str) -> None:
    """Catches an error that names a missing image processor or image token in place of the wrong kind of data."""
    model = write_text_checkpoint(tmp_path / "model", model_type)
    paths = {
        "default": OptionFields.model_fields["calib_images"].default,
        "folder": tmp_path,
        "image": write_image(tmp_path / "a.png"),
        "text": tmp_path / "q.txt",
        "missing.jsonl": tmp_path / "missing.jsonl",
    }
    paths["text"].write_text("a")
    with pytest.raises(UserError) as caught:
        load_samples(model, paths[source])
    (fault,) = caught.value.faults
    assert str(paths[source]) in fault.what and ("default" in fault.what) == (source == "default")
    assert '.jsonl with lines such as {"prompt"' in fault.fix


def test_every_bad_line_is_named(tmp_path: Path) -> None:
    """Catches a line with an image that is accepted, and one without a prompt."""
    model = write_text_checkpoint(tmp_path / "model")
    entries: tuple[object, ...] = (
        {"prompt": "a"},
        {"image": "a.png", "prompt": "a"},
        {"response": "a"},
        {"image": [], "prompt": "a"},
        [],
    )
    source = lines(tmp_path / "q.jsonl", *entries)
    with pytest.raises(UserError) as caught:
        load_samples(model, source)
    assert [fault.where for fault in caught.value.faults] == [f"{source} line {number}" for number in (2, 3, 5)]
    image, missing, no_object = (fault.what for fault in caught.value.faults)
    assert "no vision tower" in image and "'prompt' is not given" in missing and "not a JSON object" in no_object
    assert all("image" not in fault.fix for fault in caught.value.faults)


def test_long_texts_are_not_truncated(tmp_path: Path) -> None:
    """Catches truncated text, an error for the first line only, and a limit that needs an image processor."""
    model = write_text_checkpoint(tmp_path / "model")
    frame = len(byte_ids(chat("")))
    prompts = ("a" * 5, "b" * 50, "c" * 60)
    source = lines(tmp_path / "q.jsonl", *({"prompt": prompt} for prompt in prompts))
    with pytest.raises(UserError) as caught:
        load_samples(model, source, max_tokens=frame + 49)
    *faults, total = caught.value.faults
    assert [fault.where for fault in faults] == [f"{source} line {number}" for number in (2, 3)]
    assert [re.findall(r"\d+", fault.what)[-1] for fault in faults] == [str(frame + 50), str(frame + 60)]
    assert "1 of 3" in total.what and "--skip_bad_images" not in total.fix
    assert len(load_samples(model, source, max_tokens=frame + 60).samples) == 3


def test_a_selection_of_lines(tmp_path: Path) -> None:
    """Catches a selection that works with images only."""
    model = write_text_checkpoint(tmp_path / "model")
    source = lines(tmp_path / "q.jsonl", *({"prompt": "a" * size} for size in range(1, 21)))
    calibration = load_samples(model, source, max_samples=4, seed=3)
    lengths = [sample["input_ids"].shape[1] for sample in calibration.samples]
    assert len(set(lengths)) == 4 and lengths == sorted(lengths) and "4 of 20" in calibration.notes[1]
