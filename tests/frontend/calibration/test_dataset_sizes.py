"""The selection of samples, and the token budget of a sample."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.calibration_files import MEAN, PAD, STD, TINY, lines, write_image
from vlqc.errors import UserError
from vlqc.frontend.calibration.dataset import load_samples
from vlqc.frontend.calibration.sources import PROMPT


def length_of(sample: dict[str, torch.Tensor]) -> int:
    return sample["input_ids"].shape[1]


def grids(*samples: dict[str, torch.Tensor]) -> list[list[int]]:
    return [grid for sample in samples for grid in sample["image_grid_thw"].tolist()]


def test_a_choice_of_samples(tmp_path: Path) -> None:
    """Catches a selection that is not reproducible, ignores the seed, loses the order, or has no note."""
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
    assert "7 of 40" in notes[1] and "--seed 3" in notes[1]
    assert not any("chosen" in note for note in load_samples(TINY, source, max_samples=40).notes)


def mersenne_twister(seed: int) -> tuple[list[int], int]:
    """Key and position of the generator behind Python's random."""
    _, state, _ = random.Random(seed).getstate()
    return list(state[:-1]), state[-1]


def test_pictures_that_are_not_chosen_are_not_read(tmp_path: Path) -> None:
    """Catches images that are decoded, or reported as unreadable, although they are not selected."""
    for number in range(12):
        write_image(tmp_path / f"{number:02}.png", 28 * (number + 1), 28 * 2)
    widths = [width // 2 for _, _, width in grids(*load_samples(TINY, tmp_path, max_samples=4).samples)]
    for number in set(range(12)) - {width - 1 for width in widths}:
        (tmp_path / f"{number:02}.png").write_bytes(b"broken")
    again = load_samples(TINY, tmp_path, max_samples=4)
    assert [width // 2 for _, _, width in grids(*again.samples)] == widths


def test_a_bad_image_is_replaced_by_the_next_of_the_seed(tmp_path: Path) -> None:
    """Catches fewer samples than requested, and replacements that are not in the order of the seed."""
    for number in range(8):
        write_image(tmp_path / f"{number}.png", 28 * (number + 2), 56)

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


def test_images_shrink_to_the_budget(tmp_path: Path) -> None:
    """Catches a sample over its budget, truncated image tokens, a distorted image, and small images that change."""
    write_image(tmp_path / "large.png", 560, 280)
    write_image(tmp_path / "small.png", 84, 56)
    text = 3 + len(PROMPT.split())
    untouched = load_samples(TINY, tmp_path)
    assert grids(*untouched.samples) == [[1, 20, 40], [1, 4, 6]]
    calibration = load_samples(TINY, tmp_path, max_tokens=text + 60)
    large, small = calibration.samples
    assert grids(large) == [[1, 10, 20]]  # patches; 5 rows of 10 tokens are 1 : 2 like the image
    assert length_of(large) == text + 50 and large["pixel_values"].shape[0] == 200
    assert int((large["input_ids"] == PAD).sum()) == 50
    assert torch.equal(small["pixel_values"], untouched.samples[1]["pixel_values"])
    assert calibration.notes[0].startswith("1 of 2 ") and f" {text + 60} tokens" in calibration.notes[0]
    exactly = load_samples(TINY, tmp_path, max_tokens=text + 200)
    assert grids(*exactly.samples) == [[1, 20, 40], [1, 4, 6]] and "smaller" not in " ".join(exactly.notes)


def test_an_image_is_shrunk_from_the_whole_of_it(tmp_path: Path) -> None:
    """Catches an image that is cropped to fit, or whose sides are swapped."""
    halves = np.zeros((280, 560, 3), dtype=np.uint8)
    halves[:, 280:] = 255
    Image.fromarray(halves).save(tmp_path / "halves.png")
    (sample,) = load_samples(TINY, tmp_path, max_tokens=9 + 8).samples
    assert grids(sample) == [[1, 4, 8]]
    black, white = (np.subtract(color, MEAN) / STD for color in (0, 1))
    patches = sample["pixel_values"].numpy().reshape(2, 4, 2, 2, 3, 2, 14, 14)  # by tokens: row, column; 2 x 2 patches
    np.testing.assert_allclose(patches[:, 0].mean(axis=(0, 1, 2, 4, 5, 6)), black, atol=0.05)
    np.testing.assert_allclose(patches[:, 3].mean(axis=(0, 1, 2, 4, 5, 6)), white, atol=0.05)


def test_several_images_share_the_budget(tmp_path: Path) -> None:
    """Catches one image that uses the whole budget, and a small image that is resized before a large one."""
    write_image(tmp_path / "large.png", 560, 280)
    write_image(tmp_path / "square.png", 280, 280, seed=1)
    write_image(tmp_path / "small.png", 84, 56, seed=2)
    entry = {"image": ["large.png", "small.png", "square.png"], "prompt": "red", "response": "7"}
    source = lines(tmp_path / "q.jsonl", entry, {"prompt": "red"}, {"image": "small.png"})
    text = 1 + 3 * 2 + 2
    calibration = load_samples(TINY, source, max_tokens=text + 106)
    assert grids(calibration.samples[0]) == [[1, 10, 20], [1, 4, 6], [1, 14, 14]]  # 50 each for the large ones
    assert length_of(calibration.samples[0]) == text + 50 + 6 + 49
    assert calibration.notes[1].startswith("2 of 4 ")


@pytest.mark.parametrize(("width", "height"), [(5400, 28), (28, 5400), (60, 4000), (560, 31), (200, 133)])
@pytest.mark.parametrize("budget", [4, 5, 7, 23])
def test_narrow_pictures_fit_too(tmp_path: Path, width: int, height: int, budget: int) -> None:
    """Catches elongated images with a side of zero, or that are enlarged again by the image processor."""
    most = 3 + len(PROMPT.split()) + budget
    (sample,) = load_samples(TINY, write_image(tmp_path / "a.png", width, height), max_tokens=most).samples
    assert 4 <= int((sample["input_ids"] == PAD).sum()) <= budget
    assert length_of(sample) <= most


def test_text_beyond_the_budget(tmp_path: Path) -> None:
    """Catches truncated text, an error for the first line only, and lines that --skip_bad_images skips."""
    write_image(tmp_path / "a.png", 280, 280)
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
        assert re.findall(r"\d+", faults[0].what)[-1] == "31" and "--max_tokens is 16" in faults[0].why
        assert re.findall(r"\d+", faults[1].what) == ["12", "8"]  # tokens of the images and of the text
        assert "--max_tokens 20" in faults[1].fix
        assert "1 of 4" in total.what and "--skip_bad_images" not in total.fix
    assert len(load_samples(TINY, source, max_tokens=40).samples) == 4
    with pytest.raises(UserError) as caught:
        load_samples(TINY, tmp_path, max_tokens=5)  # every image of a folder has the same prompt
    assert len(caught.value.faults) == 2
