"""Calibration samples before they are read: conversations of text, images and videos, in the field's terms.

Every format of calibration data is read into these types. Settings have the names and meanings of qwen_vl_utils.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

LONGEST_NAME = 300  # characters of a path in a message
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class PixelSettings:
    """Size of an image or of every frame of a video, in pixels; None: the default. A resized height and width replace
    the file's own before the limits apply."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None


@dataclass(frozen=True)
class FrameSettings:
    """Which frames of a video are used; None: the default.

    fps or nframes: how many; min_frames, max_frames: limits of that number; video_start, video_end: seconds;
    total_pixels: of all frames; sample_fps: frames per second of a list of frames; raw_fps: of the video that these
    frames were taken from.
    """

    fps: float | None = None
    nframes: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    video_start: float | None = None
    video_end: float | None = None
    total_pixels: int | None = None
    sample_fps: float | None = None
    raw_fps: float | None = None


@dataclass(frozen=True)
class ImageRef:
    """An image that is not read yet. source: its file, or the bytes of an image file."""

    source: Path | bytes
    pixels: PixelSettings = PixelSettings()

    @property
    def name(self) -> str:
        """For messages: the path; never the data itself."""
        return _shorten(self.source) if isinstance(self.source, Path) else f"of {len(self.source):,} bytes in base64"


@dataclass(frozen=True)
class VideoRef:
    """A video that is not read yet. source: its file, a folder of frames, or the frames in order."""

    source: Path | tuple[ImageRef, ...]
    pixels: PixelSettings = PixelSettings()
    frames: FrameSettings = FrameSettings()

    @property
    def name(self) -> str:
        """For messages: the path."""
        return _shorten(self.source) if isinstance(self.source, Path) else f"of {len(self.source)} frames"


def _shorten(path: Path) -> str:
    text = str(path)
    return text if len(text) <= LONGEST_NAME else f"{text[:LONGEST_NAME]}... ({len(text):,} characters)"


Part = str | ImageRef | VideoRef


@dataclass(frozen=True)
class Turn:
    """One message of a conversation, its parts in order."""

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Conversation:
    """One sample. where: names its file and line in messages; empty for a file that is a sample by itself."""

    turns: tuple[Turn, ...]
    where: str = ""

    @classmethod
    def from_prompt(cls, images: tuple[ImageRef, ...], prompt: str) -> Self:
        """A user turn with the images before the prompt."""
        return cls((Turn("user", (*images, prompt)),))

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """In the order in which they occur."""
        return tuple(part for part in self._parts() if isinstance(part, ImageRef))

    @property
    def videos(self) -> tuple[VideoRef, ...]:
        """In the order in which they occur."""
        return tuple(part for part in self._parts() if isinstance(part, VideoRef))

    @property
    def is_complete(self) -> bool:
        """Whether it ends with the assistant's turn; otherwise the generation prompt follows."""
        return self.turns[-1].role == "assistant"

    @property
    def request(self) -> str:
        """The text of the last user turn, which names the sample in messages."""
        return next((turn.text for turn in reversed(self.turns) if turn.role == "user"), "")

    def _parts(self) -> Iterator[Part]:
        return (part for turn in self.turns for part in turn.parts)
