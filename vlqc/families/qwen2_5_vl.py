"""Qwen2.5-VL: its layers by checkpoint name, and which of them engines fuse, shard or leave in float."""

from vlqc.families.layer_names import matches_any

# ---- layers, as patterns over checkpoint names ---------------------------------------------------------------------

VISION_QKV = ("visual.blocks.*.attn.qkv",)
VISION_PROJ = ("visual.blocks.*.attn.proj",)
VISION_GATE_UP = ("visual.blocks.*.mlp.gate_proj", "visual.blocks.*.mlp.up_proj")
VISION_DOWN = ("visual.blocks.*.mlp.down_proj",)
MERGER = ("visual.merger.mlp.0", "visual.merger.mlp.2")
LANGUAGE_QKV = tuple(f"model.layers.*.self_attn.{member}_proj" for member in "qkv")
LANGUAGE_WITHOUT_BIAS = (
    "model.layers.*.self_attn.o_proj",
    "model.layers.*.mlp.gate_proj",
    "model.layers.*.mlp.up_proj",
    "model.layers.*.mlp.down_proj",
)
VISION = VISION_QKV + VISION_PROJ + VISION_GATE_UP + VISION_DOWN
LANGUAGE = LANGUAGE_QKV + LANGUAGE_WITHOUT_BIAS

# Engines multiply the members of a group as one matrix: one input, one scheme, one input scale.
FUSED_GROUPS = (
    LANGUAGE_QKV,
    ("model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj"),
    VISION_GATE_UP,
)

# What the reference quantization script of Qwen2.5-VL leaves in float: the default of `--fallback`.
REFERENCE_FLOAT: tuple[str, ...] = (
    "visual.patch_embed*",  # a convolution; engines run it in float
    "visual.blocks.*.mlp.down_proj",  # products of two activations: the widest ranges of a vision block
    "visual.merger.mlp.*",  # every image feature passes through it; two matrices in all
    "model.embed_tokens",  # a table, not a matrix product
    "model.layers.*.mlp.down_proj",  # holds the massive activations of a language model
    "lm_head",  # engines run it in float
)

ROW_PARALLEL = ("o_proj", "down_proj", "proj")  # last name component of layers sharded along their inputs
PARTS = (("visual.merger.", "merger"), ("visual.", "vision"), ("model.", "language"))  # prefix, part


def fused_group(layer: str) -> tuple[str, ...]:
    """Checkpoint layer name -> all members of its fused group, in the engines' order; a layer on its own: itself."""
    for group in FUSED_GROUPS:
        if matches_any(layer, group):
            parent = layer.rpartition(".")[0]
            return tuple(f"{parent}.{member.rpartition('.')[2]}" for member in group)
    return (layer,)


def model_part(name: str) -> str:
    """Checkpoint name of a layer or tensor -> "vision", "merger", "language" or "other" (lm_head, unknown names)."""
    return next((part for prefix, part in PARTS if name.startswith(prefix)), "other")


def in_vision_tower(name: str) -> bool:
    """Whether a layer or tensor belongs to the vision tower, the merger included."""
    return model_part(name) in ("vision", "merger")


def stays_float_in_reference(layer: str) -> bool:
    """Whether the reference quantization script leaves this layer in float."""
    return matches_any(layer, REFERENCE_FLOAT)


def is_row_parallel(layer: str) -> bool:
    """Whether tensor parallelism shards this Linear along its inputs."""
    return layer.rpartition(".")[2] in ROW_PARALLEL
