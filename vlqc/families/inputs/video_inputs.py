"""Model inputs of families with images and videos: those of images, and the patches of all videos in one tensor."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlqc.errors import Fault
from vlqc.families.inputs.image_inputs import (
    IMAGE_INPUTS,
    VIDEO_INPUTS,
    ImageInputs,
    InputLayout,
    crop_first,
    pixel_faults,
)
from vlqc.families.inputs.image_processing import ImageProcessing
from vlqc.families.inputs.input_format import ImageFormat, TextFormat, VideoFormat
from vlqc.families.inputs.text_inputs import Sample, describe
from vlqc.families.inputs.video_processing import VideoProcessing
from vlqc.formatting import pluralize

SECONDS = "second_per_grid_ts"  # [videos] float: seconds between two temporal steps
MEDIA = {"image": IMAGE_INPUTS, "video": VIDEO_INPUTS}
MODALITY = {"image": 1, "video": 2}
LARGEST_STEP = 1e4  # seconds


class VideoInputs(ImageInputs):
    """As those of images; with videos also pixel_values_videos [P, C*T*p*p] float (P patches of all videos, ordered by
    temporal steps), video_grid_thw [videos, 3] int64, and for families that have it second_per_grid_ts [videos]."""

    refused: ClassVar[Mapping[str, str]] = {}
    integers: ClassVar[tuple[str, ...]] = (*ImageInputs.integers, VIDEO_INPUTS[1])
    description: ClassVar[str] = f"{ImageInputs.description}, and with videos pixel_values_videos and video_grid_thw"

    def __init__(self, title: str, form: TextFormat, images: ImageFormat, videos: VideoFormat) -> None:
        super().__init__(title, form, images)
        self.videos = VideoProcessing(ImageProcessing(images), videos)
        self.timestamps = videos.timestamps
        seconds = (SECONDS,) if videos.seconds else ()
        self.optional = (*ImageInputs.optional, *VIDEO_INPUTS, *seconds)  # type: ignore[misc]

    # ---- checks ------------------------------------------------------------------------------------------------------

    def _required_of(self, sample: Sample) -> tuple[str, ...]:
        needed = super()._required_of(sample)
        return (*needed, *VIDEO_INPUTS) if any(key in sample for key in (*VIDEO_INPUTS, SECONDS)) else needed

    def _shown_names(self) -> tuple[str, ...]:
        return (*super()._shown_names(), *(name for name in self.optional if name in (*VIDEO_INPUTS, SECONDS)))

    def _image_faults(self, where: str, sample: Sample, config: Any) -> list[Fault]:
        layout = InputLayout.of(config)
        faults = super()._image_faults(where, sample, config)
        of_videos = pixel_faults(where, sample, VIDEO_INPUTS, layout, config.video_token_id, "video")
        if not of_videos and VIDEO_INPUTS[0] in sample:
            of_videos = [*self._step_faults(where, sample, layout, config), *self._seconds_faults(where, sample)]
        return faults + of_videos

    def _step_faults(self, where: str, sample: Sample, layout: InputLayout, config: Any) -> list[Fault]:
        """Video tokens that are not grouped by temporal steps, where the family has timestamps between these."""
        if not self.timestamps:
            return []
        grid = sample[VIDEO_INPUTS[1]]
        expected = [int(height * width) // layout.merge_size**2 for steps, height, width in grid for _ in range(steps)]
        if (found := _run_lengths(sample["input_ids"][0] == config.video_token_id)) == expected:
            return []
        groups, steps = pluralize(len(found), "group"), pluralize(len(expected), "temporal step")
        what = f"the video tokens are in {groups}, the videos have {steps}"
        if len(found) == len(expected):
            what = "the groups of video tokens do not have the sizes of the temporal steps"
        return [Fault(what, where, "every temporal step has its time as text and vision_start and vision_end")]

    def _seconds_faults(self, where: str, sample: Sample) -> list[Fault]:
        if SECONDS not in sample:
            return []
        seconds, videos = _seconds(sample[SECONDS]), len(sample[VIDEO_INPUTS[1]])
        if (
            seconds is not None
            and seconds.shape == (videos,)
            and bool(((seconds > 0) & (seconds < LARGEST_STEP)).all())
        ):
            return []
        value: Any = sample[SECONDS]
        shown = describe(value) if isinstance(value, Tensor) else f"a {type(value).__name__}"
        why = f"positive numbers [{videos}] are expected, seconds between two temporal steps"
        return [Fault(f"{SECONDS} is {shown}", where, why)]

    def normalized(self, sample: Sample) -> dict[str, Tensor]:
        """Processors return second_per_grid_ts as a list of numbers."""
        numbers = {SECONDS: _seconds(sample[SECONDS])} if SECONDS in sample else {}
        return super().normalized({**sample, **numbers})  # type: ignore[dict-item]

    # ---- images of a sample ------------------------------------------------------------------------------------------

    def has_images(self, sample: Sample) -> bool:
        return any(names[0] in sample for names in MEDIA.values())

    def has_videos(self, sample: Sample) -> bool:
        return VIDEO_INPUTS[0] in sample

    def same_images(self, first: Sample, second: Sample) -> bool:
        """Of samples with images and videos their order counts, too, so that no two are the same."""
        kinds = [kind for kind, names in MEDIA.items() if names[0] in first or names[0] in second]
        return len(kinds) == 1 and all(
            key in first and key in second and torch.equal(first[key], second[key]) for key in MEDIA[kinds[0]]
        )

    def patches(self, sample: Sample) -> int:
        return sum(len(sample[names[0]]) for names in MEDIA.values() if names[0] in sample)

    def image_bytes(self, sample: Sample) -> int:
        return sum(sample[names[0]].nbytes for names in MEDIA.values() if names[0] in sample)

    def token_modality(self, input_ids: Tensor, config: Any) -> Tensor:
        modality = super().token_modality(input_ids, config)
        return modality.masked_fill(input_ids == config.video_token_id, MODALITY["video"])

    def patch_modality(self, sample: Sample, config: Any) -> Tensor | None:
        if VIDEO_INPUTS[0] not in sample:
            return None
        return torch.cat(
            [
                torch.full((int(sample[MEDIA[kind][1]][number].prod()),), MODALITY[kind], dtype=torch.int8)
                for kind, number in self._order(sample, config)
            ]
        )

    def _order(self, sample: Sample, config: Any) -> list[tuple[str, int]]:
        """(kind, number) of all images and videos in the order of their tokens."""
        merge = config.vision_config.spatial_merge_size
        modality = self.token_modality(sample["input_ids"][0], config)
        starts = []
        for kind, names in MEDIA.items():
            if names[1] in sample:
                positions = (modality == MODALITY[kind]).nonzero().flatten()
                counts = sample[names[1]].prod(-1) // merge**2
                first = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)[:-1]])
                starts += [(int(positions[at]), kind, number) for number, at in enumerate(first.tolist())]
        return [(kind, number) for _, kind, number in sorted(starts)]

    # ---- the forward -------------------------------------------------------------------------------------------------

    def forward_arguments(self, sample: Sample, model: nn.Module, accepted: Collection[str]) -> dict[str, Any]:
        """A sample with images and videos runs through the vision tower once, where transformers runs it twice.

        Videos are then given as images, in the order of the tokens, and the positions, in which they differ, beside.
        """
        arguments = super().forward_arguments(sample, model, accepted)
        if SECONDS not in accepted:
            arguments.pop(SECONDS, None)
        if not all(names[0] in sample for names in MEDIA.values()):
            return arguments
        owner: Any = model if hasattr(model, "get_rope_index") else model.model
        known = inspect.signature(owner.get_rope_index).parameters
        positions, _ = owner.get_rope_index(**{name: value for name, value in arguments.items() if name in known})
        config: Any = model.config
        parts: dict[str, list[Tensor]] = {name: [] for name in IMAGE_INPUTS}
        pixels = {kind: _split(sample, *names) for kind, names in MEDIA.items()}
        for kind, number in self._order(sample, config):
            parts[IMAGE_INPUTS[0]].append(pixels[kind][number])
            parts[IMAGE_INPUTS[1]].append(sample[MEDIA[kind][1]][number][None])
        ids = sample["input_ids"]
        arguments |= {name: torch.cat(values) for name, values in parts.items()}
        arguments |= {
            "input_ids": ids.masked_fill(ids == config.video_token_id, config.image_token_id),
            "position_ids": positions,
        }
        return {name: value for name, value in arguments.items() if name not in (*VIDEO_INPUTS, SECONDS)}

    # ---- other samples -----------------------------------------------------------------------------------------------

    def crop(self, sample: Sample, config: Any) -> dict[str, Tensor]:
        """The upper left corner of the first image or of the first step of the first video, whichever comes first."""
        if not self.has_images(sample):
            return super().crop(sample, config)
        kind, _ = self._order(sample, config)[0]
        ids = sample["input_ids"][sample["attention_mask"] != 0]  # [S] without padding
        positions = self.is_image_token(ids, config).nonzero().flatten()
        cropped = crop_first(ids, positions, sample, MEDIA[kind], config.vision_config.spatial_merge_size)
        if kind == "video" and SECONDS in sample:
            cropped[SECONDS] = sample[SECONDS][:1]
        return cropped


def _split(sample: Sample, pixels: str, grid: str) -> Sequence[Tensor]:
    """The patches of every image or video."""
    return torch.split(sample[pixels], sample[grid].prod(-1).tolist())


def _run_lengths(selected: Tensor) -> list[int]:
    """bool [S] -> lengths of the runs of true values."""
    values, counts = torch.unique_consecutive(selected, return_counts=True)
    return [int(count) for value, count in zip(values, counts, strict=True) if value]


def _seconds(value: Any) -> Tensor | None:
    """Numbers as float32; None if they are none."""
    try:
        return torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        return None
