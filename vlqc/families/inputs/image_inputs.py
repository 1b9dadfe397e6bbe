"""Model inputs of families with images: patches of all images in one tensor, image tokens in the text.

Qwen2-VL, Qwen2.5-VL and Qwen3-VL have the same names and layout; sizes come from config.json.
"""

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from vlqc.errors import Fault
from vlqc.families.inputs.image_processing import ImageProcessing
from vlqc.families.inputs.input_format import ImageFormat, TextFormat
from vlqc.families.inputs.text_inputs import (
    LARGEST_SAMPLE,
    SYNTHETIC_TOKENS,
    TEXT_INPUTS,
    Sample,
    TextInputs,
    describe,
    is_integer,
)
from vlqc.formatting import pluralize

IMAGE_INPUTS = ("pixel_values", "image_grid_thw")  # [P, C*T*p*p] float, [images, 3] int64
TOKEN_TYPES = "mm_token_type_ids"  # [1, S] int64, in newer transformers: 1 at image tokens
VIDEO_INPUTS = ("pixel_values_videos", "video_grid_thw")
GRIDS = (IMAGE_INPUTS[1], VIDEO_INPUTS[1])
LARGEST_PIXEL = 1e4  # pixels that are not rescaled or not normalized stay below it
CROP_HEIGHT, CROP_WIDTH = 16, 12  # patches; windows have 8 x 8, so the crop has complete and partial ones
FIRST, NEAREST, AFTER = 16, 8, 48  # tokens of text that are kept: the first ones, before the image, after it
WINDOWS = (1, 1.5)  # height and width of a synthetic image in attention windows: one complete, one partial
WINDOW_TOKENS = 4  # side of that window for a vision tower without windows


@dataclass(frozen=True)
class InputLayout:
    """How images appear in the inputs of a model.

    image_token: id of the token that stands for one image feature; merge_size: patches along a side of one image
    feature; patch_values: values of one patch, C*T*p*p; window: side of an attention window in image tokens.
    """

    image_token: int
    merge_size: int
    patch_values: int
    window: float

    @classmethod
    def of(cls, config: Any) -> Self:
        """config: of a transformers model."""
        vision = config.vision_config
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        token_side = vision.spatial_merge_size * vision.patch_size
        window = getattr(vision, "window_size", None) or WINDOW_TOKENS * token_side
        return cls(config.image_token_id, vision.spatial_merge_size, values, window / token_side)

    def image_tokens(self, patches: int) -> int:
        """Number of image tokens of so many patches."""
        return patches // self.merge_size**2


def pixel_faults(
    where: str, sample: Sample, names: tuple[str, str], layout: InputLayout, token: int, noun: str
) -> list[Fault]:
    """Everything that is wrong with the images or the videos of a sample. where: names it.

    names: of the tensors of patches and of grids; token: id of the token that stands for one feature; noun: "image" or
    "video".
    """
    pixel_name, grid_name = names
    tokens = int((sample["input_ids"] == token).sum())
    if pixel_name not in sample:
        why = f"input_ids holds {noun} tokens, but there are no {pixel_name}"
        article = "an" if noun == "image" else "a"
        return [Fault(f"{pluralize(tokens, f'{noun} token')} without {article} {noun}", where, why)] if tokens else []
    pixels, grid = sample[pixel_name], sample[grid_name]
    is_grid = is_integer(grid) and grid.ndim == 2 and grid.shape[-1] == 3 and grid.shape[0] > 0
    if not is_grid or pixels.ndim != 2 or not pixels.is_floating_point() or not bool((grid > 0).all()):
        why = f"{pixel_name} float [P, D] and {grid_name} integers [{noun}s, 3] are expected"
        return [Fault(f"{pixel_name} is {describe(pixels)}, {grid_name} is {describe(grid)}", where, why)]
    patch_rows = pluralize(pixels.shape[0], "patch", "patches")
    if not bool((grid <= pixels.shape[0]).all()):  # products of larger numbers may overflow and appear to match
        return [Fault(f"{grid_name} is larger than {pixel_name}", where, f"which has {patch_rows}")]
    faults = []
    patches, merge = int(grid.prod(-1).sum()), layout.merge_size
    if bool((grid[:, 1:] % merge != 0).any()):
        why = f"height and width must be multiples of {merge}"
        faults.append(Fault(f"{grid_name} cannot be merged", where, why))
    if pixels.shape[1] != layout.patch_values:
        why = f"the model expects {layout.patch_values}"
        faults.append(Fault(f"{pixel_name} has {pluralize(pixels.shape[1], 'value')} per patch", where, why))
    if pixels.shape[0] != patches:
        why = f"{grid_name} implies {patches}"
        faults.append(Fault(f"{pixel_name} has {patch_rows}", where, why))
    if tokens != layout.image_tokens(patches):
        features = layout.image_tokens(patches)
        why = f"the {noun}s have {pluralize(features, f'{noun} feature')}; {noun} tokens must not be truncated"
        faults.append(Fault(f"input_ids holds {pluralize(tokens, f'{noun} token')}", where, why))
    if not bool(torch.isfinite(pixels).all()):
        faults.append(Fault(f"{pixel_name} holds NaN or Inf", where))
    elif (largest := max(abs(float(end)) for end in torch.aminmax(pixels))) > LARGEST_PIXEL:
        why = "normalized pixels (colors from 0 to 1, minus mean, divided by standard deviation) stay below 10"
        fix = "check image_std and rescale_factor"
        faults.append(Fault(f"{pixel_name} reaches {largest:.3g}", where, why, fix))
    return faults


def crop_first(ids: Tensor, positions: Tensor, sample: Sample, names: tuple[str, str], merge: int) -> dict[str, Tensor]:
    """A sample with the upper left corner of the first image, or of the first temporal step of the first video.

    ids: int64 [S], token ids without padding; positions: of the tokens of all images and videos, of which the first
    belong to it; names: of its tensors of patches and of grids; merge: patches along a side of one image token.
    """
    steps, height, width = (int(size) for size in sample[names[1]][0])
    rows, columns = min(height, CROP_HEIGHT) // merge, min(width, CROP_WIDTH) // merge
    # The merge * merge patches of one image token are adjacent.
    patches = sample[names[0]][: height * width]
    blocks = patches.reshape(height // merge, width // merge, merge * merge, -1)
    own = steps * height * width // merge**2
    begin, end = int(positions[0]), int(positions[own - 1]) + 1
    after = ids[end : int(positions[own]) - NEAREST if len(positions) > own else None]
    before = ids[:begin] if begin <= FIRST + NEAREST else torch.cat([ids[:FIRST], ids[begin - NEAREST : begin]])
    kept = torch.cat([before, ids[begin : begin + rows * columns], after[:AFTER]])[None]
    return {
        "input_ids": kept,
        "attention_mask": torch.ones_like(kept),
        names[0]: blocks[:rows, :columns].reshape(-1, patches.shape[-1]).contiguous(),
        names[1]: torch.tensor([[1, rows * merge, columns * merge]]),
    }


class ImageInputs(TextInputs):
    """A sample has input_ids and attention_mask [1, S] int64; with images also pixel_values [P, C*T*p*p] float (P
    patches of all images, those of one image token adjacent) and image_grid_thw [images, 3] int64."""

    takes_parts = True
    optional: ClassVar[tuple[str, ...]] = (*IMAGE_INPUTS, TOKEN_TYPES)
    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(VIDEO_INPUTS, "the model takes no videos")
    integers: ClassVar[tuple[str, ...]] = (*TEXT_INPUTS, IMAGE_INPUTS[1])
    description: ClassVar[str] = (
        "a sample has input_ids and attention_mask, and with images pixel_values and image_grid_thw"
    )

    def __init__(self, title: str, form: TextFormat, images: ImageFormat) -> None:
        super().__init__(title, form)
        self.images = images
        self.processing = ImageProcessing(images)

    # ---- checks ------------------------------------------------------------------------------------------------------

    def _required_of(self, sample: Sample) -> tuple[str, ...]:
        has_part = any(key in sample for key in IMAGE_INPUTS)
        return (*self.required, *IMAGE_INPUTS) if has_part else self.required

    def _shown_names(self) -> tuple[str, ...]:
        return (*self.required, *IMAGE_INPUTS)

    def _text_faults(self, where: str, sample: Sample, vocabulary: int) -> list[Fault]:
        ids = sample["input_ids"]
        token_types = sample.get(TOKEN_TYPES, ids)
        faults = super()._text_faults(where, sample, vocabulary)
        if not isinstance(token_types, Tensor) or token_types.shape != ids.shape or not is_integer(token_types):
            why = f"integers {list(ids.shape)} are expected"
            faults.append(Fault(f"{TOKEN_TYPES} does not match input_ids", where, why))
        return faults

    def _image_faults(self, where: str, sample: Sample, config: Any) -> list[Fault]:
        layout = InputLayout.of(config)
        return pixel_faults(where, sample, IMAGE_INPUTS, layout, layout.image_token, "image")

    # ---- images of a sample ------------------------------------------------------------------------------------------

    def has_images(self, sample: Sample) -> bool:
        return IMAGE_INPUTS[0] in sample

    def same_images(self, first: Sample, second: Sample) -> bool:
        return all(key in first and key in second and torch.equal(first[key], second[key]) for key in IMAGE_INPUTS)

    def patches(self, sample: Sample) -> int:
        return len(sample["pixel_values"]) if self.has_images(sample) else 0

    def patches_per_token(self, config: Any) -> int:
        return InputLayout.of(config).merge_size ** 2

    def attention_pairs(self, sample: Sample, config: Any, *, windowed: bool) -> int:
        layout = InputLayout.of(config)
        limit = round(layout.window * layout.merge_size) ** 2 if windowed else sys.maxsize
        grids = [step for name in GRIDS if name in sample for step in sample[name].tolist()]
        return sum(steps * height * width * min(height * width, limit) for steps, height, width in grids)

    def image_bytes(self, sample: Sample) -> int:
        return sample["pixel_values"].nbytes if self.has_images(sample) else 0

    def token_modality(self, input_ids: Tensor, config: Any) -> Tensor:
        return torch.where(input_ids == config.image_token_id, 1, 0).to(torch.int8)

    # ---- the forward -------------------------------------------------------------------------------------------------

    def forward_arguments(self, sample: Sample, model: nn.Module, accepted: Collection[str]) -> dict[str, Any]:
        """transformers 5 derives image positions from mm_token_type_ids and gives wrong outputs without."""
        arguments = super().forward_arguments(sample, model, accepted)
        if TOKEN_TYPES not in accepted:
            arguments.pop(TOKEN_TYPES, None)
        elif TOKEN_TYPES not in arguments:
            arguments[TOKEN_TYPES] = self.token_modality(sample["input_ids"], model.config).int()
        return arguments

    # ---- other samples -----------------------------------------------------------------------------------------------

    def crop(self, sample: Sample, config: Any) -> dict[str, Tensor]:
        """The upper left corner of the first image, and the text near it."""
        if not self.has_images(sample):
            return super().crop(sample, config)
        ids = sample["input_ids"][sample["attention_mask"] != 0]  # [S] without padding
        positions = self.is_image_token(ids, config).nonzero().flatten()
        return crop_first(ids, positions, sample, IMAGE_INPUTS, config.vision_config.spatial_merge_size)

    def synthetic_sample(self, config: Any, seed: int = 0, *, smallest: bool = False) -> dict[str, Tensor]:
        """Random text, an image of noise, and random text. The smallest image has 2 x 2 image tokens."""
        layout = InputLayout.of(config)
        rows, columns = (2, 2) if smallest else (max(2, round(layout.window * share)) for share in WINDOWS)
        if smallest and rows * columns * layout.merge_size**2 * layout.patch_values > LARGEST_SAMPLE:
            raise ValueError(f"a patch of an image has {layout.patch_values} values")
        generator = torch.Generator().manual_seed(seed)
        start, end = config.vision_start_token_id, getattr(config, "vision_end_token_id", None)
        words = self._words(config, {layout.image_token, start, getattr(config, "video_token_id", -1)}, generator)
        before, after = words[:SYNTHETIC_TOKENS], words[SYNTHETIC_TOKENS : 2 * SYNTHETIC_TOKENS]
        image = [start, *[layout.image_token] * (rows * columns), *([] if end is None else [end])]
        ids = torch.tensor([[*before, *image, *after]])
        height, width = rows * layout.merge_size, columns * layout.merge_size
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(height * width, layout.patch_values, generator=generator),
            "image_grid_thw": torch.tensor([[1, height, width]]),
        }

    # ---- prompts -----------------------------------------------------------------------------------------------------

    def image_placeholder(self, token: str) -> str:
        return f"{self.images.vision_start}{token}{self.images.vision_end}"
