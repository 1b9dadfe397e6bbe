"""Writing the compiled checkpoint: files and folders, tensors of a stage, and what an engine wants beside them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vlqc.emit import deferred_stages as spool
from vlqc.emit.folder_writer import FolderEmitter
from vlqc.emit.mindie_writer import MindieEmitter
from vlqc.emit.stage_tensors import Entry
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.ir.stage import Stage
from vlqc.options.options import Options
from vlqc.pipeline.precision_search import Plan

__all__ = ["FolderEmitter", "emitter_for", "kept_bytes", "waiting_bytes"]


def emitter_for(options: Options, folder: Path, checkpoint: Checkpoint, *, writes: bool = True) -> FolderEmitter:
    """The emitter of the layout that the options ask for, writing into `folder`, or nowhere."""
    if not writes:
        return NoEmitter(folder, checkpoint, options)
    return (MindieEmitter if options.mindie_layout else FolderEmitter)(folder, checkpoint, options)


class NoEmitter(FolderEmitter):
    """Of a process that does not write: another one does, or the result is complete."""

    def add_stage(self, stage: Stage) -> None:
        pass

    def add(self, entries: Iterable[Entry]) -> None:
        pass

    def copy(self, name: str) -> Tensor:
        return self.checkpoint.tensor(name)

    def copy_rest(self, names: Iterable[str]) -> None:
        pass

    def settle(self) -> Plan | None:
        plan = None if self._spool is None else self.plan(self._spool)
        return plan if plan and plan.groups else None

    def restore(self, marks: Sequence[dict[str, Any]], taken: set[int]) -> None:
        self.restore_spool(marks, set(range(len(marks))))

    def finish(self) -> None:
        pass


def waiting_bytes(model: StreamedModel) -> int:
    """About how much room a result takes whose schemes are chosen last, with all that waits until then."""
    return spool.expected_bytes(model)


def kept_bytes(model: StreamedModel, samples: Sequence[Mapping[str, Tensor]]) -> int:
    """Of the outputs of a stage for all samples, float32, twice: one set goes when the next one is complete."""
    config = model.checkpoint.config
    tokens = sum(sample["input_ids"].numel() for sample in samples)
    patches = sum(len(sample["pixel_values"]) for sample in samples if "pixel_values" in sample)
    return (
        2 * 4 * max(tokens * int(config["hidden_size"]), patches * int(config["vision_config"].get("hidden_size", 0)))
    )
