"""A correct small folder of any scheme and layout, and the float checkpoint it came from, written with NumPy alone.

Independent of the compiler: every formula is spelled out here once more. Tests damage the content before it is written.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

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
# What W4A8_DYNAMIC needs: inputs of at least two groups of 64. Such a model is not run.
WIDE = {"hidden_size": 128, "intermediate_size": 192}
WIDE_VISION = {"hidden_size": 64, "intermediate_size": 72, "out_hidden_size": 128}
FLOAT_LINEARS = ("lm_head", "visual.merger.mlp.0", "visual.merger.mlp.2", "down_proj")
ITEM = {"BF16": 2, "F16": 2, "F32": 4, "I8": 1, "I32": 4, "I64": 8}


@dataclass
class Tensor:
    """One tensor as it lies in a file."""

    dtype: str
    shape: list[int]
    data: bytes

    def flip(self, byte: int, bits: int) -> None:
        """Damage one byte."""
        changed = bytearray(self.data)
        changed[byte] ^= bits
        self.data = bytes(changed)


def stored(values: Array, dtype: str) -> Tensor:
    """Values -> a tensor of that dtype code, rounding half to even."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
        data = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
    else:
        kinds = {"F16": np.float16, "F32": np.float32, "I8": np.int8, "I32": np.int32, "I64": np.int64}
        data = np.asarray(values).astype(kinds[dtype])
    return Tensor(dtype, list(np.shape(values)), np.ascontiguousarray(data).tobytes())


def rounded(values: Array, dtype: str) -> Array:
    """The float32 values that `stored` keeps."""
    tensor = stored(values, dtype)
    if dtype == "BF16":
        bits = np.frombuffer(tensor.data, np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(tensor.shape)
    return np.frombuffer(tensor.data, np.float16).astype(np.float32).reshape(tensor.shape)


def safetensors_bytes(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Header length, header, data: the whole format."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for name, tensor in tensors.items():
        end = position + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(tensor.data for tensor in tensors.values())


def float_tensors(config: dict[str, Any], rng: np.random.Generator) -> Iterator[tuple[str, Array]]:
    """Every tensor of the float model, random, by name."""
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


@dataclass
class Content:
    """Everything of a folder, still changeable; `write` puts it on disk."""

    config: dict[str, Any]
    source: dict[str, Tensor]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] | None = field(default_factory=lambda: {"format": "pt"})
    parts: int = 1  # weight files
    side_files: bool = True
    mindie: bool = False  # the layout
    type_name: str = "w8a8"

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.config))
        described = f"quant_model_description_{self.type_name}.json" if self.mindie else "quant_model_description.json"
        (folder / described).write_text(json.dumps(self.description))
        stem = f"quant_model_weight_{self.type_name}"
        names = list(self.tensors)
        placed = {}
        for part in range(self.parts):
            mine = names[part :: self.parts]
            number = f"-{part + 1:05d}-of-{self.parts:05d}" if self.parts > 1 else ""
            file = f"{stem}{number}.safetensors"
            (folder / file).write_bytes(safetensors_bytes({name: self.tensors[name] for name in mine}, self.metadata))
            placed |= dict.fromkeys(mine, file)
        if self.parts > 1:
            total = sum(len(tensor.data) for tensor in self.tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": placed}
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
        for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"):
            if self.side_files:
                (folder / name).write_text("{}")
        return folder

    def write_source(self, folder: Path) -> Path:
        folder.mkdir()
        config = self.config | {"vision_config": dict(self.config["vision_config"])}
        config.pop("quantize", None)
        config.pop("quantization_config", None)
        config["vision_config"].pop("quantize", None)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").write_bytes(safetensors_bytes(self.source, {"format": "pt"}))
        return folder


def make_content(
    *,
    dtype: str = "bfloat16",
    tied: bool = False,
    both: bool = False,
    smooth: bool = True,
    scheme: str = "W8A8",
    mindie: bool = False,
    scope: str = "engine",
    shift: bool = False,
    group_size: int = 64,
    wide: dict[str, Any] | None = None,
) -> Content:
    """A float model of random weights, smoothed with random scales on every edge (or not), quantized with the usual
    exclusions. both: with the two keys that MindIE wants; mindie: in its layout; scope: "all" for W4A8_DYNAMIC on every
    layer that is quantized at all; shift: the norms in front of quantized layers have a bias; wide: other sizes than
    those of WIDE."""
    config: dict[str, Any] = CONFIG | {"torch_dtype": dtype, "tie_word_embeddings": tied}
    config["vision_config"] = dict(CONFIG["vision_config"])
    if scheme == "W4A8_DYNAMIC":
        config |= WIDE | (wide or {})
        config["vision_config"] |= WIDE_VISION
    code = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    values = {name: rounded(value, code) for name, value in float_tensors(config, np.random.default_rng(5))}
    content = Content(config, {name: stored(value, code) for name, value in values.items()}, mindie=mindie)
    content.type_name = scheme.lower()
    without_bias = {name.replace(".weight", ".bias") for name in values} - values.keys()
    if smooth:
        _smooth(values, config, code, np.random.default_rng(6), shift)
    used = set()
    for name, value in values.items():
        layer, _, suffix = name.rpartition(".")
        word = "FLOAT"
        if suffix == "weight" and value.ndim == 2 and "embed" not in name:
            word = scheme_of(layer, scheme, mindie, scope)
            if word == "W4A8_DYNAMIC" and value.shape[1] % group_size:
                word = "W8A8_DYNAMIC"
        used.add(word)
        if word != "FLOAT":
            _quantize(content, layer, value, values.get(f"{layer}.bias"), code, word, group_size)
        elif name not in without_bias or ".norm" in name or "layernorm" in name:
            content.tensors[name] = stored(value, code)
            content.description[name] = "FLOAT"
            if shift and mindie and f"{layer}.bias" in values and layer.endswith(("norm1", "norm2", "layernorm")):
                content.tensors[f"{layer}.module.{suffix}"] = stored(value, code)
                content.description[f"{layer}.module.{suffix}"] = scheme
    content.description |= {"version": "1.0.0", "model_quant_type": scheme}
    if "W4A8_DYNAMIC" in used:
        content.description["group_size"] = group_size
    if both or mindie:
        config["quantize"] = scheme.lower()
        if not (mindie and scheme == "W8A8_DYNAMIC"):
            config["vision_config"]["quantize"] = "w8a8"
    if mindie:
        config["quantization_config"] = {"group_size": group_size if "W4A8_DYNAMIC" in used else 0}
    return content


def scheme_of(layer: str, scheme: str, mindie: bool, scope: str) -> str:
    """What a layer gets in a folder of that scheme, made for that layout."""
    if layer.endswith(FLOAT_LINEARS) or (mindie and scheme == "W8A8_DYNAMIC" and layer.startswith("visual.")):
        return "FLOAT"
    if scheme == "W4A8_DYNAMIC" and scope == "engine" and not mindie:
        return (
            scheme if layer.endswith(("o_proj", "gate_proj", "up_proj")) and "visual" not in layer else "W8A8_DYNAMIC"
        )
    return scheme


def _smooth(values: dict[str, Array], config: dict[str, Any], code: str, rng: np.random.Generator, shift: bool) -> None:
    """Divide producers and multiply consumers, in place; what is stored in float is rounded again."""

    def fold_norm(norm: str, *linears: str) -> None:
        gamma = values[f"{norm}.weight"]
        values[f"{norm}.weight"] = rounded(gamma / rng.uniform(0.5, 2, gamma.shape), code)
        exact = gamma / values[f"{norm}.weight"]
        for linear in linears:
            weight = values[f"{linear}.weight"]
            values[f"{linear}.weight"] = weight * np.tile(exact, weight.shape[1] // len(exact))
        if shift and "merger" not in norm:
            added = values[f"{norm}.bias"] = rounded(rng.standard_normal(len(gamma)) * 0.3, code)
            for linear in linears:
                taken = values[f"{linear}.weight"].astype(np.float64) @ added
                bias = values.get(f"{linear}.bias")
                # A layer that had no bias has this one in its quant_bias only, never as a tensor.
                values[f"{linear}.bias"] = -taken if bias is None else rounded(bias - taken, code)

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


def input_range(layer: str) -> tuple[float, int]:
    """(scale before rounding, offset) of a layer's input. The vision attention's output is symmetric: offset 0."""
    if layer.endswith("attn.proj"):
        return 0.03, 0
    return (0.03, 5) if layer.endswith("o_proj") else (0.07, -7)


def _quantize(
    content: Content, layer: str, weight: Array, bias: Array | None, code: str, scheme: str, group_size: int
) -> None:
    make = {"W8A8": _static, "W8A8_DYNAMIC": _dynamic, "W4A8_DYNAMIC": _groups}[scheme]
    added = make(content, layer, np.asarray(weight, np.float32), bias, code, group_size)
    content.tensors |= {f"{layer}.{suffix}": tensor for suffix, tensor in added.items()}
    content.description |= {f"{layer}.{suffix}": scheme for suffix in added}


def _static(_: Content, layer: str, weight: Array, bias: Array | None, code: str, __: int) -> dict[str, Tensor]:
    scale, offset = input_range(layer)
    input_scale = rounded(np.array([scale]), code)
    weight_scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
    integers = np.clip(np.rint(weight / weight_scale), -127, 127).astype(np.int8)
    deq_scale = (input_scale * weight_scale).astype(np.float32).reshape(-1)
    steps = np.zeros(len(weight)) if bias is None else bias.astype(np.float64) / deq_scale.astype(np.float64)
    quant_bias = np.rint(steps - offset * integers.sum(axis=1, dtype=np.int64))
    return {
        "weight": stored(integers, "I8"),
        "weight_scale": stored(weight_scale, "F32"),
        "weight_offset": stored(np.zeros_like(weight_scale), "F32"),
        "input_scale": stored(input_scale, "F32"),
        "input_offset": stored(np.array([offset]), "F32"),
        "quant_bias": stored(quant_bias, "I32"),
        "deq_scale": stored(deq_scale, "F32")
        if code == "BF16"
        else stored(deq_scale.view(np.uint32).astype(np.int64), "I64"),
    }


def _dynamic(_: Content, __: str, weight: Array, ___: Array | None, code: str, ____: int) -> dict[str, Tensor]:
    scale = rounded(np.abs(weight).max(axis=1, keepdims=True) / 127, code)
    return {
        "weight": stored(np.clip(np.rint(weight / scale), -127, 127), "I8"),
        "weight_scale": stored(scale, "F32"),
        "weight_offset": stored(np.zeros_like(scale), "F32"),
    }


def _groups(content: Content, layer: str, weight: Array, _: Array | None, code: str, size: int) -> dict[str, Tensor]:
    n, k = weight.shape
    groups = weight.reshape(n, k // size, size)
    first = rounded(np.abs(weight).max(axis=1, keepdims=True) / 119, code)
    second = rounded(np.abs(groups).max(axis=2) / 7 / first, code)
    q4 = np.clip(np.rint(groups / (first * second)[:, :, None]), -8, 7).reshape(n, k)
    exact = q4 * np.repeat(first.astype(np.float64) * second, size, axis=1)
    parts = 16 if layer.endswith(("o_proj", "attn.proj", "down_proj")) else 1
    low, high = q4[0::2].astype(np.int64) & 15, q4[1::2].astype(np.int64) & 15
    packed = np.array(low | high << 4, np.uint8).view(np.int8)
    tensors = {
        "weight": stored(q4 if content.mindie else packed, "I8"),
        "weight_scale": stored(first, "F32"),
        "weight_offset": stored(np.zeros_like(first), "F32"),
        "weight_scale_second": stored(second, "F32"),
        "weight_offset_second": stored(np.zeros_like(second), "F32"),
        "scale_bias": stored(8 * exact.reshape(n, parts, -1).sum(axis=2), "F32"),
    }
    if content.mindie:
        del tensors["scale_bias"]
    return tensors
