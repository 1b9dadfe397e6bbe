"""Lists the samples that --calib_images names: a folder of images, one image, or a .jsonl file."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlqc.errors import Fault, UserError
from vlqc.files import parse_json
from vlqc.formatting import did_you_mean
from vlqc.frontend.calibration.conversation import Conversation, ImageRef
from vlqc.frontend.calibration.images import IMAGE_SUFFIXES, is_image, is_video
from vlqc.options.fields import OptionFields

PROMPT = "Please describe this picture in detail."
LINE_KEYS = ("image", "prompt", "response")
NO_VIDEOS = "videos are not supported; extract frames and pass those"
EXAMPLE = '{"image": "cat.jpg", "prompt": "What is this?"}'
TEXT_EXAMPLE = '{"prompt": "What is this?"}'
AS_TEXT = "save it as UTF-8, one JSON object per line"
KINDS = "pass a folder of images, one image, or a .jsonl file"
TEXT_KINDS = f"pass --calib_images FILE.jsonl with lines such as {TEXT_EXAMPLE}"


@dataclass(frozen=True)
class SampleList:
    """The samples of a source in a fixed order, and notes for the user on how it was read."""

    conversations: list[Conversation]
    notes: list[str] = field(default_factory=list)


def list_samples(source: Path, text_only: str | None = None) -> SampleList:
    """The samples in a fixed order. Opens no image. Raises UserError for an unusable source.

    text_only: title of a model that takes no images; None for others.
    """
    if text_only is not None and not (source.suffix.lower() == ".jsonl" and source.is_file()):
        why = f"{text_only} has no vision tower: it is calibrated with prompts"
        raise UserError(Fault(f"{_named(source)} is not a .jsonl file", why=why, fix=TEXT_KINDS))
    what, suffixes = _named(source), " ".join(IMAGE_SUFFIXES)
    if source.is_dir():
        images = [path for path in sorted(source.iterdir()) if is_image(path) and not path.is_dir()]
        if not images:
            why = f"the folder contains no {suffixes} (its subfolders are not searched)"
            if any(map(is_video, source.iterdir())):
                why = f"the folder contains videos only; {NO_VIDEOS}"
            raise UserError(Fault(what, why=why, fix="add images; 30 varied ones are recommended"))
        return SampleList([Conversation.from_prompt((ImageRef(path),), PROMPT) for path in images])
    if not source.exists():
        raise UserError(Fault(what, why="there is no such folder or file", fix=KINDS))
    if not source.is_file():
        raise UserError(Fault(what, why="it is not a regular file", fix=KINDS))
    if source.suffix.lower() == ".jsonl":
        return SampleList(_read_json_lines(source, text_only))
    if is_image(source):
        return SampleList([Conversation.from_prompt((ImageRef(source),), PROMPT)])
    if is_video(source):
        raise UserError(Fault(what, why=NO_VIDEOS, fix=KINDS))
    raise UserError(Fault(what, why=f"it is neither a folder, nor .jsonl, nor one of {suffixes}", fix=KINDS))


def _named(source: Path) -> str:
    """The option and its value, with a remark if the user may not have given it."""
    is_default = source == OptionFields.model_fields["calib_images"].default
    return f"--calib_images {source}{' (the default)' if is_default else ''}"


def _read_json_lines(source: Path, text_only: str | None) -> list[Conversation]:
    """Lines of {"image": path or [paths], "prompt": text, "response": text}. UserError with every faulty line."""
    try:
        lines = source.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(Fault(f"--calib_images {source}", why=f"it is not UTF-8 text: {error}", fix=AS_TEXT)) from error
    except OSError as error:
        fix = "check its permissions"
        raise UserError(Fault(f"--calib_images {source}", why=f"it cannot be read: {error}", fix=fix)) from error
    samples, faults, example = [], [], EXAMPLE if text_only is None else TEXT_EXAMPLE
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{source} line {number}"
        try:
            samples.append(_parse_line(line, source.parent, where, text_only))
        except _LineError as error:
            faults.append(Fault(error.what, where=where, fix=error.fix))
    if not samples and not faults:
        faults = [Fault(f"--calib_images {source}", why="it has no lines", fix=f"write lines such as {example}")]
    if faults:
        raise UserError(*faults)
    return samples


class _LineError(Exception):
    def __init__(self, what: str, fix: str = "") -> None:
        self.what, self.fix = what, fix
        super().__init__(what)


def _parse_line(line: str, folder: Path, where: str, text_only: str | None) -> Conversation:
    """One line; paths are relative to `folder`. Raises _LineError with everything that is wrong in it."""
    keys, example = (LINE_KEYS, EXAMPLE) if text_only is None else (LINE_KEYS[1:], TEXT_EXAMPLE)
    try:
        values = parse_json(line)
    except ValueError as error:
        raise _LineError(f"not JSON: {error}", f"write {example}") from error
    if not isinstance(values, dict):
        raise _LineError("not a JSON object", f"write {example}")
    faults = list(_line_faults(values, text_only))
    if faults:
        raise _LineError("; ".join(faults), f"a line has the keys {', '.join(keys)}")
    names = values.get("image") or []
    images = tuple(ImageRef(folder / name) for name in ([names] if isinstance(names, str) else names))
    return Conversation.from_prompt(images, values.get("prompt", PROMPT), values.get("response"), where)


def _line_faults(values: dict[str, Any], text_only: str | None) -> Iterator[str]:
    for key in values:
        if "video" in key:
            yield NO_VIDEOS
        elif key not in LINE_KEYS:
            yield " ".join(filter(None, [f"unknown key {key!r}", did_you_mean(key, LINE_KEYS)]))
    for key in ("prompt", "response"):
        if not isinstance(values.get(key, ""), str | None if key == "response" else str):
            yield f"{key!r} is not text"
    image = values.get("image")
    names = [] if image is None else image if isinstance(image, list) else [image]
    if not all(isinstance(name, str) and name.strip() and "\0" not in name for name in names):
        yield "'image' is neither a path nor a list of paths"
    elif any(is_video(Path(name)) for name in names):
        yield NO_VIDEOS
    elif any("://" in name for name in names):
        yield "'image' is a URL; images are read from files only"
    if names and text_only is not None:
        yield f"'image' is given, but {text_only} has no vision tower"
    if not names and not values.get("prompt"):
        yield "neither 'image' nor 'prompt' is given" if text_only is None else "'prompt' is not given"
