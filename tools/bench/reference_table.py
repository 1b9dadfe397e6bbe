"""Prints the table of `tools/bench/reference.py`, also from its JSON files.

python -m tools.bench.reference_table FILE...
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from tools.bench.metrics import median

MSMODELSLIM, VLQC = "msModelSlim", "vlqc"
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
WIDTH = 150  # characters; without a terminal rich uses 80, too few for the widest table
Rows = Sequence[dict[str, Any]]


def value_at(row: dict[str, Any], path: tuple[str, ...]) -> float | None:
    """The value at a path of a row; None if it is missing."""
    value: Any = row
    for key in path:
        value = None if value is None else value[key]
    if value is None:
        return None
    return float(value) / MIB if path[-1] == "peak_bytes" else float(value)


def medians(rows: Rows) -> dict[str, float | None]:
    """Column -> median over the rows."""
    return {column: median(value_at(row, path) for row in rows) for column, (path, _) in COLUMNS.items()}


def differences(rows: Rows) -> list[float]:
    """SQNR of vlqc minus that of msModelSlim, in dB, for each seed that has both."""
    sqnr: dict[tuple[int, str], float] = {(row["seed"], row["tool"]): row["agreement"]["sqnr"] for row in rows}
    seeds = sorted({seed for seed, _ in sqnr})
    both = [seed for seed in seeds if (seed, MSMODELSLIM) in sqnr and (seed, VLQC) in sqnr]
    return [sqnr[seed, VLQC] - sqnr[seed, MSMODELSLIM] for seed in both]


def show(rows: Rows, console: Console | None = None) -> None:
    """Prints a table per checkpoint: medians over the seeds, and their difference."""
    for case in unique(row["case"] for row in rows):
        print_case(
            case,
            [row for row in rows if row["case"] == case],
            console or Console(width=None if sys.stdout.isatty() else WIDTH),
        )


def print_case(case: str, rows: Rows, console: Console) -> None:
    """Prints the table of one checkpoint, without empty columns."""
    totals = medians(rows)
    columns = [column for column in COLUMNS if totals[column] is not None]
    seeds = len({row["seed"] for row in rows})
    title = f"{case}: medians over {seeds} seeds" if seeds > 1 else case
    table = Table(*(Column(name, no_wrap=True) for name in ("scheme", "tool")), title=title)
    table.add_column("difference dB", justify="right", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for scheme in unique(row["scheme"] for row in rows):
        of_scheme = [row for row in rows if row["scheme"] == scheme]
        for tool in unique(row["tool"] for row in of_scheme):
            values = medians([row for row in of_scheme if row["tool"] == tool])
            difference = median(differences(of_scheme)) if tool == VLQC else None
            first = scheme if tool != VLQC else ""
            cells = [shown(values[column], COLUMNS[column][1]) for column in columns]
            table.add_row(first, "" if tool == scheme else tool, shown(difference, "{:+.2f}"), *cells)
        table.add_section()
    console.print(table)


def shown(value: float | None, form: str) -> str:
    """A value as text; empty for None."""
    return "" if value is None else form.format(value).rstrip("%")


def unique(values: Iterable[str]) -> list[str]:
    """Distinct values in the order of their first occurrence."""
    return list(dict.fromkeys(values))


if __name__ == "__main__":
    show([row for name in sys.argv[1:] for row in json.loads(Path(name).read_text(encoding="utf-8"))])
