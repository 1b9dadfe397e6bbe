"""Progress of a compilation on a terminal, in a notebook or in a log file."""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

from vlqc.formatting import escape_control_chars, format_duration, pluralize
from vlqc.reporting.tables import is_warning

LOG_INTERVAL = 5.0  # seconds between two lines where output goes to a file
NOTEBOOK_INTERVAL = 0.25  # seconds between two updates in a notebook: each is a message to the browser


class Progress:
    """Progress callbacks in call order; the base class ignores them."""

    def begin(self, stages: int, samples: int, done: int = 0) -> None:
        """The model and the calibration samples are loaded and checked.

        stages: number of stages of the model; samples: number of samples that each of them runs; done: number of first
        stages that an interrupted run has finished already.
        """

    def stage(self, index: int, name: str) -> None:
        """Stage `index` (from 0) starts."""

    def sample(self, done: int) -> None:
        """`done` samples have run through the current stage."""

    def step(self, pass_name: str) -> None:
        """A pass starts on the current stage."""

    def stage_done(self, index: int) -> None:
        """Stage `index` is compiled and written."""

    def note(self, text: str) -> None:
        """A message to the user. With several lines it is a warning, summarized by its first line."""

    def finish(self) -> None:
        """The compilation has ended, with or without an error. May be called twice."""


def resolve_progress(progress: Progress | None, *, is_rank0: bool) -> Progress:
    """The progress callbacks of this process: `progress`, in a notebook a bar by default, otherwise silent ones.

    is_rank0: whether this process has rank 0; all others are silent.
    """
    if is_rank0 and progress is None and Console().is_jupyter:
        return TerminalProgress()
    return (progress if is_rank0 else None) or Progress()


class TerminalProgress(Progress):
    """A live bar over all stages on a terminal or in a notebook, plain lines elsewhere; both with the time left.

    clock: monotonic time in seconds.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._stages = self._samples = self._done = self._resumed_at = 0
        self._name = ""
        self._started = self._last_line = clock()
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._notebook_output: Any = None  # what IPython's display() returned for the bar
        self._last_update = float("-inf")

    def begin(self, stages: int, samples: int, done: int = 0) -> None:
        self._stages, self._samples, self._done, self._resumed_at = stages, samples, done, done
        self._started = self._last_line = self._clock()
        can_redraw = self._console.is_terminal and not self._console.is_dumb_terminal
        if self._console.is_jupyter or can_redraw:
            self._bar = self._new_bar()
            self._task = self._bar.add_task("starting", total=stages, completed=done, left="")
            if self._console.is_jupyter:  # rich's own live display there needs ipywidgets
                from IPython.display import display

                self._notebook_output = display(self._bar, display_id=True)
            else:
                self._bar.start()
        else:
            self._line(f"{pluralize(stages, 'stage')}, {pluralize(samples, 'sample') if samples else 'no samples'}")
            if done:
                self._line(f"resuming after stage {done} of {stages}")

    def stage(self, index: int, name: str) -> None:
        self._name = name
        self._describe(name)

    def sample(self, done: int) -> None:
        self._describe(f"{self._name}: sample {done} of {self._samples}")

    def step(self, pass_name: str) -> None:
        self._describe(f"{self._name}: {pass_name}")

    def stage_done(self, index: int) -> None:
        self._done = index + 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, left=self._time_left(), refresh=True)
            self._update_notebook(force=True)
        elif self._done == self._stages or self._clock() - self._last_line >= LOG_INTERVAL:
            elapsed = format_duration(self._clock() - self._started)
            left = self._time_left()
            self._line(f"stage {self._done} of {self._stages} done ({self._name}), {elapsed} elapsed, {left}")

    def note(self, text: str) -> None:
        """Prints warnings at once, before hours of work; all other notes are in the summary."""
        if is_warning(text):
            first, *rest = escape_control_chars(text).split("\n")
            self._console.print(Text.assemble(("warning: ", "bold yellow"), (first, "bold")), soft_wrap=True)
            for line in rest:
                self._console.print(Text(f"  {line.strip()}"), soft_wrap=True)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description="", left="")
            self._update_notebook(force=True)
            self._bar.stop()
            self._bar = self._notebook_output = None

    def _new_bar(self) -> Bar:
        return Bar(
            BarColumn(bar_width=16, table_column=Column(min_width=16)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[left]}", table_column=Column(min_width=12, no_wrap=True)),
            TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
            expand=True,
            console=self._console,
            transient=True,
        )

    def _describe(self, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=text, left=self._time_left())
            self._update_notebook()

    def _update_notebook(self, *, force: bool = False) -> None:
        if self._notebook_output is not None and (force or self._clock() - self._last_update >= NOTEBOOK_INTERVAL):
            self._last_update = self._clock()
            self._notebook_output.update(self._bar)

    def _line(self, text: str) -> None:
        self._last_line = self._clock()
        self._console.print(Text(text), soft_wrap=True)

    def _time_left(self) -> str:
        """Estimated from the mean time per stage. rich's own estimate looks back 30 s, which is less than one stage."""
        finished = self._done - self._resumed_at
        if finished == 0:
            return "time left unknown"
        remaining = (self._clock() - self._started) / finished * (self._stages - self._done)
        return f"{format_duration(remaining)} left"
