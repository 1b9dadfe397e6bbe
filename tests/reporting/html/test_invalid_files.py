"""vlqc.reporting.html: invalid files, files of another compilation, and the command line."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.support import synthetic_report
from vlqc.cli.commands import app
from vlqc.errors import UserError
from vlqc.reporting.html import report_text, write_report
from vlqc.reporting.html.schema import DATA_FILE, LARGEST, rounded
from vlqc.verify.findings import RANKING


def curve_of(content: dict[str, Any]) -> dict[str, Any]:
    curves: dict[str, Any] = content["stages"][0]["inputs"][0]["before"]
    return curves


def input_of(content: dict[str, Any]) -> dict[str, Any]:
    read: dict[str, Any] = content["stages"][0]["inputs"][0]
    return read


DAMAGES: dict[str, Any] = {
    "cut off": lambda text: text[:-100],
    "not UTF-8": lambda text: "\udcff",
    "empty": lambda text: "",
    "a list": lambda text: "[1, 2]",
    "another version": lambda text: text.replace("vlqc report 1", "vlqc report 2"),
    "a missing field": lambda text: text.replace('"pipeline"', '"pipelines"'),
    "NaN": lambda text: text.replace('"bytes_before":145000000000', '"bytes_before":NaN'),
    "a negative count": lambda text: text.replace('"bytes_before":145000000000', '"bytes_before":-1'),
    "an unknown scheme": lambda text: text.replace('"scheme":"W8A8"', '"scheme":"W2A2"'),
    "a short curve": lambda text: edited(text, lambda it: curve_of(it)["image"].pop()),
    "an infinite curve": lambda text: edited(text, lambda it: curve_of(it)["image"].append(float("inf"))),
    "a string as number": lambda text: edited(text, lambda it: curve_of(it).update(image=["x"] * 20)),
    "an unknown modality": lambda text: edited(text, lambda it: curve_of(it).update(audio=curve_of(it)["image"])),
    "deep nesting": lambda text: "[" * 100_000,
    "a count above 2**63": lambda text: text.replace('"bytes_before":145000000000', f'"bytes_before":{10**400}'),
    "a curve beyond any float32": lambda text: edited(text, lambda it: curve_of(it).update(image=[1.7e308] * 20)),
    "scales beyond any float32": lambda text: edited(text, lambda it: input_of(it).update(scales=[1.7e308] * 20)),
    "an SQNR beyond any float32": lambda text: edited(text, lambda it: it["stages"][0].update(sqnr={"image": -1e308})),
    "an input without sites": lambda text: edited(text, lambda it: input_of(it).update(sites=[])),
}


def edited(text: str, change: Any) -> str:
    content = json.loads(text)
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_invalid_report_data_is_refused(damage: str, tmp_path: Path) -> None:
    """Catches a traceback or a page with wrong content for an invalid vlqc_report.json."""
    folder = synthetic_report.write_folder(tmp_path / "out", synthetic_report.report_data(layers=1, blocks=1))
    valid = (folder / DATA_FILE).read_text(encoding="utf-8")
    changed = DAMAGES[damage](valid)
    assert changed != valid
    (folder / DATA_FILE).write_bytes(changed.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=DATA_FILE):
        write_report(folder, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"facts": []}', "[" * 100_000, '{"ok": 1, "facts": {}, "engine": 0, "advice": [1]}']
)
def test_other_json_is_refused_as_verification(content: str, tmp_path: Path) -> None:
    """Catches a traceback for some other JSON file."""
    folder = synthetic_report.write_folder(tmp_path / "out", synthetic_report.report_data(layers=1, blocks=1))
    (tmp_path / "verify.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"verify\.json"):
        report_text(folder, verification=tmp_path / "verify.json")


@pytest.mark.parametrize("share", [str(10**400), "1e999", '"\\ud800"', "NaN"])
def test_a_verification_of_impossible_numbers_is_refused(share: str, tmp_path: Path) -> None:
    """Catches a traceback for a number outside of float64, and for a lone surrogate."""
    folder = synthetic_report.write_folder(tmp_path / "out", synthetic_report.report_data(layers=1, blocks=1))
    content = f'{{"ok": true, "engine": "x", "facts": {{"error by group": [{{"group": "a", "share %": {share}}}]}}}}'
    (tmp_path / "verify.json").write_text(content.replace("error by group", RANKING), encoding="utf-8")
    with pytest.raises(UserError, match=r"verify\.json"):
        report_text(folder, verification=tmp_path / "verify.json")


def test_a_page_of_the_largest_values(tmp_path: Path) -> None:
    """Catches a limit above what the charts can draw, or below what vlqc writes."""
    assert rounded(float("inf")) == LARGEST == rounded(1.7e308) == -rounded(-3.4028e38)
    folder = synthetic_report.write_folder(tmp_path / "out", synthetic_report.report_data(layers=2, blocks=1))
    content = json.loads((folder / DATA_FILE).read_text())
    content["bytes_before"] = 2**63 - 1
    for stage in content["stages"]:
        stage["sqnr"] = {"image": -LARGEST, "text": LARGEST}
        for read in stage["inputs"]:
            read["scales"] = read["before"]["image"] = [LARGEST, *[1e-320] * 19]
    (folder / DATA_FILE).write_text(json.dumps(content))
    timings = json.loads(synthetic_report.timings(synthetic_report.report_data(layers=2, blocks=1)).model_dump_json())
    for each in (*timings["stages"], *timings["passes"]):
        each["seconds"] = LARGEST
    (tmp_path / "t.json").write_text(json.dumps(timings))
    assert report_text(folder, timings=tmp_path / "t.json").startswith("<!DOCTYPE html>")


def test_a_folder_name_that_is_not_utf_8(tmp_path: Path) -> None:
    """Catches a traceback for a folder name that is not UTF-8."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    synthetic_report.write_folder(folder, synthetic_report.report_data(layers=1, blocks=1))
    assert run(folder, "--output", tmp_path / "page.html")[0] == 0
    assert "caf\\udce9" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("flag", ["--timings", "--verification"])
def test_devices_and_pipes_are_refused(flag: str, tmp_path: Path) -> None:
    """Catches a command that waits for a pipe, or reads a device until memory is exhausted."""
    folder = synthetic_report.write_folder(tmp_path / "out", synthetic_report.report_data(layers=1, blocks=1))
    os.mkfifo(tmp_path / "pipe")
    for endless in ("/dev/zero", tmp_path / "pipe"):
        code, output = run(folder, "--output", tmp_path / "page.html", flag, endless)
        assert code == 2 and "not a regular file" in output


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    return result.exit_code, result.output


def test_timings_of_another_model_are_refused(tmp_path: Path) -> None:
    """Catches times of another compilation on the page."""
    folder = synthetic_report.write_folder(tmp_path / "out", synthetic_report.report_data(layers=1, blocks=1))
    synthetic_report.timings(synthetic_report.report_data(layers=2, blocks=1)).write(tmp_path / "t.json")
    with pytest.raises(UserError, match=r"t\.json"):
        report_text(folder, timings=tmp_path / "t.json")


def test_the_command(tmp_path: Path) -> None:
    """Catches a command that writes to another path than it prints, or overwrites a file that is not a page."""
    folder = synthetic_report.write_folder(tmp_path / "out", synthetic_report.report_data(layers=1, blocks=1))
    code, output = run(folder, "--output", tmp_path / "page.html")
    assert code == 0 and str(tmp_path / "page.html") in output.replace("\n", "")
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert run(folder, "--output", tmp_path / "page.html")[0] == 0  # again, over itself
    config = (folder / "config.json").read_text()
    assert run(folder, "--output", folder / "config.json")[0] == 2
    assert (folder / "config.json").read_text() == config


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: ["nowhere"],
        lambda folder: (folder / DATA_FILE).unlink(),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "quant_model_description.json").write_text("{"),
        lambda folder: [folder, "--timings", folder / "config.json"],
        lambda folder: [folder, "--timings", folder / "nothing"],
        lambda folder: [folder, "--verification", folder],
        lambda folder: [folder, "--output", folder / "nowhere" / "page.html"],
    ],
)
def test_bad_input(damage: Any, tmp_path: Path) -> None:
    """Catches a traceback or a page in spite of missing or invalid files."""
    folder = synthetic_report.write_folder(tmp_path / "out", synthetic_report.report_data(layers=1, blocks=1))
    arguments = damage(folder)
    code, output = run(*(arguments if isinstance(arguments, list) else [folder, "--output", tmp_path / "page.html"]))
    assert code == 2 and "error: " in output and "Traceback" not in output
    assert not (tmp_path / "page.html").exists()
