"""IR dumps: every stage, as traced and after every pass, as files to read, to compare and to run again."""

import importlib
import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors import SafetensorError

from vlqc.errors import Fault, UserError
from vlqc.formatting import did_you_mean
from vlqc.ir.printer import print_stage
from vlqc.ir.stage import Stage
from vlqc.options.options import Options
from vlqc.pipeline.pass_api import Pass
from vlqc.reporting.dumps.files import State, dumped, folder_name, remove_dumped

# Format -> what writes it, as module:function(stage, path without suffix, state). Loaded where asked for.
WRITERS = {
    "text": "vlqc.reporting.dumps.files:write_text",
    "json": "vlqc.reporting.dumps.as_json:write_json",
    "onnx": "vlqc.reporting.onnx:write_onnx",
    "bundle": "vlqc.reporting.dumps.bundle_writing:write_bundle",
}


class Dumper:
    """Writes STAGE/00-traced and STAGE/NN-after-PASS below a folder, in every format; without one it writes nothing.

    stages: patterns over the names of stages, none: all; formats: of `WRITERS`; print_after: name of a pass, after
    which the text of these stages is shown, by `show` or on stderr; print_traced: whether it is, as traced;
    model_path: of the checkpoint; overwrite: whether what another run dumped of these stages goes first (texts of two
    runs side by side would tell nothing); otherwise it is refused, at once. flag: the option that named the folder.
    UserError for files that cannot be written.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        stages: Sequence[str] = (),
        formats: Sequence[str] = ("text",),
        print_after: str | None = None,
        print_traced: bool = False,
        model_path: Path | None = None,
        show: Callable[[str], object] | None = None,
        overwrite: bool = False,
        flag: str = "--dump_ir",
    ) -> None:
        self.folder, self.stages, self.print_after, self._show = folder, tuple(stages), print_after, show or _to_stderr
        self.print_traced = print_traced
        self.model_path, self._state = model_path, State(model_path)
        self._writers = [_writer(name) for name in formats] if folder is not None else []
        self._overwrite, self._flag = overwrite, flag
        if folder is not None and folder.is_dir():
            self._require_free(folder, [path.name for path in sorted(folder.iterdir()) if self.wants(path.name)])

    @classmethod
    def of(cls, options: Options, passes: Sequence[Pass], *, active: bool) -> "Dumper":
        """As the user's options have it. UserError if it would print after a pass that does not run."""
        require_pass("--print_after", options.print_after, passes)
        if not active:
            return cls(None)
        return cls(
            options.dump_ir,
            stages=options.dump_stages,
            formats=options.dump_formats.split(","),
            print_after=options.print_after,
            model_path=options.model_path,
            overwrite=options.overwrite or options.resume,  # an interrupted run has dumped into the same folder
        )

    def wants(self, name: str) -> bool:
        """Whether a stage of that name is one of those to be looked into."""
        return not self.stages or any(fnmatchcase(name, pattern) for pattern in self.stages)

    def traced(self, stage: Stage) -> None:
        if self.folder is not None and self.wants(stage.name):
            self._state = State(self.model_path)
            self._require_free(self.folder, [folder_name(stage.name)])  # another run may have begun since
            remove_dumped(self.folder / folder_name(stage.name))
        if self.print_traced and self.wants(stage.name):
            self._show(print_stage(stage))
        self._write(stage, "00-traced")

    def after(self, stage: Stage, number: int, done: Pass) -> None:
        if done.name == self.print_after and self.wants(stage.name):
            self._show(f"; {stage.name} after {done.name}\n{print_stage(stage)}")
        self._write(stage, f"{number + 1:02}-after-{done.name}")

    def _write(self, stage: Stage, title: str) -> None:
        if self.folder is None or not self.wants(stage.name):
            return
        path = self.folder / folder_name(stage.name) / title
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for write in self._writers:
                write(stage, path, self._state)
        except (OSError, SafetensorError) as error:  # the disk is full
            fix = "give every run a folder of its own, where you may write and there is room"
            raise UserError(Fault("the dump cannot be written", str(path), str(error), fix)) from error

    def _require_free(self, folder: Path, stages: Sequence[str]) -> None:
        """UserError if a stage's folder holds what another run dumped, unless that may go."""
        taken = [] if self._overwrite else [name for name in stages if any(dumped(folder / name))]
        if taken:
            more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
            fix = "name another folder, or add --overwrite to replace what was dumped of these stages"
            raise UserError(Fault(f"{self._flag} {folder}", why=f"it holds a dump of {taken[0]}{more}", fix=fix))


def _to_stderr(text: str) -> None:
    """TraceResult up when it is used: a progress bar takes stderr's place while it is shown."""
    sys.stderr.write(text)


def _writer(name: str) -> Callable[[Stage, Path, State], None]:
    module, _, function = WRITERS[name].partition(":")
    found: Callable[[Stage, Path, State], None] = getattr(importlib.import_module(module), function)
    return found


def require_pass(flag: str, name: str | None, passes: Sequence[Pass]) -> None:
    """UserError if a pass is named that the pipeline does not run."""
    names = [step.name for step in passes]
    if name is not None and name not in names:
        fix = did_you_mean(name, names) or f"name one of {', '.join(names)}"
        raise UserError(Fault(f"{flag} {name}", why="the pipeline has no such pass", fix=fix))
