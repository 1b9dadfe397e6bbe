"""What happens during a compilation, gathered for its result."""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from vlqc.checkpoint import Checkpoint
from vlqc.emit.ascend import emitted_dtype
from vlqc.engines import Scheme, loads, part_of, serve_commands
from vlqc.ir import Stage
from vlqc.options import Options
from vlqc.result import Result


class Tally:
    """Counts sites, gathers notes (each shown once, at once) and makes the result."""

    def __init__(self, options: Options, checkpoint: Checkpoint, show_note: Callable[[str], None]) -> None:
        self.options, self.checkpoint, self._show_note = options, checkpoint, show_note
        self.counts: dict[tuple[str, str], int] = {}
        self.notes: list[str] = []
        self._started = time.perf_counter()
        if checkpoint.dtype != emitted_dtype(checkpoint.dtype):
            stored = str(checkpoint.dtype).removeprefix("torch.")
            self.note(
                [f"the checkpoint is {stored}; engines run bfloat16, so its float tensors are emitted as bfloat16"]
            )

    def note(self, notes: Iterable[str]) -> None:
        for text in notes:
            if text not in self.notes:
                self.notes.append(text)
                self._show_note(text)

    def count(self, stage: Stage) -> None:
        """A finished stage: its sites by scheme, its notes."""
        for site in stage.sites.values():
            self._count(stage.part, site.scheme or Scheme.FLOAT)
        self.note(stage.notes)

    def _count(self, part: str, scheme: Scheme) -> None:
        self.counts[part, str(scheme)] = self.counts.get((part, str(scheme)), 0) + 1

    def result(self, passes: dict[str, float]) -> Result:
        """Once the folder stands at its place."""
        folder = self.options.save_directory
        if "lm_head.weight" in self.checkpoint:
            self._count(part_of("lm_head"), Scheme.FLOAT)
        description = json.loads((folder / "quant_model_description.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        dtype = str(emitted_dtype(self.checkpoint.dtype)).removeprefix("torch.")
        return Result(
            folder=folder,
            counts=self.counts,
            bytes_before=self.checkpoint.bytes,
            bytes_after=_weight_bytes(folder),
            seconds=time.perf_counter() - self._started,
            peak_memory_bytes=_peak_memory(),
            notes=self.notes,
            engines=loads(description, dtype, config),
            serve=serve_commands(self.options.engine_target, folder),
            passes=passes,
        )


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _peak_memory() -> int:
    """The most memory this process ever held, in bytes; Linux counts it in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
