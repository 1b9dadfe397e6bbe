"""A folder of pictures, one picture, or JSON lines -> what to read for every sample. No picture is opened here."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlqc.errors import Fault, UserError
from vlqc.files import parse_json
from vlqc.formatting import did_you_mean
from vlqc.frontend.calibration.images import PICTURE_ENDINGS, is_picture, is_video

PROMPT = "Please describe this picture in detail."
LINE_KEYS = ("image", "prompt", "response")
NO_VIDEOS = "videos are not supported"
EXAMPLE = '{"image": "cat.jpg", "prompt": "What is this?"}'
AS_TEXT = "save it as UTF-8, one JSON object per line"


@dataclass(frozen=True)
class Request:
    """One sample before it is read: its pictures, what is asked about them, what is answered, where that is written."""

    pictures: tuple[Path, ...]
    prompt: str = PROMPT
    response: str | None = None
    where: str = ""


def list_requests(source: Path) -> list[Request]:
    """What to read, in the order of calibration. No picture is opened. UserError for an unusable source."""
    what, endings = f"--calib_images {source}", " ".join(PICTURE_ENDINGS)
    if source.is_dir():
        found = [path for path in sorted(source.iterdir()) if is_picture(path) and not path.is_dir()]
        if not found:
            why = f"no file in it ends in one of {endings} (folders inside it are not searched)"
            if any(map(is_video, source.iterdir())):
                why = f"it holds videos but no pictures; {NO_VIDEOS}"
            raise UserError(Fault(what, why=why, fix="put pictures into it; 30 COCO-like ones are advised"))
        return [Request((path,)) for path in found]
    if not source.exists():
        fix = "name a folder of pictures, one picture, or a .jsonl file"
        raise UserError(Fault(what, why="there is no such folder or file", fix=fix))
    if not source.is_file():
        raise UserError(Fault(what, why="it is not an ordinary file", fix="name a folder, a picture or a .jsonl file"))
    if source.suffix.lower() == ".jsonl":
        return _read_json_lines(source)
    if is_picture(source):
        return [Request((source,))]
    if is_video(source):
        raise UserError(Fault(what, why=NO_VIDEOS, fix="name pictures: frames of it, saved as such, will do"))
    fix = "name a folder of pictures, one picture, or a .jsonl file"
    raise UserError(Fault(what, why=f"it is neither a folder, nor .jsonl, nor one of {endings}", fix=fix))


def _read_json_lines(source: Path) -> list[Request]:
    """Every line {"image": path or [paths], "prompt": text, "response": text}; UserError naming every bad line."""
    try:
        lines = source.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(Fault(f"--calib_images {source}", why=f"it is not UTF-8 text: {error}", fix=AS_TEXT)) from error
    except OSError as error:
        fix = "look at who may read it"
        raise UserError(Fault(f"--calib_images {source}", why=f"it cannot be read: {error}", fix=fix)) from error
    requests, faults = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{source} line {number}"
        try:
            requests.append(_request_of(line, source.parent, where))
        except _BadLine as bad:
            faults.append(Fault(bad.what, where=where, fix=bad.fix))
    if not requests and not faults:
        faults = [Fault(f"--calib_images {source}", why="it has no lines", fix=f"write lines such as {EXAMPLE}")]
    if faults:
        raise UserError(*faults)
    return requests


class _BadLine(Exception):
    def __init__(self, what: str, fix: str = "") -> None:
        self.what, self.fix = what, fix
        super().__init__(what)


def _request_of(line: str, folder: Path, where: str) -> Request:
    """One line of text -> Request; paths are relative to `folder`. Raises _BadLine with everything wrong in it."""
    try:
        given = parse_json(line)
    except ValueError as error:
        raise _BadLine(f"not JSON: {error}", f"write {EXAMPLE}") from error
    if not isinstance(given, dict):
        raise _BadLine("not a JSON object", f"write {EXAMPLE}")
    faults = list(_faults_of(given))
    if faults:
        raise _BadLine("; ".join(faults), f"a line has the keys {', '.join(LINE_KEYS)}")
    images = given.get("image") or []
    names = [images] if isinstance(images, str) else images
    pictures = tuple(folder / name for name in names)
    return Request(pictures, given.get("prompt", PROMPT), given.get("response"), where)


def _faults_of(given: dict[str, Any]) -> Iterator[str]:
    for key in given:
        if "video" in key:
            yield NO_VIDEOS
        elif key not in LINE_KEYS:
            yield " ".join(filter(None, [f"unknown key {key!r}", did_you_mean(key, LINE_KEYS)]))
    for key in ("prompt", "response"):
        if not isinstance(given.get(key, ""), str | None if key == "response" else str):
            yield f"{key!r} is not text"
    images = given.get("image")
    names = [] if images is None else images if isinstance(images, list) else [images]
    if not all(isinstance(name, str) and name.strip() and "\0" not in name for name in names):
        yield "'image' is neither a path nor a list of paths"
    elif any(is_video(Path(name)) for name in names):
        yield NO_VIDEOS
    elif any("://" in name for name in names):
        yield "'image' is an address; pictures are read from files only"
    if not names and not given.get("prompt"):
        yield "neither 'image' nor 'prompt' is there"
