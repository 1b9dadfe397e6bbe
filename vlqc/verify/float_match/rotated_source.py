"""The tensors of the float checkpoint in the basis of rotations, computed again from the definition.

Rows x are rotated to x R. A layer that reads them has W diag(w) R in each block of columns, with the weight w of the
norm before it, and the bias b + W b_norm; one that writes them has R^T W in each block of rows, and b R. The norm's
weight is then 1 and its bias 0. Only the matrices R themselves are those of the compiler, from `kernels_ref`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

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
    source: Mapping[str, StoredTensor],
    model: ModelStructure,
    rotations: Iterable[AppliedRotation],
    includes: Callable[[str], bool] = lambda layer: True,
) -> dict[str, StoredTensor]:
    """Float checkpoint -> the same with rotated tensors in place of those that the rotations change.

    model: of the folder; includes: layers to rotate, with the norms before them. A tensor whose shape or dtype does not
    fit the model stays as it is, and is a fault later.
    """
    changing: dict[str, list[AppliedRotation]] = {}
    norms: set[str] = set()
    for rotation in rotations:
        norms.update(filter(includes, rotation.norms))
        for layer in filter(includes, {**rotation.writers, **rotation.readers}):
            changing.setdefault(layer, []).append(rotation)
    result = dict(source)
    for norm in norms:
        for name, value in ((f"{norm}.weight", 1.0), (f"{norm}.bias", 0.0)):
            if _fits(source, model, name):
                result[name] = ConstantTensor(*_header(name, source[name]), value)
    for layer, of_layer in changing.items():
        result |= _rotated_layer(layer, of_layer, source, model)
    return result


def _rotated_layer(
    layer: str, rotations: list[AppliedRotation], source: Mapping[str, StoredTensor], model: ModelStructure
) -> Iterator[tuple[str, StoredTensor]]:
    """Weight and bias of a linear layer, convolution or embedding by name, those that the source has."""
    norm = next((name for each in rotations if (name := each.readers.get(layer)) is not None), None)
    scale, shift = source.get(f"{norm}.weight"), source.get(f"{norm}.bias")
    if any(name in source and not _fits(source, model, name) for name in (f"{norm}.weight", f"{norm}.bias")):
        return
    outputs = tuple(
        (each.rotation, tuple(each.writers[layer]))
        for each in rotations
        if layer in each.writers and layer not in each.tables
    )
    if _fits(source, model, name := f"{layer}.weight"):
        inputs = tuple(each.rotation for each in rotations if layer in each.readers or layer in each.tables)
        yield name, RotatedTensor(*_header(name, source[name]), source[name], scale, inputs, outputs)
        if _fits(source, model, bias := f"{layer}.bias"):
            weight = source[name] if shift is not None else None
            yield bias, RotatedBias(*_header(bias, source[bias]), source[bias], weight, shift, outputs)


def _header(name: str, tensor: StoredTensor) -> tuple[str, Path, str, tuple[int, ...], int]:
    """Arguments of a tensor that is computed from another one."""
    return name, tensor.file, "F32", tensor.shape, 0


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
