"""Functions that damage a compiled folder before or after it is written, and text of the faults found in it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tests.support.compiled_folder import FolderContent
from tests.support.tensors import stored
from vlqc.verify.findings import VerificationResult

Change = Callable[[FolderContent], object]

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


def rename(content: FolderContent, old: str, new: str) -> None:
    for names in (content.tensors, content.description):
        names[new] = names.pop(old)


def float_weight(content: FolderContent, layer: str) -> None:
    """Replaces a quantized layer by its float weight, with a matching description."""
    for suffix in ("weight_scale", "weight_offset", "input_scale", "input_offset", "quant_bias", "deq_scale"):
        del content.tensors[f"{layer}.{suffix}"], content.description[f"{layer}.{suffix}"]
    content.tensors[f"{layer}.weight"] = content.source[f"{layer}.weight"]
    content.description[f"{layer}.weight"] = "FLOAT"


def reshape(content: FolderContent, name: str, shape: list[int]) -> None:
    content.tensors[name].shape = shape


def add(content: FolderContent, name: str, values: object, dtype: str, scheme: str | None = "FLOAT") -> None:
    content.tensors[name] = stored(np.asarray(values), dtype)
    if scheme:
        content.description[name] = scheme


def describe(content: FolderContent, scheme: str, *layers: str) -> None:
    for name in content.description:
        if name.rpartition(".")[0] in layers and not name.endswith(".bias"):
            content.description[name] = scheme


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


def integers(content: FolderContent, layer: str) -> npt.NDArray[np.int64]:
    tensor = content.tensors[f"{layer}.weight"]
    return np.frombuffer(tensor.data, np.int8).reshape(tensor.shape).astype(np.int64)


def set_integers(content: FolderContent, layer: str, values: npt.NDArray[np.int64]) -> None:
    """Replaces the integers of a layer whose input_offset is 0, so that quant_bias does not depend on them."""
    content.tensors[f"{layer}.weight"] = stored(values, "I8")
