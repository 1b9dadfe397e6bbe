"""One pass, run again on one state of one stage, from a bundle: `vlqc run-pass`."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vlqc.errors import Fault, UserError
from vlqc.formatting import pluralize
from vlqc.ir.parser import parse_stage
from vlqc.ir.printer import print_stage
from vlqc.pipeline.manager import PassManager
from vlqc.pipeline.ordering import CALIBRATION
from vlqc.pipeline.pass_api import Pass
from vlqc.pipeline.registry import parse_pipeline
from vlqc.reporting.dumps.bundle_reading import read_bundle
from vlqc.reporting.dumps.diff import Changes, changes


@dataclass(frozen=True)
class Rerun:
    """text: of the stage behind the passes; found: what they changed; notes: what they noted; seconds: of each pass."""

    text: str
    found: Changes
    notes: tuple[str, ...]
    seconds: dict[str, float]

    def lines(self) -> Iterator[str]:
        """What changed, and what was noted, as text."""
        for about, sentences in self.found.items():
            yield "\n  ".join([about, *sentences])
        yield from (f"note: {note}" for note in self.notes)
        yield f"{pluralize(len(self.found), 'thing')} changed" if self.found else "nothing changed"

    def to_dict(self) -> dict[str, Any]:
        """As a value of JSON."""
        return {"changed": self.found, "notes": self.notes, "seconds": self.seconds, "text": self.text}


def _parsed(pipeline: str) -> list[Pass]:
    """As `parse_pipeline`, whose faults name an option of a compilation: here it is an argument."""
    try:
        return parse_pipeline(pipeline)
    except UserError as error:
        raise UserError(*(replace(it, where=it.where.replace("--pipeline", "PASS")) for it in error.faults)) from None


@torch.no_grad()
def run_pass(bundle: Path, pipeline: str) -> Rerun:
    """Runs the passes of a pipeline's text on the stage of a bundle, with the checks of a compilation.

    On the machine that wrote the bundle, with as many threads, the text is that of the compilation, byte by byte.
    UserError for a bundle that cannot be used, and for passes that need what it lacks; InternalError as in a
    compilation: that is what a bug report is about.
    """
    passes = _parsed(pipeline)
    stage = read_bundle(bundle)
    if not stage.execution.calls and any(step.name == CALIBRATION for step in passes):
        why = "it runs all calibration samples through the stage, but the bundle contains the probe only"
        fix = f"use a bundle from before {CALIBRATION}, of a compilation in one process"
        raise UserError(Fault(f"{CALIBRATION} cannot be run", str(bundle), why, fix))
    before = print_stage(stage)
    manager = PassManager(passes)
    manager.run(stage)
    text = print_stage(stage)
    return Rerun(text, changes(parse_stage(before), parse_stage(text)), tuple(stage.notes), manager.seconds)
