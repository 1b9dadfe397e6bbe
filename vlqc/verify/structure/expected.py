"""What a Qwen2.5-VL folder must contain, derived from config.json alone: every tensor, its shape, dtypes and scheme."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlqc.targets.schemes import SPECS, LinearShape, Scheme, Shape, StorageFormat, quant_type, stored_tensors

# torch_dtype of config.json -> safetensors dtype code
DTYPE_CODES = {"bfloat16": "BF16", "float16": "F16"}

# What a config may leave out: the defaults of Qwen2_5_VLConfig (transformers 4.49).
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


@dataclass(frozen=True)
class Linear(LinearShape):
    """One matrix of the model; bias: whether it has one."""

    bias: bool = False


@dataclass(frozen=True)
class ExpectedModel:
    """The model that config.json describes, under checkpoint names."""

    linears: dict[str, Linear]  # lm_head included unless tied
    norms: dict[str, int]  # layer -> channels
    others: dict[str, Shape]  # tensors (not layers) that are neither: embeddings, the patch convolution
    heads: int
    kv_heads: int
    layers: int
    depth: int
    vision_hidden: int

    def embeddings_and_linears(self) -> list[str]:
        """Layers whose `.weight` the engine looks up in the description."""
        return [name.removesuffix(".weight") for name in self.others] + list(self.linears)


def expected_model(config: Mapping[str, Any]) -> ExpectedModel | str:
    """config.json, flat or with text_config -> the model; a sentence when a size in it cannot be one."""
    nested = config.get("text_config")
    text = nested if isinstance(nested, Mapping) else config
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        return "vision_config is missing"
    sizes = {}
    for part, given, defaults in (("text", text, TEXT_DEFAULTS), ("vision", vision, VISION_DEFAULTS)):
        for key, default in defaults.items():
            value = given.get(key, default)
            if type(value) is not int or not 0 < value < 1 << 31:
                return f"{key} of the {part} model is {value!r}, not a positive whole number"
            sizes[f"{part}.{key}"] = value
    head = text.get("head_dim") or sizes["text.hidden_size"] // sizes["text.num_attention_heads"]
    if type(head) is not int or head < 1 or sizes["text.num_attention_heads"] % sizes["text.num_key_value_heads"]:
        return "num_attention_heads, num_key_value_heads and head_dim do not fit together"
    if sizes["text.num_hidden_layers"] + sizes["vision.depth"] > 10_000:
        return "it asks for more than 10000 blocks"
    return _model(sizes, head, tied=is_tied(config))


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether lm_head shares the embedding's table. The top-level key decides, as in the engines."""
    nested = config.get("text_config")
    inner = nested.get("tie_word_embeddings", False) if isinstance(nested, Mapping) else False
    return bool(config.get("tie_word_embeddings", inner))


def _model(sizes: Mapping[str, int], head: int, *, tied: bool) -> ExpectedModel:
    linears: dict[str, Linear] = {}
    norms: dict[str, int] = {}
    hidden, inner = sizes["vision.hidden_size"], sizes["vision.intermediate_size"]
    for index in range(sizes["vision.depth"]):
        block = f"visual.blocks.{index}"
        norms |= {f"{block}.norm1": hidden, f"{block}.norm2": hidden}
        linears |= {
            f"{block}.attn.qkv": Linear(3 * hidden, hidden, bias=True),
            f"{block}.attn.proj": Linear(hidden, hidden, bias=True, row_parallel=True),
            f"{block}.mlp.gate_proj": Linear(inner, hidden, bias=True),
            f"{block}.mlp.up_proj": Linear(inner, hidden, bias=True),
            f"{block}.mlp.down_proj": Linear(hidden, inner, bias=True, row_parallel=True),
        }
    merged = hidden * sizes["vision.spatial_merge_size"] ** 2
    norms["visual.merger.ln_q"] = hidden
    linears["visual.merger.mlp.0"] = Linear(merged, merged, bias=True)
    linears["visual.merger.mlp.2"] = Linear(sizes["vision.out_hidden_size"], merged, bias=True)
    patch = (sizes["vision.temporal_patch_size"], sizes["vision.patch_size"], sizes["vision.patch_size"])

    width, inner = sizes["text.hidden_size"], sizes["text.intermediate_size"]
    queries, keys = head * sizes["text.num_attention_heads"], head * sizes["text.num_key_value_heads"]
    for index in range(sizes["text.num_hidden_layers"]):
        layer = f"model.layers.{index}"
        norms |= {f"{layer}.input_layernorm": width, f"{layer}.post_attention_layernorm": width}
        linears |= {
            f"{layer}.self_attn.q_proj": Linear(queries, width, bias=True),
            f"{layer}.self_attn.k_proj": Linear(keys, width, bias=True),
            f"{layer}.self_attn.v_proj": Linear(keys, width, bias=True),
            f"{layer}.self_attn.o_proj": Linear(width, queries, bias=False, row_parallel=True),
            f"{layer}.mlp.gate_proj": Linear(inner, width, bias=False),
            f"{layer}.mlp.up_proj": Linear(inner, width, bias=False),
            f"{layer}.mlp.down_proj": Linear(width, inner, bias=False, row_parallel=True),
        }
    norms["model.norm"] = width
    if not tied:
        linears["lm_head"] = Linear(sizes["text.vocab_size"], width, bias=False)
    others = {
        "visual.patch_embed.proj.weight": (sizes["vision.hidden_size"], sizes["vision.in_channels"], *patch),
        "model.embed_tokens.weight": (sizes["text.vocab_size"], width),
    }
    return ExpectedModel(
        linears=linears,
        norms=norms,
        others=others,
        heads=sizes["text.num_attention_heads"],
        kv_heads=sizes["text.num_key_value_heads"],
        layers=sizes["text.num_hidden_layers"],
        depth=sizes["vision.depth"],
        vision_hidden=sizes["vision.hidden_size"],
    )


# ---- the tensors of a folder -----------------------------------------------------------------------------------------

CHECKED_SCHEMES = tuple(SPECS)


@dataclass(frozen=True)
class ExpectedTensor:
    """One tensor of the folder: allowed dtype codes, shape, and its word in the description."""

    dtypes: tuple[str, ...]
    shape: Shape
    word: Scheme


def expected_tensors(
    model: ExpectedModel, schemes: Mapping[str, Scheme], form: StorageFormat
) -> dict[str, ExpectedTensor]:
    """Model, scheme per Linear (missing: FLOAT) and the folder's form -> every tensor that must exist."""
    tensors = {
        name: ExpectedTensor((form.float_dtype,), shape, Scheme.FLOAT)
        for name, shape in (*model.others.items(), *((f"{layer}.weight", (n,)) for layer, n in model.norms.items()))
    }
    for layer, linear in model.linears.items():
        scheme = schemes.get(layer, Scheme.FLOAT)
        for spec in stored_tensors(scheme, form):
            shape = spec.shape(linear, form)
            tensors[f"{layer}.{spec.suffix}"] = ExpectedTensor(form.dtype_codes(spec.dtypes), shape, scheme)
        if linear.bias:
            tensors[f"{layer}.bias"] = ExpectedTensor((form.float_dtype,), (linear.outputs,), Scheme.FLOAT)
    return tensors


def norm_biases(model: ExpectedModel, schemes: Mapping[str, Scheme], form: StorageFormat) -> dict[str, ExpectedTensor]:
    """The tensors that may exist besides: a bias per norm, which a folded shift leaves behind, and, in MindIE's layout,
    weight and bias of such a norm once more under `X.module`, marked with the folder's type."""
    tensors = {
        f"{norm}.bias": ExpectedTensor((form.float_dtype,), (n,), Scheme.FLOAT) for norm, n in model.norms.items()
    }
    if not form.packed:
        word = quant_type(schemes.values())
        for norm, n in model.norms.items():
            for suffix in ("weight", "bias"):
                tensors[f"{norm}.module.{suffix}"] = ExpectedTensor((form.float_dtype,), (n,), word)
    return tensors


def consumers_of_norm(norm: str) -> tuple[str, ...]:
    """Norm layer -> the Linears that read its output. model.norm: lm_head."""
    parent, _, name = norm.rpartition(".")
    behind = {
        "norm1": ("attn.qkv",),
        "norm2": ("mlp.gate_proj", "mlp.up_proj"),
        "ln_q": ("mlp.0",),
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
    return tuple(f"{parent}.{consumer}" for consumer in behind[name]) if name in behind else ("lm_head",)
