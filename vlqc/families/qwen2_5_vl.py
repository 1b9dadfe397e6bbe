"""Qwen2.5-VL: names, layers, config.json and model inputs."""

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict  # pydantic accepts typing.TypedDict from Python 3.12 on

from vlqc.families.config_values import (
    BlockIndex,
    Blocks,
    ConfigLimits,
    Deviation,
    ImageTokens,
    Mrope,
    Size,
    TextConfig,
    rope_keys,
)
from vlqc.families.family import ModelFamily, Part, Role
from vlqc.families.inputs.input_format import QWEN_IMAGE_PROCESSORS, ImageFormat, TextFormat, VideoFormat
from vlqc.families.text_config import flat_keys, is_tied, layer_type_faults, nested_text, tie_faults

if TYPE_CHECKING:  # torch-free
    from torch import nn

# ---- layers, as patterns over checkpoint names ---------------------------------------------------------------------

VISION_GATE_UP = ("visual.blocks.*.mlp.gate_proj", "visual.blocks.*.mlp.up_proj")
QKV = tuple(f"model.layers.*.self_attn.{member}_proj" for member in "qkv")
GATE_UP = ("model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj")

ROW_PARALLEL = ("o_proj", "down_proj", "proj")  # last name component of layers sharded along their inputs

RENAMED_PREFIXES = {"model.visual.": "visual.", "model.language_model.": "model."}  # newer transformers: original


def original_name(name: str) -> str:
    """Name of a tensor or module in any transformers version -> its name in the first release, which engines expect."""
    for new, original in RENAMED_PREFIXES.items():
        if name.startswith(new):
            return original + name.removeprefix(new)
    return name


def original_pattern(pattern: str) -> str:
    """A glob pattern of names in any transformers version, or of vLLM's -> of names in the first release."""
    pattern = re.sub(r"(?<!\w)model\.(?=visual\b)|^language_model\.(?=lm_head\b)", "", pattern)
    return re.sub(r"(?:(?<=\*)\.|(?<![\w.]))(?:model\.)?language_model\b(?:\.model\b)?", "model", pattern)


# ---- config.json -----------------------------------------------------------------------------------------------------

RENAMED_KEYS = {"dtype": "torch_dtype"}
NOT_IN_VISION_CONFIG = ("dtype", "torch_dtype", "rope_parameters")


def flatten_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of any transformers version -> the flat form of the first release, which engines expect.

    Newer versions nest the keys of the language model in `text_config`, whose values count, and the rotary embedding in
    `rope_parameters`. A flat config is returned unchanged.
    """
    if nested_text(config) is None:
        return config if "rope_parameters" not in config else original_rope(config)
    flat = original_rope(flat_keys(config))
    vision = flat.get("vision_config")
    if isinstance(vision, dict):
        flat["vision_config"] = {key: value for key, value in vision.items() if key not in NOT_IN_VISION_CONFIG}
    return {RENAMED_KEYS.get(key, key): value for key, value in flat.items()}


def original_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Flat keys with `rope_parameters` in place of `rope_theta` and `rope_scaling` -> with these.

    Multimodal sections have the type mrope unless scaled.
    """
    keys = rope_keys(config)
    scaling = keys.get("rope_scaling")
    if isinstance(scaling, dict) and scaling is not config.get("rope_scaling") and "mrope_section" in scaling:
        rope_type = scaling.setdefault("rope_type", "default")
        scaling["type"] = "mrope" if rope_type == "default" else rope_type
    return keys


# ---- keys of config.json -------------------------------------------------------------------------------------------

# Values that the model's config class gives to missing keys, where they are large or invalid for the checkpoint.
CONFIG_DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "rope_scaling": None,
    "vision_config": None,
}


class VisionConfig(TypedDict, total=False):
    """Keys of `vision_config`."""

    depth: Blocks
    hidden_size: Size
    intermediate_size: Size
    num_heads: Size
    in_channels: Size
    in_chans: Size
    patch_size: Size
    spatial_patch_size: Size
    spatial_merge_size: Size
    temporal_patch_size: Size
    out_hidden_size: Size
    tokens_per_second: Size
    window_size: Annotated[int, Field(ge=1, le=2**15)]  # pixels; images are padded to the square of it
    fullatt_block_indexes: list[BlockIndex]
    initializer_range: Deviation
    hidden_act: str
    model_type: str
    torch_dtype: str
    dtype: str


class Config(TextConfig, ImageTokens, total=False):
    """Keys of a flat config.json; validated with a `ConfigLimits` as context."""

    rope_scaling: Mrope
    vision_config: VisionConfig


CONFIG = TypeAdapter(Config)


# ---- the family ------------------------------------------------------------------------------------------------------


class Qwen25VL(ModelFamily):
    """Qwen2.5-VL, 3B to 72B."""

    name = "qwen2_5_vl"
    title = "Qwen2.5-VL"
    model_types = ("qwen2_5_vl",)
    architectures = ("Qwen2_5_VLForConditionalGeneration",)
    transformers_version = "4.49"

    roles: ClassVar[Mapping[Role, tuple[str, ...]]] = {
        Role.VISION_QKV: ("visual.blocks.*.attn.qkv",),
        Role.VISION_PROJ: ("visual.blocks.*.attn.proj",),
        Role.VISION_UP: VISION_GATE_UP,
        Role.VISION_DOWN: ("visual.blocks.*.mlp.down_proj",),
        Role.MERGER: ("visual.merger.mlp.0", "visual.merger.mlp.2"),
        Role.QKV: QKV,
        Role.OUT: ("model.layers.*.self_attn.o_proj",),
        Role.UP: GATE_UP,
        Role.DOWN: ("model.layers.*.mlp.down_proj",),
    }
    fused_groups: ClassVar[tuple[tuple[str, ...], ...]] = (QKV, GATE_UP, VISION_GATE_UP)
    key_value = QKV[1:]
    reference_float: ClassVar[tuple[str, ...]] = (
        "visual.patch_embed*",  # a convolution; engines run it in float
        "visual.blocks.*.mlp.down_proj",  # products of two activations: the widest ranges of a vision block
        "visual.merger.mlp.*",  # every image feature passes through it; two matrices in all
        "model.embed_tokens",  # a table, not a matrix product
        "model.layers.*.mlp.down_proj",  # holds the massive activations of a language model
        "lm_head",  # engines run it in float
    )
    row_parallel: ClassVar[tuple[str, ...]] = ROW_PARALLEL

    parts = (("visual.merger.", Part.MERGER), ("visual.", Part.VISION), ("model.", Part.LANGUAGE))
    subparts = (
        ("visual.blocks.", "vision blocks"),
        ("visual.merger.", "merger"),
        ("visual.", "vision, other"),
        ("model.layers.", "language layers"),
        ("model.embed_tokens.", "embeddings"),
        ("lm_head.", "lm_head"),
    )
    block_lists = ("model.layers.", "visual.blocks.")
    config_objects: ClassVar[Mapping[str, bool]] = {"text_config": False, "vision_config": True}

    text_format: ClassVar[TextFormat] = TextFormat(system_prompt="You are a helpful assistant.")
    image_format: ClassVar[ImageFormat] = ImageFormat(
        token_side=28,
        processor_classes=(*QWEN_IMAGE_PROCESSORS, "Qwen2_5_VLImageProcessor"),  # the latter in the first release
    )
    video_format: ClassVar[VideoFormat] = VideoFormat(seconds=True)

    def checkpoint_name(self, name: str) -> str:
        return original_name(name)

    def name_pattern(self, pattern: str) -> str:
        return original_pattern(pattern)

    def attends_in_windows(self, block: str, config: Any) -> bool:
        whole = getattr(config.vision_config, "fullatt_block_indexes", None)
        return whole is not None and block not in {f"visual.blocks.{index}" for index in whole}

    def prepare(self, model: "nn.Module") -> None:
        """Images of any size run without a mask of all pairs of patches."""
        from vlqc.families.segmented_attention import segment_attention  # imports torch

        segment_attention(model)

    def engine_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The flat form of the first release."""
        return flatten_config(config)

    def text_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        nested = nested_text(config)
        return config if nested is None else nested

    def vision_config(self, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        vision = config.get("vision_config")
        return vision if isinstance(vision, Mapping) else None

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        return is_tied(config)

    def checkpoint_faults(self, config: Mapping[str, Any], names: Collection[str]) -> list[tuple[str, str]]:
        return tie_faults(config, names, self.output_head) + layer_type_faults(config)

    def config_values(self, config: Mapping[str, Any]) -> dict[str, Any]:
        text, vision = self.text_config(config), self.vision_config(config) or {}
        return {
            "dtype": config.get("torch_dtype", config.get("dtype", text.get("dtype"))),
            "language layers": text.get("num_hidden_layers"),
            "hidden size": text.get("hidden_size"),
            "vision blocks": vision.get("depth"),
            "vision hidden size": vision.get("hidden_size"),
            "tied embeddings": is_tied(config),
        }

    def config_schema(self) -> TypeAdapter[Any]:
        return CONFIG

    def config_limits(self, config: Mapping[str, Any], largest: int, tensors: int) -> ConfigLimits:
        return ConfigLimits.of(config, self.vision_config(config), largest, tensors)

    def complete_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**CONFIG_DEFAULTS, **config}


QWEN2_5_VL = Qwen25VL()
