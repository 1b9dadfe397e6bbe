"""vlqc.run: what a run releases when it ends early."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest

import vlqc
import vlqc.compiler
from tests.support import tiny
from vlqc.frontend.streamed_model import StreamedModel, open_model
from vlqc.options.options import Options


@dataclass(frozen=True)
class FailAt(vlqc.Pass):
    """Raises ZeroDivisionError on one stage."""

    name: ClassVar[str] = "fail-at"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    summary: ClassVar[str] = "fail"
    stage: str = ""

    def run(self, stage: vlqc.Stage) -> bool:
        if stage.name == self.stage:
            _ = 1 / 0
        return False


@pytest.mark.every_transformers
@pytest.mark.parametrize("stage", ["visual.blocks.0", "model.layers.1"])
def test_a_failing_pass_leaves_nothing_suspended(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an iteration over stages that stays open after an error: replaced forwards, loaded weights."""
    models: list[StreamedModel] = []

    def opened(options: Options) -> StreamedModel:
        models.append(open_model(options))
        return models[-1]

    monkeypatch.setattr(vlqc.compiler, "open_model", opened)
    passes = [*vlqc.parse_pipeline("insert-observers"), FailAt(stage)]
    with pytest.raises(ZeroDivisionError):
        vlqc.compile(model_path=tiny.TINY, save_directory=tmp_path / "out", samples=tiny.mixed_samples(), passes=passes)
    (model,) = models
    assert not any("forward" in module.__dict__ for module in model.stages.values())
    assert all(parameter.is_meta for parameter in model.module.parameters())
    assert not (tmp_path / "out").exists()
