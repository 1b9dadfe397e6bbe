"""vlqc.reporting.html: files that are no report, or not of this compilation, and the command that says so."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.support import synthetic_report as made_up_report
from vlqc.cli.commands import app
from vlqc.errors import UserError
from vlqc.reporting.html import report_text, write_report
from vlqc.reporting.html.schema import FILE, LARGEST, rounded
from vlqc.verify.findings import RANKING


def curve_of(content: dict[str, Any]) -> dict[str, Any]:
    curves: dict[str, Any] = content["stages"][0]["inputs"][0]["before"]
    return curves


def input_of(content: dict[str, Any]) -> dict[str, Any]:
    read: dict[str, Any] = content["stages"][0]["inputs"][0]
    return read


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
    "a count beyond any disk": lambda text: text.replace('"bytes_before":145000000000', f'"bytes_before":{10**400}'),
    "a curve beyond any float32": lambda text: edited(text, lambda it: curve_of(it).update(image=[1.7e308] * 20)),
    "scales beyond any float32": lambda text: edited(text, lambda it: input_of(it).update(scales=[1.7e308] * 20)),
    "noise beyond measure": lambda text: edited(text, lambda it: it["stages"][0].update(sqnr={"image": -1e308})),
    "an input that nothing reads": lambda text: edited(text, lambda it: input_of(it).update(sites=[])),
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


@pytest.mark.parametrize("share", [str(10**400), "1e999", '"\\ud800"', "NaN"])
def test_a_verification_of_impossible_numbers_is_refused(share: str, tmp_path: Path) -> None:
    """Catches a traceback for a number that no float holds, and for half a character, which no page holds."""
    folder = made_up_report.folder(tmp_path / "out", made_up_report.facts(layers=1, blocks=1))
    told = f'{{"ok": true, "engine": "x", "facts": {{"error by group": [{{"group": "a", "share %": {share}}}]}}}}'
    (tmp_path / "verify.json").write_text(told.replace("error by group", RANKING), encoding="utf-8")
    with pytest.raises(UserError, match="no verification"):
        report_text(folder, verification=tmp_path / "verify.json")


def test_the_largest_that_is_taken_has_a_page(tmp_path: Path) -> None:
    """Catches a bound above what the charts can draw, or one below what vlqc itself writes."""
    assert rounded(float("inf")) == LARGEST == rounded(1.7e308) == -rounded(-3.4028e38)
    folder = made_up_report.folder(tmp_path / "out", made_up_report.facts(layers=2, blocks=1))
    content = json.loads((folder / FILE).read_text())
    content["bytes_before"] = 2**63 - 1
    for stage in content["stages"]:
        stage["sqnr"] = {"image": -LARGEST, "text": LARGEST}
        for read in stage["inputs"]:
            read["scales"] = read["before"]["image"] = [LARGEST, *[1e-320] * 19]
    (folder / FILE).write_text(json.dumps(content))
    timings = json.loads(made_up_report.timings(made_up_report.facts(layers=2, blocks=1)).model_dump_json())
    for each in (*timings["stages"], *timings["passes"]):
        each["seconds"] = LARGEST
    (tmp_path / "t.json").write_text(json.dumps(timings))
    assert report_text(folder, timings=tmp_path / "t.json").startswith("<!DOCTYPE html>")


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    """Catches a traceback for a folder whose name is not UTF-8, as copies from other systems have them."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    made_up_report.folder(folder, made_up_report.facts(layers=1, blocks=1))
    assert run(folder, "--output", tmp_path / "page.html")[0] == 0
    assert "caf\\udce9" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("flag", ["--timings", "--verification"])
def test_what_never_ends_is_not_read(flag: str, tmp_path: Path) -> None:
    """Catches a report that waits for a pipe, or reads a device until the memory ends."""
    folder = made_up_report.folder(tmp_path / "out", made_up_report.facts(layers=1, blocks=1))
    os.mkfifo(tmp_path / "pipe")
    for endless in ("/dev/zero", tmp_path / "pipe"):
        code, told = run(folder, "--output", tmp_path / "page.html", flag, endless)
        assert code == 2 and "not an ordinary file" in told


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
