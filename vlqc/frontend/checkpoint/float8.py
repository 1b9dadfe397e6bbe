"""Weights stored as 8-bit floats with scales, as DeepSeek and Qwen publish them: which scales belong to which weight.

A weight W of dtype F8_E4M3 [.., N, K] has a tensor `W_scale_inv` or `W_scale` beside it, which multiplies it: one scale
per block of `weight_block_size` rows and columns (the last ones may be smaller), per row, or for all of it. The weight
stands for the product, rounded to bfloat16.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlqc.errors import Fault
from vlqc.formatting import enumerate_first, pluralize

CODE = "F8_E4M3"
SCALE_DTYPES = ("F32", "BF16", "F16")
SCALES = ("_scale_inv", "_scale")  # suffixes of the name of a weight
# Suffixes of the name of a layer: scales of static activations and of the key-value cache, which a float model lacks.
ACTIVATION_SCALES = (
    ".input_scale", ".output_scale", ".activation_scale", "_activation_scale", ".k_scale", ".v_scale", ".q_scale",
)  # fmt: skip
DEFAULT_BLOCK = (128, 128)
QUANTIZED = "the checkpoint is quantized already"
FLOAT_FIX = "pass the float checkpoint that it was made from"


@dataclass(frozen=True)
class Float8Scale:
    """The scales of a weight. name: of their tensor; block: rows and columns that share one."""

    name: str
    block: tuple[int, int]


@dataclass(frozen=True)
class Entry:
    """dtype code and shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]


def find_scales(
    tensors: Mapping[str, Entry], config: Mapping[str, Any], where: str
) -> tuple[dict[str, Float8Scale], list[Fault]]:
    """Tensors by name -> the scales of each weight of dtype F8_E4M3, and faults. config: content of config.json.

    There is one fault for all weights without scales, and one for all scales that do not fit.
    """
    block = _block_size(config)
    scales: dict[str, Float8Scale] = {}
    bare, misfits = [], []
    for name, weight in tensors.items():
        if weight.dtype != CODE:
            continue
        scale_name = next((name + suffix for suffix in SCALES if name + suffix in tensors), None)
        if scale_name is None:
            bare.append(name)
        elif (found := _layout(weight.shape, tensors[scale_name], block)) is None:
            scale, shape = tensors[scale_name], list(weight.shape)
            misfits.append(f"{scale_name} is {scale.dtype} {list(scale.shape)}, which does not fit the weight {shape}")
        else:
            scales[name] = Float8Scale(scale_name, found)
    faults = []
    if bare:
        names = enumerate_first(bare, 3)
        why = f"{pluralize(len(bare), 'weight')} of dtype {CODE} without scales ({' or '.join(SCALES)}): {names}"
        some = "; if the files that hold the scales were lost, download the checkpoint again" if scales else ""
        faults.append(Fault(QUANTIZED, where, why, FLOAT_FIX + some))
    if misfits:
        more = f", and {len(misfits) - 1} more" if len(misfits) > 1 else ""
        known = f"scales are {', '.join(SCALE_DTYPES)}: one, one per row, or one per block of {list(block)}"
        why = f"{misfits[0]}{more}; {known}"
        faults.append(Fault(f"{QUANTIZED}, with scales in a form that is not known", where, why, FLOAT_FIX))
    return scales, faults


def left_out(names: Collection[str], scales: Mapping[str, Float8Scale]) -> set[str]:
    """Names of tensors that a float model lacks: scales of these weights and of their activations."""
    if not scales:
        return set()
    used = {scale.name for scale in scales.values()}
    return {name for name in names if name in used or name.endswith(ACTIVATION_SCALES)}


def block_scales(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of a tensor of scales -> [.., rows of blocks, columns of blocks]."""
    return tuple(shape) if len(shape) > 1 else (math.prod(shape), 1)


def _layout(shape: Sequence[int], scale: Entry, block: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns per scale of a weight of this shape; None if the scales do not fit."""
    if len(shape) < 2 or not all(shape) or scale.dtype not in SCALE_DTYPES:
        return None
    *outer, rows, columns = shape
    if math.prod(scale.shape) == 1 and not math.prod(outer) > 1:
        return rows, columns
    for candidate in (block, (1, columns), (rows, columns)):
        blocks = (*outer, -(-rows // candidate[0]), -(-columns // candidate[1]))
        if block_scales(scale.shape) == blocks:
            return candidate
    return None


def _block_size(config: Mapping[str, Any]) -> tuple[int, int]:
    settings = config.get("quantization_config")
    size = settings.get("weight_block_size") if isinstance(settings, Mapping) else None
    if isinstance(size, list) and len(size) == 2 and all(type(each) is int and each > 0 for each in size):
        return size[0], size[1]
    return DEFAULT_BLOCK
