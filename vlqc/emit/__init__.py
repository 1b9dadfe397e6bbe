"""Writing the compiled checkpoint: files and folders, tensors of a stage, and what an engine wants beside them."""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from vlqc.checkpoint import Checkpoint
from vlqc.emit import ascend, spool
from vlqc.emit.ascend import Entry
from vlqc.emit.mindie import MindieEmitter
from vlqc.emit.vllm_ascend import FolderEmitter
from vlqc.ir import Stage
from vlqc.model import FloatModel
from vlqc.options import Options

__all__ = ["FolderEmitter", "emitter_for", "expected_bytes"]


def emitter_for(options: Options, folder: Path, checkpoint: Checkpoint, *, writes: bool = True) -> FolderEmitter:
    """The emitter of the layout that the options ask for, writing into `folder`, or nowhere."""
    if not writes:
        return NoEmitter(folder, checkpoint, options)
    return (MindieEmitter if options.mindie_layout else FolderEmitter)(folder, checkpoint, options)


class NoEmitter(FolderEmitter):
    """Of a process that does not write: another one does."""

    def add_stage(self, stage: Stage) -> None:
        pass

    def add(self, entries: Iterable[Entry]) -> None:
        pass

    def copy(self, name: str) -> Tensor:
        return self.checkpoint.tensor(name)


def expected_bytes(model: FloatModel, options: Options) -> int:
    """About how much room the result takes while it is made."""
    return spool.expected_bytes(model) if options.fallback == "auto" else ascend.expected_bytes(model)
