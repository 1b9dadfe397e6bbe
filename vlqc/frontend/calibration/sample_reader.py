"""Reads the images and videos of one sample and builds its model inputs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from vlqc.errors import Fault, InternalError
from vlqc.families.inputs.image_processing import Patches
from vlqc.families.inputs.video_processing import VideoPatches
from vlqc.formatting import brief, pluralize
from vlqc.frontend.calibration.conversation import Conversation, ImageRef, VideoRef
from vlqc.frontend.calibration.images import MISSING, ImageError, read_image
from vlqc.frontend.calibration.processor import SampleProcessor
from vlqc.frontend.calibration.token_budget import Fitted, TooLongError, count_tokens, fit_sample
from vlqc.frontend.calibration.video_frames import VideoPlan, plan_video
from vlqc.frontend.calibration.videos import FewerFramesError, VideoError

T = TypeVar("T", bound=ImageRef | VideoRef | VideoPlan)
R = TypeVar("R")


@dataclass(frozen=True)
class ReadSample:
    """Model inputs; the number of images and of videos in them; how many images were resized, and how many videos have
    fewer or smaller frames, to fit the token budget; how many videos have fewer frames by the limit of their number;
    how many have one frame only."""

    tensors: dict[str, torch.Tensor]
    images: int
    resized: int = 0
    videos: int = 0
    reduced: int = 0
    thinned: int = 0
    still: int = 0


@dataclass(frozen=True)
class BadMedia:
    """An image or video that cannot be used. where: names the sample; why: the reason."""

    image: ImageRef | VideoRef
    where: str
    why: str

    @property
    def is_missing(self) -> bool:
        return self.why == MISSING

    @property
    def fault(self) -> Fault:
        return Fault(f"{self.name} cannot be used", where=self.where, why=self.why)

    @property
    def name(self) -> str:
        return f"{'image' if isinstance(self.image, ImageRef) else 'video'} {self.image.name}"


class _OtherFramesError(Exception):
    """A video has another number of frames than its packets suggest."""

    def __init__(self, video: VideoRef, frames: int) -> None:
        self.video, self.frames = video, frames
        super().__init__()


class UnusableSampleError(Exception):
    """Faults of the images and of the text of one sample."""

    def __init__(self, bad_media: Sequence[BadMedia] = (), text_faults: Sequence[Fault] = ()) -> None:
        self.bad_media, self.text_faults = bad_media, text_faults
        super().__init__()


def read_sample(
    processor: SampleProcessor, source: Conversation, max_tokens: int | None, max_frames: int | None
) -> ReadSample:
    """Reads the images and videos of one sample and builds its model inputs.

    Raises UnusableSampleError with all of its faults.
    """
    frames: dict[VideoRef, int] = {}  # of files that have other numbers of frames than their packets suggest
    for _ in range(len(source.videos) + 1):
        try:
            return _read_media(processor, source, max_tokens, max_frames, frames)
        except _OtherFramesError as error:
            frames[error.video] = error.frames
    raise InternalError(f"{source.where}: frames are counted again and again")


def _read_media(
    processor: SampleProcessor,
    source: Conversation,
    max_tokens: int | None,
    max_frames: int | None,
    frames: Mapping[VideoRef, int],
) -> ReadSample:
    """As `read_sample`, with the numbers of frames that are known. Raises _OtherFramesError for another one."""

    def read(ref: ImageRef | VideoRef) -> VideoPlan | Patches:
        if isinstance(ref, VideoRef):
            plan = plan_video(ref, processor.video_processing, max_frames, frames.get(ref))
            if max_tokens is not None:
                count_tokens(processor, plan)  # may raise ImageError, which `_each` attributes to this video
            return plan
        return processor.process_image(read_image(ref.source), pixels=ref.pixels)

    media: list[ImageRef | VideoRef] = [*source.videos, *source.images]
    found = _each(source, media, read)
    plans = [each for each in found if isinstance(each, VideoPlan)]
    patches = [each for each in found if not isinstance(each, VideoPlan)]
    tokens = [processor.image_tokens(each) for each in patches]
    fitted = Fitted((None,) * len(tokens), tuple(plans))
    if max_tokens is not None and _length(processor, source, tokens, plans) > max_tokens:
        with _text_faults(source):
            try:
                fitted = fit_sample(processor, source, tokens, plans, max_tokens)
            except TooLongError as error:
                fault = _too_long(source, error.text, error.media, max_tokens)
                raise UnusableSampleError(text_faults=[fault]) from error
        if any(limit is not None for limit in fitted.image_limits):
            # Read again rather than kept: full-size images of a whole sample may not fit in memory.
            patches = _read_images(processor, source, fitted.image_limits)
    videos = _each(source, fitted.videos, lambda plan: _read_video(processor, plan))
    with _text_faults(source):
        tensors = processor.build_sample(patches, source, videos)
    resized = sum(limit is not None for limit in fitted.image_limits)
    reduced = sum(before != after for before, after in zip(plans, fitted.videos, strict=True))
    thinned, still = sum(plan.thinned for plan in plans), sum(len(plan.listed) == 1 for plan in plans)
    return ReadSample(tensors, len(patches), resized, len(videos), reduced, thinned, still)


def _read_video(processor: SampleProcessor, plan: VideoPlan) -> VideoPatches:
    try:
        return processor.process_video(plan.read(), plan.sampled)
    except FewerFramesError as error:
        if error.frames == 0 or plan.stream is None or error.frames >= plan.stream.frames:
            raise VideoError("it has no frame that can be decoded") from error
        raise _OtherFramesError(plan.ref, error.frames) from error


def _length(
    processor: SampleProcessor, source: Conversation, image_tokens: Sequence[int], videos: Sequence[VideoPlan]
) -> int:
    with _text_faults(source):
        counts = [count_tokens(processor, plan) for plan in videos]
        return processor.tokenize(source, image_tokens, counts)["input_ids"].shape[1]


def _read_images(processor: SampleProcessor, source: Conversation, limits: Sequence[int | None]) -> list[Patches]:
    """Patches of every image, with at most so many image tokens each where there is a limit."""
    left = iter(limits)
    return _each(
        source, source.images, lambda image: processor.process_image(read_image(image.source), next(left), image.pixels)
    )


def _each(source: Conversation, media: Sequence[T], read: Callable[[T], R]) -> list[R]:
    """The results for all images or videos of a sample. Raises UnusableSampleError with all that cannot be used."""
    results, bad_media = [], []
    for each in media:
        try:
            results.append(read(each))
        except ImageError as error:
            bad_media.append(BadMedia(each.ref if isinstance(each, VideoPlan) else each, source.where, str(error)))
    if bad_media:
        raise UnusableSampleError(bad_media)
    return results


@contextmanager
def _text_faults(source: Conversation) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        fault = Fault(f"the prompt {brief(source.request, 60)}", where=source.where, why=str(error))
        raise UnusableSampleError(text_faults=[fault]) from error


def _too_long(source: Conversation, text: int, images: int, max_tokens: int) -> Fault:
    what = f"the text of the prompt {brief(source.request, 60)} alone has {pluralize(text, 'token')}"
    if text <= max_tokens:
        media = " and ".join(kind for kind, given in (("images", source.images), ("videos", source.videos)) if given)
        what = f"the sample needs at least {pluralize(images, 'token')} for its {media} and {text} for its text"
    fix = f"shorten the text, or give --max_tokens {text + images} or more"
    return Fault(what, where=source.where, why=f"--max_tokens is {max_tokens}", fix=fix)
