"""The file of `vlqc verify --json_file`, as far as the report page shows it: logits, error by group, advice."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlqc.errors import Fault, UserError
from vlqc.files import parse_json, read_regular_file
from vlqc.verify.findings import INPUTS_OF, LEGEND, RANKING

LOGITS = "logits against float"
SHARE = "share %"
FIX = "pass the file of `vlqc verify FOLDER ... --locate --json_file FILE`"


@dataclass(frozen=True)
class RankingTable:
    """rows: text per cell; bars: share of the error per row, in percent of the largest share."""

    columns: list[str]
    rows: list[list[str]]
    bars: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Verification:
    """A verification as the page shows it.

    ok: whether no check found a fault. engine: whose rules were checked. logits: (name, value). inputs: how layers that
    can be run in two kinds of arithmetic were run, empty without such. ranking: groups of
    layers by their share of the error, None without --locate. legend: meaning of the columns. advice: (what, why, fix).
    manifest: SHA-256 of the folder's MANIFEST.json, empty in files of older versions.
    """

    ok: bool
    engine: str
    logits: list[tuple[str, str]]
    ranking: RankingTable | None
    legend: str
    advice: list[tuple[str, str, str]]
    manifest: str = ""
    inputs: str = ""


def read_verification(path: Path) -> Verification:
    """UserError for a file that cannot be read or that `vlqc verify` did not write."""
    try:
        return _parse(parse_json(read_regular_file(path).decode()))
    except OSError as error:
        raise UserError(Fault(f"cannot read {path.name}", str(path), str(error), FIX)) from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        why = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
        raise UserError(Fault(f"{path.name} is not a verification", str(path), why, FIX)) from None


def _parse(content: dict[str, Any]) -> Verification:
    if str(content.get("format", "")).startswith("vlqc timings"):
        raise ValueError("it is a file of timings, for --timings")
    if missing := [key for key in ("ok", "engine", "facts") if key not in content]:
        raise ValueError(f"key {missing[0]!r} is missing")
    facts = content["facts"]
    rows = facts.get(RANKING)
    return Verification(
        ok=content["ok"] is True,
        engine=str(content["engine"]),
        logits=[
            (f"{name}{_in_parentheses(fact)}", _format(value, 6))
            for fact, figures in facts.items()
            if fact == LOGITS or fact.startswith(f"{LOGITS}, ")  # in another arithmetic
            for name, value in figures.items()
        ],
        ranking=_ranking(rows) if rows else None,
        legend=str(facts.get(LEGEND, "")),
        advice=[(str(row["what"]), str(row["why"]), str(row["fix"])) for row in content.get("advice", [])],
        manifest=str(content.get("manifest") or ""),
        inputs="; ".join(f"{name}: {text}" for name, text in facts.items() if name.startswith(INPUTS_OF)),
    )


def _in_parentheses(fact: str) -> str:
    """Title of figures of the logits -> the arithmetic that it names, empty for the usual one."""
    arithmetic = fact.removeprefix(LOGITS).removeprefix(", ")
    return f" ({arithmetic})" if arithmetic else ""


def _ranking(rows: list[dict[str, Any]]) -> RankingTable:
    first, *others = (str(name) for name in rows[0])
    others.sort(key=lambda name: name != SHARE)  # second column, so that narrow screens show it
    columns = [first, *others]
    shares = [float(row.get(SHARE, 0.0)) for row in rows]
    largest = max(shares) or 1.0
    return RankingTable(
        columns,
        [[_format(row[name]) for name in columns] for row in rows],
        [max(0.0, min(100.0, 100 * (share / largest))) for share in shares],
    )


def _format(value: Any, digits: int = 4) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
