"""What `vlqc verify --json_file FILE` wrote, as far as the report shows it: logits, groups by their share, advice."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlqc.errors import Fault, UserError
from vlqc.files import parse_json, read_regular_file
from vlqc.verify.findings import RANKING

LOGITS = "logits against float"
SHARE = "share %"
FIX = "give the file that `vlqc verify FOLDER ... --locate --json_file FILE` wrote"


@dataclass(frozen=True)
class Table:
    """columns; rows: text per cell; bars: percent of the longest per row, empty where nothing is compared."""

    columns: list[str]
    rows: list[list[str]]
    bars: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Verification:
    """ok: whether the folder passed; engine: whose rules were held; logits: (name, figure); located: the ranking, None
    where it was not asked for; legend: what its columns mean; advice: (what, why, what to do); manifest: SHA-256 of the
    folder's MANIFEST.json, empty where the file does not tell it."""

    ok: bool
    engine: str
    logits: list[tuple[str, str]]
    located: Table | None
    legend: str
    advice: list[tuple[str, str, str]]
    manifest: str = ""


def read_verification(path: Path) -> Verification:
    """UserError for a file that cannot be read, or that something else wrote."""
    try:
        return _read(parse_json(read_regular_file(path).decode()))
    except OSError as error:
        raise UserError(Fault(f"{path.name} cannot be read", str(path), str(error), FIX)) from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        why = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
        raise UserError(Fault(f"{path.name} is no verification", str(path), why, FIX)) from None


def _read(content: dict[str, Any]) -> Verification:
    if str(content.get("format", "")).startswith("vlqc timings"):
        raise ValueError("it holds timings, which --timings takes")
    if lacking := [key for key in ("ok", "engine", "facts") if key not in content]:
        raise ValueError(f"it does not say {lacking[0]!r}")
    facts = content["facts"]
    rows = facts.get(RANKING)
    return Verification(
        ok=content["ok"] is True,
        engine=str(content["engine"]),
        logits=[(str(name), _figure(value, 6)) for name, value in facts.get(LOGITS, {}).items()],
        located=_table(rows) if rows else None,
        legend=str(facts.get("in the table", "")),
        advice=[(str(it["what"]), str(it["why"]), str(it["fix"])) for it in content.get("advice", [])],
        manifest=str(content.get("manifest") or ""),
    )


def _table(rows: list[dict[str, Any]]) -> Table:
    first, *others = (str(name) for name in rows[0])
    others.sort(key=lambda name: name != SHARE)  # what the ranking goes by stands where the narrowest screen shows it
    columns = [first, *others]
    shares = [float(row.get(SHARE, 0.0)) for row in rows]
    longest = max(shares) or 1.0
    return Table(
        columns,
        [[_figure(row[name]) for name in columns] for row in rows],
        [max(0.0, min(100.0, 100 * (it / longest))) for it in shares],
    )


def _figure(value: Any, digits: int = 4) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
