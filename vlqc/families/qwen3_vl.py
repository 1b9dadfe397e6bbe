"""Qwen3-VL, dense: names, config.json and roles of its layers.

The vision tower has LayerNorms, an MLP without a gate, and besides the merger after its last block further ones between
blocks ("deepstack"), whose outputs are added to the first layers of the language model.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, TypeAdapter
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
from vlqc.families.family import ModelFamily, Part, Role, dtype_keys
from vlqc.families.inputs.input_format import ImageFormat, VideoFormat
from vlqc.families.text_config import corrected_top_level, is_tied, layer_type_faults, nested_text, tie_faults

DEEPSTACK_INDEXES = (8, 16, 24)  # blocks before deepstack mergers, where config.json does not list them
BLOCKS, DEEPSTACK = "model.visual.blocks.", "model.visual.deepstack_merger_list."
QKV = tuple(f"model.language_model.layers.*.self_attn.{member}_proj" for member in "qkv")
GATE_UP = ("model.language_model.layers.*.mlp.gate_proj", "model.language_model.layers.*.mlp.up_proj")
MERGERS = tuple(
    f"model.visual.{merger}.linear_fc{number}" for merger in ("merger", "deepstack_merger_list.*") for number in (1, 2)
)


def check_distinct(indices: list[int]) -> list[int]:
    """ValueError if a number occurs twice: only one merger runs after a block."""
    if len(set(indices)) < len(indices):
        raise ValueError("its numbers must be distinct")
    return indices


class VisionConfig(TypedDict, total=False):
    """Keys of `vision_config`."""

    depth: Blocks
    hidden_size: Size
    intermediate_size: Size
    num_heads: Size
    in_channels: Size
    patch_size: Size
    spatial_merge_size: Size
    temporal_patch_size: Size
    out_hidden_size: Size
    num_position_embeddings: Size
    deepstack_visual_indexes: Annotated[list[BlockIndex], AfterValidator(check_distinct)]
    initializer_range: Deviation
    hidden_act: str
    model_type: str
    torch_dtype: str
    dtype: str


class LanguageConfig(TextConfig, total=False):
    """Keys of `text_config`."""

    attention_bias: bool
    rope_scaling: Mrope


class Config(ImageTokens, total=False):
    """Keys of config.json; validated with a `ConfigLimits` as context."""

    model_type: str
    architectures: list[str]
    tie_word_embeddings: bool
    torch_dtype: str
    dtype: str
    text_config: LanguageConfig
    vision_config: VisionConfig


CONFIG = TypeAdapter(Config)
# Values that the model's config class gives to missing keys, where they can be invalid for the checkpoint.
TEXT_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "head_dim": 128,
    "rope_scaling": None,
}


class Qwen3VL(ModelFamily):
    """Qwen3-VL, 2B to 32B."""

    name = "qwen3_vl"
    title = "Qwen3-VL"
    model_types = ("qwen3_vl",)
    architectures = ("Qwen3VLForConditionalGeneration",)
    transformers_version = "4.57"

    roles: ClassVar[Mapping[Role, tuple[str, ...]]] = {
        Role.VISION_QKV: ("model.visual.blocks.*.attn.qkv",),
        Role.VISION_PROJ: ("model.visual.blocks.*.attn.proj",),
        Role.VISION_UP: ("model.visual.blocks.*.mlp.linear_fc1",),
        Role.VISION_DOWN: ("model.visual.blocks.*.mlp.linear_fc2",),
        Role.MERGER: MERGERS,
        Role.QKV: QKV,
        Role.OUT: ("model.language_model.layers.*.self_attn.o_proj",),
        Role.UP: GATE_UP,
        Role.DOWN: ("model.language_model.layers.*.mlp.down_proj",),
    }
    fused_groups: ClassVar[tuple[tuple[str, ...], ...]] = (QKV, GATE_UP)
    key_value = QKV[1:]
    reference_float: ClassVar[tuple[str, ...]] = (
        "model.visual.patch_embed*",  # a convolution; engines run it in float
        "model.visual.pos_embed",  # a table, not a matrix product
        "model.visual.blocks.*.mlp.linear_fc2",  # reads the output of an activation function
        *MERGERS,  # every image feature passes through one of them
        "model.language_model.embed_tokens",  # a table, not a matrix product
        "model.language_model.layers.*.mlp.down_proj",  # holds the massive activations of a language model
        "lm_head",  # engines run it in float
    )
    row_parallel: ClassVar[tuple[str, ...]] = ("o_proj", "down_proj", "proj", "linear_fc2")

    parts = (
        ("model.visual.merger.", Part.MERGER),
        ("model.visual.deepstack_merger_list.", Part.MERGER),
        ("model.visual.", Part.VISION),
        ("model.language_model.", Part.LANGUAGE),
    )
    subparts = (
        ("model.visual.blocks.", "vision blocks"),
        ("model.visual.merger.", "merger"),
        ("model.visual.deepstack_merger_list.", "deepstack mergers"),
        ("model.visual.", "vision, other"),
        ("model.language_model.layers.", "language layers"),
        ("model.language_model.embed_tokens.", "embeddings"),
        ("lm_head.", "lm_head"),
    )
    block_lists = ("model.language_model.layers.", BLOCKS, DEEPSTACK)
    config_objects: ClassVar[Mapping[str, bool]] = {"text_config": True, "vision_config": True}

    def name_pattern(self, pattern: str) -> str:
        """Also of names without the first parts, as Qwen2.5-VL has them."""
        pattern = re.sub(r"^(?=visual\b)", "model.", pattern)
        return re.sub(r"^model\.(?=layers\b|embed_tokens\b|norm\b)", "model.language_model.", pattern)

    def stage_order(self, stages: Sequence[str], config: Mapping[str, Any]) -> list[str]:
        """A deepstack merger runs right after the block whose output it reads."""
        indices = (self.vision_config(config) or {}).get("deepstack_visual_indexes", DEEPSTACK_INDEXES)
        mergers = {f"{BLOCKS}{block}": f"{DEEPSTACK}{number}" for number, block in enumerate(indices)}
        order: list[str] = []
        for stage in stages:
            if stage not in mergers.values():
                order += [stage, mergers[stage]] if mergers.get(stage) in stages else [stage]
        return order

    def outputs_read_later(self, stages: Sequence[str]) -> frozenset[str]:
        """Deepstack mergers, whose outputs are added in the language model, and the blocks before them."""
        mergers = [number for number, stage in enumerate(stages) if stage.startswith(DEEPSTACK)]
        return frozenset(stages[index] for number in mergers for index in (number - 1, number))

    image_format: ClassVar[ImageFormat] = ImageFormat(token_side=32)
    video_format: ClassVar[VideoFormat] = VideoFormat(timestamps=True, resized_again=False)

    def engine_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Nested, as published; newer transformers versions write `rope_parameters` in place of two other keys."""
        text = nested_text(config)
        if text is None:
            return config
        converted = rope_keys(text)
        if self.is_tied(config):  # engines read the key there, transformers 5 writes the one at the top
            converted["tie_word_embeddings"] = True
        complete = corrected_top_level({**config, "text_config": converted})
        return config if complete == config else complete

    def text_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        return nested_text(config) or {}

    def vision_config(self, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        vision = config.get("vision_config")
        return vision if isinstance(vision, Mapping) else None

    def extra_vision_outputs(self, config: Mapping[str, Any]) -> int:
        """Of the deepstack mergers; the model's config class has three if the key is missing."""
        indices = (self.vision_config(config) or {}).get("deepstack_visual_indexes", DEEPSTACK_INDEXES)
        return len(indices) if isinstance(indices, Sequence) else 0

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        """The key in `text_config`, which engines read; `engine_config` adds it where only the top-level key is set."""
        return is_tied(config)

    def dtypes(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Those at the top and in `text_config`; engines read the one or the other."""
        text = {f"text_config.{key}": value for key, value in dtype_keys(self.text_config(config)).items()}
        return dtype_keys(config) | text or super().dtypes(config)

    def checkpoint_faults(self, config: Mapping[str, Any], names: Collection[str]) -> list[tuple[str, str]]:
        return tie_faults(config, names, self.output_head) + layer_type_faults(config)

    def set_dtype(self, config: dict[str, Any], dtype: str) -> None:
        """At the top and in `text_config`, where engines read it."""
        super().set_dtype(config, dtype)
        if isinstance(text := config.get("text_config"), dict):
            super().set_dtype(text, dtype)

    def config_values(self, config: Mapping[str, Any]) -> dict[str, Any]:
        text, vision = self.text_config(config), self.vision_config(config) or {}
        return {
            "dtype": config.get("torch_dtype", config.get("dtype", text.get("dtype"))),
            "language layers": text.get("num_hidden_layers"),
            "hidden size": text.get("hidden_size"),
            "vision blocks": vision.get("depth"),
            "vision hidden size": vision.get("hidden_size"),
            "tied embeddings": self.is_tied(config),
        }

    def config_schema(self) -> TypeAdapter[Any]:
        return CONFIG

    def config_limits(self, config: Mapping[str, Any], largest: int, tensors: int) -> ConfigLimits:
        return ConfigLimits.of(self.text_config(config), self.vision_config(config), largest, tensors)

    def complete_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        complete = {**config, "text_config": TEXT_DEFAULTS | dict(self.text_config(config))}
        if (vision := self.vision_config(config)) is not None:
            complete["vision_config"] = {"deepstack_visual_indexes": list(DEEPSTACK_INDEXES), **vision}
        return complete


QWEN3_VL = Qwen3VL()
