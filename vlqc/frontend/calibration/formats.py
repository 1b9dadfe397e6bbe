"""The formats of calibration data: a table of readers, each recognised by a key. One entry -> one conversation."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlqc.formatting import brief, did_you_mean, enumerate_first, pluralize
from vlqc.frontend.calibration.conversation import Conversation, ImageRef, Part, Role, Turn, VideoRef
from vlqc.frontend.calibration.images import is_video
from vlqc.frontend.calibration.media import (
    FRAME_KEYS,
    PIXEL_KEYS,
    EntryError,
    image_ref,
    image_refs,
    video_ref,
    video_refs,
)

PROMPT = "Please describe this picture in detail."
VIDEO_PROMPT = "Please describe this video in detail."
EXAMPLE = '{"image": "cat.jpg", "prompt": "What is this?"}'
TEXT_EXAMPLE = '{"prompt": "What is this?"}'
LINE_KEYS = ("image", "video", "prompt", "response")
LISTED_FRAME_KEYS = ("sample_fps", "raw_fps")  # settings of frames; a video file has its own rate
FRAMES_KEY = "frames"  # a list of frames, as the value of "video" may be, too
IMAGE_TAG, VIDEO_TAG = "<image>", "<video>"
NAMED_IMAGE = re.compile(r"<img>([^<>]*)</img>")
ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
MESSAGE_KEYS = ("role", "from", "human")  # one of them makes an object a message rather than an entry
ROLE_KEYS, TEXT_KEYS = ("role", "from"), ("content", "value")  # of messages; of ShareGPT
CALL_KEYS = ("tool_calls", "function_call")  # of a message, whose text would be incomplete
TURN_KEYS = (*ROLE_KEYS, *TEXT_KEYS, "human", "assistant", *CALL_KEYS)
PART_KINDS = {  # type of a part of a message, or its key -> what it is
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
}
PART_SOURCES = ("image", "image_url", "video", "video_url", "url", "path")
EMPTY: tuple[Any, ...] = (None, "", [], {})  # values of a key that is not used
MEDIA_KEYS = ("images", "image", "videos", "video")
UNREADABLE = {"audios": "audio is not supported", "audio": "audio is not supported"}
OBJECT_TAGS = ("<bbox>", "<ref-object>")  # of ms-swift, which replaces them by the entries of `objects`


class _Place(str):
    """A tag that an image or video takes the place of; other texts that read the same are texts."""

    __slots__ = ()


@dataclass(frozen=True)
class EntryFormat(ABC):
    """One format. title: for messages; key: of an entry, which this format is recognised by."""

    title: str
    key: str

    @property
    @abstractmethod
    def keys(self) -> tuple[str, ...]:
        """The keys that are read. Others are ignored, with a note."""

    @abstractmethod
    def read(self, entry: Mapping[str, Any], folder: Path, tags_are_text: bool) -> list[Turn]:
        """The turns of an entry without nulls; paths are relative to `folder`. Raises EntryError.

        tags_are_text: <image>, <video> and <img> stand for nothing, unless the entry lists images or videos.
        """

    def ignored(self, entry: Mapping[str, Any]) -> list[str]:
        """Keys with a value that is not read."""
        return [key for key, value in entry.items() if key not in self.keys and value not in EMPTY]


@dataclass(frozen=True)
class LineFormat(EntryFormat):
    """{"image": path or [paths], "prompt": text, "response": text}. Unknown keys are errors."""

    @property
    def keys(self) -> tuple[str, ...]:
        return (*LINE_KEYS, FRAMES_KEY, *PIXEL_KEYS, *FRAME_KEYS)

    def read(self, entry: Mapping[str, Any], folder: Path, tags_are_text: bool) -> list[Turn]:
        if entry and not any(key in entry for key in self.keys):
            keys = f"the {'key' if len(entry) == 1 else 'keys'} {enumerate_first(list(entry))}"
            known = ", ".join(form.key for form in FORMATS)
            raise EntryError(f"{keys} {'belongs' if len(entry) == 1 else 'belong'} to no format", f"known are {known}")
        if unknown := self.ignored(entry):
            near = dict.fromkeys(filter(None, (did_you_mean(key, LINE_KEYS) for key in unknown)))
            keys = enumerate_first([brief(key, 60) for key in unknown])
            what = f"unknown {'key' if len(unknown) == 1 else 'keys'} {keys}"
            raise EntryError("; ".join([what, *near]))
        for key in ("prompt", "response"):
            _text(entry.get(key, ""), key)
        images = image_refs(entry.get("image"), folder, entry)
        videos = video_refs(entry.get("video"), folder, entry)
        if entry.get(FRAMES_KEY) not in EMPTY:
            videos.append(video_ref(entry[FRAMES_KEY], folder, entry, FRAMES_KEY))
        if not (images or videos or entry.get("prompt", "").strip()):
            raise EntryError("'prompt' is not given, and there is neither an image nor a video")
        self._check_settings(entry, images, videos)
        prompt = VIDEO_PROMPT if videos and not images else PROMPT
        turns = [Turn("user", (entry.get("prompt", prompt),))]
        if entry.get("response") is not None:
            turns.append(Turn("assistant", (entry["response"],)))
        return _place_media(turns, images, videos, tags_are_text=True)

    @staticmethod
    def _check_settings(entry: Mapping[str, Any], images: Sequence[ImageRef], videos: Sequence[VideoRef]) -> None:
        """EntryError for a setting that nothing in the entry has."""
        files = [video for video in videos if isinstance(video.source, Path) and is_video(video.source)]
        used = {
            **dict.fromkeys(PIXEL_KEYS, bool(images or videos)),
            **dict.fromkeys(FRAME_KEYS, bool(videos)),
            **dict.fromkeys(LISTED_FRAME_KEYS, len(files) < len(videos)),
        }
        if unused := [key for key, applies in used.items() if key in entry and not applies]:
            of_frames = videos and not set(unused) - set(LISTED_FRAME_KEYS)
            kind = "list or folder of frames" if of_frames else "video" if set(unused) <= set(FRAME_KEYS) else "image"
            raise EntryError(f"{enumerate_first(unused)} {'has' if len(unused) == 1 else 'have'} no {kind} to apply to")


@dataclass(frozen=True)
class TurnsFormat(EntryFormat):
    """{key: [{"role": ..., "content": ...}, ...], "images": [...], "videos": [...], "system": text}."""

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key, "system", *MEDIA_KEYS)

    def read(self, entry: Mapping[str, Any], folder: Path, tags_are_text: bool) -> list[Turn]:
        messages = entry[self.key]
        if not isinstance(messages, list) or not messages:
            raise EntryError(f"{self.key!r} is not a list of turns")
        turns = [turn for number, message in enumerate(messages, 1) for turn in _read_message(message, number, folder)]
        return _with_media(_with_system(turns, entry), entry, folder, tags_are_text)

    def ignored(self, entry: Mapping[str, Any]) -> list[str]:
        of_turns = (key for message in entry[self.key] for key in message if message[key] not in EMPTY)
        return super().ignored(entry) + [f"{key} of turns" for key in dict.fromkeys(of_turns) if key not in TURN_KEYS]


@dataclass(frozen=True)
class PairFormat(EntryFormat):
    """{key: text, response: text, "history": [[text, text], ...], "system": text, "images": [...]}.

    more: key of a text that follows the request on a new line.
    """

    response: str
    more: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self._request_keys, self.response, "history", "system", *MEDIA_KEYS)

    @property
    def _request_keys(self) -> list[str]:
        return [self.key] if self.more is None else [self.key, self.more]

    def read(self, entry: Mapping[str, Any], folder: Path, tags_are_text: bool) -> list[Turn]:
        texts = [_text(entry.get(key) or "", key) for key in self._request_keys]
        pairs = entry.get("history") or []
        if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise EntryError("'history' is not a list of pairs of texts")
        turns = [turn for pair in pairs for turn in _turns_of_pair(pair, "history")]
        turns.append(Turn("user", ("\n".join(filter(None, texts)),)))
        if entry.get(self.response) is not None:
            turns.append(Turn("assistant", (_text(entry[self.response], self.response),)))
        return _with_media(_with_system(turns, entry), entry, folder, tags_are_text)


LINES = LineFormat("image, prompt and response (vlqc)", "prompt")
FORMATS: tuple[EntryFormat, ...] = (  # the first whose key has a value reads an entry
    TurnsFormat("messages (Qwen, OpenAI, ms-swift, LLaMA-Factory)", "messages"),
    TurnsFormat("conversations (LLaVA, ShareGPT, LLaMA-Factory)", "conversations"),
    TurnsFormat("conversation (ms-swift)", "conversation"),
    PairFormat("query and response (ms-swift)", "query", "response"),
    PairFormat("instruction and output (Alpaca)", "instruction", "output", more="input"),
    PairFormat("question and answer", "question", "answer"),
    PairFormat("text and image (msModelSlim)", "text", "response"),
    LINES,
)


def read_entry(value: Any, folder: Path, where: str, text_only: str | None) -> tuple[EntryFormat, Conversation]:
    """One entry of a data file, in any format. where: names it.

    text_only: title of a model that takes no images; None for others. Raises EntryError.
    """
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        if not any(key in value[0] for key in MESSAGE_KEYS):
            raise EntryError(f"a list of {pluralize(len(value), 'object')} that are no turns; an entry is one object")
        value = {"messages": value}
    elif isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict):
        raise EntryError("not a JSON object", f"write {EXAMPLE if text_only is None else TEXT_EXAMPLE}")
    value = {key: each for key, each in value.items() if each is not None}  # tables have every key in every line
    form = _format_of(value)
    for key, why in UNREADABLE.items():
        if value.get(key) and form is not LINES:
            raise EntryError(f"{key!r} is given: {why}")
    try:
        conversation = Conversation(_without_empty_response(form.read(value, folder, text_only is not None)), where)
    except EntryError as error:
        keys = LINE_KEYS if text_only is None else LINE_KEYS[2:]
        fix = error.fix or (f"a line has the keys {', '.join(keys)}" if form is LINES else "")
        raise EntryError(error.what, fix) from error
    if all(turn.role == "system" for turn in conversation.turns):
        raise EntryError("there is neither a user turn nor an assistant turn")
    if _asks_nothing(conversation.turns):
        raise EntryError("the user asks nothing: there is neither text, nor an image, nor a video")
    if value.get("objects") and any(tag in turn.text for tag in OBJECT_TAGS for turn in conversation.turns):
        raise EntryError(f"{' and '.join(OBJECT_TAGS)} are not read", "write the boxes as the model writes them")
    if (conversation.images or conversation.videos) and text_only is not None:
        kind = "an image" if conversation.images else "a video"
        raise EntryError(f"{kind} is given, but {text_only} has no vision tower")
    return form, conversation


def _is_empty(turn: Turn) -> bool:
    return not any(part.strip() if isinstance(part, str) else True for part in turn.parts)


def _without_empty_response(turns: list[Turn]) -> tuple[Turn, ...]:
    """Without an empty turn of the assistant at the end: data sets for evaluation have one in place of none."""
    return tuple(turns[:-1] if turns[-1].role == "assistant" and _is_empty(turns[-1]) else turns)


def _asks_nothing(turns: Sequence[Turn]) -> bool:
    """Whether the last turn is an empty one of the user, or all of the user's turns are empty."""
    empty = [_is_empty(turn) for turn in turns if turn.role == "user"]
    return bool(empty) and (all(empty) or (empty[-1] and turns[-1].role == "user"))


def _format_of(entry: Mapping[str, Any]) -> EntryFormat:
    """The first format whose key has a value, or else whose key is there."""
    filled = next((form for form in FORMATS if entry.get(form.key) not in EMPTY), None)
    return filled or next((form for form in FORMATS if form.key in entry), LINES)


def _read_message(message: Any, number: int, folder: Path) -> Iterator[Turn]:
    """A message as one turn; {"human": text, "assistant": text} as two."""
    if isinstance(message, dict) and {"human", "assistant"} <= message.keys():
        yield from _turns_of_pair((message["human"], message["assistant"]), f"turn {number}")
        return
    role_key = next((key for key in ROLE_KEYS if isinstance(message, dict) and key in message), None)
    if role_key is None:
        raise EntryError(f"turn {number} is not an object with the keys role and content, or from and value")
    if calls := next((key for key in CALL_KEYS if message.get(key)), None):
        raise EntryError(f"turn {number} has {calls}; calls and turns of tools are not read")
    role = message[role_key]
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise EntryError(f"turn {number} has the role {brief(role)}; system, user and assistant turns are read")
    content = next((message[key] for key in TEXT_KEYS if key in message), None)
    if not isinstance(content, str | list):
        raise EntryError(f"the content of turn {number} is neither text nor a list of parts")
    parts = [content] if isinstance(content, str) else content
    yield Turn(ROLES[role.lower()], tuple(read for part in parts for read in _read_part(part, folder)))


def _turns_of_pair(texts: Sequence[Any], key: str) -> list[Turn]:
    request, response = (_text(text, key) for text in texts)
    return [Turn("user", (request,)), Turn("assistant", (response,))]


def _read_part(part: Any, folder: Path) -> Sequence[Part]:
    """A part of a message. An image without a source stands for the next one that the entry lists."""
    if isinstance(part, str):
        return [part]
    if not isinstance(part, dict):
        raise EntryError(f"a part of a turn is {brief(part)}, not an object")
    name = part.get("type") or next((key for key in PART_KINDS if part.get(key) is not None), None)
    kind = PART_KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise EntryError(f"a part of a turn has the type {brief(name)}; text, image and video are read")
    if kind == "text":
        return [_text(part.get("text"), "text")]
    key = next((key for key in PART_SOURCES if part.get(key) is not None), None)
    if key is None:
        return [_Place(IMAGE_TAG if kind == "image" else VIDEO_TAG)]
    return [image_ref(part[key], folder, part, key)] if kind == "image" else video_refs(part[key], folder, part, key)


def _read_text(text: str, folder: Path) -> list[Part]:
    """A text in which <img>path</img>, the form of Qwen-VL, stands for an image."""
    pieces = NAMED_IMAGE.split(text)  # text, path, text, ..., text
    return [
        image_ref(piece, folder, key="<img>") if number % 2 else piece for number, piece in enumerate(pieces) if piece
    ]


def _with_system(turns: list[Turn], entry: Mapping[str, Any]) -> list[Turn]:
    """With the system turn that the key `system` gives, unless the turns begin with one."""
    system = _text(entry.get("system") or "", "system")
    return [Turn("system", (system,)), *turns] if system and turns[0].role != "system" else turns


def _listed_media(entry: Mapping[str, Any], folder: Path) -> tuple[list[ImageRef], list[VideoRef]]:
    images = [image for key in MEDIA_KEYS[:2] for image in image_refs(entry.get(key), folder, key=key)]
    videos = [video for key in MEDIA_KEYS[2:] for video in video_refs(entry.get(key), folder, key=key)]
    return images, videos


def _with_media(turns: list[Turn], entry: Mapping[str, Any], folder: Path, tags_are_text: bool) -> list[Turn]:
    """With the images that texts name and those that the entry lists."""
    images, videos = _listed_media(entry, folder)
    if not tags_are_text:
        turns = _convert_texts(turns, lambda text: _read_text(text, folder))
    return _place_media(turns, images, videos, tags_are_text)


def _place_media(
    turns: list[Turn], images: Sequence[ImageRef], videos: Sequence[VideoRef], tags_are_text: bool
) -> list[Turn]:
    """Puts listed images and videos in place of the tags; without tags, before the text of the first user turn."""
    turns = _place(turns, VIDEO_TAG, videos, VideoRef, tags_are_text)
    return _place(turns, IMAGE_TAG, images, ImageRef, tags_are_text)


def _place(
    turns: list[Turn],
    tag: str,
    listed: Sequence[ImageRef | VideoRef],
    kind: type[ImageRef | VideoRef],
    tags_are_text: bool,
) -> list[Turn]:
    name = "image" if kind is ImageRef else "video"
    if listed or not tags_are_text:
        turns = _convert_texts(turns, lambda text: _split_at(text, tag))
    parts = [part for turn in turns for part in turn.parts]
    places = sum(_is_place(part, tag) for part in parts)
    if listed and not places:
        if inside := sum(isinstance(part, kind) for part in parts):
            what = f"{pluralize(inside, name)} in the turns, and {pluralize(len(listed), name)} listed beside them"
            raise EntryError(what, f"give every {name} once, or write {tag} where each listed one stands")
        first = next((turn for role in ("user", "assistant") for turn in turns if turn.role == role), turns[0])
        return [replace(turn, parts=(*listed, *turn.parts)) if turn is first else turn for turn in turns]
    if places and not listed and tags_are_text:
        raise EntryError(f"{pluralize(places, f'{name} part')} of a turn, for a model that takes text only")
    if places != len(listed):
        what = f"{pluralize(places, f'{tag} tag')} in the text, but {pluralize(len(listed), name)} listed"
        raise EntryError(what, "" if listed else f'add the key "{name}s" with a list of them')
    left = iter(listed)
    return [
        replace(turn, parts=tuple(next(left) if _is_place(part, tag) else part for part in turn.parts))
        for turn in turns
    ]


def _convert_texts(turns: list[Turn], convert: Callable[[str], Sequence[Part]]) -> list[Turn]:
    """With the parts that `convert` makes of texts. What the assistant writes is not converted, unless nobody asks
    (data for pre-training)."""

    def parts(part: Part) -> Sequence[Part]:
        return convert(part) if isinstance(part, str) and not isinstance(part, _Place) else [part]

    asked = any(turn.role == "user" for turn in turns)
    return [
        turn
        if asked and turn.role == "assistant"
        else replace(turn, parts=tuple(new for part in turn.parts for new in parts(part)))
        for turn in turns
    ]


def _split_at(text: str, tag: str) -> list[Part]:
    pieces = text.split(tag)
    return [part for number, piece in enumerate(pieces) for part in ([_Place(tag)] * (number > 0) + [piece]) if part]


def _is_place(part: Part, tag: str) -> bool:
    return isinstance(part, _Place) and part == tag


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise EntryError(f"{key!r} is not text")
    return value
