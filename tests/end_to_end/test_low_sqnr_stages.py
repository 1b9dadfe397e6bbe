"""A stage whose output has a low SQNR is named in a note."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import vlqc
from tests.support import tiny
from vlqc.ir.stage import Stage
from vlqc.options.options import Options
from vlqc.pipeline.pass_api import Pass
from vlqc.pipeline.presets import pipeline_text
from vlqc.pipeline.registry import parse_pipeline
from vlqc.reporting.html.schema import read_report_data

STAGE = "model.layers.2"


@dataclass(frozen=True)
class TooLarge(Pass):
    """Decides on weight scales that are four times too large, in one stage."""

    name: ClassVar[str] = "too-large"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    summary: ClassVar[str] = "spoil a stage"

    def run(self, stage: Stage) -> bool:
        for site in stage.sites.values() if stage.name == STAGE else ():
            if site.weight is not None:
                site.weight = replace(site.weight, scale=site.weight.scale * 4)
        return stage.name == STAGE


def test_low_sqnr_note(tmp_path: Path) -> None:
    """Catches a stage with a low SQNR that is emitted without a note, and notes on other stages."""
    steps = parse_pipeline(pipeline_text(Options.without_paths()))
    steps.insert(next(number for number, step in enumerate(steps) if step.name == "lower-linears"), TooLarge())
    folder = tmp_path / "out"
    result = vlqc.compile(model_path=tiny.TINY, save_directory=folder, samples=tiny.mixed_samples(), passes=steps)
    (measured,) = (stage.sqnr for stage in read_report_data(folder).stages if stage.name == STAGE)
    assert min(measured.values()) < 10
    (note,) = (note for note in result.notes if "SQNR" in note)
    assert STAGE in note and all(f"{sqnr:.1f} dB" in note for sqnr in measured.values())
