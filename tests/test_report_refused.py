"""vlqc.report: files that are no report, or not of this compilation, and the command that says so."""

import json
from pathlib import Path
from typing import Any

import made_up_report
import pytest
from typer.testing import CliRunner

from vlqc.cli import app
from vlqc.errors import UserError
from vlqc.report import report_text, write_report
from vlqc.report.facts import FILE


def curve_of(content: dict[str, Any]) -> dict[str, Any]:
    curves: dict[str, Any] = content["stages"][0]["inputs"][0]["before"]
    return curves


DAMAGES: dict[str, Any] = {
    "no JSON": lambda text: text[:-100],
    "no text": lambda text: "\udcff",
    "empty": lambda text: "",
    "another thing": lambda text: "[1, 2]",
    "another version": lambda text: text.replace("vlqc report 1", "vlqc report 2"),
    "a field too few": lambda text: text.replace('"pipeline"', '"pipelines"'),
    "a number that is none": lambda text: text.replace('"bytes_before":145000000000', '"bytes_before":NaN'),
    "a negative count": lambda text: text.replace('"bytes_before":145000000000', '"bytes_before":-1'),
    "an unknown scheme": lambda text: text.replace('"scheme":"W8A8"', '"scheme":"W2A2"'),
    "a short curve": lambda text: edited(text, lambda it: curve_of(it)["image"].pop()),
    "an infinite curve": lambda text: edited(text, lambda it: curve_of(it)["image"].append(float("inf"))),
    "a word as number": lambda text: edited(text, lambda it: curve_of(it).update(image=["x"] * 20)),
    "an unknown modality": lambda text: edited(text, lambda it: curve_of(it).update(smell=curve_of(it)["image"])),
    "deep nesting": lambda text: "[" * 100_000,
}


def edited(text: str, change: Any) -> str:
    content = json.loads(text)
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_report_is_refused(damage: str, tmp_path: Path) -> None:
    """Catches a traceback, a page of nonsense, or half a page for a file that is not as vlqc wrote it."""
    folder = made_up_report.folder(tmp_path / "out", made_up_report.facts(layers=1, blocks=1))
    told = (folder / FILE).read_text(encoding="utf-8")
    changed = DAMAGES[damage](told)
    assert changed != told
    (folder / FILE).write_bytes(changed.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=f"{FILE} is damaged"):
        write_report(folder, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"facts": []}', "[" * 100_000, '{"ok": 1, "facts": {}, "engine": 0, "advice": [1]}']
)
def test_a_file_that_is_no_verification_is_refused(content: str, tmp_path: Path) -> None:
    """Catches a traceback for some other JSON file."""
    folder = made_up_report.folder(tmp_path / "out", made_up_report.facts(layers=1, blocks=1))
    (tmp_path / "verify.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="no verification"):
        report_text(folder, verification=tmp_path / "verify.json")


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    return result.exit_code, result.output


def test_timings_of_another_model_are_refused(tmp_path: Path) -> None:
    """Catches times shown beside stages that they are not of."""
    folder = made_up_report.folder(tmp_path / "out", made_up_report.facts(layers=1, blocks=1))
    made_up_report.timings(made_up_report.facts(layers=2, blocks=1)).write(tmp_path / "t.json")
    with pytest.raises(UserError, match="another compilation"):
        report_text(folder, timings=tmp_path / "t.json")


def test_the_command(tmp_path: Path) -> None:
    """Catches a command that writes elsewhere than it says, or over a file that is no page."""
    folder = made_up_report.folder(tmp_path / "out", made_up_report.facts(layers=1, blocks=1))
    code, told = run(folder, "--output", tmp_path / "page.html")
    assert code == 0 and str(tmp_path / "page.html") in told.replace("\n", "")
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert run(folder, "--output", tmp_path / "page.html")[0] == 0  # again, over itself
    config = (folder / "config.json").read_text()
    assert run(folder, "--output", folder / "config.json")[0] == 2
    assert (folder / "config.json").read_text() == config


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: ["nowhere"],
        lambda folder: (folder / FILE).unlink(),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "quant_model_description.json").write_text("{"),
        lambda folder: [folder, "--timings", folder / "config.json"],
        lambda folder: [folder, "--timings", folder / "nothing"],
        lambda folder: [folder, "--verification", folder],
        lambda folder: [folder, "--output", folder / "nowhere" / "page.html"],
    ],
)
def test_bad_input_is_answered(damage: Any, tmp_path: Path) -> None:
    """Catches a traceback where something is missing, and an answer without a way out."""
    folder = made_up_report.folder(tmp_path / "out", made_up_report.facts(layers=1, blocks=1))
    given = damage(folder)
    code, told = run(*(given if isinstance(given, list) else [folder, "--output", tmp_path / "page.html"]))
    assert code == 2 and "error: " in told and "Traceback" not in told
    assert not (tmp_path / "page.html").exists()
