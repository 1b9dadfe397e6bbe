"""`vlqc compile --stop_after`: the same stages as a compilation, up to one pass."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import vlqc
from tests.support.tiny import TINY
from tools.demo import tiny_task
from vlqc.cli.commands import app
from vlqc.reporting.dumps.trace_only import run_until


def run(*words: str) -> tuple[int, str, str]:
    ran = CliRunner().invoke(app, list(words))
    return ran.exit_code, ran.stdout, ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"rotate": "auto"}, {"propagate": "quantized"}])
def test_stop_after_sees_the_compilations_stages(tmp_path: Path, given: dict[str, Any]) -> None:
    """Catches a stage with other inputs than in a compilation, because earlier stages were stopped too soon."""
    given = {
        "model_path": TINY, "save_directory": tmp_path / "out", "samples": tiny_task.samples(2, seed=1),
        "weight_method": "round", "dump_stages": ["model.layers.1", "model.layers.3"], **given,
    }  # fmt: skip
    vlqc.compile(dump_ir=tmp_path / "whole", **given)
    run_until("smooth-m2", dump_ir=tmp_path / "cut", **given)
    for name in given["dump_stages"]:
        files = sorted((tmp_path / "cut" / name).iterdir())
        assert files[-1].match("*-after-smooth-m2.vlqc")
        assert all(file.read_text() == (tmp_path / "whole" / name / file.name).read_text() for file in files)


def test_stop_after_without_a_dump_prints(tmp_path: Path) -> None:
    """Catches a run that prints nothing, and exit codes that stop a script."""
    photo = str(Path(__file__).parents[1] / "photos" / "chelsea.jpg")
    words = ("compile", "--model_path", str(TINY), "--save_directory", str(tmp_path / "o"), "--calib_images", photo)
    code, _, err = run(*words, "--stop_after", "split-window-attention", "--dump_stages", "visual.blocks.0")
    assert code == 0 and not list(tmp_path.iterdir()), err
    assert "on 1 of 9 stages" in err
    code, _, err = run(*words, "--stop_after", "smooth-m3")
    assert code == 2 and "did you mean smooth-m2" in err
