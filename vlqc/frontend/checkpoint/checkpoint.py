"""Reads a Hugging Face checkpoint folder, one tensor at a time, under the names that engines expect.

transformers versions save the tensors of one model under different names. Every name in the interface of `Checkpoint`
is that of `ModelFamily.checkpoint_name`.
"""

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlqc.errors import Fault, UserError, first_faults
from vlqc.families.family import ModelFamily, TensorSlice
from vlqc.families.registry import family_of, find_family
from vlqc.formatting import pluralize
from vlqc.frontend.checkpoint.adapters import (
    FLAG,
    AdapterId,
    MatchedAdapter,
    Update,
    is_adapter,
    match_adapter,
    read_adapters,
    shared_weight_faults,
)
from vlqc.frontend.checkpoint.config_schema import config_faults, engine_form, object_faults
from vlqc.frontend.checkpoint.files import INDEX, file_stamp, read_config, tensor_ranges, weight_files
from vlqc.frontend.checkpoint.float8 import FLOAT_FIX, QUANTIZED, Entry, block_scales, find_scales, left_out
from vlqc.frontend.checkpoint.mapping import DTYPES, map_tensor
from vlqc.frontend.checkpoint.merging import dequantize, merge_
from vlqc.frontend.checkpoint.names import plain_names
from vlqc.frontend.checkpoint.prefetch import ByteRange, Prefetcher
from vlqc.frontend.checkpoint.quantization import CONFIG_KEYS, describe_quantization, quantized_tensors
from vlqc.frontend.checkpoint.side_files import SideFiles, side_files
from vlqc.frontend.checkpoint.situations import empty_faults

STORED_TWICE = "tensors that are stored twice"


@dataclass(frozen=True)
class _StoredTensor:
    """Where a tensor is stored, and what is done to it when it is read, in this order.

    name, stored_shape, stored_dtype: in the file, the latter as code; span: None if the header does not list it.
    part: where it is in the stored tensor, None if it is all of it. scale, block: tensor of its scales if it is of
    8-bit floats, and rows and columns that share one. updates: of adapters, in the order in which they are merged.
    """

    file: str
    name: str
    stored_shape: tuple[int, ...]
    stored_dtype: str
    span: ByteRange | None
    part: TensorSlice | None = None
    scale: "_StoredTensor | None" = None
    block: tuple[int, int] = (1, 1)
    updates: tuple[Update, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """As read."""
        return DTYPES[self.stored_dtype] if self.scale is None else torch.bfloat16

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored_shape if self.part is None else self.part.shape(self.stored_shape)

    @property
    def pages(self) -> ByteRange | None:
        """The bytes to read; of a stored tensor with several matrices those of all outputs of this index."""
        if self.part is None or self.span is None:
            return self.span
        size = (self.span.end - self.span.begin) // self.stored_shape[0]
        begin = self.span.begin + self.part.index * size
        return ByteRange(self.span.file, begin, begin + size)


class Checkpoint:
    """The tensors and the configuration of one folder, with adapters merged.

    A tensor is read through these steps, where they apply: its name without the prefixes of training wrappers; the
    matrix of one expert out of a tensor of all; 8-bit floats times their scales, as bfloat16; adapters merged. Every
    method that returns tensors, shapes or dtypes returns those behind all steps.

    Args:
        folder: of the checkpoint.
        lora: folders of adapters, merged in this order.

    notes: what the user should know of how it is read.

    Raises:
        UserError: with all faults at once, if the folder is not a checkpoint: no such folder, no config.json, no
            safetensors, a truncated or damaged shard, an index with files that are missing or outside the folder; or
            if an adapter cannot be merged.
    """

    def __init__(self, folder: Path, lora: Sequence[Path] = ()) -> None:
        self.folder = folder
        faults: list[Fault] = []
        self.source_config = read_config(folder)
        self._family = find_family(self.source_config)
        self.config = engine_form(self._family, self.source_config) if self._family else self.source_config
        self.digests: dict[str, str] | None = None  # if set, `tensor` adds the SHA-256 of what it reads, by name
        self._open: dict[str, Any] = {}
        self._prefetcher = Prefetcher()
        self._files = weight_files(folder)
        self._stored: dict[str, _StoredTensor] = {}
        self.notes: list[str] = []
        self._adapters: list[MatchedAdapter] = []
        in_files: list[_StoredTensor] = []
        for file in self._files:
            try:
                in_files += self._tensors_of(file, tensor_ranges(folder / file))
            except (SafetensorError, OSError, ValueError) as error:
                fix = "copy the file again"
                faults.append(Fault("weight file cannot be read", str(folder / file), str(error), fix))
        empty = [tensor.name for tensor in in_files if tensor.stored_shape == (0,)]
        faults = faults or empty_faults(folder, empty, len(in_files)) or self._add(in_files)
        faults = faults or self._split_tensors()
        if not faults and not self._stored:
            faults.append(Fault("the weight files hold no tensors", str(folder)))
        if faults:
            raise UserError(*faults)
        self._drop_leftover_config()
        self._add_adapters(lora)
        self.release()

    def _opened(self, file: str) -> Any:
        """The memory-mapped file."""
        if file not in self._open:
            self._open[file] = safe_open(str(self.folder / file), "pt")
        return self._open[file]

    def release(self) -> None:
        """Unmaps all files but for tensors in use. Pages that were read of a mapped file stay resident until then."""
        self._open.clear()

    @property
    def family(self) -> ModelFamily:
        """The model family, by config.json. UserError if there is none for its model type."""
        return self._family or family_of(self.source_config, str(self.folder / "config.json"))

    def _tensors_of(self, file: str, spans: Mapping[str, ByteRange]) -> list[_StoredTensor]:
        opened, tensors = self._opened(file), []
        for name in opened.keys():  # noqa: SIM118 - safe_open is not a mapping
            view = opened.get_slice(name)
            tensors.append(_StoredTensor(file, name, tuple(view.get_shape()), view.get_dtype(), spans.get(name)))
        return tensors

    def _add(self, in_files: Sequence[_StoredTensor]) -> list[Fault]:
        """Adds tensors under their names in the interface."""
        plain = plain_names([tensor.name for tensor in in_files], self._family, str(self.folder))
        if plain.faults:
            return plain.faults
        self.notes += plain.notes
        faults = []
        for tensor in in_files:
            name = plain.names[tensor.name]
            name = self._family.checkpoint_name(name) if self._family else name
            if name in self._stored:
                faults.append(self._twice(name, tensor.file))
            self._stored.setdefault(name, tensor)
        return first_faults(faults, STORED_TWICE) or self._add_scales()

    def _add_scales(self) -> list[Fault]:
        """Gives 8-bit floats their scales, and removes these. Faults for other dtypes that cannot be read."""
        entries = {name: Entry(stored.stored_dtype, stored.stored_shape) for name, stored in self._stored.items()}
        unknown = {name: entry.dtype for name, entry in entries.items() if entry.dtype not in DTYPES}
        if unknown:
            why = describe_quantization(self.source_config, unknown)
            return [Fault(QUANTIZED, str(self.folder), why, FLOAT_FIX)]
        scales, faults = find_scales(entries, self.source_config, str(self.folder))
        if faults:
            return faults
        for name, scale in scales.items():
            stored = self._stored[name]
            self._stored[name] = replace(stored, scale=self._stored[scale.name], block=scale.block)
        for name in left_out(entries, scales):
            del self._stored[name]
        if scales:
            self.notes.append(
                f"{pluralize(len(scales), 'weight')} stored as 8-bit floats with scales: read as the bfloat16 numbers "
                "that they stand for"
            )
        return []

    def _drop_leftover_config(self) -> None:
        """Removes what config.json says of a quantization, if all weights are read as floats."""
        keys = [key for key in CONFIG_KEYS if self.config.get(key)]
        if keys and not self._quantized() and not self._descriptions():
            if not any(stored.scale for stored in self._stored.values()):
                self.notes.append(f"{keys[0]} of config.json is left out: all weights are float")
            self.config = {key: value for key, value in self.config.items() if key not in keys}

    def _add_adapters(self, folders: Sequence[Path]) -> None:
        """UserError with the faults of all adapters."""
        faults = []
        shapes = {name: stored.shape for name, stored in self._stored.items()}
        tied = self._family is not None and self._family.is_tied(self.config)
        for adapter in read_adapters(folders):
            matched, of_adapter = match_adapter(adapter, shapes, self._family, tied=tied)
            faults += of_adapter
            for name, update in matched.updates.items():
                stored = self._stored[name]
                self._stored[name] = replace(stored, updates=(*stored.updates, update))
            self._adapters.append(matched)
            self.notes.append(f"adapter {adapter.id.name} is merged into {pluralize(len(matched.updates), 'tensor')}")
        if faults:
            raise UserError(*faults)
        if is_adapter(self.folder) and self.folder.resolve() not in [folder.resolve() for folder in folders]:
            self.notes.append(
                f"the checkpoint folder also holds an adapter, which is not merged: add {FLAG} with this folder to "
                "merge it"
            )

    @property
    def adapters(self) -> list[AdapterId]:
        """The adapters that are merged, in order."""
        return [matched.adapter.id for matched in self._adapters]

    def check_shared_weight(self, embedding: str, head: str) -> None:
        """For a model whose output head shares the embedding's weight: UserError for adapters that change one use.

        embedding, head: names of the weights.
        """
        if faults := [fault for each in self._adapters for fault in shared_weight_faults(each, embedding, head)]:
            raise UserError(*faults)

    def _split_tensors(self) -> list[Fault]:
        """Replaces tensors that hold the weights of several linear layers by these."""
        faults = []
        shapes = {name: stored.shape for name, stored in self._stored.items()}
        split = self._family.matrices(shapes, self.config) if self._family else {}
        for name, parts in split.items():
            stored = self._stored.pop(name)
            for each, part in parts.items():
                if each in self._stored:
                    faults.append(self._twice(each, stored.file))
                self._stored[each] = replace(stored, part=part)
        return first_faults(faults, STORED_TWICE)

    def _twice(self, name: str, file: str) -> Fault:
        if (other := self._stored[name].file) == file:
            fix = "save the checkpoint again with one name for each tensor"
            return Fault(f"tensor {name} is stored twice, under two names", file, fix=fix)
        where = f"{other} and {file}"
        return Fault(f"tensor {name} is stored twice", where, fix="remove the stale weight file")

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._stored)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def stored_dtype(self, name: str) -> torch.dtype:
        return self._stored[name].dtype

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights: the most frequent float dtype, by number of elements."""
        elements: dict[torch.dtype, int] = {}
        for stored in self._stored.values():
            if stored.dtype.is_floating_point:
                elements[stored.dtype] = elements.get(stored.dtype, 0) + math.prod(stored.shape)
        if not elements:
            raise UserError(Fault("the checkpoint holds no float tensor", str(self.folder)))
        return max(elements, key=lambda dtype: elements[dtype])

    @property
    def files(self) -> list[Path]:
        """Paths of the weight files."""
        return [self.folder / file for file in self._files]

    @property
    def bytes(self) -> int:
        """Total size of the weight files."""
        return sum(path.stat().st_size for path in self.files)

    def tensor(self, name: str) -> Tensor:
        """The tensor as stored, or the matrix in a stored tensor. The only method that reads whole tensors.

        It has a memory mapping of its own, which is unmapped together with it.

        Raises:
            UserError: if it holds NaN or Inf.
        """
        tensor = self._read(name)
        self._check_finite(name, tensor)
        if self.digests is not None:
            self.digests[name] = tensor_sha256(tensor)
        return tensor

    def estimate(self, name: str) -> Tensor:
        """The tensor as stored, for decisions before a run: neither checked nor part of the digests."""
        return self._read(name)

    def _read(self, name: str) -> Tensor:
        stored = self._stored[name]
        tensor = self._in_file(stored)
        if stored.scale is not None:
            first = 0 if stored.part is None else stored.part.begin
            rows = torch.arange(first, first + stored.shape[-2])
            tensor = self._dequantized(stored, tensor, rows)
        return merge_(tensor, stored.updates) if stored.updates else tensor

    def _in_file(self, stored: _StoredTensor) -> Tensor:
        """The tensor as in the file, or the part of it."""
        part, dtype = stored.part, DTYPES[stored.stored_dtype]
        if part is None and stored.span is not None:
            return map_tensor(stored.span, dtype, stored.shape)
        self.release()
        opened = self._opened(stored.file)
        if part is None:
            tensor: Tensor = opened.get_tensor(stored.name)
        else:
            view, outputs = opened.get_slice(stored.name), slice(part.begin, part.end)
            tensor = view[part.index, :, outputs].T if part.transposed else view[part.index, outputs]
            tensor = tensor.contiguous()
        self.release()
        return tensor

    def _dequantized(self, stored: _StoredTensor, values: Tensor, rows: Tensor) -> Tensor:
        """8-bit floats times their scales. values: rows of the matrix, [.., N, K]; rows: their numbers."""
        assert stored.scale is not None
        scale, block, part = self._in_file(stored.scale), stored.block, stored.part
        scale = scale.view(block_scales(scale.shape)) if scale.numel() > 1 else scale.view(1, 1)
        if part is not None:
            scale = scale[part.index].T if part.transposed else scale[part.index]
            block = (block[1], block[0]) if part.transposed else block
        if values.ndim == 2:
            return dequantize(values, scale, block, rows)
        matrices = zip(values.flatten(0, -3), scale.flatten(0, -3), strict=True)
        return torch.stack([dequantize(matrix, of_matrix, block, rows) for matrix, of_matrix in matrices]).view(
            values.shape
        )

    def check_unchanged(self, digests: Sequence[Mapping[str, str]], file_stamps: Mapping[str, list[int]]) -> None:
        """UserError unless the weights are those that an interrupted run has read.

        Args:
            digests: SHA-256 of the tensors that it read, per stage.
            file_stamps: `file_stamp` of the weight files at that time, by file name. If all are equal, one tensor per
                stage is compared, otherwise all of them.
        """
        unchanged = all(file_stamps.get(path.name) == file_stamp(path) for path in self.files)
        for digests_of_stage in digests:
            names = sorted(digests_of_stage, key=lambda name: (math.prod(self._stored[name].shape), name))
            for name in names[len(names) // 2 :][:1] if unchanged else names:
                if tensor_sha256(self._read(name)) != digests_of_stage[name]:
                    where, why = str(self.folder / self._stored[name].file), f"the values of {name} have changed"
                    fix = "restore the checkpoint, or start from the beginning with --start_over"
                    raise UserError(Fault("the interrupted run cannot be resumed", where, why, fix))

    def prefetch(self, names: Iterable[str]) -> None:
        """Begins to load these tensors into the page cache, in the background."""
        spans = dict.fromkeys(self._stored[name].pages for name in names if name in self)
        self._prefetcher.start(span for span in spans if span is not None)

    def _check_finite(self, name: str, tensor: Tensor) -> None:
        if not tensor.is_floating_point() or not tensor.numel():
            return
        low, high = (float(value) for value in torch.aminmax(tensor))
        if not (math.isfinite(low) and math.isfinite(high)):
            count = int((~torch.isfinite(tensor)).sum())
            stored, fix = self._stored[name], "repair or download the checkpoint again"
            where = str(self.folder / stored.file)
            if stored.updates:
                fix = "check it with and without the adapters of --lora; repair or download what is damaged"
            why = f"{count} of {tensor.numel()} values are not finite; such a weight cannot be quantized"
            raise UserError(Fault(f"weight {name} holds NaN or Inf", where, why, fix))

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """Rows of a matrix, read from the mapped file: indices int64 [...] -> [..., K], dtype as that of `tensor`."""
        stored = self._stored[name]
        view = self._opened(stored.file).get_slice(stored.name)
        unique, inverse = torch.unique(indices, return_inverse=True)
        rows = torch.cat([view[int(row) : int(row) + 1] for row in unique])
        self.release()
        if stored.scale is not None:
            rows = self._dequantized(stored, rows, unique)
        if stored.updates:
            rows = merge_(rows, stored.updates, unique)
        self._check_finite(name, rows)
        return rows[inverse]

    def check_tensors(self, expected: Iterable[tuple[str, tuple[int, ...]]], vocabulary: Collection[str] = ()) -> None:
        """UserError with every tensor that is missing or has another shape.

        expected: names and shapes; vocabulary: names of those with one row per token.
        """
        faults: dict[str, Fault] = {}  # by stored tensor
        where = str(self.folder)
        rows = {self.shape(name)[:1] for name in vocabulary if name in self}
        for name, shape in expected:
            if name in vocabulary and name in self and len(rows) == 1 and self.shape(name)[1:] == shape[1:]:
                if self.shape(name) != shape:
                    faults.setdefault("", self._vocabulary_fault(name, shape))
            elif name not in self:
                faults[name] = Fault(f"tensor {name} is missing", where, f"config.json implies shape {list(shape)}")
            elif self.shape(name) != tuple(shape):
                stored, why = self._stored[name], f"config.json implies {list(shape)}"
                if stored.part is not None:
                    why = f"so {name} is {list(stored.shape)}, but {why}"
                what = f"tensor {name if stored.part is None else stored.name} has shape {list(stored.stored_shape)}"
                faults.setdefault(stored.name, Fault(what, where, why))
        if faults:
            raise UserError(*first_faults(list(faults.values()), "tensors that do not fit"))

    def _vocabulary_fault(self, name: str, expected: tuple[int, ...]) -> Fault:
        """Every tensor of the vocabulary has the same other number of rows, as after tokens were added."""
        key, rows = self.family.vocabulary_key, self.shape(name)[0]
        what, why = f"tensor {name} has {rows} rows", f"{key} in config.json is {expected[0]}"
        fix = f"if tokens were added or removed in training, set {key} to {rows} wherever config.json has it"
        return Fault(what, str(self.folder), why, fix)

    def check_config(self) -> None:
        """UserError with every value of config.json that is out of bounds for the stored tensors."""
        largest = max((size for stored in self._stored.values() for size in stored.shape), default=1)
        where = str(self.folder / "config.json")
        objects = self.family.config_objects.keys() & self.source_config.keys()  # as stored: an empty one may be lost
        if faults := list(object_faults(dict.fromkeys(sorted(objects), False), self.source_config, where)):
            raise UserError(*faults)
        faults = config_faults(self.family, self.config, where, largest, len(self._stored))
        for why, fix in self.family.checkpoint_faults(self.source_config, self.names):
            faults.append(Fault("config.json does not fit the weights", where, why, fix))
        if faults:
            raise UserError(*faults)

    def _quantized(self) -> dict[str, str]:
        """dtype codes of the tensors that hold quantized weights, by name."""
        dtypes = {name: stored.stored_dtype for name, stored in self._stored.items() if stored.scale is None}
        return quantized_tensors(dtypes)

    def _descriptions(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("quant_model_description*.json"))

    def check_not_quantized(self) -> None:
        """UserError if the checkpoint is quantized already."""
        quantized, descriptions = self._quantized(), self._descriptions()
        if descriptions:
            why = f"it contains {descriptions[0]}"
        elif quantized:
            why = describe_quantization(self.source_config, quantized)
        else:
            return
        raise UserError(Fault(QUANTIZED, str(self.folder), why, FLOAT_FIX))

    def side_files(self, *, code: bool = False) -> SideFiles:
        """The files of a compiled folder besides weights, description and config.json. code: include *.py."""
        return side_files(self.folder, self.family, weights=[*self._files, INDEX], code=code)


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of the bytes of a tensor, hexadecimal; empty for a tensor without elements."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest() if flat.numel() else ""
