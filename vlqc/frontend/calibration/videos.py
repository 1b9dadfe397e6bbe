"""Decodes frames of a video file, with PyAV: in software and one thread, so that the same file gives the same frames.

The file is opened here and handed to FFmpeg as an object. FFmpeg cannot open other files, nor addresses: playlists are
not among the formats that it may choose, and it has no protocols.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from vlqc.formatting import pluralize
from vlqc.frontend.calibration.images import ImageError, why_not_a_file

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

T = TypeVar("T")
# FFmpeg's names of the containers: mp4 and mov, mkv and webm, avi, mpg, flv, wmv.
CONTAINERS = ("mov", "matroska", "avi", "mpeg", "flv", "asf")
CODECS = (
    *("h264", "hevc", "av1", "vp8", "vp9", "mpeg4", "mpeg1video", "mpeg2video", "mjpeg", "h263", "flv1", "theora"),
    *("msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "wmv1", "wmv2", "wmv3", "vc1", "prores", "dnxhd", "dvvideo", "ffv1"),
    *("huffyuv", "png", "rawvideo", "cinepak"),
)
MAX_FRAMES = 1 << 17  # over an hour at 30 frames per second: all frames up to the last one that is used are decoded
MAX_SECONDS = 4 * 3600
MAX_SIDE = 8192  # pixels
MAX_PIXELS = 8192 * 4352  # of a frame
MAX_FPS = 1000
SHORTFALL = 0.5, 0.05  # seconds, and share of its duration, by which a file may end before the duration that it states
STATES_DURATION = "matroska"  # of the containers whose other properties do not show that the file was cut off


class VideoError(ImageError):
    """A video that cannot be used, with the reason."""


class FewerFramesError(Exception):
    """The decoder returns fewer frames than the file has packets. frames: how many."""

    def __init__(self, frames: int) -> None:
        self.frames = frames
        super().__init__(f"{frames} frames")


class _File:
    """A file for PyAV, which prints the exceptions that it gets: positions that are none are an error code instead."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.read, self.tell = file, file.read, file.tell

    def seek(self, offset: int, whence: int = 0) -> int:
        """The new position; -1 if there is no such position."""
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError, OverflowError):
            return -1


@dataclass(frozen=True)
class VideoStream:
    """Properties of a video. frames: how many it has; fps: frames per second, of variable rates the mean; height,
    width: pixels of an upright frame."""

    frames: int
    fps: float
    height: int
    width: int


def read_stream(path: Path) -> VideoStream:
    """The properties of the video stream of a file, from all of its packets and one decoded frame.

    Raises:
        VideoError: if it is no readable video in one of CONTAINERS and CODECS, damaged, cut off, or beyond the limits.
    """
    with _opened(path) as (container, stream):
        packets, end, first = 0, 0.0, None
        for packet in container.demux():
            if packet.size and packet.pts is not None and packet.time_base is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index != stream.index or not packet.size or packet.is_discard:
                continue
            if packet.is_corrupt:
                raise VideoError(f"it is damaged or cut off at frame {packets}")
            packets += 1
            if packets > MAX_FRAMES:
                raise VideoError(f"it has more than {MAX_FRAMES} frames; cut it into parts")
            if first is None:
                first = next(iter(packet.decode()), None)
        if first is None:
            first = next(iter(stream.codec_context.decode(None)), None)
        if first is None:
            raise VideoError("it has no frame that can be decoded")
        _check_complete(container, end)
        array = _upright(first)
        return VideoStream(packets, _check_rate(_rate(stream), packets), *array.shape[:2])


def decode_frames(path: Path, indices: Sequence[int], convert: Callable[["npt.NDArray[np.uint8]"], T]) -> list[T]:
    """The frames with these indices, ascending; convert: applied to each, upright RGB uint8 [height, width, 3].

    Raises:
        VideoError: if one of the frames up to the last is damaged.
        FewerFramesError: if the decoder returns no frame with the last index.
    """
    frames: list[T] = []
    with _opened(path) as (container, stream):
        decoded = 0
        for number, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise VideoError(f"frame {number} is damaged")
            while len(frames) < len(indices) and indices[len(frames)] == number:
                frames.append(convert(_upright(frame)))
            if len(frames) == len(indices):
                return frames
            decoded = number + 1
    raise FewerFramesError(decoded)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream; every error of PyAV inside becomes a VideoError."""
    import av

    if not path.is_file():
        raise VideoError(why_not_a_file(path))
    # Without a protocol, and only with these formats, FFmpeg opens no file but the one that it is given.
    options = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "none"}
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise VideoError("the file is empty")
            file.seek(0)
            try:
                container = av.open(_File(file), container_options=options, metadata_errors="replace")
            except (av.FFmpegError, IndexError) as error:
                raise VideoError("not a video, damaged, or of an unsupported format") from error
            with container:
                yield container, _video_stream(container)
    except (VideoError, FewerFramesError):
        raise
    except Exception as error:  # of damaged files: av.FFmpegError, and IndexError, UnicodeError and others in PyAV
        why = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        raise VideoError(f"it cannot be decoded: {why}") from error


def _video_stream(container: Any) -> Any:
    """The first video stream that is no cover image, with its decoder set up."""
    import av

    covers = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & covers]
    if not streams:
        raise VideoError("it has no video stream")
    stream, context = streams[0], streams[0].codec_context
    if context is None or context.codec.canonical_name not in CODECS:
        name = "unknown" if context is None else context.codec.canonical_name
        raise VideoError(f"its codec is {name}; convert it to H.264")
    if max(context.width, context.height) > MAX_SIDE or context.width * context.height > MAX_PIXELS:
        raise VideoError(f"its frames have {context.width} x {context.height} pixels, at most {MAX_PIXELS} are allowed")
    context.thread_type, context.thread_count = "NONE", 1
    context.options = {"max_pixels": str(MAX_PIXELS)}  # of later frames, whose size may be another one
    return stream


def _rate(stream: Any) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate or stream.base_rate
    if not rate:
        raise VideoError("it states no frame rate")
    return Fraction(rate)


def _check_rate(rate: Fraction, frames: int) -> float:
    if not 0 < rate <= MAX_FPS:
        raise VideoError(f"it states {float(rate):g} frames per second")
    if frames / rate > MAX_SECONDS:
        raise VideoError(f"it lasts {float(frames / rate):.0f} s, at most {MAX_SECONDS} s are allowed")
    return float(rate)


def _check_complete(container: Any, end: float) -> None:
    """VideoError if the packets of all streams end long before the duration that the header states."""
    if container.duration is None or STATES_DURATION not in container.format.name:
        return
    seconds = container.duration / 1e6
    if seconds - end > sum((SHORTFALL[0], SHORTFALL[1] * seconds)):
        raise VideoError(f"it is cut off after {end:.1f} of {pluralize(round(seconds), 'second')}")


def _upright(frame: Any) -> "npt.NDArray[np.uint8]":
    """RGB uint8 [height, width, 3], turned by the rotation that the file states (counterclockwise, in degrees)."""
    import numpy as np

    array = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(array, round(frame.rotation / 90)))
