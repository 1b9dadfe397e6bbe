"""How prompts and images of a family are given to the model: values that a family's file states.

This module imports no torch, because the command line imports the families for its help.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlqc.families.inputs.smart_resize import MAX_ASPECT_RATIO

QWEN_TOKENIZERS = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
# What the class Qwen2Tokenizer of transformers 5 builds, whatever tokenizer.json has: its entries there.
QWEN_PIPELINE: Mapping[str, Any] = {
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {
                    "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
                },
                "behavior": "Isolated",
                "invert": False,
            },
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ],
    },
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE"},
}
QWEN_IMAGE_PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")
# Where versions of transformers keep the class that needs Pillow only, the newest first. From 5.0 on, the name of the
# class in transformers itself, and AutoImageProcessor, may need torchvision.
QWEN_PILLOW_PROCESSORS = (
    "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl:Qwen2VLImageProcessorPil",
    "transformers.models.qwen2_vl.image_processing_qwen2_vl:Qwen2VLImageProcessor",
)


@dataclass(frozen=True)
class TextFormat:
    """Tokenizer and chat form.

    tokenizer_classes: values of tokenizer_class in tokenizer_config.json, the one that every version of transformers
    has and that is made for the family first; tokenizer_pipeline: entries of the tokenizer.json that this class has;
    system_prompt: of the family's chat template, empty if it has none.
    """

    tokenizer_classes: tuple[str, ...] = QWEN_TOKENIZERS
    tokenizer_pipeline: Mapping[str, Any] = field(default_factory=lambda: QWEN_PIPELINE)
    system_prompt: str = ""


@dataclass(frozen=True)
class ImageFormat:
    """Image processor, and how images appear in a prompt.

    token_side: pixels along a side of one image token. processor_classes: values of image_processor_type in
    preprocessor_config.json, the one that every version of transformers knows first; all have the same settings;
    processor_aliases: those that not every version of transformers knows.
    pillow_processors: module:class of the image processor that needs Pillow only, one of them is in every version.
    image_token: repeated once per image feature, between vision_start and vision_end.

    min_tokens, max_tokens: image tokens of one image; max_aspect_ratio: of its sides. These are the limits of the image
    preprocessing of qwen_vl_utils, which the published models were evaluated with.
    """

    token_side: int
    processor_classes: tuple[str, ...] = QWEN_IMAGE_PROCESSORS
    processor_aliases: tuple[str, ...] = ("Qwen2VLImageProcessorPil", "Qwen2_5_VLImageProcessor")
    pillow_processors: tuple[str, ...] = QWEN_PILLOW_PROCESSORS
    image_token: str = "<|image_pad|>"
    vision_start: str = "<|vision_start|>"
    vision_end: str = "<|vision_end|>"
    min_tokens: int = 4
    max_tokens: int = 16384
    max_aspect_ratio: int = MAX_ASPECT_RATIO

    @property
    def max_pixels(self) -> int:
        """Pixels of the largest image; the settings of the image processor must not enlarge images beyond it."""
        return self.max_tokens * self.token_side**2


@dataclass(frozen=True)
class VideoFormat:
    """How videos appear in a prompt, and the limits of the video preprocessing of qwen_vl_utils.

    video_token: repeated once per video feature, between vision_start and vision_end. timestamps: whether every
    temporal step has its time as text, and its own vision_start and vision_end. seconds: whether the model takes
    the seconds between two temporal steps. resized_again: whether the limits of the image processor apply to frames.

    fps: of the selected frames; min_frames, max_frames: limits of their number, a multiple of frame_factor; min_tokens,
    max_tokens: of one frame, counted like those of an image; total_tokens: of all frames of a video, counted in steps.
    """

    timestamps: bool = False
    seconds: bool = False
    resized_again: bool = True
    video_token: str = "<|video_pad|>"
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    frame_factor: int = 2
    min_tokens: int = 128
    max_tokens: int = 768
    total_tokens: float = 0.9 * 128000
