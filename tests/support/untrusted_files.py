"""Small files for tests of untrusted input: a photo, and JSON files with some values replaced."""

import json
from pathlib import Path

from PIL import Image


def edit(path: Path, **keys: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def photo(folder: Path) -> Path:
    path = folder / "photo.png"
    Image.new("RGB", (56, 56), (200, 30, 30)).save(path)
    return path
