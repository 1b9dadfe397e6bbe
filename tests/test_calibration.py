"""Pictures and JSON lines -> model inputs, against arithmetic and token numbers written out here."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import dynamic_module_utils

from vlqc.calibration import load_samples
from vlqc.calibration_sources import PROMPT
from vlqc.errors import UserError
from vlqc.model_inputs import ModelInputs
from vlqc.pictures import load_process_vision_info

TINY = Path(__file__).parents[1] / "tools" / "tiny_vl"
BOS, START, END, PAD, UNKNOWN = 1, 3, 4, 5, 63  # the tiny tokenizer's numbers
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def picture(path: Path, width: int = 84, height: int = 56, seed: int = 0) -> Path:
    """Noise, so that a swapped row, column or channel shows."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def model_without(tmp_path: Path, *left_out: str) -> Path:
    """The tiny checkpoint's small files, less some."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in TINY.glob("*.json"):
        if path.name not in left_out:
            shutil.copyfile(path, folder / path.name)
    return folder


def lines(path: Path, *entries: object) -> Path:
    path.write_text(
        "\n".join(each if isinstance(each, str) else json.dumps(each) for each in entries), encoding="utf-8"
    )
    return path


def patches_by_hand(path: Path) -> np.ndarray:
    """Patches of 14 x 14 in 2 x 2 groups; each patch as channel, frame (the picture twice), row, column."""
    values = np.asarray(Image.open(path)).astype(np.float64) / 255
    values = (values - MEAN) / STD  # [H, W, 3]
    patches = []
    for top in range(0, values.shape[0], 28):
        for left in range(0, values.shape[1], 28):
            for row, column in ((0, 0), (0, 14), (14, 0), (14, 14)):
                patch = values[top + row :, left + column :][:14, :14].transpose(2, 0, 1)  # [3, 14, 14]
                patches.append(np.stack([patch, patch], axis=1).ravel())
    return np.stack(patches)


def test_tensors_of_a_picture(tmp_path: Path) -> None:
    """Catches a wrong patch order, normalization, prompt, or number of image tokens, in every transformers version."""
    path = picture(tmp_path / "a.png")
    (sample,) = load_samples(TINY, path).samples
    assert {name: tensor.dtype for name, tensor in sample.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "pixel_values": torch.float32,
        "image_grid_thw": torch.int64,
    }
    np.testing.assert_allclose(sample["pixel_values"].numpy(), patches_by_hand(path), atol=2e-6)
    assert sample["image_grid_thw"].tolist() == [[1, 4, 6]]
    words = len(PROMPT.split())
    assert sample["input_ids"].tolist() == [[BOS, START, *[PAD] * 6, END, *[UNKNOWN] * words]]
    assert sample["attention_mask"].tolist() == [[1] * (9 + words)]


if transformers.__version__.startswith("4."):

    def test_equal_to_the_stock_processor(tmp_path: Path) -> None:
        """Catches any difference from transformers' own processor (the one of 5.x needs torchvision)."""
        path = picture(tmp_path / "a.png", 333, 200)
        processor = transformers.AutoProcessor.from_pretrained(TINY)
        asked = [{"type": "image", "image": str(path)}, {"type": "text", "text": PROMPT}]
        messages = [{"role": "user", "content": asked}]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        images, _ = load_process_vision_info()(messages)
        wanted = processor(text=[text], images=images, return_tensors="pt")
        (sample,) = load_samples(TINY, path).samples
        assert set(sample) == set(wanted)
        assert all(torch.equal(sample[name], wanted[name]) for name in sample)


def test_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    """Catches an order that depends on the file system, and files that are no pictures being read."""
    for seed, name in enumerate(("c.png", "a.PNG", "b.bmp")):
        picture(tmp_path / name, seed=seed)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    calibration = load_samples(TINY, tmp_path)
    alone = [load_samples(TINY, tmp_path / name).samples[0] for name in ("a.PNG", "b.bmp", "c.png")]
    for sample, single in zip(calibration.samples, alone, strict=True):
        assert torch.equal(sample["pixel_values"], single["pixel_values"])
    assert calibration.notes == ["3 calibration pictures: 30 varied ones are advised"]


def test_thirty_pictures_need_no_advice(tmp_path: Path) -> None:
    """Catches advice that comes however many pictures there are."""
    for number in range(30):
        picture(tmp_path / f"{number}.png", 56, 56)
    assert load_samples(TINY, tmp_path).notes == []


def test_json_lines(tmp_path: Path) -> None:
    """Catches lost or misplaced questions, answers and pictures, and paths not taken from the file's own folder."""
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", 56, 56, seed=1)
    source = lines(
        tmp_path / "q.jsonl",
        {"image": "a.png", "prompt": "red"},
        {"image": ["b.png", "a.png"], "prompt": "green", "response": "7"},
        "",
        {"prompt": "red green"},
        {"image": str(tmp_path / "b.png")},
    )
    one, two, text_only, default = load_samples(TINY, source).samples
    assert one["input_ids"].tolist() == [[BOS, START, *[PAD] * 6, END, 22]]
    assert two["input_ids"].tolist() == [[BOS, START, *[PAD] * 4, END, START, *[PAD] * 6, END, 23, 19]]
    assert two["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 6]]
    assert torch.equal(two["pixel_values"], torch.cat([default["pixel_values"], one["pixel_values"]]))
    assert text_only.keys() == {"input_ids", "attention_mask"}
    assert text_only["input_ids"].tolist() == [[BOS, 22, 23]]
    assert default["input_ids"].shape[1] == 7 + len(PROMPT.split())


def test_every_bad_line_is_named(tmp_path: Path) -> None:
    """Catches a report of only the first bad line, or one without its number."""
    source = lines(
        tmp_path / "q.jsonl",
        '{"prompt": "fine"}',
        "{not json",
        '["a list"]',
        {"images": "a.png", "prompt": "x"},
        {"video": "a.mp4", "prompt": "x"},
        {"image": 7},
        {"image": "a.png", "prompt": 3},
        {"response": "only"},
        {"image": "https://example.com/a.png"},
    )
    with pytest.raises(UserError) as caught:
        load_samples(TINY, source)
    assert [fault.where for fault in caught.value.faults] == [f"{source} line {number}" for number in range(2, 10)]
    whats = [fault.what for fault in caught.value.faults]
    for what, wanted in zip(
        whats,
        [
            "not JSON",
            "not a JSON object",
            "did you mean image?",
            "videos are not supported",
            "neither a path",
            "'prompt' is not text",
            "neither 'image' nor 'prompt'",
            "read from files only",
        ],
        strict=True,
    ):
        assert wanted in what


def test_all_bad_pictures_are_listed_at_once(tmp_path: Path) -> None:
    """Catches a run that stops at the first bad picture, so that the user repairs them one by one."""
    picture(tmp_path / "good.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    picture(tmp_path / "narrow.png", 8000, 28)
    with pytest.raises(UserError) as caught:
        load_samples(TINY, tmp_path)
    *bad, total = caught.value.faults
    assert [fault.what for fault in bad] == [str(tmp_path / "broken.jpg"), str(tmp_path / "narrow.png")]
    assert "aspect ratio" in bad[1].why
    assert "--skip_bad_images" in total.fix

    calibration = load_samples(TINY, tmp_path, skip_bad_images=True)
    assert len(calibration.samples) == 1
    assert [note.split(":")[0] for note in calibration.notes[:2]] == [f"skipped {fault.what}" for fault in bad]


def test_skipping_everything_is_an_error(tmp_path: Path) -> None:
    """Catches a compilation that goes on with no sample at all."""
    (tmp_path / "broken.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="no sample is left"):
        load_samples(TINY, tmp_path, skip_bad_images=True)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing", None, ["no such folder or file"]),
        ("empty", "folder", [".jpg", ".webp", "not searched"]),
        ("list.txt", "text", ["neither a folder"]),
        ("none.jsonl", "\n\n", ["no lines"]),
    ],
)
def test_unusable_sources(tmp_path: Path, name: str, content: str | None, words: list[str]) -> None:
    """Catches an unclear answer to a wrong --calib_images."""
    source = tmp_path / name
    if content == "folder":
        source.mkdir()
    elif content is not None:
        source.write_text(content)
    with pytest.raises(UserError) as caught:
        load_samples(TINY, source)
    assert all(word in str(caught.value) for word in [str(source), *words])


def test_one_pixel_is_enough(tmp_path: Path) -> None:
    """Catches a crash on the smallest picture, which the preparation enlarges to the least number of patches."""
    (sample,) = load_samples(TINY, picture(tmp_path / "dot.png", 1, 1)).samples
    assert sample["image_grid_thw"].tolist() == [[1, 4, 4]]


# ---- how many samples, how many tokens -------------------------------------------------------------------------------


def length_of(sample: dict[str, torch.Tensor]) -> int:
    return sample["input_ids"].shape[1]


def grids(*samples: dict[str, torch.Tensor]) -> list[list[int]]:
    return [grid for sample in samples for grid in sample["image_grid_thw"].tolist()]


def test_a_choice_of_samples(tmp_path: Path) -> None:
    """Catches a choice that changes from run to run, ignores the seed, loses the order, or has no note."""
    source = lines(tmp_path / "q.jsonl", *({"prompt": " ".join(["red"] * (n + 1))} for n in range(40)))

    def chosen(**given: int) -> list[int]:
        return [length_of(sample) - 2 for sample in load_samples(TINY, source, **given).samples]

    # random.Random(0).random() is 0.844, 0.758, 0.421, 0.259, ...: Python promises the same numbers for ever
    lots = np.random.RandomState()
    lots.set_state(("MT19937", *mersenne_twister(0)))
    expected = sorted(np.argsort(lots.random_sample(40))[:7].tolist())
    assert chosen(max_samples=7) == chosen(max_samples=7, seed=0) == expected
    assert len({tuple(chosen(max_samples=7, seed=seed)) for seed in range(4)}) == 4
    assert chosen(max_samples=40, seed=3) == chosen(max_samples=99) == chosen() == list(range(40))
    notes = load_samples(TINY, source, max_samples=7, seed=3).notes
    assert notes[0] == "calibrated on 7 of 40 samples, chosen by --seed 3"
    assert not any("chosen" in note for note in load_samples(TINY, source, max_samples=40).notes)


def mersenne_twister(seed: int) -> tuple[list[int], int]:
    """Key and position of the generator behind Python's random."""
    _, state, _ = random.Random(seed).getstate()
    return list(state[:-1]), state[-1]


def test_pictures_that_are_not_chosen_are_not_read(tmp_path: Path) -> None:
    """Catches 100 000 pictures decoded to use 30 of them, and bad pictures reported that nobody asked for."""
    for number in range(12):
        picture(tmp_path / f"{number:02}.png", 28 * (number + 1), 28 * 2)
    widths = [width // 2 for _, _, width in grids(*load_samples(TINY, tmp_path, max_samples=4).samples)]
    for number in set(range(12)) - {width - 1 for width in widths}:
        (tmp_path / f"{number:02}.png").write_bytes(b"broken")
    again = load_samples(TINY, tmp_path, max_samples=4)
    assert [width // 2 for _, _, width in grids(*again.samples)] == widths


def test_a_bad_picture_is_replaced_by_the_next_of_the_seed(tmp_path: Path) -> None:
    """Catches fewer samples than asked for although there are enough, and a replacement at random."""
    for number in range(8):
        picture(tmp_path / f"{number}.png", 28 * (number + 2), 56)

    def chosen(most: int) -> list[int]:
        found = grids(*load_samples(TINY, tmp_path, max_samples=most, seed=5, skip_bad_images=True).samples)
        return [width // 2 - 2 for _, _, width in found]

    three, five = chosen(3), chosen(5)
    assert set(three) < set(five)  # the order of the seed does not depend on how many are taken
    (tmp_path / f"{three[1]}.png").write_bytes(b"broken")
    replaced = chosen(3)
    assert replaced == sorted(replaced) and set(replaced) < set(five) - {three[1]} and len(replaced) == 3
    with pytest.raises(UserError, match="2 of 3 samples can be used"):
        load_samples(TINY, tmp_path, max_samples=3, seed=5)


def test_pictures_shrink_to_the_budget(tmp_path: Path) -> None:
    """Catches a sample over its budget, cut image tokens, another shape of the picture, and small pictures touched."""
    picture(tmp_path / "large.png", 560, 280)
    picture(tmp_path / "small.png", 84, 56)
    text = 3 + len(PROMPT.split())
    untouched = load_samples(TINY, tmp_path)
    assert grids(*untouched.samples) == [[1, 20, 40], [1, 4, 6]]
    calibration = load_samples(TINY, tmp_path, max_tokens=text + 60)
    large, small = calibration.samples
    assert grids(large) == [[1, 10, 20]]  # patches; 5 rows of 10 tokens are 1 : 2 like the picture
    assert length_of(large) == text + 50 and large["pixel_values"].shape[0] == 200
    assert int((large["input_ids"] == PAD).sum()) == 50
    assert torch.equal(small["pixel_values"], untouched.samples[1]["pixel_values"])
    assert calibration.notes[0] == f"1 of 2 pictures made smaller to keep samples within {text + 60} tokens"
    exactly = load_samples(TINY, tmp_path, max_tokens=text + 200)
    assert grids(*exactly.samples) == [[1, 20, 40], [1, 4, 6]] and "smaller" not in " ".join(exactly.notes)


def test_a_picture_is_shrunk_from_the_whole_of_it(tmp_path: Path) -> None:
    """Catches a picture that is cropped to fit, or whose sides are swapped."""
    halves = np.zeros((280, 560, 3), dtype=np.uint8)
    halves[:, 280:] = 255
    Image.fromarray(halves).save(tmp_path / "halves.png")
    (sample,) = load_samples(TINY, tmp_path, max_tokens=9 + 8).samples
    assert grids(sample) == [[1, 4, 8]]
    black, white = (np.subtract(colour, MEAN) / STD for colour in (0, 1))
    patches = sample["pixel_values"].numpy().reshape(2, 4, 2, 2, 3, 2, 14, 14)  # by tokens: row, column; 2 x 2 patches
    np.testing.assert_allclose(patches[:, 0].mean(axis=(0, 1, 2, 4, 5, 6)), black, atol=0.05)
    np.testing.assert_allclose(patches[:, 3].mean(axis=(0, 1, 2, 4, 5, 6)), white, atol=0.05)


def test_several_pictures_share_the_budget(tmp_path: Path) -> None:
    """Catches one picture that takes it all, and a small one made smaller while a large one could give way."""
    picture(tmp_path / "large.png", 560, 280)
    picture(tmp_path / "square.png", 280, 280, seed=1)
    picture(tmp_path / "small.png", 84, 56, seed=2)
    entry = {"image": ["large.png", "small.png", "square.png"], "prompt": "red", "response": "7"}
    source = lines(tmp_path / "q.jsonl", entry, {"prompt": "red"}, {"image": "small.png"})
    text = 1 + 3 * 2 + 2
    calibration = load_samples(TINY, source, max_tokens=text + 106)
    assert grids(calibration.samples[0]) == [[1, 10, 20], [1, 4, 6], [1, 14, 14]]  # 50 each for the large ones
    assert length_of(calibration.samples[0]) == text + 50 + 6 + 49
    assert "2 of 4 pictures made smaller" in calibration.notes[0]


@pytest.mark.parametrize(("width", "height"), [(5400, 28), (28, 5400), (60, 4000), (560, 31), (200, 133)])
@pytest.mark.parametrize("budget", [4, 5, 7, 23])
def test_narrow_pictures_fit_too(tmp_path: Path, width: int, height: int, budget: int) -> None:
    """Catches odd shapes whose sides round to nothing, or are enlarged again by the preparation."""
    most = 3 + len(PROMPT.split()) + budget
    (sample,) = load_samples(TINY, picture(tmp_path / "a.png", width, height), max_tokens=most).samples
    assert 4 <= int((sample["input_ids"] == PAD).sum()) <= budget
    assert length_of(sample) <= most


def test_text_beyond_the_budget(tmp_path: Path) -> None:
    """Catches text that is cut, one bad line at a time, and lines that are skipped with the bad pictures."""
    picture(tmp_path / "a.png", 280, 280)
    source = lines(
        tmp_path / "q.jsonl",
        {"prompt": "red"},
        {"prompt": "red " * 30},
        {"image": ["a.png"] * 3, "prompt": "red"},
        {"image": "a.png", "prompt": "red", "response": "7 " * 30},
    )
    for skip in (False, True):
        with pytest.raises(UserError) as caught:
            load_samples(TINY, source, max_tokens=16, skip_bad_images=skip)
        *faults, total = caught.value.faults
        assert [fault.where for fault in faults] == [f"{source} line {number}" for number in (2, 3, 4)]
        assert "alone has 31 tokens" in faults[0].what and "--max_tokens is 16" in faults[0].why
        assert "12 tokens at least for its pictures and 8 for its text" in faults[1].what
        assert "--max_tokens 20" in faults[1].fix
        assert "1 of 4" in total.what and "--skip_bad_images" not in total.fix
    assert len(load_samples(TINY, source, max_tokens=40).samples) == 4
    with pytest.raises(UserError) as caught:
        load_samples(TINY, tmp_path, max_tokens=5)  # every picture of a folder has the same prompt
    assert len(caught.value.faults) == 2


def test_videos_are_refused(tmp_path: Path) -> None:
    """Catches a video that is passed over without a word, or answered as a file of an unknown kind."""
    video = tmp_path / "clips" / "a.MP4"
    video.parent.mkdir()
    video.write_bytes(b"")
    for source in (video, video.parent, lines(tmp_path / "q.jsonl", {"image": "a.mp4", "prompt": "x"})):
        with pytest.raises(UserError, match="videos are not supported"):
            load_samples(TINY, source)
    picture(video.parent / "a.png")
    note, _ = load_samples(TINY, video.parent).notes
    assert note == f"left out of {video.parent}: 1 video, which vlqc does not support"


# ---- what a checkpoint brings along ----------------------------------------------------------------------------------


def test_checkpoint_without_tokenizer_or_settings(tmp_path: Path) -> None:
    """Catches a raw exception of transformers, or an attempt to use the network, for an incomplete checkpoint."""
    path = picture(tmp_path / "a.png")
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
    assert "no sample has a picture" in load_samples(model, text_only).notes[-1]
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer in .* cannot be loaded"):
        load_samples(model, path)


def test_settings_of_newer_transformers(tmp_path: Path) -> None:
    """Catches checkpoints whose picture settings lie in processor_config.json and give `size` instead of min_pixels."""
    path = picture(tmp_path / "a.png", 280, 280)
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
    """Catches a checkpoint that cannot be calibrated because it was saved without its template."""
    model = model_without(tmp_path, "chat_template.json", "tokenizer_config.json")
    config = json.loads((TINY / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    calibration = load_samples(model, picture(tmp_path / "a.png"))
    assert calibration.samples[0]["input_ids"][0, :8].tolist() == [START, *[PAD] * 6, END]
    assert "no chat template" in calibration.notes[0]


def test_unmarked_turns_and_marked_ones(tmp_path: Path) -> None:
    """Catches a fallback form that differs from Qwen2.5-VL's own where its turn tokens exist."""
    inputs = ModelInputs(TINY)
    inputs._template = None
    assert inputs._in_chat_form(1, "Hi", None) == "<|vision_start|><|image_pad|><|vision_end|>Hi"
    inputs._tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    assert inputs._in_chat_form(1, "Hi", None) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert inputs._in_chat_form(0, "Hi", "Ho").endswith("<|im_start|>assistant\nHo<|im_end|>\n")


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    """Catches image tokens that the model does not recognize: features and tokens would not match."""
    model = model_without(tmp_path)
    config = json.loads((TINY / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "image_token_id": 6}))
    with pytest.raises(UserError, match=r"number 5 in the tokenizer and 6 in config\.json"):
        load_samples(model, picture(tmp_path / "a.png"))


def test_image_token_inside_a_prompt(tmp_path: Path) -> None:
    """Catches a text that smuggles in image tokens for which there is no picture."""
    source = lines(tmp_path / "q.jsonl", {"prompt": "what is <|image_pad|>"})
    with pytest.raises(UserError, match="stands for a picture") as caught:
        load_samples(TINY, source)
    assert caught.value.faults[0].where == f"{source} line 1"


def test_own_code_needs_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches code from the checkpoint that runs (or a question at the keyboard) without --trust_remote_code."""
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
    path = picture(tmp_path / "a.png")
    try:
        load_samples(model, path)  # 5.x goes on with the tokenizer class that config.json implies, 4.x gives up
    except UserError as error:
        assert "--trust_remote_code True" in str(error)
    assert not ran.exists()
    assert load_samples(model, path, trust_remote_code=True).samples
    assert ran.exists()
