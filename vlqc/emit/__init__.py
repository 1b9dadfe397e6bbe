"""Writing the compiled checkpoint: files and folders, tensors of a stage, and what an engine wants beside them."""

from pathlib import Path

from vlqc.checkpoint import Checkpoint
from vlqc.emit.ascend import expected_bytes, stage_entries
from vlqc.emit.vllm_ascend import FolderEmitter
from vlqc.options import Options

__all__ = ["emitter_for", "expected_bytes", "stage_entries"]


def emitter_for(options: Options, folder: Path, checkpoint: Checkpoint) -> FolderEmitter:
    """The emitter of the layout that the options ask for, writing into `folder`."""
    both = options.engine_target == "both"
    return FolderEmitter(folder, checkpoint, options.scheme, part_file_size=options.part_file_size, both=both)
