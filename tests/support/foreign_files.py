"""Small files of a stranger: a photo, and JSON with other values."""

import json
from pathlib import Path

from PIL import Image


def edit(path: Path, **keys: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def photo(folder: Path) -> Path:
    path = folder / "photo.png"
    Image.new("RGB", (56, 56), (200, 30, 30)).save(path)
    return path
