"""Timings and verifications of another folder, of older versions, and of interrupted runs."""

import hashlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support.interrupted_runs import compile_into, fail_at_stage, small_checkpoint
from tests.support.report_pages import Page
from vlqc.cli.commands import app
from vlqc.errors import UserError
from vlqc.reporting.html import report_text
from vlqc.reporting.html.schema import Timings


def verify_into(folder: Path, file: Path) -> Path:
    """Runs `vlqc verify --json_file`."""
    ended = CliRunner().invoke(app, ["verify", str(folder), "--json_file", str(file), "--quiet"])
    assert ended.exit_code == 0, ended.output
    return file


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two compiled folders of one model, `first` and `second`, with timings and verifications; `second` was resumed."""
    root = tmp_path_factory.mktemp("folders")
    checkpoint = small_checkpoint(root / "checkpoint")
    compile_into(root / "first", checkpoint, timings=root / "first-t.json")
    again = {"timings": root / "second-t.json", "anti_method": "m4"}
    with fail_at_stage("model.layers.0", KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        compile_into(root / "second", checkpoint, **again)
    compile_into(root / "second", checkpoint, **again, resume=True)
    for name in ("first", "second"):
        verify_into(root / name, root / f"{name}-v.json")
    return root


def test_files_of_another_folder_are_refused(folders: Path) -> None:
    """Catches accuracy and times of one folder on the page of another, whose stages have the same names."""
    own = report_text(folders / "first", timings=folders / "first-t.json", verification=folders / "first-v.json")
    assert "does not identify its folder" not in own and "interrupted" not in own
    for flag, name in (("timings", "second-t.json"), ("verification", "second-v.json")):
        with pytest.raises(UserError, match="belongs to another folder") as caught:
            report_text(folders / "first", **{flag: folders / name})
        (fault,) = caught.value.faults
        digests = [
            hashlib.sha256((folders / each / "MANIFEST.json").read_bytes()).hexdigest() for each in ("first", "second")
        ]
        assert all(digest[:12] in fault.why for digest in digests)
        assert name in fault.what and str(folders / "first") in fault.what and fault.fix


def test_files_of_older_versions_get_a_note(folders: Path, tmp_path: Path) -> None:
    """Catches files without a digest that are refused or shown without a note."""
    for name in ("first-t.json", "second-v.json"):
        content = json.loads((folders / name).read_text())
        del content["manifest"]
        (tmp_path / name).write_text(json.dumps(content))
    text = report_text(folders / "first", timings=tmp_path / "first-t.json", verification=tmp_path / "second-v.json")
    assert Page(text).text.count("does not identify its folder") == 2


def test_times_of_a_resumed_run(folders: Path) -> None:
    """Catches times of the remaining stages that are shown as those of all stages."""
    assert (Timings.read(folders / "first-t.json").kept, Timings.read(folders / "second-t.json").kept) == (0, 3)
    page = Page(report_text(folders / "second", timings=folders / "second-t.json")).text
    assert "interrupted after 3 stages" in page and "the 2 stages after" in page
    assert "whole compilation" not in page


def test_a_verification_is_deterministic(folders: Path, tmp_path: Path) -> None:
    """Catches a verification that differs between two runs."""
    assert verify_into(folders / "first", tmp_path / "v.json").read_bytes() == (folders / "first-v.json").read_bytes()
