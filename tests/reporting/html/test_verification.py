"""Whose timings and verification a report shows: those of its own folder, and of which part of an interrupted run."""

import hashlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.interrupted_runs import compile_into, failing, small
from tests.support.report_pages import Page
from vlqc.cli.commands import app
from vlqc.errors import UserError
from vlqc.reporting.html import report_text
from vlqc.reporting.html.timings import Timings


def verified(folder: Path, file: Path) -> Path:
    """What `vlqc verify --json_file` says of the folder, in the file."""
    ended = CliRunner().invoke(app, ["verify", str(folder), "--json_file", str(file), "--quiet"])
    assert ended.exit_code == 0, ended.output
    return file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two compiled folders, `first` and `second`, of one model, and what was told of each; `second` was interrupted."""
    place = tmp_path_factory.mktemp("made")
    checkpoint = small(place / "checkpoint")
    compile_into(place / "first", checkpoint, timings=place / "first-t.json")
    again = {"timings": place / "second-t.json", "anti_method": "m4"}
    with failing("model.layers.0", KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        compile_into(place / "second", checkpoint, **again)
    compile_into(place / "second", checkpoint, **again, resume=True)
    for name in ("first", "second"):
        verified(place / name, place / f"{name}-v.json")
    return place


def test_files_of_another_folder_are_refused(made: Path) -> None:
    """Catches accuracy and times of one folder on the page of another, whose stages have the same names."""
    own = report_text(made / "first", timings=made / "first-t.json", verification=made / "first-v.json")
    assert "does not say which folder" not in own and "after the interruption" not in own
    for flag, name in (("timings", "second-t.json"), ("verification", "second-v.json")):
        with pytest.raises(UserError, match="of another folder") as caught:
            report_text(made / "first", **{flag: made / name})
        (fault,) = caught.value.faults
        digests = [hashlib.sha256((made / it / "MANIFEST.json").read_bytes()).hexdigest() for it in ("first", "second")]
        assert all(digest[:12] in fault.why for digest in digests)
        assert name in fault.what and str(made / "first") in fault.what and fault.fix


def test_older_files_get_a_note(made: Path, tmp_path: Path) -> None:
    """Catches a page that hides that nothing ties a file to the folder, and older files that are refused."""
    for name in ("first-t.json", "second-v.json"):
        content = json.loads((made / name).read_text())
        del content["manifest"]
        (tmp_path / name).write_text(json.dumps(content))
    text = report_text(made / "first", timings=tmp_path / "first-t.json", verification=tmp_path / "second-v.json")
    assert Page(text).text.count("does not say which folder it is of") == 2


def test_times_of_a_run_that_went_on(made: Path) -> None:
    """Catches times of the remaining stages that are shown as those of the whole compilation."""
    assert (Timings.read(made / "first-t.json").kept, Timings.read(made / "second-t.json").kept) == (0, 3)
    page = Page(report_text(made / "second", timings=made / "second-t.json")).text
    assert "Times are of the 2 stages that ran after the interruption; 3 had been finished" in page
    assert "whole compilation" not in page


def test_a_verification_stays_deterministic(made: Path, tmp_path: Path) -> None:
    """Catches a verification that says something else the second time."""
    assert verified(made / "first", tmp_path / "v.json").read_bytes() == (made / "first-v.json").read_bytes()
