"""Prints the table of `tools/bench/reference.py`, also from its JSON files.

python -m tools.bench.reference_table FILE...
"""

import sys
from collections.abc import Iterable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from tools.bench.metrics import median
from tools.bench.reference_rows import MSMODELSLIM, VLQC, Row, read_rows

UNROTATED = f"{VLQC} --rotate none"
DIFFERENCES = {"vs msModelSlim": MSMODELSLIM, "vs none": UNROTATED}  # title: what is subtracted
COLUMNS = {  # title: path in a row, format
    "SQNR dB": (("agreement", "sqnr"), "{:.2f}"),
    "weights only": (("weights_only",), "{:.2f}"),
    "cosine": (("agreement", "cosine"), "{:.5f}"),
    "KL": (("agreement", "kl"), "{:.2g}"),
    "top-1 %": (("agreement", "top1"), "{:.1%}"),
    "correct %": (("accuracy",), "{:.2f}"),
    "perplexity": (("perplexity",), "{:.4f}"),
    "CPU s": (("usage", "cpu_seconds"), "{:.1f}"),
    "wall s": (("usage", "wall_seconds"), "{:.1f}"),
    "peak MiB": (("usage", "peak_bytes"), "{:.0f}"),
}
MIB = 2**20
WIDTH = 180  # characters; without a terminal rich uses 80, too few for the widest table
Rows = Sequence[Row]


def value_at(row: Row, path: tuple[str, ...]) -> float | None:
    """The value at a path of a row; None if it is missing."""
    value: Any = reduce(lambda parent, name: parent and getattr(parent, name), path, row)
    if value is None:
        return None
    return float(value) / MIB if path[-1] == "peak_bytes" else float(value)


def medians(rows: Rows) -> dict[str, float | None]:
    """Column -> median over the rows."""
    return {column: median(value_at(row, path) for row in rows) for column, (path, _) in COLUMNS.items()}


def difference(rows: Rows, label: str, subtracted: str) -> float | None:
    """Median over the seeds of the SQNR of one tool minus that of another, in dB; None for msModelSlim, for the same
    tool, and without a seed that has both."""
    if label in (MSMODELSLIM, subtracted):
        return None
    sqnr = {(row.seed, row.label): row.agreement.sqnr for row in rows}
    both = [seed for seed, tool in sqnr if tool == label and (seed, subtracted) in sqnr]
    return median(sqnr[seed, label] - sqnr[seed, subtracted] for seed in both)


def show(rows: Rows, console: Console | None = None) -> None:
    """Prints a table per checkpoint: medians over the seeds, and medians of the differences per seed."""
    console = console or Console(width=None if sys.stdout.isatty() else WIDTH)
    for case in unique(row.case for row in rows):
        print_case(case, [row for row in rows if row.case == case], console)


def print_case(case: str, rows: Rows, console: Console) -> None:
    """Prints the table of one checkpoint, without empty columns."""
    totals = medians(rows)
    columns = [column for column in COLUMNS if totals[column] is not None]
    differences = [title for title, label in DIFFERENCES.items() if any(row.label == label for row in rows)]
    seeds = len({row.seed for row in rows})
    title = f"{case}: medians over {seeds} seeds" if seeds > 1 else case
    table = Table(*(Column(name, no_wrap=True) for name in ("scheme", "tool")), title=title)
    for column in [*differences, *columns]:
        table.add_column(column, justify="right", no_wrap=True)
    for scheme in unique(row.scheme for row in rows):
        of_scheme = [row for row in rows if row.scheme == scheme]
        for number, label in enumerate(unique(row.label for row in of_scheme)):
            values = medians([row for row in of_scheme if row.label == label])
            cells = [shown(difference(of_scheme, label, DIFFERENCES[each]), "{:+.2f}") for each in differences]
            cells += [shown(values[column], COLUMNS[column][1]) for column in columns]
            table.add_row("" if number else scheme, "" if label == scheme else label, *cells)
        table.add_section()
    console.print(table)


def shown(value: float | None, form: str) -> str:
    """A value as text; empty for None."""
    return "" if value is None else form.format(value).rstrip("%")


def unique(values: Iterable[str]) -> list[str]:
    """Distinct values in the order of their first occurrence."""
    return list(dict.fromkeys(values))


if __name__ == "__main__":
    show([row for name in sys.argv[1:] for row in read_rows(Path(name))])
