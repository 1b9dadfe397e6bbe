"""What distinguishes the families of `outlier_checkpoint.py`: config.json, default sizes, and parameters in order.

A family is a row of FAMILIES. Its parameters are a sequence of entries, which `outlier_checkpoint.py` fills with
numbers. Names are those of the files of published models.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

BEGIN, VISION_START, VISION_END, IMAGE, VIDEO, VISION_PAD = 1, 3, 4, 5, 6, 7  # token ids of tools/demo/tiny_vl
MERGE, FRAMES, COLORS = 2, 2, 3
BRANCH_GAIN = 0.75  # of linear layers that write to the residual stream


@dataclass(frozen=True)
class Shape:
    """Sizes of the checkpoint; the vocabulary is at least 64.

    head: channels of a head of the language model, 0: hidden / heads. It must be a multiple of 16 in Qwen2-VL and
    Qwen2.5-VL; a vision head must be a multiple of 4. The numbers from `positions` on are of Qwen3-VL.
    """

    layers: int = 2
    hidden: int = 512
    intermediate: int = 768
    heads: int = 8
    value_heads: int = 2
    vision_layers: int = 2  # of Qwen2.5-VL the last block has full attention, the others are windowed
    vision_hidden: int = 256
    vision_intermediate: int = 340
    vision_heads: int = 4
    vocabulary: int = 512
    head: int = 0
    positions: int = 256  # of the vision tower's position embedding: a square number
    deepstack: tuple[int, ...] = ()  # numbers of the vision blocks whose output goes through a merger of its own
    experts: int = 0
    used_experts: int = 2  # per token
    expert_intermediate: int = 0

    @property
    def head_size(self) -> int:
        """Channels of a head of the language model."""
        return self.head or self.hidden // self.heads


@dataclass(frozen=True)
class Vision:
    """Vision tower. Names are relative to a block, or to the merger for `merger`: norm, first and second linear."""

    prefix: str
    patch: int  # pixels along a side
    merger: tuple[str, str, str]
    up: str
    down: str
    gate: str | None = None
    is_layer_norm: bool = True  # with a bias; otherwise RMSNorm
    has_patch_bias: bool = False
    has_positions: bool = False
    image_settings: dict[str, Any] = field(default_factory=dict)  # changes to those of tiny_vl, None: no such key


@dataclass(frozen=True)
class Family:
    """One model type.

    version: the transformers version that config.json names; outlier_factors: bounds, larger where fewer channels or
    layers are quantized.
    """

    architecture: str
    version: str
    shape: Shape
    vision: Vision | None = None
    text: str = "model"  # prefix of the language model
    has_qkv_bias: bool = False
    has_head_norms: bool = False  # q_norm and k_norm
    is_nested: bool = False  # config.json has a text_config
    outlier_factors: tuple[float, float] = (8.0, 32.0)


QWEN2_5_VISION = Vision(
    "visual", 14, ("ln_q", "mlp.0", "mlp.2"), "mlp.up_proj", "mlp.down_proj", gate="mlp.gate_proj", is_layer_norm=False
)
QWEN2_VISION = Vision("visual", 14, ("ln_q", "mlp.0", "mlp.2"), "mlp.fc1", "mlp.fc2")
QWEN3_VISION = Vision(
    "model.visual",
    16,
    ("norm", "linear_fc1", "linear_fc2"),
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    has_patch_bias=True,
    has_positions=True,
    image_settings={
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "image_std": [0.5, 0.5, 0.5],
        "max_pixels": None,
        "min_pixels": None,
        "patch_size": 16,
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    },
)
QWEN2_SHAPE = Shape(layers=3, hidden=256, intermediate=512, vision_layers=4, vision_hidden=128, vision_intermediate=512)
# o_proj is not square, a vision head has 36 channels, and vision_intermediate is not a multiple of 32.
QWEN3_SHAPE = replace(QWEN2_SHAPE, head=48, vision_hidden=144, vision_intermediate=304, deepstack=(0, 1, 2))

FAMILIES = {
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        "4.49.0",
        Shape(),
        QWEN2_5_VISION,
        has_qkv_bias=True,
        outlier_factors=(5.0, 24.0),
    ),
    "qwen2_vl": Family("Qwen2VLForConditionalGeneration", "4.45.0", QWEN2_SHAPE, QWEN2_VISION, has_qkv_bias=True),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration",
        "4.57.0",
        QWEN3_SHAPE,
        QWEN3_VISION,
        text="model.language_model",
        has_head_norms=True,
        is_nested=True,
    ),
    "qwen3_vl_moe": Family(
        "Qwen3VLMoeForConditionalGeneration",
        "4.57.0",
        replace(QWEN3_SHAPE, experts=8, expert_intermediate=96),
        QWEN3_VISION,
        text="model.language_model",
        has_head_norms=True,
        is_nested=True,
        outlier_factors=(10.0, 40.0),
    ),
    "qwen2": Family("Qwen2ForCausalLM", "4.43.1", QWEN2_SHAPE, has_qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", "4.51.0", QWEN3_SHAPE, has_head_norms=True),
}


# ---- parameters ------------------------------------------------------------------------------------------------------

Sizes = dict[str, tuple[int, ...]]
VISION, TEXT = "vision", "text"  # residual streams


@dataclass(frozen=True)
class Linear:
    """A linear layer.

    large: first row and number of the rows of which a few are enlarged; stream: the residual stream, VISION or TEXT,
    whose constant part is in its bias.
    """

    name: str
    rows: int
    columns: int
    has_bias: bool = False
    gain: float = 1.0
    large: tuple[int, int] | None = None
    stream: str | None = None

    def sizes(self) -> Sizes:
        bias = {f"{self.name}.bias": (self.rows,)} if self.has_bias else {}
        return {f"{self.name}.weight": (self.rows, self.columns)} | bias


@dataclass(frozen=True)
class PatchEmbedding:
    """The convolution over the pixels of a patch."""

    name: str
    rows: int
    patch: int
    has_bias: bool

    def sizes(self) -> Sizes:
        bias = {f"{self.name}.bias": (self.rows,)} if self.has_bias else {}
        return {f"{self.name}.weight": (self.rows, COLORS, FRAMES, self.patch, self.patch)} | bias


@dataclass(frozen=True)
class Norm:
    """A norm and the layers that read it; those read each channel `repeat` times."""

    name: str
    channels: int
    consumers: tuple[str, ...]
    has_bias: bool = False
    repeat: int = 1

    def sizes(self) -> Sizes:
        return {f"{self.name}.weight": (self.channels,)} | (
            {f"{self.name}.bias": (self.channels,)} if self.has_bias else {}
        )


@dataclass(frozen=True)
class Embedding:
    """The embedding of the tokens: the start of the language model's residual stream."""

    name: str
    tokens: int
    channels: int

    def sizes(self) -> Sizes:
        return {f"{self.name}.weight": (self.tokens, self.channels)}


@dataclass(frozen=True)
class Values:
    """A weight of normal numbers without outliers."""

    name: str
    size: tuple[int, ...]
    mean: float
    deviation: float

    def sizes(self) -> Sizes:
        return {f"{self.name}.weight": self.size}


@dataclass(frozen=True)
class FinalNorm:
    """The norm before the output head."""

    name: str
    channels: int

    def sizes(self) -> Sizes:
        return {f"{self.name}.weight": (self.channels,)}


@dataclass(frozen=True)
class Router:
    """The scores of the experts. The last expert is never chosen."""

    name: str
    experts: int
    channels: int

    def sizes(self) -> Sizes:
        return {f"{self.name}.weight": (self.experts, self.channels)}


@dataclass(frozen=True)
class Experts:
    """Gated MLPs in two tensors: inputs x outputs, the gate's outputs before the up projection's."""

    name: str
    experts: int
    channels: int
    middle: int

    def sizes(self) -> Sizes:
        return {
            f"{self.name}.gate_up_proj": (self.experts, self.channels, 2 * self.middle),
            f"{self.name}.down_proj": (self.experts, self.middle, self.channels),
        }


Entry = Linear | PatchEmbedding | Norm | Embedding | Values | FinalNorm | Router | Experts


def vision_entries(family: Family, shape: Shape) -> Iterator[Entry]:
    """The vision tower and its mergers; nothing for a language model."""
    if family.vision is None:
        return
    vision, hidden, middle = family.vision, shape.vision_hidden, shape.vision_intermediate
    yield PatchEmbedding(f"{vision.prefix}.patch_embed.proj", hidden, vision.patch, vision.has_patch_bias)
    if vision.has_positions:
        yield Values(f"{vision.prefix}.pos_embed", (shape.positions, hidden), 0.0, 0.3)
    for index in range(shape.vision_layers):
        block = f"{vision.prefix}.blocks.{index}"
        qkv, up = f"{block}.attn.qkv", f"{block}.{vision.up}"
        stream = VISION if index == 0 and not vision.has_patch_bias else None
        yield Linear(qkv, 3 * hidden, hidden, True, large=(2 * hidden, hidden))
        yield Linear(f"{block}.attn.proj", hidden, hidden, True, BRANCH_GAIN, stream=stream)
        gates = (f"{block}.{vision.gate}",) if vision.gate else ()
        for gate in gates:
            yield Linear(gate, middle, hidden, True)
        yield Linear(up, middle, hidden, True, large=(0, middle) if vision.gate else None)  # scales do not pass a GELU
        yield Linear(f"{block}.{vision.down}", hidden, middle, True, BRANCH_GAIN)
        yield Norm(f"{block}.norm1", hidden, (qkv,), vision.is_layer_norm)
        yield Norm(f"{block}.norm2", hidden, (*gates, up), vision.is_layer_norm)
    yield from _merger(vision, shape, "merger", is_main=True)
    for index in range(len(shape.deepstack)):
        yield from _merger(vision, shape, f"deepstack_merger_list.{index}", is_main=False)


def _merger(vision: Vision, shape: Shape, name: str, is_main: bool) -> Iterator[Entry]:
    """The main merger starts the stream of image tokens, and its norm precedes the concatenation of patches."""
    norm, first, second = (f"{vision.prefix}.{name}.{part}" for part in vision.merger)
    merged = shape.vision_hidden * MERGE**2
    yield Linear(first, merged, merged, True)
    yield Linear(second, shape.hidden, merged, True, 1.0 if is_main else BRANCH_GAIN, stream=TEXT if is_main else None)
    channels, repeat = (shape.vision_hidden, MERGE**2) if is_main else (merged, 1)
    yield Norm(norm, channels, (first,), vision.is_layer_norm, repeat)


def text_entries(family: Family, shape: Shape, tied: bool) -> Iterator[Entry]:
    """The language model."""
    hidden, middle, has_bias = shape.hidden, shape.intermediate, family.has_qkv_bias
    queries, values = shape.head_size * shape.heads, shape.head_size * shape.value_heads
    yield Embedding(f"{family.text}.embed_tokens", shape.vocabulary, hidden)
    for index in range(shape.layers):
        layer = f"{family.text}.layers.{index}"
        query, key, value, out = (f"{layer}.self_attn.{name}_proj" for name in "qkvo")
        yield Linear(query, queries, hidden, has_bias)
        yield Linear(key, values, hidden, has_bias)
        yield Linear(value, values, hidden, has_bias, large=(0, values))
        yield Linear(out, hidden, queries, gain=BRANCH_GAIN)
        for name in ("q_norm", "k_norm") if family.has_head_norms else ():
            yield Values(f"{layer}.self_attn.{name}", (shape.head_size,), 1.0, 0.1)
        if shape.experts:
            readers: tuple[str, ...] = (f"{layer}.mlp.gate", f"{layer}.mlp.experts")
            yield Router(readers[0], shape.experts, hidden)
            yield Experts(readers[1], shape.experts, hidden, shape.expert_intermediate)
        else:
            readers = (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")
            yield Linear(readers[0], middle, hidden)
            yield Linear(readers[1], middle, hidden, large=(0, middle))
            yield Linear(f"{layer}.mlp.down_proj", hidden, middle, gain=BRANCH_GAIN)
        yield Norm(f"{layer}.input_layernorm", hidden, (query, key, value))
        yield Norm(f"{layer}.post_attention_layernorm", hidden, readers)
    yield FinalNorm(f"{family.text}.norm", hidden)
    if not tied:
        yield Linear("lm_head", shape.vocabulary, hidden)


def tensor_sizes(family: str, shape: Shape, tied: bool) -> Sizes:
    """Name -> size of every tensor of the checkpoint, in the order of the entries."""
    row, sizes = FAMILIES[family], {}
    for entry in (*vision_entries(row, shape), *text_entries(row, shape, tied)):
        sizes |= entry.sizes()
    return sizes


# ---- config.json -----------------------------------------------------------------------------------------------------


def config_of(shape: Shape, dtype: str, tied: bool, family: str = "qwen2_5_vl") -> dict[str, Any]:
    """config.json with the keys of the published models. Raises ValueError for sizes that do not fit together."""
    row = FAMILIES[family]
    _check(family, row, shape)
    common = {
        "architectures": [row.architecture],
        "model_type": family,
        "tie_word_embeddings": tied,
        "transformers_version": row.version,
    }
    text = _text_config(family, row, shape)
    if row.vision:
        common |= {
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "vision_config": _vision_config(family, shape),
            "vision_end_token_id": VISION_END,
            "vision_start_token_id": VISION_START,
        }
    if not row.is_nested:
        padding = {"pad_token_id": 0, "vision_token_id": VISION_PAD} if row.vision else {}
        return dict(sorted({**text, **common, **padding, "torch_dtype": dtype}.items()))
    text |= {"dtype": dtype, "model_type": f"{family}_text"} | ({"tie_word_embeddings": True} if tied else {})
    return dict(sorted({**common, "text_config": dict(sorted(text.items()))}.items()))


def _check(family: str, row: Family, shape: Shape) -> None:
    multiple = 16 if family in ("qwen2_vl", "qwen2_5_vl") else 2
    if (not shape.head and shape.hidden % shape.heads) or shape.head_size % multiple:
        raise ValueError(f"hidden / heads must be a multiple of {multiple}: {shape}")
    if row.vision and shape.vision_hidden % (4 * shape.vision_heads):
        raise ValueError(f"vision_hidden / vision_heads must be a multiple of 4: {shape}")
    if shape.heads % shape.value_heads or shape.vocabulary < 64:
        raise ValueError(f"value_heads must divide heads, and the vocabulary must be at least 64: {shape}")
    if family == "qwen2_vl" and shape.vision_intermediate % shape.vision_hidden:
        raise ValueError(f"vision_intermediate must be a multiple of vision_hidden: {shape}")
    if any(not 0 <= block < shape.vision_layers for block in shape.deepstack) or len(shape.deepstack) > shape.layers:
        raise ValueError(f"deepstack must name vision blocks, at most one per layer: {shape}")
    if (family == "qwen3_vl_moe") != bool(shape.experts) or shape.experts == 1:
        raise ValueError(f"qwen3_vl_moe needs at least two experts, other families none: {shape}")


def _text_config(family: str, row: Family, shape: Shape) -> dict[str, Any]:
    half = shape.head_size // 2
    config: dict[str, Any] = {
        "attention_dropout": 0.0,
        "bos_token_id": BEGIN,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 32768,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.value_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "use_cache": True,
        "vocab_size": shape.vocabulary,
    }
    if not row.is_nested:
        sliding = None if row.has_head_norms else 32768
        config |= {"max_window_layers": shape.layers, "sliding_window": sliding, "use_sliding_window": False}
    if row.has_head_norms:
        config |= {"attention_bias": False, "head_dim": shape.head_size, "rope_scaling": None}
    if row.vision and row.is_nested:
        side = half * 20 // 64
        sections = [half - 2 * side, side, side]  # of half a head: time, height, width
        rotary = {"mrope_interleaved": True, "mrope_section": sections, "rope_type": "default"}
        config |= {"rope_theta": 5000000.0, "rope_scaling": rotary}
    elif row.vision:
        sections = [half // 4, half // 8 * 3, half // 8 * 3]
        config["rope_scaling"] = {"mrope_section": sections, "type": "mrope"}
    if shape.experts:
        config |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": shape.expert_intermediate,
            "norm_topk_prob": True,
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.used_experts,
        }
    return config


def _vision_config(family: str, shape: Shape) -> dict[str, Any]:
    config: dict[str, Any] = {
        "depth": shape.vision_layers,
        "num_heads": shape.vision_heads,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": FRAMES,
    }
    if family == "qwen2_vl":
        config |= {
            "embed_dim": shape.vision_hidden,
            "hidden_size": shape.hidden,
            "in_channels": COLORS,
            "in_chans": COLORS,
            "mlp_ratio": shape.vision_intermediate // shape.vision_hidden,
            "model_type": family,
            "patch_size": 14,
            "spatial_patch_size": 14,
        }
        return dict(sorted(config.items()))
    config |= {
        "hidden_size": shape.vision_hidden,
        "in_channels": COLORS,
        "intermediate_size": shape.vision_intermediate,
        "model_type": family,
        "out_hidden_size": shape.hidden,
    }
    if family == "qwen2_5_vl":
        config |= {
            "fullatt_block_indexes": [shape.vision_layers - 1],
            "hidden_act": "silu",
            "in_chans": COLORS,
            "patch_size": 14,
            "spatial_patch_size": 14,
            "tokens_per_second": 2,
            "window_size": 112,
        }
    else:
        config |= {
            "deepstack_visual_indexes": list(shape.deepstack),
            "hidden_act": "gelu_pytorch_tanh",
            "initializer_range": 0.02,
            "num_position_embeddings": shape.positions,
            "patch_size": 16,
        }
    return dict(sorted(config.items()))


def patch_values(config: dict[str, Any]) -> int:
    """Values of one patch of the images, 0 for a language model."""
    vision = config.get("vision_config")
    return COLORS * FRAMES * vision["patch_size"] ** 2 if vision else 0


def vocabulary(config: dict[str, Any]) -> int:
    """Number of tokens, from a flat or a nested config."""
    return int(config.get("text_config", config)["vocab_size"])
