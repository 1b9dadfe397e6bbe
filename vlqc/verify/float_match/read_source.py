"""The float checkpoint as it is compiled: 8-bit floats times their scales, adapters merged, computed again with NumPy.

Names, and which tensors belong together, are found by the code that the compiler uses; the arithmetic is independent.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vlqc.errors import Fault, UserError, first_faults
from vlqc.frontend.checkpoint.adapters import AdapterTensor, Update, match_adapter, read_adapters, shared_weight_faults
from vlqc.frontend.checkpoint.float8 import CODE, Entry, block_scales, find_scales, left_out
from vlqc.frontend.checkpoint.header import TensorEntry, read_header
from vlqc.frontend.checkpoint.names import plain_names
from vlqc.frontend.model_structure import ModelStructure
from vlqc.verify.folder.reader import STORED, Array, StoredMatrix, StoredTensor, round_to

FACTORS_IN_MEMORY = 8  # matrices of adapters


@dataclass(frozen=True)
class Float8Tensor(StoredTensor):
    """A weight of 8-bit floats (4 bits of exponent, 3 of mantissa) times its scales, as bfloat16.

    scale: its scales; block: rows and columns that share one.
    """

    scale: StoredTensor
    block: tuple[int, int]

    def _elements(self, start: int, stop: int) -> Array:
        rows, columns = self.shape[-2:]
        first, last = start // columns, -(-stop // columns)
        count = (last - first) * columns
        stored = np.fromfile(self.file, np.uint8, count, offset=self.begin + first * columns)
        if stored.size != count:
            raise OSError(f"{self.file.name} became shorter while it was read")
        values = float8_values()[stored].reshape(last - first, columns)
        scales = self.scale.read().astype(np.float32)
        scales = scales.reshape(-1, *(block_scales(scales.shape)[-2:] if scales.size > 1 else (1, 1)))
        matrix, row = np.divmod(np.arange(first, last), rows)
        of_rows = np.repeat(scales[matrix, row // self.block[0]], self.block[1], axis=1)[:, :columns]
        return round_to("BF16", values * of_rows).reshape(-1)[start - first * columns : stop - first * columns]


@lru_cache(maxsize=1)
def float8_values() -> Array:
    """The number that each byte stands for, float32 [256]: E4M3 without infinities (OCP 8-bit floating point)."""
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, (byte & 7) / 8
    size = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7))
    values = np.where(byte >= 128, -size, size)
    values[[127, 255]] = np.nan
    return values.astype(np.float32)


@dataclass(frozen=True)
class MergedTensor(StoredTensor):
    """A tensor with updates of adapters, in order, rounded to the tensor's dtype once."""

    original: StoredTensor
    updates: tuple[Update, ...]

    def _elements(self, start: int, stop: int) -> Array:
        if start == stop:
            return np.zeros(0, np.float32)
        width = self.count // (self.shape[0] if self.shape else 1)
        first, last = start // width, -(-stop // width)
        rows = self.original._elements(first * width, last * width).reshape(last - first, width).astype(np.float64)
        for update in self.updates:
            rows = _updated(rows, update, slice(first, last))
        values = rows.reshape(-1)[start - first * width : stop - first * width]
        return values if self.dtype == "F64" else round_to(self.dtype, values)


def _updated(rows: Array, update: Update, place: slice) -> Array:
    """Rows of a tensor, float64 [n, K], after an update. place: which rows they are."""
    if update.value is not None:
        width = rows.shape[1]
        value = _stored(update.value)._elements(place.start * width, place.stop * width)
        rows = value.reshape(rows.shape).astype(np.float64)
    if update.a is not None and update.b is not None:
        a, b = _matrix(update.a), _matrix(update.b)
        product = a.T[place] @ b.T if update.is_embedding else b[place] @ a
        rows = rows + update.scaling * product
    if update.magnitude is not None:
        norms = np.sqrt((rows**2).sum(axis=1))
        rows = rows * (_matrix(update.magnitude).reshape(-1)[place] / norms)[:, None]
    if update.bias is not None:
        rows = rows + update.scaling * _matrix(update.bias)[place]
    return rows


def _stored(tensor: AdapterTensor) -> StoredTensor:
    return StoredTensor(tensor.name, tensor.file, tensor.dtype, tensor.shape, tensor.begin)


@lru_cache(maxsize=FACTORS_IN_MEMORY)
def _matrix(tensor: AdapterTensor) -> Array:
    """float64 [first dimension, all others]."""
    return _stored(tensor).read().astype(np.float64).reshape(tensor.shape[0] if tensor.shape else 1, -1)


def forget_adapters() -> None:
    """Releases the matrices of adapters, whose files may change before they are read again."""
    _matrix.cache_clear()


def read_source(
    files: Iterable[Path], folder: Path, config: Mapping[str, Any], model: ModelStructure, lora: Sequence[Path]
) -> dict[str, StoredTensor]:
    """Weight files of a float checkpoint -> its tensors by checkpoint name. UserError with all faults.

    folder, config: of the checkpoint; model: of the compiled folder; lora: folders of adapters to merge.
    """
    family = model.family
    stored, faults = _headers(files)
    plain = plain_names([name for name, _, _ in stored], family, str(folder))
    if faults or plain.faults:
        raise UserError(*faults, *plain.faults)
    entries = {family.checkpoint_name(plain.names[name]): (file, entry) for name, file, entry in stored}
    tensors = _readable(entries, config, folder)
    for name, places in family.matrices({name: each.shape for name, each in tensors.items()}, config).items():
        whole = tensors.pop(name)
        tensors |= {matrix: StoredMatrix.at(matrix, whole, place) for matrix, place in places.items()}
    return _merged(tensors, lora, model, tied=family.is_tied(config))


def _headers(files: Iterable[Path]) -> tuple[list[tuple[str, Path, TensorEntry]], list[Fault]]:
    stored, faults = [], []
    for file in files:
        try:
            header = read_header(file)
            errors = header.faults
            stored += [(name, file, entry) for name, entry in header.tensors.items()]
        except (OSError, ValueError) as error:
            errors = [f"the header cannot be read: {error}"]
        faults += [Fault(error, str(file), "the file is damaged", "download the file again") for error in errors]
    return stored, faults


def _readable(
    entries: Mapping[str, tuple[Path, TensorEntry]], config: Mapping[str, Any], folder: Path
) -> dict[str, StoredTensor]:
    scales, faults = find_scales(
        {name: Entry(entry.dtype, entry.shape) for name, (_, entry) in entries.items()}, config, str(folder)
    )
    for name, (file, entry) in entries.items():
        if entry.dtype not in STORED and entry.dtype != CODE:
            faults.append(Fault(f"tensor {name} has dtype {entry.dtype}", str(file), "it is no float dtype"))
    if faults:
        raise UserError(*first_faults(faults, "tensors that cannot be read"))
    plain = {
        name: StoredTensor(name, file, entry.dtype, entry.shape, entry.begin) for name, (file, entry) in entries.items()
    }
    removed = left_out(entries, scales)
    return {
        name: Float8Tensor(name, each.file, "BF16", each.shape, each.begin, plain[scale.name], scale.block)
        if (scale := scales.get(name)) is not None
        else each
        for name, each in plain.items()
        if name not in removed
    }


def _merged(
    tensors: Mapping[str, StoredTensor], lora: Sequence[Path], model: ModelStructure, *, tied: bool
) -> dict[str, StoredTensor]:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    updates: dict[str, list[Update]] = {}
    faults: list[Fault] = []
    for adapter in read_adapters(lora):
        matched, misfits = match_adapter(adapter, shapes, model.family, tied=tied)
        faults += misfits
        if tied:
            faults += shared_weight_faults(matched, f"{model.embedding}.weight", f"{model.output_head}.weight")
        for name, update in matched.updates.items():
            updates.setdefault(name, []).append(update)
    if faults:
        raise UserError(*faults)
    result = dict(tensors)
    for name, of_tensor in updates.items():
        each = tensors[name]
        result[name] = MergedTensor(name, each.file, each.dtype, each.shape, 0, each, tuple(of_tensor))
    return result
