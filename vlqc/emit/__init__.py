"""Writing the compiled checkpoint: files and folders, tensors of a stage, and what an engine wants beside them."""

from pathlib import Path

from vlqc.checkpoint import Checkpoint
from vlqc.emit.ascend import expected_bytes
from vlqc.emit.mindie import MindieEmitter
from vlqc.emit.vllm_ascend import FolderEmitter
from vlqc.options import Options

__all__ = ["FolderEmitter", "emitter_for", "expected_bytes"]


def emitter_for(options: Options, folder: Path, checkpoint: Checkpoint) -> FolderEmitter:
    """The emitter of the layout that the options ask for, writing into `folder`."""
    return (MindieEmitter if options.mindie_layout else FolderEmitter)(folder, checkpoint, options)
