"""A Hugging Face checkpoint folder, read one tensor at a time, under its original names.

Newer transformers save `model.visual.*` and `model.language_model.*`; engines know `visual.*` and `model.*`. Every
name that leaves this file is an original one.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlqc.errors import Fault, UserError
from vlqc.families.qwen2_5_vl import flatten_config, original_name
from vlqc.frontend.checkpoint.config_schema import config_faults
from vlqc.frontend.checkpoint.files import link_faults, read_config, spans_of, times_of, weight_files
from vlqc.frontend.checkpoint.prefetch import ReadAhead, Span

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# Weight files of any kind, which an emitted folder replaces, and files that say where weights are.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


class Checkpoint:
    """The tensors and configuration of one folder.

    Raises UserError, with all faults at once, for a folder that cannot be a checkpoint: no such folder, no config.json,
    no safetensors, a truncated or damaged shard, an index that names files which are missing or outside the folder.
    """

    def __init__(self, folder: Path, canonical: Callable[[str], str] = original_name) -> None:
        self.folder = folder
        if faults := link_faults(folder) if folder.is_dir() else []:
            raise UserError(*faults)
        self.source_config = read_config(folder)
        self.config = flatten_config(self.source_config)
        self.digests: dict[str, str] | None = None  # where wanted: SHA-256 of what `tensor` read, by name
        self._open: dict[str, Any] = {}
        self._ahead = ReadAhead()
        self._spans: dict[str, dict[str, Span]] = {}
        self._files: list[str] = []
        self._file_of: dict[str, str] = {}
        self._stored_name: dict[str, str] = {}
        self._shape: dict[str, tuple[int, ...]] = {}
        self._dtype: dict[str, torch.dtype] = {}
        for file in weight_files(folder):
            try:
                self._files.append(file)
                self._spans[file] = spans_of(folder / file)
                self._list(file, self._opened(file), canonical, faults)
            except (SafetensorError, OSError, ValueError) as error:
                fix = "copy the file again: its size or header is not what the format promises"
                faults.append(Fault("weight file cannot be read", str(folder / file), str(error), fix))
        if not faults and not self._file_of:
            faults.append(Fault("the weight files hold no tensors", str(folder)))
        if faults:
            raise UserError(*faults)
        self.release()

    def _opened(self, file: str) -> Any:
        """The mapped file, opened when it is first wanted."""
        if file not in self._open:
            self._open[file] = safe_open(str(self.folder / file), "pt")
        return self._open[file]

    def release(self) -> None:
        """Unmaps all files but for tensors in use: what was read of a mapped file stays resident until then."""
        self._open.clear()

    def _list(self, file: str, opened: Any, canonical: Callable[[str], str], faults: list[Fault]) -> None:
        for stored in opened.keys():  # noqa: SIM118 - safe_open is no mapping
            name = canonical(stored)
            if name in self._file_of:
                where = f"{self._file_of[name]} and {file}"
                faults.append(Fault(f"tensor {name} is stored twice", where, fix="remove the stale weight file"))
                continue
            view = opened.get_slice(stored)
            if view.get_dtype() not in DTYPES:
                faults.append(
                    Fault(f"tensor {name} has dtype {view.get_dtype()}", file, "vlqc reads float checkpoints")
                )
                continue
            self._file_of[name], self._stored_name[name] = file, stored
            self._shape[name] = tuple(view.get_shape())
            self._dtype[name] = DTYPES[view.get_dtype()]

    @property
    def names(self) -> list[str]:
        """Original names of all tensors, sorted."""
        return sorted(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape[name]

    def stored_dtype(self, name: str) -> torch.dtype:
        return self._dtype[name]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights: the most frequent one among float tensors, by number of elements."""
        elements: dict[torch.dtype, int] = {}
        for name, dtype in self._dtype.items():
            if dtype.is_floating_point:
                elements[dtype] = elements.get(dtype, 0) + torch.Size(self._shape[name]).numel()
        if not elements:
            raise UserError(Fault("the checkpoint holds no float tensor", str(self.folder)))
        return max(elements, key=lambda dtype: elements[dtype])

    @property
    def files(self) -> list[Path]:
        """Its weight files."""
        return [self.folder / file for file in self._files]

    @property
    def bytes(self) -> int:
        """Size of all weight files."""
        return sum((self.folder / file).stat().st_size for file in self._files)

    def tensor(self, name: str) -> Tensor:
        """The named tensor as stored, checked to be finite. The one place that reads whole tensors.

        It lies in a mapping of its own: its memory goes with it.
        """
        self.release()
        tensor: Tensor = self._opened(self._file_of[name]).get_tensor(self._stored_name[name])
        self.release()
        self._finite(name, tensor)
        if self.digests is not None:
            self.digests[name] = digest_of(tensor)
        return tensor

    def require_same(self, digests: Sequence[Mapping[str, str]], file_times: Mapping[str, list[int]]) -> None:
        """UserError unless weights are what another run read: per stage their digests.

        file_times: those of the files then. Where none has changed, one weight per stage is read, otherwise all.
        """
        unchanged = all(file_times.get(path.name) == times_of(path) for path in self.files)
        for of_stage in digests:
            names = sorted(of_stage, key=lambda name: (torch.Size(self._shape[name]).numel(), name))
            for name in names[len(names) // 2 :][:1] if unchanged else names:
                tensor = self._opened(self._file_of[name]).get_tensor(self._stored_name[name])
                self.release()
                if digest_of(tensor) != of_stage[name]:
                    where, why = str(self.folder / self._file_of[name]), f"{name} has other values than it had then"
                    fix = "bring the checkpoint back as it was, or start anew with --start_over"
                    raise UserError(Fault("the interrupted run cannot be resumed", where, why, fix))

    def read_ahead(self, names: Iterable[str]) -> None:
        """Begins to bring these tensors from the disk in the background, into the system's cache of files."""
        self._ahead.start(span for name in names if name in self and (span := self._span(name)))

    def _span(self, name: str) -> Span | None:
        """Where the bytes of a tensor lie."""
        return self._spans[self._file_of[name]].get(self._stored_name[name])

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or not tensor.numel():
            return tensor
        low, high = (float(it) for it in torch.aminmax(tensor))
        file, fix = str(self.folder / self._file_of[name]), "repair or download the checkpoint again"
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = int((~torch.isfinite(tensor)).sum())
            raise UserError(
                Fault(
                    f"weight {name} holds NaN or Inf",
                    file,
                    f"{bad} of {tensor.numel()} values are not finite; such a weight has no quantized form",
                    fix,
                )
            )
        return tensor

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """Rows of a matrix, gathered from the mapped file: indices int64 [...] -> [..., K] as stored."""
        view = self._opened(self._file_of[name]).get_slice(self._stored_name[name])
        unique, where = torch.unique(indices, return_inverse=True)
        gathered = torch.cat([view[int(row) : int(row) + 1] for row in unique])
        self.release()
        return self._finite(name, gathered)[where]

    def expect(self, wanted: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """UserError listing every tensor that the model needs and the checkpoint lacks or holds in another shape."""
        faults = []
        for name, shape in wanted:
            if name not in self:
                faults.append(
                    Fault(f"tensor {name} is missing", str(self.folder), f"config.json implies it, as {list(shape)}")
                )
            elif self._shape[name] != tuple(shape):
                has = list(self._shape[name])
                faults.append(
                    Fault(f"tensor {name} has shape {has}", str(self.folder), f"config.json implies {list(shape)}")
                )
        if faults:
            raise UserError(*faults)

    def require_config(self) -> None:
        """UserError with every value of config.json that the model cannot have been made with."""
        largest = max((size for shape in self._shape.values() for size in shape), default=1)
        where = str(self.folder / "config.json")
        if faults := config_faults(self.config, where, largest, len(self._shape)):
            raise UserError(*faults)

    def require_float(self) -> None:
        """UserError for a checkpoint that is quantized already: its integers are no weights to be quantized."""
        described = sorted(path.name for path in self.folder.glob("quant_model_description*.json"))
        integers = [name for name in self.names if not self._dtype[name].is_floating_point]
        configured = [key for key in ("quantization_config", "quantize") if self.config.get(key)]
        if described or integers or configured:
            why = f"it holds {described[0]}" if described else f"config.json has {configured[0]}" if configured else ""
            why = why or f"{integers[0]} is {self._dtype[integers[0]]}"
            why = why.replace("torch.", "")
            fix = "give the float checkpoint that it was made from"
            raise UserError(Fault("the checkpoint is quantized already", str(self.folder), why, fix))

    def side_files(self, *, code: bool = False) -> list[str]:
        """Everything beside weights and config.json that an engine or a processor may need, sorted; no folders.

        code: *.py as well. Links count as what they lead to (`links` says where that may be): a snapshot in the Hugging
        Face cache consists of nothing else.
        """
        return sorted(
            path.name
            for path in self.folder.iterdir()
            if path.is_file() and path.name != "config.json" and not path.name.endswith(WEIGHT_SUFFIXES)
            and not path.name.startswith(".") and (code or path.suffix != ".py")
        )  # fmt: skip


def digest_of(tensor: Tensor) -> str:
    """SHA-256 of the bytes of a tensor, hexadecimal."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest() if flat.numel() else ""
