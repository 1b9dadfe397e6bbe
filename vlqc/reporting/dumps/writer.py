"""IR dumps: every stage as traced and after every pass, as files in several formats."""

import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors import SafetensorError

from vlqc.errors import Fault, UserError
from vlqc.formatting import did_you_mean
from vlqc.ir.printer import print_stage
from vlqc.ir.stage import Stage
from vlqc.options.options import Options
from vlqc.pipeline.pass_api import Pass

# Format -> function(stage, path without suffix, context), imported on use.
WRITERS = {
    "text": "vlqc.reporting.dumps.writer:write_text",
    "json": "vlqc.reporting.dumps.as_json:write_json",
    "onnx": "vlqc.reporting.onnx:write_onnx",
    "bundle": "vlqc.reporting.dumps.bundle:write_bundle",
}
DUMP_FILE = re.compile(r"\d\d-(traced|after-[\w-]+)\.(vlqc|json|onnx|onnx\.data|bundle)")


class Dumper:
    """Writes STAGE/00-traced and STAGE/NN-after-PASS below a folder, in every format; nothing without a folder.

    Args:
        folder: of the dump; None to print only.
        stages: glob patterns over stage names; empty for all stages.
        formats: keys of WRITERS.
        print_after: name of a pass after which the text of these stages is passed to `show`.
        print_traced: whether the text as traced is passed to `show`.
        model_path: folder of the checkpoint, which bundles need.
        show: called with each text; prints to stderr by default.
        overwrite: whether files of an older dump of these stages are deleted first; otherwise they are an error.
        flag: the option that names the folder, for messages.

    Raises:
        UserError: from all methods, if a file cannot be written or the folder has a dump of these stages.
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
        self.folder, self.stages, self.print_after, self.print_traced = folder, tuple(stages), print_after, print_traced
        self.model_path, self._context = model_path, DumpContext(model_path)
        self._writers: list[Writer] = []
        if folder is not None:
            self._writers = [pkgutil.resolve_name(WRITERS[name]) for name in formats]
        self._show, self._overwrite, self._flag = show or _print_to_stderr, overwrite, flag
        if folder is not None and folder.is_dir():
            self._require_no_dump(folder, [path.name for path in sorted(folder.iterdir()) if self.selects(path.name)])

    @classmethod
    def from_options(cls, options: Options, passes: Sequence[Pass], *, active: bool) -> "Dumper":
        """active: whether this process writes. UserError if --print_after names a pass that does not run."""
        require_pass("--print_after", options.print_after, passes)
        if not active:
            return cls(None)
        return cls(
            options.dump_ir,
            stages=options.dump_stages,
            formats=options.dump_formats.split(","),
            print_after=options.print_after,
            model_path=options.model_path,
            overwrite=options.overwrite or options.resume,  # an interrupted run has used the same folder
        )

    def selects(self, stage_name: str) -> bool:
        """Whether a stage of this name is dumped."""
        return not self.stages or any(fnmatchcase(stage_name, pattern) for pattern in self.stages)

    def traced(self, stage: Stage) -> None:
        """Dumps a stage before its first pass."""
        if self.folder is not None and self.selects(stage.name):
            self._context = DumpContext(self.model_path)
            self._require_no_dump(self.folder, [folder_name(stage.name)])  # another run may have started since
            delete_dump(self.folder / folder_name(stage.name))
        if self.print_traced and self.selects(stage.name):
            self._show(print_stage(stage))
        self._write(stage, "00-traced")

    def after(self, stage: Stage, number: int, done: Pass) -> None:
        """Dumps a stage after a pass. number: of the pass, from 0."""
        if done.name == self.print_after and self.selects(stage.name):
            self._show(f"; {stage.name} after {done.name}\n{print_stage(stage)}")
        self._write(stage, f"{number + 1:02}-after-{done.name}")

    def _write(self, stage: Stage, title: str) -> None:
        if self.folder is None or not self.selects(stage.name):
            return
        path = self.folder / folder_name(stage.name) / title
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for write in self._writers:
                write(stage, path, self._context)
        except (OSError, SafetensorError) as error:
            fix = "use a separate writable folder with enough free space for every run"
            raise UserError(Fault("cannot write the dump", str(path), str(error), fix)) from error

    def _require_no_dump(self, folder: Path, stages: Sequence[str]) -> None:
        """UserError if the folder has files of another dump of these stages, unless they may be deleted."""
        dumped = [] if self._overwrite else [name for name in stages if any(dump_files(folder / name))]
        if dumped:
            more = f" and {len(dumped) - 1} more" if len(dumped) > 1 else ""
            fix = "choose another folder, or add --overwrite to replace the dump of these stages"
            why = f"it contains a dump of {dumped[0]}{more}"
            raise UserError(Fault(f"{self._flag} {folder}", why=why, fix=fix))


def _print_to_stderr(text: str) -> None:
    """Resolves sys.stderr on each call, because a progress bar replaces it while it is shown."""
    sys.stderr.write(text)


def require_pass(flag: str, name: str | None, passes: Sequence[Pass]) -> None:
    """UserError if an option names a pass that the pipeline does not run."""
    names = [step.name for step in passes]
    if name is not None and name not in names:
        fix = did_you_mean(name, names) or f"choose one of {', '.join(names)}"
        raise UserError(Fault(f"{flag} {name}", why="the pipeline has no such pass", fix=fix))


# ---- files of a dump -------------------------------------------------------------------------------------------------


class DumpContext:
    """What the writers of one stage share.

    model_path: folder with config.json; None if the stage is not from a checkpoint. written: kind of file -> (digest of
    its content, path), so that unchanged tensors are linked and not written again.
    """

    def __init__(self, model_path: Path | None = None) -> None:
        self.model_path = model_path
        self.written: dict[str, tuple[str, Path]] = {}


Writer = Callable[[Stage, Path, DumpContext], None]


def write_text(stage: Stage, path: Path, context: DumpContext) -> None:
    """Writes PATH.vlqc."""
    add_suffix(path, ".vlqc").write_text(print_stage(stage), encoding="utf-8")


def write_or_link(kind: str, digest: str, path: Path, context: DumpContext, write: Callable[[Path], None]) -> None:
    """Writes a file, or links the file of an earlier pass with the same content."""
    previous = context.written.get(kind)
    if previous is not None and previous[0] == digest:
        try:
            os.link(previous[1], path)
            return
        except OSError:  # file system without hard links
            pass
    write(path)
    context.written[kind] = digest, path


def folder_name(stage: str) -> str:
    return re.sub(r"[^\w.-]", "_", stage)


def add_suffix(path: Path, suffix: str) -> Path:
    """The path with a suffix appended; names of passes and stages may contain dots."""
    return path.with_name(path.name + suffix)


def dump_files(folder: Path) -> Iterator[Path]:
    """Files and bundles that a dump wrote into the folder of a stage; other files are ignored."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if DUMP_FILE.fullmatch(path.name) and not path.is_symlink():
            yield path


def delete_dump(folder: Path) -> None:
    for path in dump_files(folder):
        if path.is_dir():
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        else:
            path.unlink()
