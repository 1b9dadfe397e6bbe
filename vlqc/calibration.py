"""A folder of pictures, one picture, or JSON lines -> the model inputs on which a checkpoint is calibrated."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlqc.errors import Fault, UserError, near_miss
from vlqc.model_inputs import ModelInputs
from vlqc.pictures import PICTURE_ENDINGS, BadPicture, is_picture, read_picture

PROMPT = "Please describe this picture in detail."
ADVISED_PICTURES = 30
LINE_KEYS = ("image", "prompt", "response")


@dataclass(frozen=True)
class Calibration:
    """Model inputs in a fixed order, and what the user should know about them.

    samples: input_ids and attention_mask [1, S] int64; with pictures also pixel_values [P, C*T*p*p] float32 (P patches
    of all its pictures) and image_grid_thw [n, 3] int64 (one row per picture).
    """

    samples: list[dict[str, torch.Tensor]]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Request:
    """One sample before it is read: its pictures, what is asked about them, what is answered, where that is written."""

    pictures: tuple[Path, ...]
    prompt: str = PROMPT
    response: str | None = None
    where: str = ""


def load_samples(
    model_path: Path, calib_images: Path, *, trust_remote_code: bool = False, skip_bad_images: bool = False
) -> Calibration:
    """Pictures or JSON lines, and the model's folder -> Calibration. Reads local files only, one picture at a time.

    Raises UserError with all unusable samples at once; with `skip_bad_images` each becomes a note, as long as one
    sample is left. Of a .jsonl file every bad line is named; those are never skipped.
    """
    requests = list_requests(calib_images)
    inputs = ModelInputs(model_path, trust_remote_code=trust_remote_code)
    samples: list[dict[str, torch.Tensor]] = []
    faults: list[Fault] = []
    pictures = 0
    for request in requests:
        bad = [fault for fault in _add_sample(samples, inputs, request) if fault not in faults]
        faults += bad
        pictures += 0 if bad else len(request.pictures)
    if faults and not skip_bad_images:
        fix = "repair or remove what is named above, or add --skip_bad_images to go on without it"
        raise UserError(*faults, Fault(f"{len(samples)} of {len(requests)} samples can be used", fix=fix))
    if not samples:
        raise UserError(*faults, Fault(f"no sample is left of {calib_images}", fix="name pictures that can be read"))
    notes = [f"skipped {fault.what}: {fault.why}" for fault in faults]
    return Calibration(samples, inputs.notes + notes + _advice(pictures))


def _add_sample(samples: list[dict[str, torch.Tensor]], inputs: ModelInputs, request: Request) -> list[Fault]:
    """Reads the pictures of one request and appends its model inputs, or returns what is wrong with which of them."""
    made, faults = [], []
    for path in request.pictures:
        try:
            made.append(inputs.patches_of(read_picture(path)))
        except BadPicture as error:
            faults.append(Fault(str(path), where=request.where, why=str(error)))
    if not faults:
        try:
            samples.append(inputs.build(made, request.prompt, request.response))
        except ValueError as error:
            faults.append(Fault(f"the prompt {request.prompt!r}", where=request.where, why=str(error)))
    return faults


def _advice(pictures: int) -> list[str]:
    if pictures == 0:
        return ["no sample has a picture: the vision tower sees nothing to calibrate on"]
    if pictures < ADVISED_PICTURES:
        plural = "" if pictures == 1 else "s"
        return [f"{pictures} calibration picture{plural}: {ADVISED_PICTURES} varied ones are advised"]
    return []


# ---- where samples come from -----------------------------------------------------------------------------------------


def list_requests(source: Path) -> list[Request]:
    """What to read, in the order of calibration. No picture is opened. UserError for an unusable source."""
    what, endings = f"--calib_images {source}", " ".join(PICTURE_ENDINGS)
    if source.is_dir():
        found = [path for path in sorted(source.iterdir()) if is_picture(path) and not path.is_dir()]
        if not found:
            why = f"no file in it ends in one of {endings} (folders inside it are not searched)"
            raise UserError(Fault(what, why=why, fix="put pictures into it; 30 COCO-like ones are advised"))
        return [Request((path,)) for path in found]
    if not source.exists():
        fix = "name a folder of pictures, one picture, or a .jsonl file"
        raise UserError(Fault(what, why="there is no such folder or file", fix=fix))
    if source.suffix.lower() == ".jsonl":
        return _read_json_lines(source)
    if is_picture(source):
        return [Request((source,))]
    raise UserError(Fault(what, why=f"it is neither a folder, nor .jsonl, nor one of {endings}"))


def _read_json_lines(source: Path) -> list[Request]:
    """Every line {"image": path or [paths], "prompt": text, "response": text}; UserError naming every bad line."""
    try:
        lines = source.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(Fault(f"--calib_images {source}", why=f"it is not UTF-8 text: {error}")) from error
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
        faults = [Fault(f"--calib_images {source}", why="it has no lines", fix='{"image": "cat.jpg", "prompt": "..."}')]
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
        given = json.loads(line)
    except ValueError as error:
        raise _BadLine(f"not JSON: {error}") from error
    if not isinstance(given, dict):
        raise _BadLine("not a JSON object", 'write {"image": "cat.jpg", "prompt": "What is this?"}')
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
            yield "videos are not supported"
        elif key not in LINE_KEYS:
            yield " ".join(filter(None, [f"unknown key {key!r}", near_miss(key, LINE_KEYS)]))
    for key in ("prompt", "response"):
        if not isinstance(given.get(key, ""), str | None if key == "response" else str):
            yield f"{key!r} is not text"
    images = given.get("image")
    names = [] if images is None else images if isinstance(images, list) else [images]
    if not all(isinstance(name, str) and name.strip() and "\0" not in name for name in names):
        yield "'image' is neither a path nor a list of paths"
    elif any("://" in name for name in names):
        yield "'image' is an address; pictures are read from files only"
    if not names and not given.get("prompt"):
        yield "neither 'image' nor 'prompt' is there"
