"""Images and videos as calibration data names them: paths, file:// URLs, base64 data, with the settings of
qwen_vl_utils."""

import base64
import binascii
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from vlqc.formatting import brief
from vlqc.frontend.calibration.conversation import FrameSettings, ImageRef, PixelSettings, VideoRef
from vlqc.frontend.calibration.images import is_image, is_video

LONGEST_PATH, LONGEST_NAME = 4096, 255  # bytes, of Linux
SHORTEST_DATA = 100  # characters of an image in base64
BASE64_BEGINNINGS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")  # of JPEG, PNG, GIF and WebP
LARGEST_DATA = 64 * 2**20  # bytes of one base64 image
SOURCE_KEYS = ("url", "path", "image", "video")  # of an object that stands for a file
PIXEL_KEYS = tuple(field.name for field in fields(PixelSettings))
FRAME_KEYS = tuple(field.name for field in fields(FrameSettings))
LARGEST_SETTING = {  # bounds the memory of one sample
    "min_pixels": 2**24,
    "max_pixels": 2**26,
    "resized_height": 2**14,
    "resized_width": 2**14,
    "total_pixels": 2**31,
    "nframes": 2**16,
    "min_frames": 2**16,
    "max_frames": 2**16,
    "fps": 1000,
    "sample_fps": 1000,
    "raw_fps": 1000,
    "video_start": 10**6,
    "video_end": 10**6,
}
DECIMAL_SETTINGS = ("fps", "sample_fps", "raw_fps", "video_start", "video_end")
# The rates keep the seconds of temporal steps finite.
LEAST_SETTING = {"fps": 0.001, "sample_fps": 0.001, "raw_fps": 0.001, "video_start": 0}
SMALLEST = math.ulp(0.0)  # of the other settings: any value above 0


class EntryError(Exception):
    """An entry of a data file that cannot be used: what is wrong in it, and what to do."""

    def __init__(self, what: str, fix: str = "") -> None:
        self.what, self.fix = what, fix
        super().__init__(what)


def image_ref(value: Any, folder: Path, settings: Mapping[str, Any] | None = None, key: str = "image") -> ImageRef:
    """An image: a path relative to `folder`, a URL, a data URI, or an object with one of them.

    settings: may hold those of PixelSettings, beside other keys; key: names the value in messages. Raises EntryError.
    """
    if isinstance(value, dict) and isinstance(value.get("bytes"), str):  # as datasets are saved
        return ImageRef(_decode(value["bytes"], key), _pixel_settings(settings))
    return ImageRef(_locate(_source_of(value, key), folder, key), _pixel_settings(settings))


def image_refs(
    value: Any, folder: Path, settings: Mapping[str, Any] | None = None, key: str = "image"
) -> list[ImageRef]:
    """One image or a list of images. Nothing for None, or for an empty text."""
    values = [] if value in (None, "") else value if isinstance(value, list) else [value]
    return [image_ref(each, folder, settings, key) for each in values]


def video_ref(value: Any, folder: Path, settings: Mapping[str, Any] | None = None, key: str = "video") -> VideoRef:
    """A video: as `image_ref`, or a list of frames. settings: may hold those of PixelSettings and FrameSettings."""
    pixels, frames = _pixel_settings(settings), _frame_settings(settings)
    if isinstance(value, list):
        return VideoRef(tuple(image_ref(frame, folder, key=key) for frame in value), pixels, frames)
    source = _locate(_source_of(value, key), folder, key)
    if isinstance(source, bytes):
        raise EntryError(f"{key!r} is base64 data; videos are read from files only")
    return VideoRef(source, pixels, frames)


def video_refs(
    value: Any, folder: Path, settings: Mapping[str, Any] | None = None, key: str = "video"
) -> list[VideoRef]:
    """The videos of a value. A list of images is one video of these frames; items of other lists are videos: files,
    folders, or lists of frames. Nothing for None, an empty text or an empty list."""
    if value in (None, "", []):
        return []
    if not isinstance(value, list):
        return [video_ref(value, folder, settings, key)]
    frames = sum(map(_is_frame, value))
    if frames and any(isinstance(each, list) or is_video(Path(_name(each))) for each in value):
        raise EntryError(f"{key!r} lists both images and videos", "list the frames of one video, or videos")
    return [video_ref(each, folder, settings, key) for each in ([value] if frames else value)]


def _is_frame(value: Any) -> bool:
    """Whether an item of a list is an image, by its name or as data."""
    is_data = isinstance(value, dict) and isinstance(value.get("bytes"), str)
    return is_data or _name(value)[:5].lower() == "data:" or is_image(Path(_name(value)))


def _name(value: Any) -> str:
    """The path or URL of an item of a list; empty if it has none."""
    if isinstance(value, dict):
        value = next((value[key] for key in SOURCE_KEYS if value.get(key) is not None), None)
    return value if isinstance(value, str) else ""


def _source_of(value: Any, kind: str) -> str:
    """The path or URL of a value: itself, or that of an object such as {"url": ...}."""
    name = _name(value)
    if not name.strip() or "\0" in name:
        raise EntryError(f"{kind!r} is neither a path nor a list of paths")
    return name


def _locate(source: str, folder: Path, kind: str) -> Path | bytes:
    """The file that a path or file:// URL names, or the content of a data URI."""
    if source[:5].lower() == "data:":
        media_type, comma, data = source[5:].partition(",")
        if not comma or not media_type.lower().endswith(";base64"):
            raise EntryError(f"{kind!r} is a data URI without base64 data")
        return _decode(unquote(data), kind)
    if source[:5].lower() == "file:":
        # As qwen_vl_utils does, file://a/b.jpg is read as the relative path a/b.jpg.
        local = source[5:].removeprefix("//")
        local = local.removeprefix("localhost") if local.startswith("localhost/") else local
        # Many write names with % as they are: the decoded name counts, unless only the other one is there.
        is_literal = not os.path.exists(folder / unquote(local)) and os.path.exists(folder / local)
        source = local if is_literal else unquote(local)
    elif "://" in source[:32]:
        media = "videos" if "video" in kind else "images"
        raise EntryError(f"{kind!r} is a URL; {media} are read from files only", f"download the {media} first")
    is_data = _is_too_long(source) or (len(source) > SHORTEST_DATA and source.startswith(BASE64_BEGINNINGS))
    if not source.strip() or "\0" in source or is_data:
        fix = "base64 data begin with data:image/png;base64," if is_data else ""
        raise EntryError(f"{kind!r} is neither a path nor a data URI: text of {len(source):,} characters", fix)
    return folder / source


def _is_too_long(path: str) -> bool:
    """Whether no file can have this path."""
    encoded = path.encode(errors="surrogatepass")
    return len(encoded) > LONGEST_PATH or any(len(name) > LONGEST_NAME for name in encoded.split(b"/"))


def _decode(data: str, kind: str) -> bytes:
    if len(data) > LARGEST_DATA * 4 // 3:
        raise EntryError(f"{kind!r} has {len(data):,} characters of base64 data, at most {LARGEST_DATA * 4 // 3:,}")
    compact = "".join(data.split())
    try:
        decoded = base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise EntryError(f"{kind!r} is not valid base64 data ({len(data):,} characters)") from None
    if not decoded:
        raise EntryError(f"{kind!r} is a data URI without data")
    return decoded


def _pixel_settings(settings: Mapping[str, Any] | None) -> PixelSettings:
    pixels = PixelSettings(**_settings(settings or {}, PIXEL_KEYS))
    if pixels.min_pixels and pixels.max_pixels and pixels.min_pixels > pixels.max_pixels:
        raise EntryError(f"'min_pixels' is {pixels.min_pixels}, more than 'max_pixels', which is {pixels.max_pixels}")
    if (pixels.resized_height is None) != (pixels.resized_width is None):
        raise EntryError("'resized_height' and 'resized_width' are given together or not at all")
    return pixels


def _frame_settings(settings: Mapping[str, Any] | None) -> FrameSettings:
    frames = FrameSettings(**_settings(settings or {}, FRAME_KEYS))
    if frames.fps is not None and frames.nframes is not None:
        raise EntryError("'fps' and 'nframes' are both given; one of them determines the frames")
    return frames


def _settings(values: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    given = {key: values[key] for key in keys if values.get(key) is not None}
    for key, value in given.items():
        types = (int, float) if key in DECIMAL_SETTINGS else (int,)
        kind = "a number" if key in DECIMAL_SETTINGS else "an integer"
        is_number = isinstance(value, types) and not isinstance(value, bool)
        if not is_number or not (LEAST_SETTING.get(key, SMALLEST) <= value <= LARGEST_SETTING[key]):
            least = f"at least {LEAST_SETTING[key]}" if key in LEAST_SETTING else "greater than 0"
            limits = f"{least} and at most {LARGEST_SETTING[key]}"
            raise EntryError(f"{key!r} is {brief(value)}; it must be {kind} {limits}")
    return given
