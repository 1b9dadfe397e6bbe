"""Runs passes again on one state of one stage, from a bundle: `vlqc run-pass`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vlqc.errors import Fault, UserError
from vlqc.formatting import pluralize
from vlqc.ir.parser import parse_stage
from vlqc.ir.printer import print_stage
from vlqc.ir.stage import Stage
from vlqc.pipeline.manager import PassManager
from vlqc.pipeline.ordering import CALIBRATION
from vlqc.pipeline.pass_api import Pass
from vlqc.pipeline.registry import parse_pipeline
from vlqc.pipeline.rotation_plan import RotationPass
from vlqc.reporting.dumps.bundle import read_bundle
from vlqc.reporting.dumps.diff import Changes, diff_stages


@dataclass(frozen=True)
class ReplayResult:
    """Result of `run_pass`.

    text: of the stage after the passes. changes: what the passes changed. notes: of the passes. seconds: by pass.
    """

    text: str
    changes: Changes
    notes: tuple[str, ...]
    seconds: dict[str, float]

    def lines(self) -> Iterator[str]:
        """Changes and notes as text."""
        for heading, sentences in self.changes.items():
            yield "\n  ".join([heading, *sentences])
        yield from (f"note: {note}" for note in self.notes)
        yield f"{pluralize(len(self.changes), 'item')} changed" if self.changes else "nothing changed"

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-compatible values."""
        return {"changed": self.changes, "notes": self.notes, "seconds": self.seconds, "text": self.text}


@torch.no_grad()
def run_pass(bundle: Path, pipeline: str) -> ReplayResult:
    """Runs passes on the stage of a bundle, with the checks of a compilation.

    On the machine that wrote the bundle, and with the same number of threads, the text is identical to that of the
    compilation.

    Args:
        bundle: folder that `--dump_formats bundle` wrote.
        pipeline: text of a pipeline.

    Raises:
        UserError: the bundle or the pipeline is invalid, or a pass needs samples that the bundle does not have.
        InternalError: a check after a pass failed, as in a compilation.
    """
    passes = _parse_passes(pipeline)
    stage = read_bundle(bundle)
    if not stage.execution.calls and any(step.name == CALIBRATION for step in passes):
        why = "it runs all calibration samples through the stage, but the bundle contains the probe only"
        fix = f"use a bundle from before {CALIBRATION}, of a compilation in one process"
        raise UserError(Fault(f"{CALIBRATION} cannot be run", str(bundle), why, fix))
    _check_rotations(bundle, stage, passes)
    before = print_stage(stage)
    manager = PassManager(passes)
    manager.run(stage)
    text = print_stage(stage)
    changes = diff_stages(parse_stage(before), parse_stage(text))
    return ReplayResult(text, changes, tuple(stage.notes), manager.seconds)


def _check_rotations(bundle: Path, stage: Stage, passes: Sequence[Pass]) -> None:
    """UserError for passes that need a planned rotation to be done, and for rotation passes that plan another one."""
    planned = {rotation.kind: rotation for rotation in stage.rotations if not rotation.done}
    for step in passes:
        if isinstance(step, RotationPass):
            rotation = planned.pop(step.rotates, None)
            if rotation is not None and rotation.rotation.seed != step.seed:
                why = f"the inputs in the bundle are rotated with the seed {rotation.rotation.seed}"
                fix = f"use {step.name}{{seed={rotation.rotation.seed}}}"
                raise UserError(Fault(f"{step.name} cannot be run with the seed {step.seed}", str(bundle), why, fix))
        elif planned:
            why = f"the stage is not rotated yet: {', '.join(planned)}"
            fix = "run the passes that rotate it first, or use the bundle after them"
            raise UserError(Fault(f"{step.name} cannot be run", str(bundle), why, fix))


def _parse_passes(pipeline: str) -> list[Pass]:
    """`parse_pipeline`, with faults that name the argument PASS and not the option --pipeline."""
    try:
        return parse_pipeline(pipeline)
    except UserError as error:
        faults = (replace(fault, where=fault.where.replace("--pipeline", "PASS")) for fault in error.faults)
        raise UserError(*faults) from None
