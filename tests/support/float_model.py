"""A small float model: its config, random tensors, and smoothing of every edge, with NumPy alone."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.support.tensors import Array, rounded

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "torch_dtype": "bfloat16",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 48,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "image_token_id": 45,
    "video_token_id": 46,
    "vision_start_token_id": 43,
    "vision_end_token_id": 44,
    "vision_config": {
        "model_type": "qwen2_5_vl",
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "fullatt_block_indexes": [0],
        "window_size": 112,
    },
}
# Sizes for W4A8_DYNAMIC: inputs of at least two groups of 64. Such a model is not run.
WIDE = {"hidden_size": 128, "intermediate_size": 192}
WIDE_VISION = {"hidden_size": 64, "intermediate_size": 72, "out_hidden_size": 128}


def float_tensors(config: dict[str, Any], rng: np.random.Generator) -> Iterator[tuple[str, Array]]:
    """(name, random values) of every tensor of the float model."""
    vision = config["vision_config"]
    hidden, inner = vision["hidden_size"], vision["intermediate_size"]

    def linear(name: str, n: int, k: int, bias: bool) -> Iterator[tuple[str, Array]]:
        yield f"{name}.weight", rng.standard_normal((n, k)) * 1.5 / np.sqrt(k)
        if bias:
            yield f"{name}.bias", rng.standard_normal(n) * 0.2

    def norm(name: str, size: int) -> Iterator[tuple[str, Array]]:
        yield f"{name}.weight", rng.uniform(0.5, 1.5, size)

    patch = (vision["temporal_patch_size"], vision["patch_size"], vision["patch_size"])
    yield "visual.patch_embed.proj.weight", rng.standard_normal((hidden, 3, *patch)) * 0.03
    for index in range(vision["depth"]):
        block = f"visual.blocks.{index}"
        yield from norm(f"{block}.norm1", hidden)
        yield from norm(f"{block}.norm2", hidden)
        yield from linear(f"{block}.attn.qkv", 3 * hidden, hidden, True)
        yield from linear(f"{block}.attn.proj", hidden, hidden, True)
        for name, n, k in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            yield from linear(f"{block}.mlp.{name}_proj", n, k, True)
    merged = hidden * vision["spatial_merge_size"] ** 2
    yield from norm("visual.merger.ln_q", hidden)
    yield from linear("visual.merger.mlp.0", merged, merged, True)
    yield from linear("visual.merger.mlp.2", vision["out_hidden_size"], merged, True)
    width, inner = config["hidden_size"], config["intermediate_size"]
    head = width // config["num_attention_heads"]
    keys = head * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", rng.standard_normal((config["vocab_size"], width)) * 0.5
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        yield from norm(f"{layer}.input_layernorm", width)
        yield from norm(f"{layer}.post_attention_layernorm", width)
        for name, n in (("q", width), ("k", keys), ("v", keys)):
            yield from linear(f"{layer}.self_attn.{name}_proj", n, width, True)
        yield from linear(f"{layer}.self_attn.o_proj", width, width, False)
        for name, n, k in (("gate", inner, width), ("up", inner, width), ("down", width, inner)):
            yield from linear(f"{layer}.mlp.{name}_proj", n, k, False)
    yield from norm("model.norm", width)
    if not config["tie_word_embeddings"]:
        yield from linear("lm_head", config["vocab_size"], width, False)


def smooth_every_edge(
    values: dict[str, Array], config: dict[str, Any], code: str, rng: np.random.Generator, shift: bool
) -> None:
    """Divides producers and multiplies consumers by random scales, in place; float tensors are rounded again."""

    def fold_norm(norm: str, *linears: str) -> None:
        gamma = values[f"{norm}.weight"]
        values[f"{norm}.weight"] = rounded(gamma / rng.uniform(0.5, 2, gamma.shape), code)
        exact = gamma / values[f"{norm}.weight"]
        for linear in linears:
            weight = values[f"{linear}.weight"]
            values[f"{linear}.weight"] = weight * np.tile(exact, weight.shape[1] // len(exact))
        if shift and "merger" not in norm:
            shift_values = values[f"{norm}.bias"] = rounded(rng.standard_normal(len(gamma)) * 0.3, code)
            for linear in linears:
                product = values[f"{linear}.weight"].astype(np.float64) @ shift_values
                bias = values.get(f"{linear}.bias")
                # A layer without a bias compensates the shift in its quant_bias, not in a tensor.
                values[f"{linear}.bias"] = -product if bias is None else rounded(bias - product, code)

    def fold_linear(producer: str, rows: slice, consumer: str, repeat: tuple[int, int] | None = None) -> None:
        scale = rng.uniform(0.5, 2, len(values[f"{producer}.weight"][rows])).astype(np.float32)
        values[f"{producer}.weight"][rows] /= scale[:, None]
        if f"{producer}.bias" in values:
            values[f"{producer}.bias"][rows] = rounded(values[f"{producer}.bias"][rows] / scale, code)
        if repeat:
            scale = np.repeat(scale.reshape(repeat[0], -1), repeat[1], axis=0).reshape(-1)
        values[f"{consumer}.weight"] = values[f"{consumer}.weight"] * scale

    for index in range(config["vision_config"]["depth"]):
        block, hidden = f"visual.blocks.{index}", config["vision_config"]["hidden_size"]
        fold_norm(f"{block}.norm1", f"{block}.attn.qkv")
        fold_norm(f"{block}.norm2", f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj")
        fold_linear(f"{block}.attn.qkv", slice(2 * hidden, None), f"{block}.attn.proj")
        fold_linear(f"{block}.mlp.up_proj", slice(None), f"{block}.mlp.down_proj")
    fold_norm("visual.merger.ln_q", "visual.merger.mlp.0")
    keys, queries = config["num_key_value_heads"], config["num_attention_heads"]
    for index in range(config["num_hidden_layers"]):
        attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
        fold_norm(f"model.layers.{index}.input_layernorm", *(f"{attention}.{name}_proj" for name in "qkv"))
        fold_norm(f"model.layers.{index}.post_attention_layernorm", f"{mlp}.gate_proj", f"{mlp}.up_proj")
        fold_linear(f"{attention}.v_proj", slice(None), f"{attention}.o_proj", (keys, queries // keys))
        fold_linear(f"{mlp}.up_proj", slice(None), f"{mlp}.down_proj")
