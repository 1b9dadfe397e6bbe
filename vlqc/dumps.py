"""IR dumps: the text of every stage, as traced and after every pass, as files to read and to compare."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from vlqc.errors import Fault, UserError
from vlqc.ir import Stage
from vlqc.pipeline import Pass
from vlqc.printer import print_stage


class Dumper:
    """Writes STAGE/00-traced.vlqc and STAGE/NN-after-PASS.vlqc below a folder; without one it writes nothing.

    What an earlier run dumped for the same stage goes first: texts of two runs side by side would tell nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def traced(self, stage: Stage) -> None:
        if self.folder is not None:
            for stale in (self.folder / _file_name(stage)).glob("[0-9][0-9]-*.vlqc"):
                stale.unlink()
        self._write(stage, "00-traced")

    def after(self, stage: Stage, number: int, done: Pass) -> None:
        self._write(stage, f"{number + 1:02}-after-{done.name}")

    def _write(self, stage: Stage, title: str) -> None:
        if self.folder is None:
            return
        path = self.folder / _file_name(stage) / f"{title}.vlqc"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(print_stage(stage), encoding="utf-8")
        except OSError as error:
            raise UserError(Fault("the dump cannot be written", str(path), str(error))) from error


class Onlooker(Protocol):
    """What wants to see every stage: as traced, and after every pass."""

    def traced(self, stage: Stage) -> None: ...
    def after(self, stage: Stage, number: int, done: Pass) -> None: ...


class Onlookers:
    """Several of them as one, in this order."""

    def __init__(self, *onlookers: Onlooker) -> None:
        self._onlookers = onlookers

    def traced(self, stage: Stage) -> None:
        for onlooker in self._onlookers:
            onlooker.traced(stage)

    def after(self, stage: Stage, number: int, done: Pass) -> None:
        for onlooker in self._onlookers:
            onlooker.after(stage, number, done)


def _file_name(stage: Stage) -> str:
    return re.sub(r"[^\w.-]", "_", stage.name)


def announcer(show: Callable[[str], None]) -> Callable[[Stage, Pass], None]:
    """What a PassManager calls before each pass, telling `show` its name."""
    return lambda stage, coming: show(coming.name)
