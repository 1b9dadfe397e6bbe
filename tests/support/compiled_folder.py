"""A valid small compiled folder of any scheme and layout, and its float checkpoint, written with NumPy alone.

Independent of the compiler: all formulas are implemented again here. Tests damage the content before it is written.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.float_model import CONFIG, WIDE, WIDE_VISION, float_tensors, smooth_every_edge
from tests.support.tensors import Array, Tensor, rounded, safetensors_bytes, stored

FLOAT_LINEARS = ("lm_head", "visual.merger.mlp.0", "visual.merger.mlp.2", "down_proj")


@dataclass
class FolderContent:
    """The content of a folder, which tests may change before `write` writes it."""

    config: dict[str, Any]
    source: dict[str, Tensor]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] | None = field(default_factory=lambda: {"format": "pt"})
    parts: int = 1  # weight files
    side_files: bool = True
    mindie: bool = False  # MindIE's layout
    type_name: str = "w8a8"

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.config))
        suffix = f"_{self.type_name}" if self.mindie else ""
        (folder / f"quant_model_description{suffix}.json").write_text(json.dumps(self.description))
        stem = f"quant_model_weight_{self.type_name}"
        names = list(self.tensors)
        weight_map = {}
        for part in range(self.parts):
            of_part = names[part :: self.parts]
            number = f"-{part + 1:05d}-of-{self.parts:05d}" if self.parts > 1 else ""
            file = f"{stem}{number}.safetensors"
            (folder / file).write_bytes(
                safetensors_bytes({name: self.tensors[name] for name in of_part}, self.metadata)
            )
            weight_map |= dict.fromkeys(of_part, file)
        if self.parts > 1:
            total = sum(len(tensor.data) for tensor in self.tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
        for name, value in side_files(self.config).items() if self.side_files else ():
            (folder / name).write_text(json.dumps(value))
        return folder

    def write_source(self, folder: Path) -> Path:
        folder.mkdir()
        config = self.config | {"vision_config": dict(self.config["vision_config"])}
        config.pop("quantize", None)
        config.pop("quantization_config", None)
        config["vision_config"].pop("quantize", None)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").write_bytes(safetensors_bytes(self.source, {"format": "pt"}))
        for name, value in side_files(self.config).items() if self.side_files else ():
            (folder / name).write_text(json.dumps(value))
        return folder


def side_files(config: dict[str, Any]) -> dict[str, Any]:
    """Files beside the weights that fit a config, by name."""
    rows = {**config.get("text_config", {}), **config}["vocab_size"]
    vocabulary = {f"word{number}": number for number in range(rows)}
    names = {"vision_start": "vision_start", "vision_end": "vision_end", "image": "image_pad", "video": "video_pad"}
    for key, name in names.items():
        number = config.get(f"{key}_token_id")
        vocabulary = {token: each for token, each in vocabulary.items() if each != number} | {f"<|{name}|>": number}
    return {
        "tokenizer.json": {"added_tokens": [], "model": {"type": "WordLevel", "vocab": vocabulary}},
        "tokenizer_config.json": {},
        "preprocessor_config.json": {},
        "generation_config.json": {},
        "chat_template.json": {"chat_template": "{{ messages }}"},
    }


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
    rotate: Callable[[dict[str, Array], dict[str, Any]], None] | None = None,
) -> FolderContent:
    """A float model of random weights, quantized with the usual exclusions.

    smooth: random scales on every edge; both: the two config keys that MindIE needs; mindie: its layout; scope: "all"
    for W4A8_DYNAMIC on every quantized layer; shift: norms before quantized layers have a bias; wide: replaces sizes of
    WIDE, which the language model has with it or in W4A8_DYNAMIC; rotate: changes the values of the folder, not of its
    source, before they are smoothed.
    """
    config: dict[str, Any] = CONFIG | {"torch_dtype": dtype, "tie_word_embeddings": tied}
    config["vision_config"] = dict(CONFIG["vision_config"])
    if scheme == "W4A8_DYNAMIC" or wide is not None:
        config |= WIDE | (wide or {})
        of_tower = WIDE_VISION if scheme == "W4A8_DYNAMIC" else {"out_hidden_size": config["hidden_size"]}
        config["vision_config"] |= of_tower
        half, third = (config["hidden_size"] // config["num_attention_heads"] // parts for parts in (2, 6))
        config["rope_scaling"] = {"type": "mrope", "mrope_section": [half - 2 * third, third, third]}
    code = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    values = {name: rounded(value, code) for name, value in float_tensors(config, np.random.default_rng(5))}
    content = FolderContent(config, {name: stored(value, code) for name, value in values.items()}, mindie=mindie)
    content.type_name = scheme.lower()
    if rotate:
        rotate(values, config)
    without_bias = {name.replace(".weight", ".bias") for name in values} - values.keys()
    if smooth:
        smooth_every_edge(values, config, code, np.random.default_rng(6), shift)
    biases = [name for name in values if name.endswith(".bias") and name not in without_bias]
    values |= {name: rounded(values[name], code) for name in biases}
    used = set()
    for name, value in values.items():
        layer, _, suffix = name.rpartition(".")
        layer_scheme = "FLOAT"
        if suffix == "weight" and value.ndim == 2 and "embed" not in name:
            layer_scheme = scheme_of(layer, scheme, mindie, scope)
            if layer_scheme == "W4A8_DYNAMIC" and (value.shape[1] % group_size or value.shape[1] == group_size):
                layer_scheme = "W8A8_DYNAMIC"
        used.add(layer_scheme)
        if layer_scheme != "FLOAT":
            _quantize(content, layer, value, values.get(f"{layer}.bias"), code, layer_scheme, group_size)
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
    """Scheme of a layer in a folder of this type and layout."""
    if layer.endswith(FLOAT_LINEARS) or (mindie and scheme == "W8A8_DYNAMIC" and layer.startswith("visual.")):
        return "FLOAT"
    if scheme == "W4A8_DYNAMIC" and scope == "engine" and not mindie:
        return (
            scheme if layer.endswith(("o_proj", "gate_proj", "up_proj")) and "visual" not in layer else "W8A8_DYNAMIC"
        )
    return scheme


def input_range(layer: str) -> tuple[float, int]:
    """(scale before rounding, offset) of a layer's input. The input of the vision attention's proj has offset 0."""
    if layer.endswith("attn.proj"):
        return 0.03, 0
    return (0.03, 5) if layer.endswith("o_proj") else (0.07, -7)


def _quantize(
    content: FolderContent, layer: str, weight: Array, bias: Array | None, code: str, scheme: str, group_size: int
) -> None:
    make = {"W8A8": _static, "W8A8_DYNAMIC": _dynamic, "W4A8_DYNAMIC": _groups}[scheme]
    added = make(content, layer, np.asarray(weight, np.float32), bias, code, group_size)
    content.tensors |= {f"{layer}.{suffix}": tensor for suffix, tensor in added.items()}
    content.description |= {f"{layer}.{suffix}": scheme for suffix in added}


def _static(_: FolderContent, layer: str, weight: Array, bias: Array | None, code: str, __: int) -> dict[str, Tensor]:
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


def _dynamic(_: FolderContent, __: str, weight: Array, ___: Array | None, code: str, ____: int) -> dict[str, Tensor]:
    scale = rounded(np.abs(weight).max(axis=1, keepdims=True) / 127, code)
    return {
        "weight": stored(np.clip(np.rint(weight / scale), -127, 127), "I8"),
        "weight_scale": stored(scale, "F32"),
        "weight_offset": stored(np.zeros_like(scale), "F32"),
    }


def _groups(
    content: FolderContent, layer: str, weight: Array, _: Array | None, code: str, size: int
) -> dict[str, Tensor]:
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
