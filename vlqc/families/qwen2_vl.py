"""Qwen2-VL: names, config.json and roles of its layers. Its language model is that of Qwen2.5-VL."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict  # pydantic accepts typing.TypedDict from Python 3.12 on

from vlqc.families.config_values import Blocks, Deviation, ImageTokens, Mrope, Size, TextConfig
from vlqc.families.family import Role
from vlqc.families.inputs.input_format import ImageFormat, VideoFormat
from vlqc.families.qwen2_5_vl import GATE_UP, QKV, Qwen25VL


class VisionConfig(TypedDict, total=False):
    """Keys of `vision_config`. embed_dim: channels of the tower; hidden_size: those of its output."""

    depth: Blocks
    embed_dim: Size
    hidden_size: Size
    num_heads: Size
    mlp_ratio: Annotated[float, Field(gt=0, le=64)]
    in_channels: Size
    in_chans: Size
    patch_size: Size
    spatial_patch_size: Size
    spatial_merge_size: Size
    temporal_patch_size: Size
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


class Qwen2VL(Qwen25VL):
    """Qwen2-VL, 2B to 72B: LayerNorms and an MLP without a gate in the vision tower."""

    name = "qwen2_vl"
    title = "Qwen2-VL"
    model_types = ("qwen2_vl",)
    architectures = ("Qwen2VLForConditionalGeneration",)
    transformers_version = "4.45"

    roles: ClassVar[Mapping[Role, tuple[str, ...]]] = {
        **Qwen25VL.roles,
        Role.VISION_UP: ("visual.blocks.*.mlp.fc1",),
        Role.VISION_DOWN: ("visual.blocks.*.mlp.fc2",),
    }
    fused_groups = (QKV, GATE_UP)
    reference_float = (
        "visual.patch_embed*",  # a convolution; engines run it in float
        "visual.blocks.*.mlp.fc2",  # reads the output of an activation function, which no smoothing can scale
        "visual.merger.mlp.*",  # every image feature passes through it; two matrices in all
        "model.embed_tokens",  # a table, not a matrix product
        "model.layers.*.mlp.down_proj",  # holds the massive activations of a language model
        "lm_head",  # engines run it in float
    )
    row_parallel = (*Qwen25VL.row_parallel, "fc2")

    image_format = ImageFormat(token_side=28)
    video_format = VideoFormat()

    def config_values(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return super().config_values(config) | {
            "vision hidden size": (self.vision_config(config) or {}).get("embed_dim")
        }

    def config_schema(self) -> TypeAdapter[Any]:
        return CONFIG


QWEN2_VL = Qwen2VL()
