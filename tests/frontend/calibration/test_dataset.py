"""Images and JSON lines -> model inputs, compared with arithmetic and token ids in this file."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.support.calibration_files import BOS, END, MEAN, PAD, START, STD, TINY, UNKNOWN, lines, write_image
from vlqc.errors import UserError
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.frontend.calibration.dataset import load_samples
from vlqc.frontend.calibration.images import read_image
from vlqc.frontend.calibration.sources import PROMPT


def patches_by_hand(path: Path) -> np.ndarray:
    """Patches of 14 x 14 in 2 x 2 groups; each patch as channel, frame (the image twice), row, column."""
    values = np.asarray(Image.open(path)).astype(np.float64) / 255
    values = (values - MEAN) / STD  # [H, W, 3]
    patches = []
    for top in range(0, values.shape[0], 28):
        for left in range(0, values.shape[1], 28):
            for row, column in ((0, 0), (0, 14), (14, 0), (14, 14)):
                patch = values[top + row :, left + column :][:14, :14].transpose(2, 0, 1)  # [3, 14, 14]
                patches.append(np.stack([patch, patch], axis=1).ravel())
    return np.stack(patches)


def test_tensors_of_an_image(tmp_path: Path) -> None:
    """Catches a wrong patch order, normalization, prompt, or number of image tokens, in every transformers version."""
    path = write_image(tmp_path / "a.png")
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


if transformers.__version__.startswith("4.49"):  # later ones need torchvision for it

    def test_equal_to_the_stock_processor(tmp_path: Path) -> None:
        """Catches any difference from transformers' own processor (the one of 5.x needs torchvision)."""
        path = write_image(tmp_path / "a.png", 333, 200)
        processor = transformers.AutoProcessor.from_pretrained(TINY)
        content = [{"type": "image", "image": str(path)}, {"type": "text", "text": PROMPT}]
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        image = read_image(path)
        assert QWEN2_5_VL.inputs.processing is not None
        height, width = QWEN2_5_VL.inputs.processing.resize(image.height, image.width)
        expected = processor(text=[text], images=[image.resize((width, height))], return_tensors="pt")
        (sample,) = load_samples(TINY, path).samples
        assert set(sample) == set(expected)
        assert all(torch.equal(sample[name], expected[name]) for name in sample)


def test_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    """Catches an order that depends on the file system, and files that are not images."""
    for seed, name in enumerate(("c.png", "a.PNG", "b.bmp")):
        write_image(tmp_path / name, seed=seed)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    calibration = load_samples(TINY, tmp_path)
    alone = [load_samples(TINY, tmp_path / name).samples[0] for name in ("a.PNG", "b.bmp", "c.png")]
    for sample, single in zip(calibration.samples, alone, strict=True):
        assert torch.equal(sample["pixel_values"], single["pixel_values"])
    (note,) = calibration.notes
    assert note.startswith("3 ") and "30" in note


def test_thirty_pictures_need_no_advice(tmp_path: Path) -> None:
    """Catches a recommendation that does not depend on the number of images."""
    for number in range(30):
        write_image(tmp_path / f"{number}.png", 56, 56)
    assert load_samples(TINY, tmp_path).notes == []


def test_json_lines(tmp_path: Path) -> None:
    """Catches lost or misplaced prompts, responses and images, and paths that are not relative to the file's folder."""
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png", 56, 56, seed=1)
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
    """Catches an error that names only the first faulty line, or no line number."""
    source = lines(
        tmp_path / "q.jsonl",
        '{"prompt": "fine"}',
        "{not json",
        '["a list"]',
        {"images": "a.png", "prompt": "x"},
        {"video": 7, "prompt": "x"},
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
            "quotes at character 2",
            "not a JSON object",
            "did you mean image?",
            "'video' is neither a path",
            "neither a path",
            "'prompt' is not text",
            "'prompt' is not given",
            "read from files only",
        ],
        strict=True,
    ):
        assert wanted in what


def test_all_bad_pictures_are_listed_at_once(tmp_path: Path) -> None:
    """Catches an error that names only the first unreadable image."""
    write_image(tmp_path / "good.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    write_image(tmp_path / "narrow.png", 8000, 28)
    with pytest.raises(UserError) as caught:
        load_samples(TINY, tmp_path)
    *bad, total = caught.value.faults
    names = [str(tmp_path / "broken.jpg"), str(tmp_path / "narrow.png")]
    assert [fault.what for fault in bad] == [f"image {name} cannot be used" for name in names]
    assert "aspect ratio" in bad[1].why
    assert "--skip_bad_images" in total.fix

    calibration = load_samples(TINY, tmp_path, skip_bad_images=True)
    assert len(calibration.samples) == 1
    assert [note.split(":")[0] for note in calibration.notes[:2]] == [f"skipped image {name}" for name in names]


def test_skipping_everything_is_an_error(tmp_path: Path) -> None:
    """Catches a compilation without any sample."""
    (tmp_path / "broken.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="no usable sample"):
        load_samples(TINY, tmp_path, skip_bad_images=True)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing", None, ["no such folder or file"]),
        ("empty", "folder", [".jpg", ".webp", "not searched"]),
        ("list.txt", "text", ["neither a folder"]),
        ("none.jsonl", "\n\n", ["no entries"]),
    ],
)
def test_unusable_sources(tmp_path: Path, name: str, content: str | None, words: list[str]) -> None:
    """Catches an error for a wrong --calib_images that does not name the path and the reason."""
    source = tmp_path / name
    if content == "folder":
        source.mkdir()
    elif content is not None:
        source.write_text(content)
    with pytest.raises(UserError) as caught:
        load_samples(TINY, source)
    assert all(word in str(caught.value) for word in [str(source), *words])


def test_one_pixel_is_enough(tmp_path: Path) -> None:
    """Catches an exception for the smallest image, which is enlarged to the minimum number of patches."""
    (sample,) = load_samples(TINY, write_image(tmp_path / "dot.png", 1, 1)).samples
    assert sample["image_grid_thw"].tolist() == [[1, 4, 4]]
