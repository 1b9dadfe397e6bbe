"""Chooses the frames of a video, a folder of frames or a list of frames, and reads them at the size that they need."""

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from vlqc.families.inputs.video_processing import SampledFrames, VideoProcessing
from vlqc.frontend.calibration.conversation import ImageRef, PixelSettings, VideoRef
from vlqc.frontend.calibration.images import ImageError, is_image, is_video, read_image
from vlqc.frontend.calibration.videos import VideoError, VideoStream, decode_frames, read_stream

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

LIST_FPS = 2.0  # of a list of frames that does not state its own
MAX_LISTED = 1 << 16  # frames of a folder or list
LIST_KEYS_OF_FILES = ("video_start", "video_end")


@dataclass(frozen=True)
class VideoPlan:
    """Which frames of a video are read, and at which size. Nothing is decoded yet.

    first, last: between which frames are selected; frame_height, frame_width: of the model inputs. stream: of a file;
    listed: the frames of a folder or list. thinned: whether it has fewer frames than its settings ask for.
    """

    ref: VideoRef
    processing: VideoProcessing
    sampled: SampledFrames
    first: int
    last: int
    frame_height: int
    frame_width: int
    stream: VideoStream | None = None
    listed: tuple[ImageRef, ...] = ()
    thinned: bool = False

    @property
    def frames(self) -> int:
        """Number of frames that are read."""
        return len(self.sampled.indices)

    def with_frames(self, count: int) -> Self:
        """With at most so many frames, of the same size, evenly spread. count: a multiple of frame_factor."""
        if count >= self.frames:
            return self
        sample_fps = self.sampled.sample_fps * count / self.frames
        indices = self.processing.spread(self.first, self.last, count)
        return replace(self, sampled=replace(self.sampled, indices=indices, sample_fps=sample_fps))

    def with_size(self, height: int, width: int) -> Self:
        """With frames of another size."""
        return replace(self, frame_height=height, frame_width=width)

    def read(self) -> Tensor:
        """The frames, uint8 [N, 3, frame_height, frame_width].

        Raises:
            VideoError, ImageError: if a frame cannot be read.
            FewerFramesError: if the file has fewer frames than its packets suggest.
        """
        if self.stream is not None and isinstance(self.ref.source, Path):
            return torch.stack(decode_frames(self.ref.source, self.sampled.indices, self._resize))
        shapes, frames = set(), []  # one frame at a time has its full size
        for index in self.sampled.indices:
            image = self.listed[min(index, len(self.listed) - 1)]
            array = _read_listed(image, self.processing, self.ref.pixels)
            shapes.add(array.shape[:2])
            if len(shapes) > 1:
                shown = " and ".join(f"{width} x {height}" for height, width in sorted(shapes))
                raise VideoError(f"its frames have different sizes, {shown} pixels")
            frames.append(self._resize(array))
        return torch.stack(frames)

    def _resize(self, array: "npt.NDArray[np.uint8]") -> Tensor:
        frame = torch.from_numpy(array).permute(2, 0, 1)
        return self.processing.resize(frame, self.frame_height, self.frame_width)


def plan_video(
    ref: VideoRef, processing: VideoProcessing, max_frames: int | None = None, frames: int | None = None
) -> VideoPlan:
    """Chooses the frames by the settings of the video.

    max_frames: at most so many are used, but at least those of one temporal step; frames: that the file has,
    if not as many as its packets suggest.

    Raises:
        VideoError: if the video, a folder or a frame cannot be used.
    """
    try:
        if isinstance(ref.source, Path) and not ref.source.is_dir():
            return _plan_file(ref, ref.source, processing, max_frames, frames)
        return _plan_list(ref, processing, max_frames)
    except ValueError as error:  # of the settings and of extreme shapes
        raise VideoError(str(error)) from error
    except OSError as error:  # of paths, without the name, which may be long
        raise VideoError(error.strerror or type(error).__name__) from error


def _plan_file(
    ref: VideoRef, path: Path, processing: VideoProcessing, max_frames: int | None, frames: int | None
) -> VideoPlan:
    stream, settings = read_stream(path), ref.frames
    if frames is not None:
        stream = replace(stream, frames=frames)
    first, last = processing.frame_range(stream.frames, stream.fps, settings.video_start, settings.video_end)
    total = last - first + 1
    count = processing.frame_count(
        total,
        stream.fps,
        fps=settings.fps,
        nframes=settings.nframes,
        min_frames=settings.min_frames,
        max_frames=settings.max_frames,
    )
    used = _limited(count, max_frames, processing)
    size = processing.frame_size(stream.height, stream.width, used, **_pixels(ref))
    sampled = SampledFrames(processing.spread(first, last, used), stream.fps, used / total * stream.fps)
    return VideoPlan(ref, processing, sampled, first, last, *size, stream=stream, thinned=used < count)


def _plan_list(ref: VideoRef, processing: VideoProcessing, max_frames: int | None) -> VideoPlan:
    """All frames of a folder or list, at most as many as the settings allow; of an odd number the last one is repeated.

    The frames are numbered at raw_fps and follow each other at sample_fps, as in qwen_vl_utils.
    """
    settings, listed = ref.frames, _listed(ref)
    if given := [key for key in LIST_KEYS_OF_FILES if getattr(settings, key) is not None]:
        verb = "is" if len(given) == 1 else "are"
        raise VideoError(f"{' and '.join(given)} {verb} for video files, not for lists of frames")
    count = -(-len(listed) // processing.form.frame_factor) * processing.form.frame_factor
    sample_fps = settings.sample_fps or settings.fps or LIST_FPS
    array = _read_listed(listed[0], processing, ref.pixels)
    limit = settings.max_frames or processing.form.max_frames
    if settings.nframes is not None:
        limit = round(settings.nframes / processing.form.frame_factor) * processing.form.frame_factor  # as of files
    wished = _limited(count, limit, processing)
    used = _limited(wished, max_frames, processing)
    height, width = array.shape[:2]
    size = processing.frame_size(height, width, used, **_pixels(ref))
    sampled = SampledFrames(tuple(range(count)), settings.raw_fps or sample_fps, sample_fps)
    plan = VideoPlan(ref, processing, sampled, 0, len(listed) - 1, *size, listed=listed, thinned=used < wished)
    return plan.with_frames(used)


def _limited(count: int, limit: int | None, processing: VideoProcessing) -> int:
    """At most so many frames, but at least those of one temporal step; a multiple of these."""
    factor = processing.form.frame_factor
    return count if limit is None else min(count, max(limit // factor, 1) * factor)


def _listed(ref: VideoRef) -> tuple[ImageRef, ...]:
    """The frames of a list, or the images in a folder: by name, numbers in names by value."""
    if isinstance(ref.source, Path):
        files = [path for path in ref.source.iterdir() if not path.is_dir()]
        if videos := sorted(path.name for path in files if is_video(path)):
            raise VideoError(f"it is a folder with the video {videos[0]}: name the file, or a folder of frames")
        paths = [path for path in files if is_image(path)]
        listed = tuple(ImageRef(path) for path in sorted(paths, key=_by_number))
    else:
        listed = ref.source
    if not listed:
        raise VideoError("it has no frames" + (": the folder has no images" if isinstance(ref.source, Path) else ""))
    if len(listed) > MAX_LISTED:
        raise VideoError(f"it has {len(listed)} frames, at most {MAX_LISTED} are allowed")
    return listed


def _by_number(path: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], path.name


def _read_listed(image: ImageRef, processing: VideoProcessing, pixels: PixelSettings) -> "npt.NDArray[np.uint8]":
    """A listed frame, resized once as an image, RGB uint8 [height, width, 3]."""
    import numpy as np

    try:
        opened = read_image(image.source)
    except ImageError as error:
        raise VideoError(f"frame {image.name}: {error}") from error
    height, width = processing.listed_frame_size(opened.height, opened.width, **asdict(pixels))
    return np.array(opened.resize((width, height)))


def _pixels(ref: VideoRef) -> dict[str, int | None]:
    return asdict(ref.pixels) | {"total_pixels": ref.frames.total_pixels}
