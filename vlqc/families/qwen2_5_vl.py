"""Qwen2.5-VL: names, layers, config.json and model inputs."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import AfterValidator, Field, ValidationInfo
from typing_extensions import TypedDict  # pydantic accepts typing.TypedDict from Python 3.12 on

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


# ---- bounds of the values in config.json ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ConfigLimits:
    """Upper bounds of values in config.json, from the tensors of the checkpoint and from other values.

    size: the largest dimension of any tensor; blocks: the number of tensors; last_block: index of the last block of the
    vision tower; last_token: the largest token id; rotary: half the channels of a head of the language model.
    """

    size: int
    blocks: int
    last_block: int
    last_token: int
    rotary: int


def config_limits(config: Mapping[str, Any], largest: int, tensors: int) -> ConfigLimits:
    """Limits for a config that may be invalid. largest: largest dimension of any tensor; tensors: their number."""
    vision = config.get("vision_config")
    depth = vision.get("depth") if isinstance(vision, dict) else None
    vocabulary = config["vocab_size"]
    return ConfigLimits(
        size=largest,
        blocks=tensors,
        last_block=(int(depth or 0) if _is_integer(depth, tensors) else tensors) - 1,
        last_token=(vocabulary if _is_integer(vocabulary, largest) else largest) - 1,
        rotary=_head_size(config) // 2,
    )


def _is_integer(value: Any, maximum: int) -> bool:
    return type(value) is int and 1 <= value <= maximum


def _head_size(config: Mapping[str, Any]) -> int:
    """Channels of a head of the language model; 0 if the config does not determine it."""
    size = config.get("head_dim")
    if _is_integer(size, 2**31):
        return int(size or 0)
    heads, hidden = config.get("num_attention_heads", 64), config["hidden_size"]
    return hidden // heads if _is_integer(heads, 2**31) and _is_integer(hidden, 2**31) else 0


def _at_most(limit: str, meaning: str) -> AfterValidator:
    def check(value: int, info: ValidationInfo) -> int:
        maximum = getattr(info.context, limit)
        if value > maximum:
            raise ValueError(f"it must be at most {maximum}, {meaning}")
        return value

    return AfterValidator(check)


def _mrope(value: Any, info: ValidationInfo) -> Any:
    sections: Any = value.get("mrope_section") if isinstance(value, dict) else None
    half = getattr(info.context, "rotary", 0)
    are_sizes = isinstance(sections, list) and all(_is_integer(size, 2**20) for size in sections)
    if not are_sizes or len(sections) != 3 or sum(sections) != half:
        raise ValueError(f"it needs an mrope_section of three integers above 0 whose sum is {half}, half of a head")
    return value


Size = Annotated[int, Field(ge=1), _at_most("size", "the largest dimension of any tensor")]
Blocks = Annotated[int, Field(ge=1), _at_most("blocks", "the number of tensors")]
BlockIndex = Annotated[int, Field(ge=0), _at_most("last_block", "the index of the last block")]
Token = Annotated[int, Field(ge=0), _at_most("last_token", "the last id of the vocabulary")]
Tokens = Token | list[Token] | None
Positions = Annotated[int, Field(ge=1, le=2**31 - 1)]
Deviation = Annotated[float, Field(ge=0, le=1e3)]

# Values that the model's config class gives to missing keys, where they are large or invalid for the checkpoint.
CONFIG_DEFAULTS = {
    key: TEXT_DEFAULTS[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
} | {"rope_scaling": None}


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


class Config(TypedDict, total=False):
    """Keys of a flat config.json; validated with a `ConfigLimits` as context."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size | None
    num_hidden_layers: Blocks
    image_token_id: Token
    video_token_id: Token
    vision_start_token_id: Token
    vision_end_token_id: Token
    vision_token_id: Token
    bos_token_id: Tokens
    eos_token_id: Tokens
    pad_token_id: Tokens
    hidden_act: str
    model_type: str
    torch_dtype: str
    dtype: str
    tie_word_embeddings: bool
    use_sliding_window: bool
    use_cache: bool
    rms_norm_eps: Annotated[float, Field(ge=1e-12, le=1e-2)]
    rope_theta: Annotated[float, Field(ge=1, le=1e12)]
    attention_dropout: Annotated[float, Field(ge=0, le=1)]
    initializer_range: Deviation
    max_position_embeddings: Positions
    max_window_layers: Annotated[int, Field(ge=0, le=2**31 - 1)]
    sliding_window: Positions | None
    rope_scaling: Annotated[Any, AfterValidator(_mrope)]
    vision_config: VisionConfig
    architectures: list[str]


# ---- model inputs ----------------------------------------------------------------------------------------------------

TEXT_INPUTS = ("input_ids", "attention_mask")  # [1, S] int64
IMAGE_INPUTS = ("pixel_values", "image_grid_thw")  # [P, C*T*p*p] float, [images, 3] int64
OPTIONAL_INPUTS = ("mm_token_type_ids",)  # [1, S] int64, in newer transformers
VIDEO_INPUTS = ("pixel_values_videos", "video_grid_thw")  # not supported
TOKENIZER_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
IMAGE_PROCESSOR_CLASSES = (
    "Qwen2VLImageProcessor",
    "Qwen2VLImageProcessorFast",
    "Qwen2VLImageProcessorPil",
    "Qwen2_5_VLImageProcessor",
)
IMAGE_TOKEN = "<|image_pad|>"
SYSTEM_PROMPT = "You are a helpful assistant."
# Limits of the image preprocessing of qwen_vl_utils, which the published models were evaluated with.
PIXELS_PER_TOKEN_SIDE = 28
MIN_IMAGE_TOKENS, MAX_IMAGE_TOKENS = 4, 16384
MAX_ASPECT_RATIO = 200
MAX_ENLARGED_PIXELS = MAX_IMAGE_TOKENS * PIXELS_PER_TOKEN_SIDE**2  # the settings must not enlarge images beyond it


class ImageSize(TypedDict, total=False):
    """`size` of the image processor's settings, in pixels of the whole image."""

    shortest_edge: Annotated[int, Field(ge=1, le=MAX_ENLARGED_PIXELS)] | None
    longest_edge: Annotated[int, Field(ge=1, le=2**40)] | None


class ImageSettings(TypedDict, total=False):
    """Keys of preprocessor_config.json. The published models have patch_size 14 and the other two sizes 2."""

    patch_size: Annotated[int, Field(ge=1, le=128)]
    merge_size: Annotated[int, Field(ge=1, le=8)]
    temporal_patch_size: Annotated[int, Field(ge=1, le=16)]
    min_pixels: Annotated[int, Field(ge=1, le=MAX_ENLARGED_PIXELS)] | None
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


@dataclass(frozen=True)
class InputLayout:
    """How images appear in the inputs of a model.

    image_token_id: token that stands for one image feature; merge_size: patches along a side of one image feature;
    patch_values: values of one patch, C*T*p*p.
    """

    image_token_id: int
    merge_size: int
    patch_values: int

    @classmethod
    def of(cls, config: Any) -> Self:
        """config: of a transformers model."""
        vision = config.vision_config
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return cls(config.image_token_id, vision.spatial_merge_size, values)

    def image_tokens(self, patches: int) -> int:
        """Number of image tokens of so many patches."""
        return patches // self.merge_size**2


def is_image_token(input_ids: "Tensor", config: Any) -> "Tensor":
    """input_ids [B, S] -> bool [B, S]. config: of the transformers model."""
    image_tokens: Tensor = input_ids == config.image_token_id
    return image_tokens


def smart_resize(height: int, width: int) -> tuple[int, int]:
    """Pixels of an image -> pixels to which it is resized before the image processor resizes it once more.

    The function of the same name in qwen_vl_utils 0.0.14, at its default limits: both sides become multiples of 28, the
    number of image tokens lies between 4 and 16384, and the aspect ratio is kept as closely as possible. That package
    cannot be imported without torchvision, and the function of that name in transformers treats images with a side
    below 28 pixels differently.

    Raises:
        ValueError: if one side is more than 200 times as long as the other.
    """
    side = PIXELS_PER_TOKEN_SIDE
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise ValueError(f"the aspect ratio must be at most {MAX_ASPECT_RATIO}, it is {ratio:g}")
    min_pixels, max_pixels = MIN_IMAGE_TOKENS * side**2, MAX_IMAGE_TOKENS * side**2
    rows, columns = (max(1, round(pixels / side)) for pixels in (height, width))
    if rows * columns * side**2 > max_pixels:
        factor = math.sqrt((height * width) / max_pixels)
        rows, columns = (math.floor(pixels / factor / side) for pixels in (height, width))
    elif rows * columns * side**2 < min_pixels:
        factor = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(pixels * factor / side) for pixels in (height, width))
    return rows * side, columns * side


def chat_text(images: int, prompt: str, response: str | None, *, image_token: str, marks_turns: bool) -> str:
    """The conversation as Qwen2.5-VL's chat template writes it, for checkpoints without a template.

    Args:
        images: how many; they precede the prompt, with one image token each.
        response: of the assistant. None ends the text where it would begin.
        marks_turns: whether the tokenizer has the tokens that mark turns.
    """
    request = f"<|vision_start|>{image_token}<|vision_end|>" * images + prompt
    if not marks_turns:
        return request + ("" if response is None else f" {response}")
    turns = [("system", SYSTEM_PROMPT), ("user", request)]
    if response is not None:
        turns.append(("assistant", response))
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return text if response is not None else f"{text}<|im_start|>assistant\n"
