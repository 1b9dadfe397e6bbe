"""Qwen2.5-VL: names, layers, config.json and model inputs."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlqc.families.layer_names import matches_any
from vlqc.families.model_structure import Linear, ModelStructure

if TYPE_CHECKING:  # torch-free: the command line imports this module for its help
    from torch import Tensor

MODEL_TYPES = ("qwen2_5_vl",)  # model_type in config.json
ARCHITECTURES = ("Qwen2_5_VLForConditionalGeneration",)

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


BLOCK = re.compile(r"(?:model\.layers|visual\.blocks)\.\d+(?=\.)")


def block_of(name: str) -> str | None:
    """Checkpoint name of a layer or tensor -> its block, such as "model.layers.3"; None outside of the blocks."""
    block = BLOCK.match(name)
    return block and block[0]


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


# ---- all layers and their sizes, from config.json ------------------------------------------------------------------

EMBEDDING, OUTPUT_HEAD, PATCH_EMBEDDING = "model.embed_tokens", "lm_head", "visual.patch_embed.proj"

# Defaults of Qwen2_5_VLConfig in transformers 4.49 for keys that config.json may leave out.
TEXT_DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
VISION_DEFAULTS = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
}
LARGEST_SIZE, MOST_BLOCKS = 1 << 31, 10_000  # bounds that keep a damaged config.json from filling the memory

# Linear layers as (name, outputs, inputs, has a bias), with sizes named as in `_sizes`; norms as (name, channels,
# linear layers that read it); edges as (producer, consumer) of a scale that cancels between two linear layers.
VISION_BLOCK = "visual.blocks.{}"
VISION_BLOCK_LINEARS = (
    ("attn.qkv", "vision_qkv", "vision_hidden", True),
    ("attn.proj", "vision_hidden", "vision_hidden", True),
    ("mlp.gate_proj", "vision_intermediate", "vision_hidden", True),
    ("mlp.up_proj", "vision_intermediate", "vision_hidden", True),
    ("mlp.down_proj", "vision_hidden", "vision_intermediate", True),
)
VISION_BLOCK_NORMS = (
    ("norm1", "vision_hidden", ("attn.qkv",)),
    ("norm2", "vision_hidden", ("mlp.gate_proj", "mlp.up_proj")),
)
VISION_BLOCK_EDGES = (("attn.qkv", "attn.proj"), ("mlp.up_proj", "mlp.down_proj"))
MERGER_BLOCK = "visual.merger"
MERGER_LINEARS = (
    ("mlp.0", "vision_merged", "vision_merged", True),
    ("mlp.2", "vision_output", "vision_merged", True),
)
MERGER_NORMS = (("ln_q", "vision_hidden", ("mlp.0",)),)
DECODER_LAYER = "model.layers.{}"
DECODER_LAYER_LINEARS = (
    ("self_attn.q_proj", "queries", "hidden", True),
    ("self_attn.k_proj", "keys", "hidden", True),
    ("self_attn.v_proj", "keys", "hidden", True),
    ("self_attn.o_proj", "hidden", "queries", False),
    ("mlp.gate_proj", "intermediate", "hidden", False),
    ("mlp.up_proj", "intermediate", "hidden", False),
    ("mlp.down_proj", "hidden", "intermediate", False),
)
DECODER_LAYER_NORMS = (
    ("input_layernorm", "hidden", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", "hidden", ("mlp.gate_proj", "mlp.up_proj")),
)
DECODER_LAYER_EDGES = (("self_attn.v_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj"))
FINAL_NORM = "model.norm"  # read by the output head; no scale is folded into it

LinearRows = tuple[tuple[str, str, str, bool], ...]
NormRows = tuple[tuple[str, str, tuple[str, ...]], ...]
EdgeRows = tuple[tuple[str, str], ...]


def model_structure(config: Mapping[str, Any]) -> ModelStructure | str:
    """config.json, flat or with text_config -> the model's structure, or what is wrong with the config."""
    sizes = _sizes(config)
    if isinstance(sizes, str):
        return sizes
    linears: dict[str, Linear] = {}
    norms: dict[str, int] = {}
    consumers: dict[str, tuple[str, ...]] = {}
    edges: dict[str, str] = {}

    def add(block: str, linear_rows: LinearRows, norm_rows: NormRows, edge_rows: EdgeRows) -> None:
        for name, channels, readers in norm_rows:
            norms[f"{block}.{name}"] = sizes[channels]
            consumers[f"{block}.{name}"] = tuple(f"{block}.{reader}" for reader in readers)
        for name, outputs, inputs, bias in linear_rows:
            layer = f"{block}.{name}"
            linears[layer] = Linear(sizes[outputs], sizes[inputs], is_row_parallel(layer), bias)
        for producer, consumer in edge_rows:
            edges[f"{block}.{producer}"] = f"{block}.{consumer}"

    for index in range(sizes["vision_depth"]):
        add(VISION_BLOCK.format(index), VISION_BLOCK_LINEARS, VISION_BLOCK_NORMS, VISION_BLOCK_EDGES)
    add(MERGER_BLOCK, MERGER_LINEARS, MERGER_NORMS, ())
    for index in range(sizes["layers"]):
        add(DECODER_LAYER.format(index), DECODER_LAYER_LINEARS, DECODER_LAYER_NORMS, DECODER_LAYER_EDGES)
    norms[FINAL_NORM], consumers[FINAL_NORM] = sizes["hidden"], (OUTPUT_HEAD,)
    if not is_tied(config):
        linears[OUTPUT_HEAD] = Linear(sizes["vocabulary"], sizes["hidden"])
    patch = (sizes["temporal_patch"], sizes["patch"], sizes["patch"])
    other_tensors = {
        f"{PATCH_EMBEDDING}.weight": (sizes["vision_hidden"], sizes["image_channels"], *patch),
        f"{EMBEDDING}.weight": (sizes["vocabulary"], sizes["hidden"]),
    }
    return ModelStructure(linears, norms, other_tensors, consumers, edges, sizes["heads"], sizes["kv_heads"])


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output head shares the embedding's weight. The top-level key takes precedence, as in the engines."""
    nested = config.get("text_config")
    inner = nested.get("tie_word_embeddings", False) if isinstance(nested, Mapping) else False
    return bool(config.get("tie_word_embeddings", inner))


def _sizes(config: Mapping[str, Any]) -> dict[str, int] | str:
    """The sizes that the tables above name, or what is wrong with the config."""
    nested = config.get("text_config")
    text_config = nested if isinstance(nested, Mapping) else config
    vision_config = config.get("vision_config")
    if not isinstance(vision_config, Mapping):
        return "vision_config is missing"
    text, vision = _integers("text", text_config, TEXT_DEFAULTS), _integers("vision", vision_config, VISION_DEFAULTS)
    if isinstance(text, str):
        return text
    if isinstance(vision, str):
        return vision
    heads, kv_heads = text["num_attention_heads"], text["num_key_value_heads"]
    head = text_config.get("head_dim") or text["hidden_size"] // heads
    if type(head) is not int or head < 1 or heads % kv_heads:
        return "num_attention_heads, num_key_value_heads and head_dim do not fit together"
    if text["num_hidden_layers"] + vision["depth"] > MOST_BLOCKS:
        return f"num_hidden_layers and depth add up to more than {MOST_BLOCKS}"
    return {
        "vocabulary": text["vocab_size"],
        "hidden": text["hidden_size"],
        "intermediate": text["intermediate_size"],
        "layers": text["num_hidden_layers"],
        "heads": heads,
        "kv_heads": kv_heads,
        "queries": head * heads,
        "keys": head * kv_heads,
        "vision_depth": vision["depth"],
        "vision_hidden": vision["hidden_size"],
        "vision_qkv": 3 * vision["hidden_size"],
        "vision_intermediate": vision["intermediate_size"],
        "vision_merged": vision["hidden_size"] * vision["spatial_merge_size"] ** 2,
        "vision_output": vision["out_hidden_size"],
        "image_channels": vision["in_channels"],
        "patch": vision["patch_size"],
        "temporal_patch": vision["temporal_patch_size"],
    }


def _integers(part: str, config: Mapping[str, Any], defaults: Mapping[str, int]) -> dict[str, int] | str:
    """The keys of `defaults` from the config, or which of them is not a positive integer below LARGEST_SIZE."""
    values = {key: config.get(key, default) for key, default in defaults.items()}
    for key, value in values.items():
        if type(value) is not int or not 0 < value < LARGEST_SIZE:
            return f"{key} of the {part} model is {value!r}, not a positive integer below {LARGEST_SIZE}"
    return values


# ---- model inputs ----------------------------------------------------------------------------------------------------


def is_image_token(input_ids: "Tensor", config: Any) -> "Tensor":
    """input_ids [B, S] -> bool [B, S]. config: of the transformers model."""
    image_tokens: Tensor = input_ids == config.image_token_id
    return image_tokens
