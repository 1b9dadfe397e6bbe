"""Error messages for options that contradict each other: they name the option and a way out."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support.tiny import TINY
from vlqc.cli.commands import app
from vlqc.formatting import pluralize

TIMINGS = '{"format": "vlqc timings 1", "seconds": 1.0}'


@pytest.mark.parametrize(
    ("words", "wanted", "unwanted"),
    [
        ("passes --fallback auto --min_sqnr 9", ["--fallback", "--min_sqnr", "add --explain"], "│"),
        (f"dump {TINY} --stages visual.merger -q", ["--quiet", "--output DIR"], "visual"),
        (f"dump {TINY} -o new --formats pdf", ["--formats pdf", "text, json, onnx or bundle"], "dump_formats"),
        (f"dump {TINY} -o new --stages a,b", ["--stages a,b"], "dump_stages"),
        ("run-pass nowhere smooth-m3", ["unknown pass", "did you mean smooth-m"], "--pipeline"),
        ("run-pass nowhere ,", ["error: ", "PASS"], "--pipeline"),
        ("run-pass nowhere a:b:c", ["where: PASS"], "--pipeline"),
        ("diff a.json a.json", ["a.json", ".vlqc"], "graph"),
        ("report folder --verification t.json", ["t.json", "--timings"], "KeyError"),
        ("report folder --verification a.json", ["a.json", "'ok'"], "KeyError"),
    ],
)
def test_faults_in_the_users_words(
    words: str, wanted: list[str], unwanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches options that are ignored silently, and a fault that names an option the command does not have."""
    from tests.support import synthetic_report

    monkeypatch.chdir(tmp_path)
    synthetic_report.write_folder(tmp_path / "folder", synthetic_report.report_data(layers=1, blocks=1))
    (tmp_path / "t.json").write_text(TIMINGS)
    (tmp_path / "a.json").write_text("{}")
    ended = CliRunner(env={"NO_COLOR": "1", "COLUMNS": "200"}).invoke(app, words.split())
    assert ended.exit_code == 2 and ended.stdout == "", ended.output
    assert all(word in ended.stderr for word in wanted) and unwanted not in ended.stderr, ended.stderr
    assert not (tmp_path / "new").exists()


def test_one_is_not_many() -> None:
    """Catches "1 things changed"."""
    from vlqc.reporting.dumps.replay import ReplayResult

    assert [pluralize(number, "stage") for number in (0, 1, 2)] == ["0 stages", "1 stage", "2 stages"]
    assert [*ReplayResult("", {"a": ["b"]}, (), {}).lines()][-1] == "1 item changed"
