"""What the user sees while a compilation runs, and when it has finished."""

import shlex
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table
from rich.text import Text

from vlqc.formatting import escape_control_chars, format_bytes, format_duration, pluralize

if TYPE_CHECKING:
    from vlqc.pipeline.registry import Pass
    from vlqc.reporting.summary import Result

PARTS = ("vision", "merger", "language", "other")
QUIET_SECONDS = 5.0  # where output goes to a file, a line at most this often


class Progress:
    """What the compiler reports, in this order, heard by nobody. Subclasses override what they show."""

    def begin(self, stages: int, samples: int, done: int = 0) -> None:
        """Everything is checked and loaded; `stages` will follow, each over `samples`, but for the first ones that were
        `done` by a run that was interrupted."""

    def stage(self, index: int, name: str) -> None:
        """Stage `index` (from 0) starts."""

    def sample(self, done: int) -> None:
        """`done` samples have passed through the current stage."""

    def step(self, pass_name: str) -> None:
        """A pass starts on the current stage."""

    def coming(self, stage: object, step: "Pass") -> None:
        """`step` for the pass manager, which hands over the stage and the pass."""
        self.step(step.name)

    def stage_done(self, index: int) -> None:
        """Stage `index` is compiled and written."""

    def note(self, text: str) -> None:
        """Something the user should know; of several lines it is a warning, whose first line says it all."""

    def finish(self) -> None:
        """No more reports follow; also called after an error, possibly twice."""


def resolve_progress(progress: Progress | None, *, first: bool) -> Progress:
    """Who hears of a compilation: the caller's progress, in a notebook a line in the cell, otherwise nobody.

    first: whether this is the process that reports.
    """
    if first and progress is None and Console().is_jupyter:
        from vlqc.reporting.notebook import NotebookProgress

        return NotebookProgress()
    return (progress if first else None) or Progress()


class TerminalProgress(Progress):
    """On a terminal one live bar over all stages, elsewhere a plain line now and then; both with the time left.

    clock: seconds, monotonic.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._stages = self._samples = self._done = self._before = 0
        self._name = ""
        self._started = self._last_line = clock()
        self._bar: Bar | None = None
        self._task = TaskID(0)

    def begin(self, stages: int, samples: int, done: int = 0) -> None:
        self._stages, self._samples, self._done, self._before = stages, samples, done, done
        self._started = self._last_line = self._clock()
        if self._console.is_terminal and not self._console.is_dumb_terminal:  # which cannot go back in a line
            self._bar = Bar(
                BarColumn(bar_width=16, table_column=Column(min_width=16)),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TimeElapsedColumn(table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[left]}", table_column=Column(min_width=12, no_wrap=True)),
                TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
                expand=True,
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("starting", total=stages, completed=done, left="")
            self._bar.start()
        else:
            self._line(f"{pluralize(stages, 'stage')}, {pluralize(samples, 'sample')}")
            if done:
                self._line(f"{done} of {stages} stages were finished before")

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
            self._bar.update(self._task, completed=self._done, left=self._left(), refresh=True)
        elif self._done == self._stages or self._clock() - self._last_line >= QUIET_SECONDS:
            elapsed = format_duration(self._clock() - self._started)
            self._line(f"stage {self._done} of {self._stages} done ({self._name}), {elapsed} elapsed, {self._left()}")

    def note(self, text: str) -> None:
        """Warnings come at once, before hours of work; all else waits for the summary."""
        if is_warning(text):
            first, *rest = escape_control_chars(text).split("\n")
            self._console.print(Text.assemble(("warning: ", "bold yellow"), (first, "bold")), soft_wrap=True)
            for line in rest:
                self._console.print(Text(f"  {line.strip()}"), soft_wrap=True)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _describe(self, what: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=what, left=self._left())

    def _line(self, text: str) -> None:
        self._last_line = self._clock()
        self._console.print(Text(text), soft_wrap=True)

    def _left(self) -> str:
        """Time left if the stages to come take as long as those so far."""
        if self._done == self._before:
            return "time left unknown"
        remaining = (self._clock() - self._started) / (self._done - self._before) * (self._stages - self._done)
        return f"{format_duration(remaining)} left"


def is_warning(note: str) -> bool:
    """Whether a note is a warning: it has several lines, of which the first says it all."""
    return "\n" in note


def print_summary(result: "Result", console: Console) -> None:
    """What became what, sizes, time, memory, where the output is, what loads it and how to serve it, notes."""
    table = Table(title="What became what", title_justify="left")
    for column in ("part", "scheme", "linears"):
        table.add_column(column, justify="right" if column == "linears" else "left")
    for part, scheme in sorted(result.counts, key=in_model_order):
        table.add_row(part, scheme, str(result.counts[part, scheme]))
    console.print(table)
    ratio = f" ({result.bytes_after / result.bytes_before:.0%})" if result.bytes_before else ""
    facts = [
        ("size", f"{format_bytes(result.bytes_before)} -> {format_bytes(result.bytes_after)}{ratio}"),
        ("time", format_duration(result.seconds)),
        ("peak memory", format_bytes(result.peak_memory_bytes)),
        ("output", str(result.folder)),
        *(("loads in", engine) for engine in result.engines),
        *(("serve", command) for command in result.serve),
        ("look inside", f"vlqc report {shlex.quote(str(result.folder))}"),
        *(("warning", warning.split("\n")[0]) for warning in filter(is_warning, result.notes)),  # the rest was shown
        *(("note", note) for note in result.notes if not is_warning(note)),
    ]
    known = ""
    for label, text in facts:
        shown = "" if label == known and label not in ("note", "warning") else label
        style = "bold yellow" if label == "warning" else "bold"
        console.print(
            Text.assemble((f"{shown:<12}", style), escape_control_chars(text)), soft_wrap=True
        )  # commands stay in one line
        known = label


def in_model_order(part_and_scheme: tuple[str, str]) -> tuple[int, str, str]:
    part, scheme = part_and_scheme
    return (PARTS.index(part) if part in PARTS else len(PARTS), part, scheme)
