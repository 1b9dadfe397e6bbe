"""vlqc.reporting.progress: plain lines where nobody watches, a bar where somebody does, times and sizes in words."""

import io
import re

import pytest
from rich.console import Console

from vlqc.formatting import format_bytes, format_duration
from vlqc.reporting.progress import Progress, TerminalProgress


def report(progress: Progress, advance: object = None) -> None:
    """Four stages, each ten seconds by the clock that `advance` moves."""
    progress.begin(4, 2)
    for index in range(4):
        progress.stage(index, f"blocks.{index}")
        progress.step("smooth-m2")
        progress.sample(1)
        if callable(advance):
            advance(10.0)
        progress.stage_done(index)
    progress.note("a [note]")
    progress.finish()
    progress.finish()


def test_plain_lines_with_the_time_left() -> None:
    """Catches control characters in a log file, and a wrong estimate."""
    now = [100.0]
    shown = io.StringIO()

    def advance(seconds: float) -> None:
        now[0] += seconds

    report(TerminalProgress(Console(file=shown), clock=lambda: now[0]), advance)
    lines = shown.getvalue().splitlines()
    assert lines[0] == "4 stages, 2 samples"
    assert lines[1] == "stage 1 of 4 done (blocks.0), 10.0 s elapsed, 30.0 s left"
    assert lines[4] == "stage 4 of 4 done (blocks.3), 40.0 s elapsed, 0.0 s left"
    assert lines[5:] == []  # notes wait for the summary


def test_quick_stages_do_not_flood_a_log() -> None:
    """Catches a line per stage when stages take no time; the last one is always told."""
    shown = io.StringIO()
    report(TerminalProgress(Console(file=shown), clock=lambda: 0.0))
    assert [line.split(" done")[0] for line in shown.getvalue().splitlines()[1:]] == ["stage 4 of 4"]


def test_live_bar_says_stage_and_pass() -> None:
    """Catches a bar that does not show where the compiler is, or that stays on the screen."""
    shown = io.StringIO()
    progress = TerminalProgress(Console(file=shown, force_terminal=True, width=120, _environ={"TERM": "xterm"}))
    progress.begin(2, 3)
    progress.stage(0, "blocks.0")
    progress.step("smooth-m2")
    progress.stage_done(0)
    assert "blocks.0: smooth-m2" in shown.getvalue() and "1/2" in shown.getvalue()
    progress.finish()
    assert "\x1b[?25h" in shown.getvalue()  # the cursor is back


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "unknown"}])
def test_a_terminal_that_only_prints(environment: dict[str, str]) -> None:
    """Catches a bar, or control characters, on a terminal that cannot go back in a line, as in an editor's window."""
    shown = io.StringIO()
    report(TerminalProgress(Console(file=shown, force_terminal=True, _environ=environment), clock=lambda: 0.0))
    assert "stage 4 of 4 done" in shown.getvalue() and "\x1b" not in shown.getvalue()


def test_no_color() -> None:
    """Catches colours for someone who has asked for none; emphasis stays, it is no colour."""
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, _environ={"TERM": "xterm-256color", "NO_COLOR": "1"})
    TerminalProgress(console).note("no version of E loads this\nwhy: a")
    assert "warning: " in shown.getvalue()
    assert not re.search(r"\x1b\[[\d;]*3[0-7]", shown.getvalue())


def test_a_warning_comes_at_once() -> None:
    """Catches a warning of several lines that waits for hours, hides in one line, or is taken for colour markup."""
    shown = io.StringIO()
    TerminalProgress(Console(file=shown, width=30)).note("no version of [E] loads this\nwhy: a\n  what to do: b")
    assert shown.getvalue() == "warning: no version of [E] loads this\n  why: a\n  what to do: b\n"


def test_silence() -> None:
    """Catches the silent reporter that the Python API uses by default saying something or failing."""
    report(Progress())


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1:00"), (75, "1:15"), (4000, "1:06:40")]
)
def test_durations(seconds: float, words: str) -> None:
    """Catches minutes shown as hours."""
    assert format_duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 20, "3.0 MiB"), (5 << 40, "5120.0 GiB")]
)
def test_sizes(count: int, words: str) -> None:
    """Catches a size in the wrong unit."""
    assert format_bytes(count) == words
