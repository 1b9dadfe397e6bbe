"""Images -> patches, with the image processor of a checkpoint: its settings, the resize rule, counts of tokens."""

import math
import pkgutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import AfterValidator, Field, TypeAdapter, ValidationInfo
from typing_extensions import TypedDict  # pydantic accepts typing.TypedDict from Python 3.12 on

from vlqc.families.inputs.input_format import ImageFormat
from vlqc.families.inputs.smart_resize import smart_resize

if TYPE_CHECKING:
    from PIL.Image import Image

Patches = tuple[torch.Tensor, torch.Tensor]  # pixel_values [P, C*T*p*p] float32, image_grid_thw [1, 3] int64


def _check_enlarged(value: int, info: ValidationInfo) -> int:
    form: Any = info.context  # an ImageFormat
    limit = form.max_pixels
    if value > limit:
        raise ValueError(f"it must be at most {limit}, the pixels of the largest image")
    return value


EnlargedPixels = Annotated[int, Field(ge=1), AfterValidator(_check_enlarged)]


class ImageSize(TypedDict, total=False):
    """`size` of the image processor's settings, in pixels of the whole image."""

    shortest_edge: EnlargedPixels | None
    longest_edge: Annotated[int, Field(ge=1, le=2**40)] | None


class ImageSettings(TypedDict, total=False):
    """Keys of preprocessor_config.json. The published models have patch_size 14 or 16 and the other two sizes 2."""

    patch_size: Annotated[int, Field(ge=1, le=128)]
    merge_size: Annotated[int, Field(ge=1, le=8)]
    temporal_patch_size: Annotated[int, Field(ge=1, le=16)]
    min_pixels: EnlargedPixels | None
    max_pixels: Annotated[int, Field(ge=1, le=2**40)] | None
    image_mean: Annotated[list[Annotated[float, Field(ge=-1e6, le=1e6)]], Field(min_length=3, max_length=3)]
    image_std: Annotated[list[Annotated[float, Field(ge=1e-6, le=1e6)]], Field(min_length=3, max_length=3)]
    do_resize: bool
    do_rescale: bool
    do_normalize: bool
    do_convert_rgb: bool
    rescale_factor: Annotated[float, Field(ge=1e-6, le=1e6)]
    resample: Annotated[int, Field(ge=0, le=5)]
    size: ImageSize | None


SETTINGS = TypeAdapter(ImageSettings)


class ImageProcessing:
    """The image preprocessing of one family. `processor` is an image processor of transformers that needs Pillow only.

    form: limits, classes and tokens.
    """

    settings_schema = SETTINGS  # of preprocessor_config.json, validated with `form` as context

    def __init__(self, form: ImageFormat) -> None:
        self.form = form

    def expected_image_token(self, config: Mapping[str, Any], default: int | None) -> Any:
        """Id of the image token in config.json, the default if it has none."""
        return config.get("image_token_id", default)

    def processor_from(self, settings: Mapping[str, Any]) -> Any:
        """The image processor that needs Pillow only, with these settings: those of preprocessor_config.json.

        ImportError if the installed version of transformers has none.
        """
        for place in self.form.pillow_processors:
            try:
                return pkgutil.resolve_name(place).from_dict(dict(settings))
            except (ImportError, AttributeError) as error:
                missing = error
        raise ImportError(f"no image processor that needs Pillow only: {missing}")

    def configure(self, processor: Any, settings: Mapping[str, Any]) -> None:
        """Sets what transformers 4 ignores: `size`, which is all that newer versions write."""
        if hasattr(processor, "min_pixels"):
            size = settings.get("size") or {}
            processor.min_pixels = settings.get("min_pixels") or size.get("shortest_edge", processor.min_pixels)
            processor.max_pixels = settings.get("max_pixels") or size.get("longest_edge", processor.max_pixels)

    def token_side(self, processor: Any) -> int:
        """Pixels along a side of one image token, as the settings have it."""
        return int(processor.patch_size * processor.merge_size)

    def min_tokens(self, processor: Any) -> int:
        """The smallest number of image tokens of an image: smaller images are enlarged."""
        pixels = int(getattr(processor, "min_pixels", None) or processor.size["shortest_edge"])
        return max(self.form.min_tokens, math.ceil(pixels / self.token_side(processor) ** 2))

    def image_tokens(self, processor: Any, patches: Patches) -> int:
        """Number of image tokens of an image."""
        return int(patches[1].prod()) // int(processor.merge_size**2)

    def process(self, processor: Any, image: "Image", height: int, width: int, **limits: int | None) -> Patches:
        """An RGB image, resized to about height x width pixels -> its patches and their grid.

        limits: of `resize`. Raises what the image processor raises, and ValueError as `resize`.
        """
        height, width = self.resize(height, width, **limits)
        inputs = processor(images=[image.resize((width, height))], return_tensors="pt")
        return inputs["pixel_values"].to(torch.float32), inputs["image_grid_thw"].to(torch.int64)

    def model_inputs(self, images: Sequence[Patches]) -> dict[str, torch.Tensor]:
        """The image tensors of a sample; without images none."""
        if not images:
            return {}
        return {
            "pixel_values": torch.cat([patches for patches, _ in images]),
            "image_grid_thw": torch.cat([grid for _, grid in images]),
        }

    def resize(
        self, height: int, width: int, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> tuple[int, int]:
        """Pixels of an image -> pixels to which it is resized before the image processor resizes it once more.

        By `smart_resize`. The default limits are those of qwen_vl_utils 0.0.14: min_tokens and max_tokens.

        Raises:
            ValueError: for extreme aspect ratios.
        """
        side = self.form.token_side
        lowest = self.form.min_tokens * side**2 if min_pixels is None else min_pixels
        default = "min_pixels" if min_pixels is None else "" if max_pixels else "max_pixels"
        return smart_resize(height, width, side, lowest, max_pixels or self.form.max_pixels, default)
