"""vlqc.reporting.notebook: one line that is replaced in place, and a result that is a table."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import vlqc.reporting.progress
from vlqc.reporting.notebook import NotebookProgress
from vlqc.reporting.progress import Progress, TerminalProgress, resolve_progress
from vlqc.reporting.summary import Result
from vlqc.verify.findings import VerificationResult


class Cell:
    """Stands for IPython's display: what is on the screen, oldest first, and how often it was touched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lines: list[str] = []
        self.touched = 0
        module = types.ModuleType("IPython.display")
        module.__dict__.update(HTML=str, display=self.display)
        monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
        monkeypatch.setitem(sys.modules, "IPython.display", module)

    def display(self, shown: str, *, display_id: bool) -> Any:
        assert display_id
        place = len(self.lines)
        self.lines.append(shown)

        def update(again: str) -> None:
            self.touched += 1
            self.lines[place] = again

        return types.SimpleNamespace(update=update)


def test_values_of_a_cell_are_one_line() -> None:
    """Catches a cell that ends with a report or a stage, and shows pages of fields."""
    report = VerificationResult("out", facts={"a": [1] * 1000})
    assert repr(report) == "<VerificationResult of out: ok, 0 faults, 0 warnings>"
    report.add_fault("files", "out", "one is missing")
    assert repr(report) == "<VerificationResult of out: FAIL, 1 fault, 0 warnings>"
    text = 'stage "a.0" part=vision dtype=bfloat16 {\n  %x = input("x") : float32[2]\n  return (%x,)\n}\n'
    assert repr(vlqc.parse(text)) == "<Stage a.0: 2 nodes, 0 sites>"


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Cell:
    return Cell(monkeypatch)


def test_one_line_in_place(cell: Cell) -> None:
    """Catches a cell that fills with lines, a wrong estimate, and names that are taken for HTML."""
    now = [100.0]
    progress = NotebookProgress(clock=lambda: now[0])
    progress.begin(4, 2)
    assert "0 of 4 stages: starting" in cell.lines[0]
    progress.stage(0, "<b>.0")
    assert "&lt;b&gt;.0" in cell.lines[0]
    now[0] += 10
    progress.step("smooth-m2")
    assert "&lt;b&gt;.0: smooth-m2" in cell.lines[0]
    progress.stage_done(0)
    assert '<progress value="1" max="4">' in cell.lines[0] and "1 of 4 stages, 30.0 s left" in cell.lines[0]
    progress.note("a note waits for the summary")
    progress.note("no version loads <this>\nwhy: too old")
    progress.finish()
    progress.finish()
    assert cell.lines[1:] == ["<b>warning:</b> no version loads &lt;this&gt;<br>why: too old"]
    assert cell.lines[0].endswith("1 of 4 stages in 10.0 s")


def test_the_browser_is_spared(cell: Cell) -> None:
    """Catches an update per sample: thousands of messages to the browser, which then stands still."""
    progress = NotebookProgress(clock=lambda: 0.0)
    progress.begin(1, 5000)
    progress.stage(0, "blocks.0")
    for done in range(5000):
        progress.sample(done)
    progress.stage_done(0)
    assert cell.touched == 2


def test_goes_on_after_an_interruption(cell: Cell) -> None:
    """Catches an estimate that counts the stages of an earlier run as work of this one."""
    now = [0.0]
    progress = NotebookProgress(clock=lambda: now[0])
    progress.begin(4, 2, done=2)
    now[0] = 5.0
    progress.stage_done(2)
    assert "3 of 4 stages, 5.0 s left" in cell.lines[0]


def test_who_hears(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a script that prints unasked, a notebook without progress, and other processes than the first talking."""
    mine = TerminalProgress(Console(stderr=True))
    assert resolve_progress(mine, first=True) is mine and type(resolve_progress(mine, first=False)) is Progress
    assert type(resolve_progress(None, first=True)) is Progress
    monkeypatch.setattr(vlqc.reporting.progress, "Console", lambda: types.SimpleNamespace(is_jupyter=True))
    assert isinstance(resolve_progress(None, first=True), NotebookProgress)
    assert resolve_progress(mine, first=True) is mine and type(resolve_progress(None, first=False)) is Progress


def test_the_result_is_a_table() -> None:
    """Catches a cell that ends in a dataclass's repr, and names that are taken for HTML."""
    counts = {("language", "W8A8"): 7, ("vision", "FLOAT"): 3}
    result = Result(Path("out"), counts, 4096, 1024, 75.0, 3 << 20, ["a <note>"], ["E 1.0"], ["serve it"])
    bundle = result._repr_mimebundle_(include=None, exclude=None)
    assert set(bundle) == {"text/plain", "text/html"}
    for wanted in ("What became what", "language", "W8A8", "4.0 KiB -&gt; 1.0 KiB (25%)", "a &lt;note&gt;", "serve it"):
        assert wanted in bundle["text/html"]
        assert wanted.replace("&gt;", ">").replace("&lt;", "<") in bundle["text/plain"]
    assert bundle["text/html"].startswith("<pre") and "<html" not in bundle["text/html"]
