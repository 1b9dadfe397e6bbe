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


def steps_of(content: FolderContent, layer: str) -> npt.NDArray[np.float64]:
    """The float weight [N, K] of an unsmoothed quantized layer in quantization steps."""
    tensor = content.source[f"{layer}.weight"]
    weight = (np.frombuffer(tensor.data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
    scales = [f"{layer}.weight_scale", f"{layer}.weight_scale_second"]
    stored_scales = [content.tensors[name] for name in scales if name in content.tensors]
    steps = weight.astype(np.float64)
    for scale in stored_scales:
        values = np.frombuffer(scale.data, np.float32).reshape(scale.shape)
        steps = steps / np.repeat(values, weight.shape[1] // values.shape[1], axis=1)
    return steps


def compensated(steps: npt.NDArray[np.float64], limits: tuple[int, int], share: float = 0.7) -> npt.NDArray[np.int64]:
    """Weights in steps [N, K] -> integers, each column taking over a share of the error of the column before it.

    That is what GPTQ does for inputs whose neighbors are correlated.
    """
    result = np.zeros(steps.shape, np.int64)
    error = np.zeros(len(steps))
    for column in range(steps.shape[1]):
        target = steps[:, column] + share * error
        result[:, column] = np.clip(np.rint(target), *limits)
        error = target - result[:, column]
    return result


def set_integers(content: FolderContent, layer: str, values: npt.NDArray[np.int64]) -> None:
    """Replaces the integers of a layer whose input_offset is 0, so that quant_bias does not depend on them."""
    content.tensors[f"{layer}.weight"] = stored(values, "I8")
