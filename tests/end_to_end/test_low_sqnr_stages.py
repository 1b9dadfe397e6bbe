"""A stage that quantization spoils is told of, by name."""

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
from vlqc.reporting.html.schema import read_facts

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


def test_a_spoilt_stage_is_noted(tmp_path: Path) -> None:
    """Catches a stage that returns noise and is emitted without a word, and warnings about sound ones."""
    steps = parse_pipeline(pipeline_text(Options.without_paths()))
    steps.insert(next(number for number, step in enumerate(steps) if step.name == "lower-linears"), TooLarge())
    folder = tmp_path / "out"
    result = vlqc.compile(model_path=tiny.TINY, save_directory=folder, samples=tiny.mixed_samples(), passes=steps)
    (measured,) = (stage.sqnr for stage in read_facts(folder).stages if stage.name == STAGE)
    assert min(measured.values()) < 10
    figures = f"{measured['text']:.1f} dB for text, {measured['image']:.1f} dB for image"
    told = f"quantization spoils {STAGE}: the SQNR of its output is {figures}; "
    assert [note for note in result.notes if "spoils" in note] == [
        f"{told}below 10 dB more than a tenth of it is noise"
    ]
