"""Fits the images and videos of a sample to a number of tokens: fewer frames first, then smaller images and frames."""

from collections.abc import Sequence
from dataclasses import dataclass

from vlqc.families.inputs.video_processing import VideoTokens
from vlqc.frontend.calibration.conversation import Conversation
from vlqc.frontend.calibration.image_budget import split_budget
from vlqc.frontend.calibration.processor import SampleProcessor
from vlqc.frontend.calibration.video_frames import VideoPlan

FEWEST_FRAMES = 4  # of a video; frames become smaller before there are fewer


@dataclass(frozen=True)
class Fitted:
    """What fits: the most image tokens of every image, None for its full size; the videos."""

    image_limits: tuple[int | None, ...]
    videos: tuple[VideoPlan, ...]


class TooLongError(Exception):
    """Even the smallest images and videos do not fit. text, media: tokens of the text, and of the smallest images and
    videos."""

    def __init__(self, text: int, media: int) -> None:
        self.text, self.media = text, media
        super().__init__(f"{text} + {media} tokens")


def fit_sample(
    processor: SampleProcessor,
    conversation: Conversation,
    image_tokens: Sequence[int],
    videos: Sequence[VideoPlan],
    max_tokens: int,
) -> Fitted:
    """The largest number of frames, or else the largest size, for which a sample has at most so many tokens.

    image_tokens: of every image at its full size; videos: as their settings have them.

    Raises:
        TooLongError: if none fits.
        ValueError: as `SampleProcessor.build_sample`.
        ImageError: as `count_tokens`.
    """

    def tokens(limit: int) -> tuple[int, list[VideoPlan]]:
        """Of the sample if no video has more frames than that, and the videos."""
        plans = [plan.with_frames(limit) for plan in videos]
        counts = [count_tokens(processor, plan) for plan in plans]
        return processor.tokenize(conversation, image_tokens, counts)["input_ids"].shape[1], plans

    most = max([FEWEST_FRAMES, *(plan.frames for plan in videos)])
    limits = range(FEWEST_FRAMES, most + 1, max([1, *(plan.processing.form.frame_factor for plan in videos)]))
    if (length := tokens(limits[0])[0]) > max_tokens:
        return _shrink(processor, image_tokens, tokens(limits[0])[1], length, max_tokens)
    low, high = 0, len(limits) - 1  # limits[low] fits
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tokens(limits[middle])[0] <= max_tokens else (low, middle - 1)
    return Fitted((None,) * len(image_tokens), tuple(tokens(limits[low])[1]))


def count_tokens(processor: SampleProcessor, plan: VideoPlan) -> VideoTokens:
    """Tokens of a video. Raises ImageError if the image processor does not take frames of this size."""
    return processor.video_tokens(plan.sampled, plan.frame_height, plan.frame_width)


def _shrink(
    processor: SampleProcessor, image_tokens: Sequence[int], videos: Sequence[VideoPlan], length: int, max_tokens: int
) -> Fitted:
    """All images, and all temporal steps of videos, get the same limit. length: tokens of the sample as it is."""
    counts = [count_tokens(processor, plan) for plan in videos]
    sizes = [*image_tokens, *(count.per_step for count in counts for _ in count.times)]
    text, smallest = length - sum(sizes), processor.min_image_tokens if sizes else 0
    budgets = split_budget(sizes, max_tokens - text, smallest)
    if not budgets:
        raise TooLongError(text, smallest * len(sizes))
    limits = [budget if budget < size else None for budget, size in zip(budgets, sizes, strict=True)]
    plans, first = [], len(image_tokens)
    for plan, count in zip(videos, counts, strict=True):
        limit = limits[first]
        first += len(count.times)
        ratio = plan.frame_height / plan.frame_width
        plans.append(plan if limit is None else plan.with_size(*processor.fit_frame(ratio, limit)))
    return Fitted(tuple(limits[: len(image_tokens)]), tuple(plans))
