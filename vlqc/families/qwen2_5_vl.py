"""Qwen2.5-VL: names, layers, config.json and model inputs."""

from typing import Any

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
SUBPARTS = ("vision blocks", "merger", "vision, other", "language layers", "embeddings", "lm_head", "other")
SUBPART_PREFIXES = {
    "visual.blocks.": "vision blocks",
    "visual.merger.": "merger",
    "visual.": "vision, other",
    "model.layers.": "language layers",
    "model.embed_tokens.": "embeddings",
    "lm_head.": "lm_head",
}


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


def model_subpart(name: str) -> str:
    """Original tensor name -> one of SUBPARTS."""
    return next((part for prefix, part in SUBPART_PREFIXES.items() if name.startswith(prefix)), "other")


def in_vision_tower(name: str) -> bool:
    """Whether a layer or tensor belongs to the vision tower, the merger included."""
    return model_part(name) in ("vision", "merger")


def stays_float_in_reference(layer: str) -> bool:
    """Whether the reference quantization script leaves this layer in float."""
    return matches_any(layer, REFERENCE_FLOAT)


def is_row_parallel(layer: str) -> bool:
    """Whether tensor parallelism shards this Linear along its inputs."""
    return layer.rpartition(".")[2] in ROW_PARALLEL


# ---- names -----------------------------------------------------------------------------------------------------------

RENAMED_PREFIXES = {"model.visual.": "visual.", "model.language_model.": "model."}  # newer transformers: original


def original_name(name: str) -> str:
    """Name of a tensor or module in any transformers version -> its name in the first release, which engines expect."""
    for new, original in RENAMED_PREFIXES.items():
        if name.startswith(new):
            return original + name.removeprefix(new)
    return name


# ---- config.json -----------------------------------------------------------------------------------------------------

RENAMED_KEYS = {"dtype": "torch_dtype"}
NOT_IN_THE_TOP_LEVEL = ("model_type", "dtype", "torch_dtype", "layer_types", "architectures")  # keys of text_config
NOT_IN_VISION_CONFIG = ("dtype", "torch_dtype", "rope_parameters")


def flatten_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of any transformers version -> the flat form of the first release, which engines expect.

    Newer versions nest the keys of the language model in `text_config` and the rotary embedding in `rope_parameters`. A
    flat config is returned unchanged.
    """
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    flat = {key: value for key, value in config.items() if key != "text_config"}
    for key, value in text.items():
        if key == "rope_parameters" and isinstance(value, dict):
            flat |= original_rope(value)
        elif key not in NOT_IN_THE_TOP_LEVEL:
            flat.setdefault(key, value)
    vision = flat.get("vision_config")
    if isinstance(vision, dict):
        flat["vision_config"] = {key: value for key, value in vision.items() if key not in NOT_IN_VISION_CONFIG}
    return {RENAMED_KEYS.get(key, key): value for key, value in flat.items()}


def original_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """rope_parameters -> rope_theta and rope_scaling; multimodal sections have the type mrope unless scaled."""
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    if "mrope_section" in scaling:
        rope_type = scaling.setdefault("rope_type", "default")
        scaling["type"] = "mrope" if rope_type == "default" else rope_type
    rope: dict[str, Any] = {"rope_scaling": scaling}
    if "rope_theta" in parameters:
        rope["rope_theta"] = parameters["rope_theta"]
    return rope
