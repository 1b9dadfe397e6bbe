"""The files of a dump: what they are called, who replaces them, and which of them can serve twice."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from vlqc.ir.printer import print_stage
from vlqc.ir.stage import Stage

DUMPED = re.compile(r"\d\d-(traced|after-[\w-]+)\.(vlqc|json|onnx|onnx\.data|bundle)")


class State:
    """What writers of one dump share: the checkpoint's folder, and files of the stage that may serve again.

    model_path: where config.json is; None: the stage is none of a checkpoint's.
    """

    def __init__(self, model_path: Path | None = None) -> None:
        self.model_path = model_path
        self.written: dict[str, tuple[str, Path]] = {}  # kind of file -> mark of its content, the file


def folder_name(stage: str) -> str:
    return re.sub(r"[^\w.-]", "_", stage)


def write_text(stage: Stage, path: Path, state: State) -> None:
    with_suffix(path, ".vlqc").write_text(print_stage(stage), encoding="utf-8")


def with_suffix(path: Path, suffix: str) -> Path:
    """The path with a suffix added; names of passes and stages may have points in them."""
    return path.with_name(path.name + suffix)


def dumped(folder: Path) -> Iterator[Path]:
    """What a dump wrote into the folder of a stage, and nothing else."""
    for found in sorted(folder.iterdir()) if folder.is_dir() else ():
        if DUMPED.fullmatch(found.name) and not found.is_symlink():
            yield found


def remove_dumped(folder: Path) -> None:
    for found in dumped(folder):
        if found.is_dir():
            for file in found.iterdir():
                file.unlink()
            found.rmdir()
        else:
            found.unlink()


def write_or_link(kind: str, mark: str, path: Path, state: State, write: Callable[[Path], None]) -> None:
    """Writes a file, or links the one of an earlier pass if its content, by its mark, is the same."""
    known = state.written.get(kind)
    if known is not None and known[0] == mark:
        try:
            os.link(known[1], path)
            return
        except OSError:  # this disk has no links
            pass
    write(path)
    state.written[kind] = mark, path
