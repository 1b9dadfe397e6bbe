"""Reads a data file of calibration samples: JSON lines, or JSON with one entry or a list of them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlqc.errors import Fault, UserError, first_faults
from vlqc.files import parse_json
from vlqc.formatting import enumerate_first, excerpt, pluralize
from vlqc.frontend.calibration.conversation import Conversation, ImageRef
from vlqc.frontend.calibration.formats import EXAMPLE, MESSAGE_KEYS, TEXT_EXAMPLE, read_entry
from vlqc.frontend.calibration.images import is_video
from vlqc.frontend.calibration.media import EntryError

DATA_SUFFIXES = (".jsonl", ".json")
NO_VIDEOS = "extract frames, and pass those as images"
AS_TEXT = "save it as UTF-8, one JSON object per line, or a list of them as .json"
FILE_KEYS = ("file_name", "dataset_path")  # of a data set in dataset_info.json of LLaMA-Factory, of ms-swift
DATASET_KEYS = (*FILE_KEYS, "hf_hub_url", "ms_hub_url", "script_url", "ms_dataset_id", "hf_dataset_id")


@dataclass(frozen=True)
class SampleList:
    """The samples of a source in a fixed order, and notes for the user on how it was read."""

    conversations: list[Conversation]
    notes: list[str] = field(default_factory=list)


def is_data_file(path: Path) -> bool:
    """Whether the name is that of a data file."""
    return path.suffix.lower() in DATA_SUFFIXES and not path.name.startswith(".")


def read_data_file(source: Path, text_only: str | None, no_videos: str | None = None) -> SampleList:
    """Every entry of a file as a conversation.

    text_only, no_videos: title of a model that takes no images, or no videos; None for others. Raises UserError with
    the faulty entries.
    """
    what, example = f"--calib_images {source}", EXAMPLE if text_only is None else TEXT_EXAMPLE
    conversations, faults = [], []
    formats: Counter[str] = Counter()
    media: dict[str, list[int]] = {}  # numbers of images and of videos
    ignored: dict[str, None] = {}
    for where, value in _entries(source, _read_text(source)):
        try:
            if isinstance(value, ValueError):
                raise EntryError(f"not JSON: {value}", f"write {example}")
            form, conversation = read_entry(value, source.parent, where, text_only)
            if conversation.videos and no_videos is not None:
                raise EntryError(f"a video is given, but {no_videos} takes no videos", NO_VIDEOS)
            if video := next(filter(_is_video, conversation.images), None):
                raise EntryError(f"the image {excerpt(video.name)} is a video", 'write "video" in place of "image"')
        except EntryError as error:
            faults.append(Fault(error.what, where=where, fix=error.fix))
            continue
        conversations.append(conversation)
        formats[form.title] += 1
        counts = media.setdefault(form.title, [0, 0])
        counts[0], counts[1] = counts[0] + len(conversation.images), counts[1] + len(conversation.videos)
        entry = {"messages": value} if isinstance(value, list) else value
        ignored.update(dict.fromkeys(form.ignored(entry) if isinstance(entry, dict) else []))
    if not conversations and not faults:
        faults = [Fault(what, why="it has no entries", fix=f"write lines such as {example}")]
    if faults:
        raise UserError(*first_faults(faults, "faulty entries"))
    return SampleList(conversations, _notes(formats, media, list(ignored)))


def _is_video(image: ImageRef) -> bool:
    return isinstance(image.source, Path) and is_video(image.source)


def _read_text(source: Path) -> str:
    what = f"--calib_images {source}"
    try:
        return source.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        why = f"it is not UTF-8 text: {error.reason} at byte {error.start}"
        raise UserError(Fault(what, why=why, fix=AS_TEXT)) from error
    except OSError as error:
        raise UserError(Fault(what, why=f"it cannot be read: {error}", fix="check its permissions")) from error


def _entries(source: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Where each entry stands, and its JSON value, or the ValueError of a line that is not JSON.

    The content decides, not the suffix: many .json files hold one object per line, some .jsonl files one list.
    """
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    is_json = source.suffix.lower() == ".json" or (lines and lines[0][1].lstrip().startswith("["))
    if lines and is_json:
        try:
            value = parse_json(text)
        except ValueError as error:
            if isinstance(_parse_line(lines[0][1]), ValueError):
                raise UserError(
                    Fault(f"--calib_images {source}", why=f"it is not JSON: {error}", fix=AS_TEXT)
                ) from error
        else:
            yield from _top_level(source, value)
            return
    for number, line in lines:
        yield f"{source} line {number}", _parse_line(line)


def _parse_line(line: str) -> Any:
    try:
        return parse_json(line, is_line=True)
    except ValueError as error:
        return error


def _top_level(source: Path, value: Any) -> Iterator[tuple[str, Any]]:
    """The entries of a list, with their index from 0; a list of messages, or an object, is one entry."""
    entries = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else []
    if entries and all(isinstance(each, dict) and any(key in each for key in DATASET_KEYS) for each in entries):
        files = [str(source.parent / str(each[key])) for each in entries for key in FILE_KEYS if key in each]
        why = "it describes data sets and holds no samples"
        fix = f"pass the data file itself{': ' + ' or '.join(files[:3]) if files else ''}"
        raise UserError(Fault(f"--calib_images {source}", why=why, fix=fix))
    is_conversation = entries and isinstance(entries[0], dict) and any(key in entries[0] for key in MESSAGE_KEYS)
    if not isinstance(value, list) or is_conversation:
        yield str(source), value
        return
    for index, entry in enumerate(value):
        yield f"{source} index {index}", entry


def _notes(formats: Mapping[str, int], media: Mapping[str, Sequence[int]], ignored: list[str]) -> list[str]:
    counts = []
    for title, count in formats.items():
        given = [
            pluralize(number, kind) for number, kind in zip(media[title], ("image", "video"), strict=True) if number
        ]
        with_media = f" with {' and '.join(given)}" if given else ""
        counts.append(f"{pluralize(count, 'sample')}{with_media} in the format {title}")
    notes = [f"calibration data: {', '.join(counts)}"]
    if ignored:
        notes.append(f"calibration data: ignored {'key' if len(ignored) == 1 else 'keys'} {enumerate_first(ignored)}")
    return notes
