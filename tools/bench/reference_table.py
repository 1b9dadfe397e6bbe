"""The table of `tools/bench/reference.py`, also of a JSON file that it wrote.

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

REFERENCE, OURS = "msModelSlim", "vlqc"
FIGURES = {  # column: where it is in a row, how it is shown
    "SQNR dB": (("agreement", "sqnr"), "{:.2f}"),
    "weights only": (("weights_only",), "{:.2f}"),
    "cosine": (("agreement", "cosine"), "{:.5f}"),
    "KL": (("agreement", "kl"), "{:.2g}"),
    "top-1 %": (("agreement", "top1"), "{:.1%}"),
    "right %": (("accuracy",), "{:.2f}"),
    "perplexity": (("perplexity",), "{:.4f}"),
    "CPU s": (("usage", "cpu_seconds"), "{:.1f}"),
    "wall s": (("usage", "wall_seconds"), "{:.1f}"),
    "peak MiB": (("usage", "peak_bytes"), "{:.0f}"),
}
MIB = 2**20
WIDTH = 150  # characters that the widest table needs; without a terminal rich would cut it to 80
Rows = Sequence[dict[str, Any]]


def figure(row: dict[str, Any], path: tuple[str, ...]) -> float | None:
    """One figure of a row; None if the row lacks it."""
    value: Any = row
    for key in path:
        value = None if value is None else value[key]
    if value is None:
        return None
    return float(value) / MIB if path[-1] == "peak_bytes" else float(value)


def medians(rows: Rows) -> dict[str, float | None]:
    """Column -> median over the rows."""
    return {column: median(figure(row, path) for row in rows) for column, (path, _) in FIGURES.items()}


def differences(rows: Rows) -> list[float]:
    """SQNR of vlqc over that of msModelSlim in dB for every seed that has both, in the order of the seeds."""
    found: dict[tuple[int, str], float] = {(row["seed"], row["side"]): row["agreement"]["sqnr"] for row in rows}
    seeds = sorted({seed for seed, _ in found})
    both = [seed for seed in seeds if (seed, REFERENCE) in found and (seed, OURS) in found]
    return [found[seed, OURS] - found[seed, REFERENCE] for seed in both]


def show(rows: Rows, console: Console | None = None) -> None:
    """One table per checkpoint: medians over the seeds, and by how much vlqc is ahead."""
    for case in unique(row["case"] for row in rows):
        print_case(
            case,
            [row for row in rows if row["case"] == case],
            console or Console(width=None if sys.stdout.isatty() else WIDTH),
        )


def print_case(case: str, rows: Rows, console: Console) -> None:
    """One checkpoint; figures that no row has get no column."""
    everything = medians(rows)
    columns = [column for column in FIGURES if everything[column] is not None]
    seeds = len({row["seed"] for row in rows})
    title = f"{case}: medians over {seeds} seeds" if seeds > 1 else case
    table = Table(*(Column(name, no_wrap=True) for name in ("scheme", "side")), title=title)
    table.add_column("ahead dB", justify="right", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for scheme in unique(row["scheme"] for row in rows):
        of_scheme = [row for row in rows if row["scheme"] == scheme]
        for side in unique(row["side"] for row in of_scheme):
            found = medians([row for row in of_scheme if row["side"] == side])
            ahead = median(differences(of_scheme)) if side == OURS else None
            first = scheme if side != OURS else ""
            figures = [shown(found[column], FIGURES[column][1]) for column in columns]
            table.add_row(first, "" if side == scheme else side, shown(ahead, "{:+.2f}"), *figures)
        table.add_section()
    console.print(table)


def shown(value: float | None, form: str) -> str:
    """A figure as text; nothing for None."""
    return "" if value is None else form.format(value).rstrip("%")


def unique(values: Iterable[str]) -> list[str]:
    """Each once, in order."""
    return list(dict.fromkeys(values))


if __name__ == "__main__":
    show([row for name in sys.argv[1:] for row in json.loads(Path(name).read_text(encoding="utf-8"))])
