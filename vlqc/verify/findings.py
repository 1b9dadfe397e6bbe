"""What a verification found: checks that were made, faults, warnings and figures."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vlqc.files import json_text
from vlqc.formatting import escape_control_chars, pluralize

SHOWN_PER_CHECK = 20  # a folder that is wrong throughout would bury its first faults otherwise; the JSON has all
WIDEST = 1 << 16  # columns: no table is wider
LOCATED = "groups by their share of the logits' error"
SHOWN_ROWS = {LOCATED: 20}  # of long tables, whose end nobody needs; the JSON has all


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (or odd, for a warning): which check, where in the folder, what, why, what to do."""

    check: str
    where: str
    what: str
    why: str = ""
    fix: str = ""


@dataclass
class Report:
    """The result of `verify_folder`: `ok` when no check found a fault. Nothing else changes that."""

    folder: str
    engine: str = ""
    manifest: str = ""  # SHA-256 of the folder's MANIFEST.json: which folder this is of, wherever it lies
    examined: dict[str, int] = field(default_factory=dict)  # check -> how many things it looked at
    findings: list[Finding] = field(default_factory=list)  # the faults
    warnings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    advice: list[Finding] = field(default_factory=list)  # what would make the folder more accurate, the best first

    def __repr__(self) -> str:
        """One line: a notebook ends a cell with it, and `described()` would fill pages."""
        found = f"{pluralize(len(self.findings), 'fault')}, {pluralize(len(self.warnings), 'warning')}"
        return f"<Report of {self.folder}: {'ok' if self.ok else 'FAIL'}, {found}>"

    @property
    def ok(self) -> bool:
        return not self.findings

    def look(self, check: str, count: int = 1) -> None:
        """Record that `check` was made on `count` more things."""
        self.examined[check] = self.examined.get(check, 0) + count

    def fault(self, check: str, where: str, what: str, why: str = "", fix: str = "") -> None:
        self.findings.append(Finding(check, *map(escape_control_chars, (where, what, why, fix))))
        self.examined.setdefault(check, 0)

    def warn(self, check: str, where: str, what: str, why: str = "", fix: str = "") -> None:
        self.warnings.append(Finding(check, *map(escape_control_chars, (where, what, why, fix))))
        self.examined.setdefault(check, 0)

    def described(self) -> dict[str, Any]:
        """The whole report as a value of JSON: the same folder gives the same."""
        content = {
            "ok": self.ok,
            "folder": escape_control_chars(self.folder),
            "engine": self.engine,
            "manifest": self.manifest or None,
            "checks": self._rows(),
            "faults": [asdict(finding) for finding in self.findings],
            "warnings": [asdict(finding) for finding in self.warnings],
            "facts": self.facts,
        }
        if self.advice:
            content["advice"] = [asdict(finding) for finding in self.advice]
        return content

    def to_json(self) -> str:
        """As JSON text."""
        return json_text(self.described())

    def render(self, console: Console) -> None:
        """Print a table of the checks, the figures, then every fault and warning in full."""
        heading = Text(
            f"{escape_control_chars(self.folder)}, checked for {self.engine}", "table.title"
        )  # as it is: no markup
        table = Table(title=heading, title_justify="left")
        for column in ("check", "result", "looked at", "faults", "warnings"):
            table.add_column(column, justify="left" if column in ("check", "result") else "right")
        for row in self._rows():
            result = Text("ok", "green") if not row["faults"] else Text("FAIL", "bold red")
            table.add_row(row["check"], result, *(str(row[key]) for key in ("examined", "faults", "warnings")))
        console.print(table)
        for name, value in self.facts.items():
            _print_fact(console, name, value)
        for title, style, findings in (
            ("advice", "cyan", self.advice),
            ("FAULT", "bold red", self.findings),
            ("warning", "yellow", self.warnings),
        ):
            _print_findings(console, title, style, findings)
        verdict = (
            "ok: the folder is sound" if self.ok else f"{len(self.findings)} fault{'s' * (len(self.findings) > 1)}"
        )
        console.print(Text(verdict, "bold green" if self.ok else "bold red"))

    def _rows(self) -> list[dict[str, Any]]:
        faults = Counter(finding.check for finding in self.findings)
        warnings = Counter(finding.check for finding in self.warnings)
        return [
            {"check": check, "examined": count, "faults": faults[check], "warnings": warnings[check]}
            for check, count in self.examined.items()
        ]


def listed(items: Iterable[object], most: int = 5) -> str:
    """ "a, b, c and 7 more": the first few of many things, in words."""
    words = [str(item) for item in items]
    rest = len(words) - most
    return ", ".join(words[:most]) + (f" and {rest} more" if rest > 0 else "")


def _print_fact(console: Console, name: str, value: Any) -> None:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        shown = value[: SHOWN_ROWS.get(name)]
        _print_rows(console, name, shown)
        if len(shown) < len(value):
            console.print(Text(f"    ... and {len(value) - len(shown)} more: --json_file FILE writes them all"))
    elif isinstance(value, dict):
        console.print(Text(f"{name}: " + ", ".join(f"{key} {_figure(cell)}" for key, cell in value.items())))
    else:
        console.print(Text(f"{name}: {', '.join(map(str, value)) if isinstance(value, list) else _figure(value)}"))


def _print_rows(console: Console, name: str, rows: list[dict[str, Any]]) -> None:
    """A table where the console is wide enough; elsewhere what a row is about on a line of its own, figures below."""
    table = Table(title=name, title_justify="left")
    for column in rows[0]:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*(_figure(cell) for cell in row.values()))
    if console.measure(table, options=console.options.update(width=WIDEST)).maximum <= console.width:
        console.print(table)
        return
    console.print(Text(name, "table.title"))
    for row in rows:
        (_, about), *figures = row.items()
        console.print(Text(_figure(about), "bold"), soft_wrap=True)
        told = ", ".join(f"{column} {_figure(cell)}" for column, cell in figures)
        console.print(Padding(Text(told), (0, 0, 0, 4)))


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else escape_control_chars(str(value))


def _print_findings(console: Console, title: str, style: str, findings: list[Finding]) -> None:
    shown: Counter[str] = Counter()
    for finding in findings:
        shown[finding.check] += 1
        if shown[finding.check] > SHOWN_PER_CHECK:
            continue
        console.print(Text.assemble((title, style), f" [{finding.check}] {finding.what}"), soft_wrap=True)
        for label, text in (("where", finding.where), ("why", finding.why), ("what to do", finding.fix)):
            if text:
                console.print(Text(f"    {label}: {text}"), soft_wrap=True)
    for check, count in shown.items():
        if count > SHOWN_PER_CHECK:
            console.print(
                Text(f"    ... and {count - SHOWN_PER_CHECK} more in [{check}]: --json_file FILE writes them all")
            )
