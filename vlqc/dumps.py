"""IR dumps: the text of every stage, as traced and after every pass, as files to read and to compare."""

import re
from collections.abc import Callable
from pathlib import Path

from vlqc.errors import Fault, UserError
from vlqc.ir import Stage
from vlqc.pipeline import Pass
from vlqc.printer import print_stage


class Dumper:
    """Writes STAGE/00-traced.vlqc and STAGE/NN-after-PASS.vlqc below a folder; without one it writes nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(Fault("the dump folder cannot be made", str(folder), str(error))) from error

    def traced(self, stage: Stage) -> None:
        self._write(stage, "00-traced")

    def after(self, stage: Stage, number: int, done: Pass) -> None:
        self._write(stage, f"{number + 1:02}-after-{done.name}")

    def _write(self, stage: Stage, title: str) -> None:
        if self.folder is not None:
            path = self.folder / re.sub(r"[^\w.-]", "_", stage.name) / f"{title}.vlqc"
            path.parent.mkdir(exist_ok=True)
            path.write_text(print_stage(stage), encoding="utf-8")


def announcer(show: Callable[[str], None]) -> Callable[[Stage, Pass], None]:
    """What a PassManager calls before each pass, telling `show` its name."""
    return lambda stage, coming: show(coming.name)
