"""The vLLM Ascend folder: weights, their description, the edited config.json, and the source's side files.

For W8A8 the folder also carries the two config keys by which MindIE finds its quantization; vLLM Ascend ignores them.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from vlqc.checkpoint import Checkpoint
from vlqc.emit.ascend import Entry, emitted_dtype, float_entry, header_bytes
from vlqc.emit.shards import ShardWriter
from vlqc.engines import Scheme, part_of

DESCRIPTION = "quant_model_description.json"
DESCRIPTION_VERSION = "1.0.0"
# A mixed folder is named after the first of these that occurs in it.
NAMED_AFTER = (Scheme.W4A8_DYNAMIC, Scheme.W8A8, Scheme.W8A8_DYNAMIC, Scheme.FLOAT)
GIB = 1024**3


class FolderEmitter:
    """Writes a compiled checkpoint into an existing empty folder: every tensor once, then `finish`.

    scheme: after which the files are named; both: whether MindIE's keys go into config.json, too; dtype: of the float
    tensors.
    """

    def __init__(
        self, folder: Path, checkpoint: Checkpoint, scheme: Scheme, *, part_file_size: int | None, both: bool
    ) -> None:
        self.folder, self.checkpoint, self.both = folder, checkpoint, both
        self.dtype = emitted_dtype(checkpoint.dtype)
        self.marks: dict[str, Scheme] = {}
        limit = None if part_file_size is None else part_file_size * GIB
        stem = f"quant_model_weight_{scheme.lower()}"
        self._shards = ShardWriter(folder, stem, header_bytes=header_bytes(checkpoint), limit=limit)

    def add(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._shards.add(entry.name, entry.tensor)
            self.marks[entry.name] = entry.mark

    def copy(self, name: str) -> Tensor:
        """Reads a tensor of the source, emits it in float, and returns it as stored."""
        tensor = self.checkpoint.tensor(name)
        self.add([float_entry(name, tensor, self.dtype)])
        return tensor

    def copy_rest(self, names: Iterable[str]) -> None:
        """Copies those that were not emitted yet."""
        for name in names:
            if name not in self.marks:
                self.copy(name)

    def finish(self) -> None:
        """Completes the weight files and writes everything beside them."""
        self._shards.close()
        used = set(self.marks.values())
        model_type = next(scheme for scheme in NAMED_AFTER if scheme in used)
        description = {
            "version": DESCRIPTION_VERSION,
            "model_quant_type": str(model_type),
            **{name: str(mark) for name, mark in sorted(self.marks.items())},
        }
        _write_json(self.folder / DESCRIPTION, description)
        _write_json(self.folder / "config.json", self._config())
        for name in self.checkpoint.side_files():
            if name.startswith("quant_model_description"):  # of another compilation
                continue
            shutil.copyfile(self.checkpoint.folder / name, self.folder / name)

    def _config(self) -> dict[str, Any]:
        """The source's config.json with only those keys changed that the emitted weights make untrue."""
        config = json.loads(json.dumps(self.checkpoint.config))
        dtype = str(self.dtype).removeprefix("torch.")
        for key in ("torch_dtype", "dtype"):
            if key in config or key == "torch_dtype":
                config[key] = dtype
        config.pop("quantization_config", None)  # vLLM would read it instead of the description
        quantized_parts = {part_of(name) for name, mark in self.marks.items() if mark == Scheme.W8A8}
        if self.both and quantized_parts:
            config["quantize"] = "w8a8"
            if quantized_parts & {"vision", "merger"}:
                config["vision_config"]["quantize"] = "w8a8"
        return config  # type: ignore[no-any-return]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
