"""Reads a Hugging Face checkpoint folder, one tensor at a time, under the names that engines expect.

transformers versions save the tensors of one model under different names. Every name in the interface of `Checkpoint`
is that of `ModelFamily.checkpoint_name`.
"""

import hashlib
import math
import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlqc.errors import Fault, UserError
from vlqc.families.family import ModelFamily, TensorSlice
from vlqc.families.registry import family_of, find_family
from vlqc.frontend.checkpoint.config_schema import REPAIR, config_faults
from vlqc.frontend.checkpoint.files import file_stamp, link_faults, read_config, tensor_ranges, weight_files
from vlqc.frontend.checkpoint.prefetch import ByteRange, Prefetcher

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MAX_FAULTS = 100  # tensors that a message names
# Weight files of any format, which an emitted folder replaces, and their indices.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


@dataclass(frozen=True)
class _StoredTensor:
    """Where and how a tensor is stored.

    name, stored_shape: in the file; span: None if the header does not list it; part: where it is in the stored tensor,
    None if it is all of it.
    """

    file: str
    name: str
    stored_shape: tuple[int, ...]
    dtype: torch.dtype
    span: ByteRange | None
    part: TensorSlice | None = None

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
    """The tensors and the configuration of one folder.

    Args:
        folder: of the checkpoint.

    Raises:
        UserError: with all faults at once, if the folder is not a checkpoint: no such folder, no config.json, no
            safetensors, a truncated or damaged shard, an index with files that are missing or outside the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if faults := link_faults(folder) if folder.is_dir() else []:
            raise UserError(*faults)
        self.source_config = read_config(folder)
        self._family = find_family(self.source_config)
        self.config = self._family.engine_config(self.source_config) if self._family else self.source_config
        self.digests: dict[str, str] | None = None  # if set, `tensor` adds the SHA-256 of what it reads, by name
        self._open: dict[str, Any] = {}
        self._prefetcher = Prefetcher()
        self._files = weight_files(folder)
        self._stored: dict[str, _StoredTensor] = {}
        for file in self._files:
            try:
                spans = tensor_ranges(folder / file)
                faults += self._add_file(file, spans)
            except (SafetensorError, OSError, ValueError) as error:
                fix = "copy the file again"
                faults.append(Fault("weight file cannot be read", str(folder / file), str(error), fix))
        faults = faults or self._split_tensors()
        if not faults and not self._stored:
            faults.append(Fault("the weight files hold no tensors", str(folder)))
        if faults:
            raise UserError(*faults)
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

    def _add_file(self, file: str, spans: Mapping[str, ByteRange]) -> list[Fault]:
        faults = []
        opened = self._opened(file)
        for stored_name in opened.keys():  # noqa: SIM118 - safe_open is not a mapping
            name = self._family.checkpoint_name(stored_name) if self._family else stored_name
            view = opened.get_slice(stored_name)
            if name in self._stored:
                faults.append(self._twice(name, file))
            elif view.get_dtype() not in DTYPES:
                why = "only float checkpoints are supported"
                faults.append(Fault(f"tensor {name} has dtype {view.get_dtype()}", file, why))
            else:
                shape, dtype = tuple(view.get_shape()), DTYPES[view.get_dtype()]
                self._stored[name] = _StoredTensor(file, stored_name, shape, dtype, spans.get(stored_name))
        return faults

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
        return faults

    def _twice(self, name: str, file: str) -> Fault:
        where = f"{self._stored[name].file} and {file}"
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
        part = stored.part
        if part is None and stored.span is not None:
            return _map_tensor(stored.span, stored.dtype, stored.shape)
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
            where, fix = str(self.folder / self._stored[name].file), "repair or download the checkpoint again"
            why = f"{count} of {tensor.numel()} values are not finite; such a weight cannot be quantized"
            raise UserError(Fault(f"weight {name} holds NaN or Inf", where, why, fix))

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """Rows of a matrix, read from the mapped file: indices int64 [...] -> [..., K], dtype as stored."""
        view = self._opened(self._stored[name].file).get_slice(self._stored[name].name)
        unique, inverse = torch.unique(indices, return_inverse=True)
        rows = torch.cat([view[int(row) : int(row) + 1] for row in unique])
        self.release()
        self._check_finite(name, rows)
        return rows[inverse]

    def check_tensors(self, expected: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """UserError with every tensor that is missing or has another shape. expected: names and shapes."""
        faults: dict[str, Fault] = {}  # by stored tensor
        where = str(self.folder)
        for name, shape in expected:
            if name not in self:
                faults[name] = Fault(f"tensor {name} is missing", where, f"config.json implies shape {list(shape)}")
            elif self.shape(name) != tuple(shape):
                stored, why = self._stored[name], f"config.json implies {list(shape)}"
                if stored.part is not None:
                    why = f"so {name} is {list(stored.shape)}, but {why}"
                what = f"tensor {name if stored.part is None else stored.name} has shape {list(stored.stored_shape)}"
                faults.setdefault(stored.name, Fault(what, where, why))
        if faults:
            shown, more = list(faults.values())[:MAX_FAULTS], len(faults) - MAX_FAULTS
            raise UserError(*shown, *([Fault(f"{more} more tensors do not fit", where)] if more > 0 else []))

    def check_config(self) -> None:
        """UserError with every value of config.json that is out of bounds for the stored tensors."""
        largest = max((size for stored in self._stored.values() for size in stored.shape), default=1)
        where = str(self.folder / "config.json")
        faults = config_faults(self.family, self.config, where, largest, len(self._stored))
        for contradiction in self.family.checkpoint_faults(self.source_config, self.names):
            faults.append(Fault("config.json does not fit the weights", where, contradiction, REPAIR))
        if faults:
            raise UserError(*faults)

    def check_not_quantized(self) -> None:
        """UserError if the checkpoint is quantized already."""
        descriptions = sorted(path.name for path in self.folder.glob("quant_model_description*.json"))
        integers = [name for name in self.names if not self.stored_dtype(name).is_floating_point]
        keys = [key for key in ("quantization_config", "quantize") if self.config.get(key)]
        if descriptions:
            why = f"it contains {descriptions[0]}"
        elif keys:
            why = f"config.json has {keys[0]}"
        elif integers:
            why = f"{integers[0]} has dtype {self.stored_dtype(integers[0])}".replace("torch.", "")
        else:
            return
        fix = "pass the float checkpoint that it was made from"
        raise UserError(Fault("the checkpoint is quantized already", str(self.folder), why, fix))

    def side_files(self, *, code: bool = False) -> list[str]:
        """Names of all files that an engine or processor may need, except weights and config.json, sorted.

        code: include *.py. Links count as files, because a snapshot in the Hugging Face cache consists of links; see
        `link_faults` for where they may lead.
        """
        return sorted(
            path.name
            for path in self.folder.iterdir()
            if path.is_file()
            and path.name != "config.json"
            and not path.name.endswith(WEIGHT_SUFFIXES)
            and not path.name.startswith(".")
            and (code or path.suffix != ".py")
        )


def _map_tensor(span: ByteRange, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor whose data is a private mapping of these bytes of a file.

    safetensors reads the header of a file each time it is opened, which takes long where it lists every expert.
    """
    if span.begin == span.end:
        return torch.empty(shape, dtype=dtype)
    start = span.begin - span.begin % mmap.ALLOCATIONGRANULARITY
    with open(span.file, "rb") as file:
        mapping = mmap.mmap(file.fileno(), span.end - start, access=mmap.ACCESS_COPY, offset=start)
    flat = torch.frombuffer(mapping, dtype=dtype, count=math.prod(shape), offset=span.begin - start)
    return flat.view(shape)


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of the bytes of a tensor, hexadecimal; empty for a tensor without elements."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest() if flat.numel() else ""
