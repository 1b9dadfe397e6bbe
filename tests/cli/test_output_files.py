"""No command writes into a checkpoint: model files are only read, and a compiled folder stays as it is."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import vlqc
from tests.support.tiny import TINY
from tools.demo import tiny_task
from vlqc.cli.commands import app
from vlqc.errors import UserError
from vlqc.options.paths import output_faults


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float checkpoint, a compiled one, a dump, a lone file of weights and a link to one."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(TINY, folder / "float")
    vlqc.compile(
        model_path=TINY, save_directory=folder / "int8", samples=tiny_task.samples(2), weight_method="round",
        dump_ir=folder / "dump", dump_stages="visual.merger", dump_formats="bundle",
    )  # fmt: skip
    (folder / "lone.safetensors").write_bytes(b"weights")
    (folder / "link").symlink_to(folder / "float" / "model.safetensors")
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "words",
    [
        "inspect float --json_file float/config.json",
        "inspect float --json_file float/new.json",
        "inspect float --json_file lone.safetensors",
        "inspect float --json_file link",
        "verify int8 --json_file int8/verify.json",
        "report int8 -o int8/page.html",
        "run-pass dump/visual.merger/00-traced.bundle smooth-m2 -o float/model.safetensors",
        "compile --model_path float --save_directory new --calib_images photos --dump_ir int8",
        "compile --model_path float --save_directory new --calib_images photos --dump_ir int8/deeper",
        "compile --model_path float --save_directory new --calib_images photos --timings int8/t.json",
        "dump float -o float/dump",
        "dump float -o int8",
    ],
)
def test_nothing_is_written_into_a_checkpoint(place: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    """Catches an output that replaces a model's file, or lies in a compiled folder, which then fails verification."""
    monkeypatch.chdir(place)
    before = contents(place)
    ended = CliRunner(env={"NO_COLOR": "1", "COLUMNS": "200"}).invoke(app, words.split())
    assert ended.exit_code == 2 and "does not modify" in ended.stderr and "choose another" in ended.stderr, ended.output
    assert contents(place) == before


def test_a_page_inside_from_python(place: Path) -> None:
    """Catches the API without the rule of the command line."""
    with pytest.raises(UserError, match="does not modify"):
        vlqc.write_report(place / "int8", place / "int8" / "page.html")


def test_other_places_are_free(place: Path, tmp_path: Path) -> None:
    """Catches a rule that also refuses files beside a checkpoint, or a folder with a config.json of its own."""
    (tmp_path / "config.json").write_text("{}")
    for free in (place / "verify.json", place / "new" / "dump", tmp_path / "page.html"):
        assert output_faults("it", free) == []
    assert output_faults("it", tmp_path / "config.json")
