"""A dump into a folder that holds one: nothing of the earlier one goes unless that is asked for. And no save folder."""

import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import vlqc
from tests.support.tiny import TINY
from tools.demo import tiny_task
from vlqc.cli.commands import app
from vlqc.errors import UserError
from vlqc.reporting.dumps.trace_only import run_until, trace
from vlqc.reporting.dumps.writer import Dumper

PHOTO = Path(__file__).parents[2] / "photos" / "chelsea.jpg"


def told(*words: object) -> tuple[int, str, str]:
    ran = CliRunner(env={"COLUMNS": "200"}).invoke(app, list(map(str, words)))
    return ran.exit_code, ran.stdout, ran.stderr


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    """Two states of one stage."""
    run_until(
        "split-window-attention", model_path=TINY, samples=tiny_task.samples(1), dump_ir=tmp_path / "ir",
        dump_stages="visual.merger", dump_formats="text,bundle",
    )  # fmt: skip
    return tmp_path / "ir"


def test_a_dump_of_the_same_stages_stays(dump: Path, tmp_path: Path) -> None:
    """Catches a trace that sweeps away the states and bundles of a compilation, without a word."""
    before = content(dump)
    code, _, err = told("dump", TINY, "--output", dump, "--stages", "visual.*")
    assert code == 2 and f"--output {dump}" in err and "dump of visual.merger" in err and "--overwrite" in err
    given: dict[str, Any] = {"model_path": TINY, "save_directory": tmp_path / "out", "samples": tiny_task.samples(1)}
    with pytest.raises(UserError, match=r"--dump_ir .*\n.*dump of visual.merger"):
        vlqc.compile(**given, dump_ir=dump)
    with pytest.raises(UserError, match="it holds a dump of"):
        run_until("smooth-m2", **given, dump_ir=dump)
    assert content(dump) == before and not (tmp_path / "out").exists()


def test_other_stages_and_overwrite_are_free(dump: Path) -> None:
    """Catches a rule that refuses a folder for stages that it does not hold, and --overwrite that replaces too much."""
    before = content(dump)
    assert told("dump", TINY, "--output", dump, "--stages", "visual.blocks.0")[0] == 0
    assert before.items() <= content(dump).items()
    assert told("dump", TINY, "--output", dump, "--stages", "visual.merger", "--overwrite")[0] == 0
    assert sorted(content(dump)) == ["visual.blocks.0/00-traced.vlqc", "visual.merger/00-traced.vlqc"]


def test_two_runs_at_a_time(tmp_path: Path) -> None:
    """Catches two runs that take each other's files away, and a fault without a way out."""
    first = Dumper(tmp_path, stages=["visual.merger"])
    second = Dumper(tmp_path, stages=["visual.merger"], formats=["bundle"], model_path=TINY)
    trace(TINY, first)
    with pytest.raises(UserError, match="it holds a dump of"):
        trace(TINY, second)
    (tmp_path / "visual.merger" / "00-traced.vlqc").rename(tmp_path / "visual.merger" / "moved")
    (tmp_path / "visual.blocks.0").touch()
    with pytest.raises(UserError, match="a folder of its own"):
        trace(TINY, Dumper(tmp_path, stages=["visual.blocks.0"]))


def test_what_saves_nothing_needs_no_save_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches --plan and --stop_after that demand a folder which they do not write, and a compilation that does not."""
    monkeypatch.chdir(tmp_path)
    given = ("compile", "--model_path", TINY, "--calib_images", PHOTO)
    code, out, err = told(*given, "--plan")
    assert code == 0 and re.search(r"disk .* free", out), err
    code, _, err = told(
        *given, "--stop_after", "split-window-attention", "--dump_stages", "visual.merger", "--dump_ir", "."
    )
    assert code == 0 and [path.name for path in tmp_path.iterdir()] == ["visual.merger"], err
    assert told(*given)[0] == 2
    assert "the folder is not empty" in told(*given, "--plan", "--save_directory", "visual.merger")[2]
