"""vlqc.reporting.progress: a bar on terminals and in notebooks, plain lines elsewhere."""

import io
import re
import sys
import types
from typing import Any

import pytest
from rich.console import Console

import vlqc
import vlqc.reporting.progress
from vlqc.formatting import format_bytes, format_duration
from vlqc.reporting.progress import Progress, TerminalProgress, resolve_progress
from vlqc.verify.findings import VerificationResult


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run_four_stages(progress: Progress, clock: Clock | None = None) -> None:
    """Four stages, each ten seconds by the clock."""
    progress.begin(4, 2)
    for index in range(4):
        progress.stage(index, f"blocks.{index}")
        progress.step("smooth-m2")
        progress.sample(1)
        if clock is not None:
            clock.now += 10.0
        progress.stage_done(index)
    progress.note("a [note]")
    progress.finish()
    progress.finish()


def test_plain_lines_with_the_time_left() -> None:
    """Catches control characters in a log file, and a wrong estimate."""
    shown, clock = io.StringIO(), Clock()
    run_four_stages(TerminalProgress(Console(file=shown), clock), clock)
    lines = shown.getvalue().splitlines()
    assert re.findall(r"\d+ \w+", lines[0]) == ["4 stages", "2 samples"]
    values = [re.findall(r"blocks\.\d|\d[\d.]*(?: s \w+)?", line) for line in lines]
    assert values[1] == ["1", "4", "blocks.0", "10.0 s elapsed", "30.0 s left"]
    assert values[4] == ["4", "4", "blocks.3", "40.0 s elapsed", "0.0 s left"]
    assert lines[5:] == []  # notes are in the summary


def test_quick_stages_do_not_flood_a_log() -> None:
    """Catches a line per stage when stages take no time, and a missing line for the last stage."""
    shown = io.StringIO()
    run_four_stages(TerminalProgress(Console(file=shown), Clock()))
    assert [line.split(" done")[0] for line in shown.getvalue().splitlines()[1:]] == ["stage 4 of 4"]


def test_the_estimate_after_an_interruption() -> None:
    """Catches an estimate that counts the stages of the interrupted run as work of this one."""
    shown, clock = io.StringIO(), Clock()
    progress = TerminalProgress(Console(file=shown), clock)
    progress.begin(4, 2, done=2)
    clock.now += 5.0
    progress.stage_done(2)
    assert "stage 3 of 4" in shown.getvalue() and "5.0 s left" in shown.getvalue()


def test_live_bar_shows_stage_and_pass() -> None:
    """Catches a bar that does not show the current stage and pass, or that stays on the screen."""
    shown = io.StringIO()
    progress = TerminalProgress(Console(file=shown, force_terminal=True, width=120, _environ={"TERM": "xterm"}))
    progress.begin(2, 3)
    progress.stage(0, "blocks.0")
    progress.step("smooth-m2")
    progress.stage_done(0)
    assert "blocks.0: smooth-m2" in shown.getvalue() and "1/2" in shown.getvalue()
    progress.finish()
    assert "\x1b[?25h" in shown.getvalue()  # the cursor is visible again


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "unknown"}])
def test_a_terminal_that_cannot_redraw(environment: dict[str, str]) -> None:
    """Catches a bar or control characters on a terminal that cannot redraw a line, such as an editor's."""
    shown = io.StringIO()
    run_four_stages(TerminalProgress(Console(file=shown, force_terminal=True, _environ=environment), Clock()))
    assert "stage 4 of 4 done" in shown.getvalue() and "\x1b" not in shown.getvalue()


def test_no_color() -> None:
    """Catches colors in spite of NO_COLOR. Bold type is allowed."""
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, _environ={"TERM": "xterm-256color", "NO_COLOR": "1"})
    TerminalProgress(console).note("no version of E loads this\nwhy: a")
    assert "warning: " in shown.getvalue()
    assert not re.search(r"\x1b\[[\d;]*3[0-7]", shown.getvalue())


def test_a_warning_is_printed_at_once() -> None:
    """Catches a warning that is delayed to the summary, loses its lines, or is parsed as color markup."""
    shown = io.StringIO()
    TerminalProgress(Console(file=shown, width=30)).note("no version of [E] loads this\nwhy: a\n  what to do: b")
    assert shown.getvalue() == "warning: no version of [E] loads this\n  why: a\n  what to do: b\n"


def test_the_base_class_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches output of the callbacks that the Python API uses by default."""
    run_four_stages(Progress())
    assert capsys.readouterr() == ("", "")


# ---- notebooks -------------------------------------------------------------------------------------------------------


class Cell:
    """Replaces IPython's display: the outputs of the cell, oldest first, and the number of updates."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.outputs: list[str] = []
        self.updates = 0
        module = types.ModuleType("IPython.display")
        module.__dict__.update(display=self.display)
        monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
        monkeypatch.setitem(sys.modules, "IPython.display", module)

    def display(self, output: Any, *, display_id: bool = False) -> Any:
        index = len(self.outputs)
        self.outputs.append(as_html(output))

        def update(changed: Any) -> None:
            self.updates += 1
            self.outputs[index] = as_html(changed)

        return types.SimpleNamespace(update=update)


def as_html(output: Any) -> str:
    html: str = output._repr_mimebundle_(include=None, exclude=None)["text/html"]
    return re.sub(r"</?span[^>]*>", "", html)


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Cell:
    monkeypatch.setattr("rich._console", Console(width=120, force_jupyter=False, file=io.StringIO()))
    return Cell(monkeypatch)


def test_one_line_in_a_notebook(cell: Cell) -> None:
    """Catches a cell that fills with lines, a wrong estimate, and names that are interpreted as HTML."""
    clock = Clock()
    progress = TerminalProgress(Console(force_jupyter=True), clock)
    progress.begin(4, 2)
    assert "0/4" in cell.outputs[0] and "starting" in cell.outputs[0]
    clock.now += 10
    progress.stage(0, "<b>.0")
    progress.stage_done(0)
    assert "1/4" in cell.outputs[0] and "30.0 s left" in cell.outputs[0] and "&lt;b&gt;.0" in cell.outputs[0]
    progress.note("a note is in the summary")
    assert len(cell.outputs) == 1
    progress.note("no version loads <this>\nwhy: too old")
    progress.finish()
    progress.finish()
    assert "warning: no version loads &lt;this&gt;" in cell.outputs[1] and "too old" in cell.outputs[2]
    assert "1/4" in cell.outputs[0] and "left" not in cell.outputs[0]


def test_a_notebook_is_updated_rarely(cell: Cell) -> None:
    """Catches an update per sample: each is a message to the browser, and thousands of them freeze the page."""
    progress = TerminalProgress(Console(force_jupyter=True), Clock())
    progress.begin(1, 5000)
    progress.stage(0, "blocks.0")
    for done in range(5000):
        progress.sample(done)
    progress.stage_done(0)
    assert cell.updates == 2


def test_default_progress(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a script that prints unasked, a silent notebook, and output of other processes than rank 0."""
    mine = TerminalProgress(Console(stderr=True))
    assert resolve_progress(mine, is_rank0=True) is mine and type(resolve_progress(mine, is_rank0=False)) is Progress
    assert type(resolve_progress(None, is_rank0=True)) is Progress
    monkeypatch.setattr(vlqc.reporting.progress, "Console", lambda **_: types.SimpleNamespace(is_jupyter=True))
    assert isinstance(resolve_progress(None, is_rank0=True), TerminalProgress)
    assert resolve_progress(mine, is_rank0=True) is mine and type(resolve_progress(None, is_rank0=False)) is Progress


def test_values_of_a_cell_are_one_line() -> None:
    """Catches pages of fields for a cell that ends with a verification or a stage."""
    result = VerificationResult("out", facts={"a": [1] * 1000})
    assert repr(result) == "<VerificationResult of out: ok, 0 faults, 0 warnings>"
    result.add_fault("files", "out", "one is missing")
    assert repr(result) == "<VerificationResult of out: FAIL, 1 fault, 0 warnings>"
    text = 'stage "a.0" part=vision dtype=bfloat16 {\n  %x = input("x") : float32[2]\n  return (%x,)\n}\n'
    assert repr(vlqc.parse_stage(text)) == "<StageSnapshot a.0: 2 nodes, 0 sites>"


# ---- formatting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1:00"), (75, "1:15"), (4000, "1:06:40")]
)
def test_durations(seconds: float, text: str) -> None:
    """Catches minutes shown as hours."""
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 20, "3.0 MiB"), (5 << 40, "5120.0 GiB")]
)
def test_sizes(count: int, text: str) -> None:
    """Catches a size in the wrong unit."""
    assert format_bytes(count) == text
