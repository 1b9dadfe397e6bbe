"""A compilation in a notebook: one line with a bar that is replaced in place, and the summary as the cell's result.

IPython's own display is enough: no widgets have to be installed, and what is shown stays in the saved notebook.
"""

import io
import time
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

from rich.console import Console

from vlqc.formatting import escape_control_chars, format_duration
from vlqc.reporting.progress import Progress, is_warning, print_summary

if TYPE_CHECKING:
    from vlqc.reporting.summary import Result

BETWEEN = 0.25  # seconds; more often nobody reads, and every update goes through the browser
COLUMNS = 110
PRE = '<pre style="white-space: pre-wrap; line-height: normal">{code}</pre>'


class NotebookProgress(Progress):
    """show: what IPython's `display(..., display_id=True)` does with HTML, returning a handle with `update`."""

    def __init__(self, show: Callable[[str], Any] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._show, self._clock = show or _display, clock
        self._handle: Any = None
        self._stages = self._samples = self._done = self._before = 0
        self._name, self._started, self._shown = "", clock(), float("-inf")

    def begin(self, stages: int, samples: int, done: int = 0) -> None:
        self._stages, self._samples, self._done, self._before = stages, samples, done, done
        self._started = self._clock()
        self._handle = self._show(self._line("starting"))

    def stage(self, index: int, name: str) -> None:
        self._name = name
        self._update(name)

    def sample(self, done: int) -> None:
        self._update(f"{self._name}: sample {done} of {self._samples}")

    def step(self, pass_name: str) -> None:
        self._update(f"{self._name}: {pass_name}")

    def stage_done(self, index: int) -> None:
        self._done = index + 1
        self._update(self._name, now=True)

    def note(self, text: str) -> None:
        if is_warning(text):
            self._show(f"<b>warning:</b> {escape(escape_control_chars(text))}".replace("\n", "<br>"))

    def finish(self) -> None:
        if self._handle is not None:
            elapsed = format_duration(self._clock() - self._started)
            self._handle.update(_html(f"{self._bar()} {self._done} of {self._stages} stages in {elapsed}"))
            self._handle = None

    def _update(self, what: str, *, now: bool = False) -> None:
        if self._handle is not None and (now or self._clock() - self._shown >= BETWEEN):
            self._shown = self._clock()
            self._handle.update(_html(self._line(what)))

    def _line(self, what: str) -> str:
        left = ""
        if self._done > self._before:
            each = (self._clock() - self._started) / (self._done - self._before)
            left = f", {format_duration(each * (self._stages - self._done))} left"
        return f"{self._bar()} {self._done} of {self._stages} stages{left}: {escape(escape_control_chars(what))}"

    def _bar(self) -> str:
        return f'<progress value="{self._done}" max="{self._stages}">{self._done} of {self._stages}</progress>'


def mime_bundle(result: "Result") -> dict[str, str]:
    """The summary of a compilation as text and as HTML."""
    console = Console(record=True, file=io.StringIO(), width=COLUMNS, force_jupyter=False, legacy_windows=False)
    print_summary(result, console)
    text = console.export_text(clear=False)
    return {"text/plain": text, "text/html": console.export_html(inline_styles=True, code_format=PRE)}


def _display(html: str) -> Any:
    from IPython.display import display

    return display(_html(html), display_id=True)


def _html(html: str) -> Any:
    from IPython.display import HTML

    return HTML(html)
