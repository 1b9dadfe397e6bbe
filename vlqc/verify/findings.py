"""The result of verifying a compiled folder: checks, faults, warnings, measured values and advice."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vlqc.errors import Fault
from vlqc.files import format_json
from vlqc.formatting import escape_control_chars, pluralize
from vlqc.targets.target import parse_target

COMPILE_AGAIN = "compile again"
COPY_AGAIN = "copy the folder again, or compile again"
SHOWN_PER_CHECK = 20  # findings printed per check, so that one kind of fault does not hide the others; the JSON has all
WIDEST = 1 << 16  # columns: wider than any table, to measure a table without wrapping
RANKING = "groups by their share of the logits' error"
LEGEND = "columns of the ranking"
INPUTS_OF = "inputs of "  # before schemes whose layers are run in two kinds of arithmetic: in which
FLOAT_CACHE = "logits against float, KV cache in float"  # beside "logits against float"
SHOWN_ROWS = {RANKING: 20}  # rows printed of long tables; the JSON has all


@dataclass(frozen=True)
class Finding:
    """One fault, warning or piece of advice: the check, where in the folder, what, why, and what to do."""

    check: str
    where: str
    what: str
    why: str = ""
    fix: str = ""


@dataclass
class VerificationResult:
    """The result of `verify_folder`. `ok` is True when no check found a fault; warnings do not change it.

    folder, engine: what was verified, and for which target. manifest: SHA-256 of the folder's MANIFEST.json, which
    identifies the folder independently of its path; empty without one. examined: check -> number of items checked.
    facts: measured values by title. advice: how to make the folder more accurate, the largest share of the error first.
    """

    folder: str
    engine: str = ""
    manifest: str = ""
    examined: dict[str, int] = field(default_factory=dict)
    faults: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    advice: list[Finding] = field(default_factory=list)

    def __repr__(self) -> str:
        """One line, because a notebook prints it at the end of a cell."""
        counts = f"{pluralize(len(self.faults), 'fault')}, {pluralize(len(self.warnings), 'warning')}"
        return f"<VerificationResult of {self.folder}: {'ok' if self.ok else 'FAIL'}, {counts}>"

    @property
    def ok(self) -> bool:
        return not self.faults

    def add_examined(self, check: str, count: int = 1) -> None:
        """Record that `check` was made on `count` more items."""
        self.examined[check] = self.examined.get(check, 0) + count

    def add_faults(self, check: str, faults: Iterable[Fault]) -> None:
        """Adds each of these faults to a check."""
        for fault in faults:
            self.add_fault(check, fault.where, fault.what, fault.why, fault.fix)

    def add_fault(self, check: str, where: str, what: str, why: str = "", fix: str = "") -> None:
        self.faults.append(Finding(check, *map(escape_control_chars, (where, what, why, fix))))
        self.examined.setdefault(check, 0)

    def add_warning(self, check: str, where: str, what: str, why: str = "", fix: str = "") -> None:
        self.warnings.append(Finding(check, *map(escape_control_chars, (where, what, why, fix))))
        self.examined.setdefault(check, 0)

    def to_dict(self) -> dict[str, Any]:
        """The whole result as JSON values; deterministic for the same folder."""
        content = {
            "ok": self.ok,
            "folder": escape_control_chars(self.folder),
            "engine": self.engine,
            "manifest": self.manifest or None,
            "checks": self._check_rows(),
            "faults": [asdict(finding) for finding in self.faults],
            "warnings": [asdict(finding) for finding in self.warnings],
            "facts": self.facts,
        }
        if self.advice:
            content["advice"] = [asdict(finding) for finding in self.advice]
        return content

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return format_json(self.to_dict())

    def render(self, console: Console) -> None:
        """Print a table of the checks, the measured values, then every fault and warning in full."""
        title = f"{escape_control_chars(self.folder)}, checked for {self._target_text()}"
        table = Table(title=Text(title, "table.title"), title_justify="left")  # Text: the path is no console markup
        for column in ("check", "result", "examined", "faults", "warnings"):
            table.add_column(column, justify="left" if column in ("check", "result") else "right")
        for row in self._check_rows():
            verdict = Text("ok", "green") if not row["faults"] else Text("FAIL", "bold red")
            table.add_row(row["check"], verdict, *(str(row[key]) for key in ("examined", "faults", "warnings")))
        console.print(table)
        for name, value in self.facts.items():
            _print_fact(console, name, value)
        for label, style, findings in (
            ("advice", "cyan", self.advice),
            ("FAULT", "bold red", self.faults),
            ("warning", "yellow", self.warnings),
        ):
            _print_findings(console, label, style, findings)
        conclusion = "ok: no faults" if self.ok else pluralize(len(self.faults), "fault")
        console.print(Text(conclusion, "bold green" if self.ok else "bold red"))

    def _target_text(self) -> str:
        return parse_target(self.engine).text if self.engine else "no engine"

    def _check_rows(self) -> list[dict[str, Any]]:
        faults = Counter(finding.check for finding in self.faults)
        warnings = Counter(finding.check for finding in self.warnings)
        return [
            {"check": check, "examined": count, "faults": faults[check], "warnings": warnings[check]}
            for check, count in self.examined.items()
        ]


def format_list(items: Iterable[object], limit: int = 5) -> str:
    """The first `limit` items: "a, b, c and 7 more"."""
    words = [str(item) for item in items]
    rest = len(words) - limit
    return ", ".join(words[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _print_fact(console: Console, name: str, value: Any) -> None:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        shown = value[: SHOWN_ROWS.get(name)]
        _print_rows(console, name, shown)
        if len(shown) < len(value):
            console.print(Text(f"    ... and {len(value) - len(shown)} more: --json_file FILE writes them all"))
    elif isinstance(value, dict):
        console.print(Text(f"{name}: " + ", ".join(f"{key} {_cell_text(cell)}" for key, cell in value.items())))
    else:
        console.print(Text(f"{name}: {', '.join(map(str, value)) if isinstance(value, list) else _cell_text(value)}"))


def _print_rows(console: Console, name: str, rows: list[dict[str, Any]]) -> None:
    """A table where the console is wide enough, else per row its first cell on one line and the others below it."""
    table = Table(title=name, title_justify="left")
    for column in rows[0]:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*(_cell_text(cell) for cell in row.values()))
    if console.measure(table, options=console.options.update(width=WIDEST)).maximum <= console.width:
        console.print(table)
        return
    console.print(Text(name, "table.title"))
    for row in rows:
        (_, heading), *cells = row.items()
        console.print(Text(_cell_text(heading), "bold"), soft_wrap=True)
        line = ", ".join(f"{column} {_cell_text(cell)}" for column, cell in cells)
        console.print(Padding(Text(line), (0, 0, 0, 4)))


def _cell_text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else escape_control_chars(str(value))


def _print_findings(console: Console, label: str, style: str, findings: list[Finding]) -> None:
    counts: Counter[str] = Counter()
    for finding in findings:
        counts[finding.check] += 1
        if counts[finding.check] > SHOWN_PER_CHECK:
            continue
        console.print(Text.assemble((label, style), f" [{finding.check}] {finding.what}"), soft_wrap=True)
        for title, text in (("where", finding.where), ("why", finding.why), ("what to do", finding.fix)):
            if text:
                console.print(Text(f"    {title}: {text}"), soft_wrap=True)
    for check, count in counts.items():
        if count > SHOWN_PER_CHECK:
            more = count - SHOWN_PER_CHECK
            console.print(Text(f"    ... and {more} more in [{check}]: --json_file FILE writes them all"))
