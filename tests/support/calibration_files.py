"""Images, JSON lines, and the small files of a checkpoint that calibration reads."""

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

TINY = Path(__file__).parents[2] / "tools" / "demo" / "tiny_vl"
BOS, START, END, PAD, UNKNOWN = 1, 3, 4, 5, 63  # the tiny tokenizer's numbers
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def write_image(path: Path, width: int = 84, height: int = 56, seed: int = 0) -> Path:
    """An image of noise, in which swapped rows, columns or channels are detected."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def model_without(tmp_path: Path, *left_out: str) -> Path:
    """A copy of the tiny checkpoint's JSON files, except for some of them."""
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
