"""The vLLM Ascend folder: weights, their description, the edited config.json, and the source's side files.

For W8A8 the folder also carries the two config keys by which MindIE finds its quantization; vLLM Ascend ignores them.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vlqc.emit.background_writer import WriteBehind
from vlqc.emit.deferred_stages import FOLDER, DeferredStages
from vlqc.emit.manifest import MANIFEST
from vlqc.emit.shard_writer import ShardWriter
from vlqc.emit.stage_tensors import Entry, emitted_dtype, float_entry, header_bytes, stage_entries
from vlqc.families.qwen2_5_vl import model_part
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.ir.stage import Stage
from vlqc.kernels_ref.matmul import CORRECTION_STEP
from vlqc.options.options import Options
from vlqc.pipeline.precision_search import Plan, cheapest
from vlqc.targets.schemes import NAMING_ORDER, Scheme

DESCRIPTION_VERSION = "1.0.0"
CORRECTED = "quant_bias_correction"  # in the description: of so many steps are the mean errors that were taken off
# A mixed folder is named after the first of these that occurs in it.
NAMED_AFTER = (*NAMING_ORDER, Scheme.FLOAT)
GIB = 1024**3


class FolderEmitter:
    """Writes a compiled checkpoint into an existing empty folder: every tensor once, then `settle` and `finish`.

    Where the precision search decides, stages wait until `settle`; otherwise they are written at once.
    dtype: of the float tensors. What differs between layouts is in the methods that start with one underscore, and in
    `packs_int4`.
    """

    packs_int4 = True

    def __init__(self, folder: Path, checkpoint: Checkpoint, options: Options) -> None:
        self.folder, self.checkpoint, self.options = folder, checkpoint, options
        self.dtype = emitted_dtype(checkpoint.dtype)
        self.marks: dict[str, Scheme] = {}
        self.corrected = False  # whether any quant_bias takes a mean error off
        limit = None if options.part_file_size is None else options.part_file_size * GIB
        self._writer = ShardWriter(folder, header_bytes=header_bytes(checkpoint), limit=limit, marked=True)
        self._shards = WriteBehind(self._writer)
        self._spool = DeferredStages(folder / FOLDER) if options.fallback == "auto" else None
        self._marked = 0  # how many of `marks` were part of a `mark`
        # Is told, with the number of the stage, that what waited is emitted, and that its file can go then.
        self.taken: Callable[[int, Callable[[], None]], None] = lambda number, drop: drop()

    def add_stage(self, stage: Stage) -> None:
        """Everything that a finished stage became."""
        self.corrected |= any(getattr(module, "corrected", False) for module in stage.live.modules())
        if self._spool is None:
            self.add(self._entries(stage))
        else:
            self._spool.put(stage, self._entries(stage), packed=self.packs_int4)

    def settle(self) -> Plan | None:
        """Once all stages were added: writes those that wait, in the schemes that the precision search chooses."""
        if self._spool is None:
            return None
        spool, plan = self._spool, self.plan(self._spool)
        self.add(spool.take(plan, lambda number: self.taken(number, lambda: spool.drop(number))))
        return plan if plan.groups else None

    def plan(self, spool: DeferredStages) -> Plan:
        return cheapest(
            spool.groups(),
            target=self.options.engine_target,
            min_sqnr=self.options.min_sqnr,
            max_float_groups=self.options.max_float_groups,
        )

    def mark(self, then: Callable[[dict[str, Any]], None], *, stage: bool = True) -> None:
        """Has `then` called, in the thread that writes, with what was emitted since the last mark, in JSON.

        By then it is on the disk. stage: whether a stage was added since.
        """
        marks = dict(list(self.marks.items())[self._marked :])
        self._marked = len(self.marks)
        made: dict[str, Any] = {"marks": marks, "corrected": self.corrected}
        spool, number = (self._spool, self._spool.count - 1) if self._spool is not None and stage else (None, 0)
        if spool is not None:
            made["spool"] = spool.mark()

        def act() -> None:
            if spool is not None:
                made["seal"] = spool.sealed(number)
            then(made | {"shards": self._writer.mark()})

        self._shards.then(act)

    def restore(self, marks: Sequence[dict[str, Any]], taken: set[int]) -> None:
        """Goes on from marks that another emitter made in this folder. Damaged if its files are not what they were.

        taken: numbers of those stages that do not wait any more.
        """
        self.restore_spool(marks, taken)
        for path in self.folder.iterdir():
            if path.is_file() and not path.name.endswith((".safetensors", ".partial")):
                path.unlink()  # written last, and written again
        self._writer.restore([mark["shards"] for mark in marks])
        for mark in marks:
            self.marks |= {name: Scheme(word) for name, word in mark["marks"].items()}
            self.corrected |= mark["corrected"]
        self._marked = len(self.marks)
        self._shards.known(self.marks)

    def restore_spool(self, marks: Sequence[dict[str, Any]], taken: set[int]) -> None:
        if self._spool is not None:
            self._spool.restore([(mark["spool"], mark["seal"]) for mark in marks if "spool" in mark], taken)

    def stop(self) -> None:
        """After an error: nothing is being written when this returns."""
        self._shards.stop()

    def _entries(self, stage: Stage) -> Iterable[Entry]:
        return stage_entries(stage, packed=self.packs_int4)

    def add(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._shards.add(entry.name, entry.tensor)
            self.marks[entry.name] = entry.mark

    def copy(self, name: str) -> Tensor:
        """Reads a tensor of the source, emits it in float unless it was, and returns it as stored."""
        tensor = self.checkpoint.tensor(name)
        if name not in self.marks:
            self.add([float_entry(name, tensor, self.dtype)])
        return tensor

    def copy_rest(self, names: Iterable[str]) -> None:
        """Copies those that were not emitted yet."""
        for name in names:
            if name not in self.marks:
                self.copy(name)

    def finish(self) -> None:
        """Completes the weight files and writes everything beside them."""
        self._shards.close(f"quant_model_weight_{self.quant_type.lower()}")
        if self._spool is not None:
            self._spool.remove()
        _write_json(self.folder / self._description_name(), self._description())
        _write_json(self.folder / "config.json", self._config())
        for name in self.checkpoint.side_files(code=self.options.trust_remote_code):
            if not name.startswith("quant_model_description") and name != MANIFEST:  # of another compilation
                shutil.copyfile(self.checkpoint.folder / name, self.folder / name)

    @property
    def quant_type(self) -> Scheme:
        """The scheme that names the folder: the one with the fewest bits."""
        return next(scheme for scheme in NAMED_AFTER if scheme in self.marks.values())

    def _description_name(self) -> str:
        return "quant_model_description.json"

    def _description(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"version": DESCRIPTION_VERSION, "model_quant_type": str(self.quant_type)}
        if self.quant_type == Scheme.W4A8_DYNAMIC:
            facts["group_size"] = self.options.group_size
        if self.corrected:
            facts[CORRECTED] = CORRECTION_STEP
        return facts | {name: str(mark) for name, mark in sorted(self.marks.items())}

    def _config(self) -> dict[str, Any]:
        """The source's config.json, flat, with only those keys changed that the emitted weights make untrue."""
        config: dict[str, Any] = json.loads(json.dumps(self.checkpoint.config))
        dtype = str(self.dtype).removeprefix("torch.")
        for key in ("torch_dtype", "dtype"):
            if key in config or key == "torch_dtype":
                config[key] = dtype
        config.pop("quantization_config", None)  # vLLM would read it instead of the description
        if self.options.engine_target == "both" and Scheme.W8A8 in self.marks.values():
            self._add_mindie_keys(config)
        return config

    def _add_mindie_keys(self, config: dict[str, Any]) -> None:
        """By which MindIE finds the quantization of the language model and of the vision tower."""
        config["quantize"] = self.quant_type.lower()
        quantized = {model_part(name) for name, mark in self.marks.items() if mark != Scheme.FLOAT}
        config["vision_config"].pop("quantize", None)
        if quantized & {"vision", "merger"}:
            config["vision_config"]["quantize"] = self.quant_type.lower()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
