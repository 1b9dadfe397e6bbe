"""Dumps into a folder with an older dump, which stays without --overwrite; and dumps without a save folder."""

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


def run(*words: object) -> tuple[int, str, str]:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, list(map(str, words)))
    return result.exit_code, result.stdout, result.stderr


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    """A dump of one stage in two states."""
    run_until(
        "split-window-attention", model_path=TINY, samples=tiny_task.samples(1), dump_ir=tmp_path / "ir",
        dump_stages="visual.merger", dump_formats="text,bundle",
    )  # fmt: skip
    return tmp_path / "ir"


def test_an_older_dump_is_refused(dump: Path, tmp_path: Path) -> None:
    """Catches a trace that deletes the dump of a compilation without --overwrite."""
    before = content(dump)
    code, _, err = run("dump", TINY, "--output", dump, "--stages", "visual.*")
    assert code == 2 and f"--output {dump}" in err and "dump of visual.merger" in err and "--overwrite" in err
    options: dict[str, Any] = {"model_path": TINY, "save_directory": tmp_path / "out", "samples": tiny_task.samples(1)}
    with pytest.raises(UserError, match=r"--dump_ir .*\n.*dump of visual.merger"):
        vlqc.compile(**options, dump_ir=dump)
    with pytest.raises(UserError, match="a dump of"):
        run_until("smooth-m2", **options, dump_ir=dump)
    assert content(dump) == before and not (tmp_path / "out").exists()


def test_other_stages_and_overwrite(dump: Path) -> None:
    """Catches an error for stages without an older dump, and --overwrite that deletes those of other stages."""
    before = content(dump)
    assert run("dump", TINY, "--output", dump, "--stages", "visual.blocks.0")[0] == 0
    assert before.items() <= content(dump).items()
    assert run("dump", TINY, "--output", dump, "--stages", "visual.merger", "--overwrite")[0] == 0
    assert sorted(content(dump)) == ["visual.blocks.0/00-traced.vlqc", "visual.merger/00-traced.vlqc"]


def test_two_runs_with_one_folder(tmp_path: Path) -> None:
    """Catches two runs that delete each other's files, and an error without advice."""
    first = Dumper(tmp_path, stages=["visual.merger"])
    second = Dumper(tmp_path, stages=["visual.merger"], formats=["bundle"], model_path=TINY)
    trace(TINY, first)
    with pytest.raises(UserError, match="a dump of"):
        trace(TINY, second)
    (tmp_path / "visual.merger" / "00-traced.vlqc").rename(tmp_path / "visual.merger" / "moved")
    (tmp_path / "visual.blocks.0").touch()
    with pytest.raises(UserError, match="separate writable folder"):
        trace(TINY, Dumper(tmp_path, stages=["visual.blocks.0"]))


def test_plan_and_stop_after_need_no_save_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches --plan and --stop_after that require a save folder, and a compilation that does not."""
    monkeypatch.chdir(tmp_path)
    arguments = ("compile", "--model_path", TINY, "--calib_images", PHOTO)
    code, out, err = run(*arguments, "--plan")
    assert code == 0 and re.search(r"disk .* free", out), err
    code, _, err = run(
        *arguments, "--stop_after", "split-window-attention", "--dump_stages", "visual.merger", "--dump_ir", "."
    )
    assert code == 0 and [path.name for path in tmp_path.iterdir()] == ["visual.merger"], err
    assert run(*arguments)[0] == 2
    assert "the folder is not empty" in run(*arguments, "--plan", "--save_directory", "visual.merger")[2]
