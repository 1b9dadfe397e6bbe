"""Ways to damage a compiled folder, before and after it is written, and what its verification says about it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tests.support.compiled_folder import Content
from tests.support.tensors import stored
from vlqc.verify.findings import VerificationResult

Change = Callable[[Content], object]

LAYER = "model.layers.0"
Q = f"{LAYER}.self_attn.q_proj"
UP = f"{LAYER}.mlp.up_proj"
BLOCK = "visual.blocks.0"
QKV = f"{BLOCK}.attn.qkv"
PROJ = f"{BLOCK}.attn.proj"  # its input_offset is 0


def texts(result: VerificationResult) -> str:
    return "\n".join(f"[{finding.check}] {finding.where}: {finding.what}" for finding in result.faults)


def named(result: VerificationResult, layer: str) -> bool:
    return any(layer in finding.where for finding in result.faults)


def rename(content: Content, old: str, new: str) -> None:
    for names in (content.tensors, content.description):
        names[new] = names.pop(old)


def float_weight(content: Content, layer: str) -> None:
    """One quantized layer left in float, correctly described."""
    for suffix in ("weight_scale", "weight_offset", "input_scale", "input_offset", "quant_bias", "deq_scale"):
        del content.tensors[f"{layer}.{suffix}"], content.description[f"{layer}.{suffix}"]
    content.tensors[f"{layer}.weight"] = content.source[f"{layer}.weight"]
    content.description[f"{layer}.weight"] = "FLOAT"


def reshape(content: Content, name: str, shape: list[int]) -> None:
    content.tensors[name].shape = shape


def add(content: Content, name: str, values: object, dtype: str, word: str | None = "FLOAT") -> None:
    content.tensors[name] = stored(np.asarray(values), dtype)
    if word:
        content.description[name] = word


def describe(content: Content, word: str, *layers: str) -> None:
    for name in content.description:
        if name.rpartition(".")[0] in layers and not name.endswith(".bias"):
            content.description[name] = word


def edit(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_header(path: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def integers(content: Content, layer: str) -> npt.NDArray[np.int64]:
    tensor = content.tensors[f"{layer}.weight"]
    return np.frombuffer(tensor.data, np.int8).reshape(tensor.shape).astype(np.int64)


def set_integers(content: Content, layer: str, values: npt.NDArray[np.int64]) -> None:
    """Other integers in a layer whose input_offset is 0, where quant_bias does not depend on them."""
    content.tensors[f"{layer}.weight"] = stored(values, "I8")
