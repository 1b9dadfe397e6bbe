"""The tensors of the float checkpoint in the basis of rotations, computed again from the definition.

Rows x are rotated to x R. A layer that reads them has W diag(w) R in each block of columns, with the weight w of the
norm before it, and the bias b + W b_norm; one that writes them has R^T W in each block of rows, and b R. The norm's
weight is then 1 and its bias 0. Only the matrices R themselves are those of the compiler, from `kernels_ref`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from vlqc.frontend.model_structure import ModelStructure
from vlqc.ir.rotations import AppliedRotation
from vlqc.kernels_ref.rotation import Rotation
from vlqc.verify.folder.reader import FLOATS, Array, StoredTensor, round_to

# Sums in float32 may differ in their last bits between machines. This is the largest difference, relative to the
# largest element of a row or column: measured are up to 6e-7 from sums in float64, 5e-8 on average.
FLOAT32_ERROR = 2.0**-20


@dataclass(frozen=True)
class RotatedTensor(StoredTensor):
    """A tensor of the float checkpoint, rotated in float32 when it is read.

    original: as stored; scale: weight [C] of a norm that is folded into each block of C columns, or None; inputs: of
    the rotations of the columns; outputs: of the rows, with the first row of every block.
    A tensor whose rows are rotated is held in memory as a whole while it is read, one such tensor at a time.
    """

    original: StoredTensor
    scale: StoredTensor | None
    inputs: tuple[Rotation, ...]
    outputs: tuple[tuple[Rotation, tuple[int, ...]], ...]

    def _elements(self, start: int, stop: int) -> Array:
        if self.outputs:
            return _whole(self)[start:stop]
        width = self.count // self.shape[0]
        first, last = start // width, -(-stop // width)
        rows = self.with_rotated_columns(first, last).reshape(-1)
        return rows[start - first * width : stop - first * width]

    def with_rotated_columns(self, first: int, last: int) -> Array:
        """Rows first..last, float32, of which only the columns are rotated."""
        rows = np.asarray(self.original.part(first, last), np.float32)  # an array of its own, read for this
        if self.scale is not None:
            scale = self.scale.read().astype(np.float32)
            rows *= np.tile(scale, rows.shape[1] // len(scale))
        for rotation in self.inputs:
            rotation.rotate_(torch.from_numpy(rows).view(len(rows), -1, rotation.size))
        return rows


@dataclass(frozen=True)
class RotatedBias(StoredTensor):
    """A bias [N] of the float checkpoint, rotated in float32 when it is read.

    original: as stored; weight, shift: of the layer and bias [C] of the norm before it, None if that has none; outputs:
    see `RotatedTensor`.
    """

    original: StoredTensor
    weight: StoredTensor | None
    shift: StoredTensor | None
    outputs: tuple[tuple[Rotation, tuple[int, ...]], ...]

    def _elements(self, start: int, stop: int) -> Array:
        bias = self.original.read().astype(np.float32)
        if self.weight is not None and self.shift is not None:
            shift = self.shift.read().astype(np.float64)
            shift = np.tile(shift, self.weight.shape[1] // len(shift))
            bias += np.concatenate([rows @ shift for _, rows in self.weight.rows()]).astype(np.float32)
        for rotation, starts in self.outputs:
            for begin in starts:
                rotation.rotate_(torch.from_numpy(bias[begin : begin + rotation.size]))
        return bias[start:stop]


@dataclass(frozen=True)
class ConstantTensor(StoredTensor):
    """A parameter of a norm that is folded into the layers behind it: all elements are `value`."""

    value: float

    def _elements(self, start: int, stop: int) -> Array:
        return np.full(stop - start, self.value, np.float32)


@lru_cache(maxsize=1)
def _whole(tensor: RotatedTensor) -> Array:
    """All elements of a tensor whose rows are rotated, float32 [count]."""
    result = tensor.with_rotated_columns(0, tensor.shape[0])
    for rotation, starts in tensor.outputs:
        for begin in starts:
            rotation.rotate_columns_(torch.from_numpy(result[begin : begin + rotation.size]))
    return result.reshape(-1)


def release_memory() -> None:
    """Releases the tensor that was read last."""
    _whole.cache_clear()


def rotated_source(
    source: Mapping[str, StoredTensor], model: ModelStructure, rotations: Iterable[AppliedRotation]
) -> dict[str, StoredTensor]:
    """Float checkpoint -> the same with rotated tensors in place of those that the rotations change.

    model: of the folder. A tensor whose shape or dtype does not fit the model stays as it is, and is a fault later.
    """
    result, rotations = dict(source), list(rotations)
    for name, original in source.items():
        layer, _, parameter = name.rpartition(".")
        changing = [rotation for rotation in rotations if rotation.changes(layer)]
        if not changing or parameter not in ("weight", "bias") or not _fits(source, model, name):
            continue
        plain = (name, original.file, "F32", original.shape, 0)
        if any(layer in rotation.norms for rotation in changing):
            result[name] = ConstantTensor(*plain, value=float(parameter == "weight"))
            continue
        reading = [rotation for rotation in changing if layer in rotation.readers]
        norm = next((norm for rotation in reading if (norm := rotation.readers[layer]) is not None), None)
        if norm is not None and not all(
            _fits(source, model, f"{norm}.{part}") for part in ("weight", "bias") if f"{norm}.{part}" in source
        ):
            continue
        inputs = [each.rotation for each in changing if layer in each.readers or layer in each.tables]
        outputs = tuple(
            (each.rotation, tuple(each.writers[layer]))
            for each in changing
            if layer in each.writers and layer not in each.tables
        )
        if parameter == "weight":
            scale = source.get(f"{norm}.weight")
            result[name] = RotatedTensor(*plain, original, scale, tuple(inputs), outputs)
        else:
            weight, shift = source.get(f"{layer}.weight"), source.get(f"{norm}.bias")
            result[name] = RotatedBias(*plain, original, weight, shift, outputs)
    return result


def _fits(source: Mapping[str, StoredTensor], model: ModelStructure, name: str) -> bool:
    """Whether a tensor of the float checkpoint has the shape that the model has, and a float dtype."""
    tensor = source.get(name)
    return tensor is not None and tensor.dtype in FLOATS and tensor.shape == model.parameters.get(name)


def nearest(dtype: str, source: StoredTensor, values: Array) -> tuple[Array, Array]:
    """Rows of a source -> their nearest values of BF16, F16 or F32, and how far a stored value may be from them.

    That is 0 for a tensor that is not rotated. For others the sums in float32 may differ in their last bits, and
    so does the rounded value where the sum is half way between two values.
    """
    rounded = round_to(dtype, values)
    if not is_rotated(source):
        return rounded, np.zeros((), np.float32)
    margin = float32_margin(values)
    return rounded, np.maximum(round_to(dtype, values + margin) - rounded, rounded - round_to(dtype, values - margin))


def is_rotated(source: StoredTensor) -> bool:
    """Whether a tensor of a source is computed, not read."""
    return isinstance(source, RotatedTensor | RotatedBias)


def float32_margin(values: Array) -> Array:
    """Rows of a rotated tensor -> how much sums in float32 may differ, by element."""
    size = np.abs(values.reshape(len(values), -1)) if values.ndim > 1 else np.abs(values)[None]
    largest = np.maximum(size.max(axis=1, keepdims=True, initial=0), size.max(axis=0, keepdims=True, initial=0))
    return np.asarray(FLOAT32_ERROR * largest.reshape(values.shape), np.float32)
