"""What `vlqc report` reads of strangers: the report of a folder, a verification, timings."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.support import synthetic_report as made_up_report
from tests.support.fuzz.damage import as_json, damaged_bytes, damaged_json
from tests.support.fuzz.verdict import demand
from tests.support.report_pages import VERIFIED
from vlqc.reporting.html import report_text
from vlqc.reporting.html.schema import FILE


@cache
def report_files() -> dict[str, Any]:
    """The three documents, by what they are."""
    told = made_up_report.facts(layers=1, blocks=1)
    return {
        "report": json.loads(told.model_dump_json()),
        "verification": VERIFIED,
        "timings": json.loads(made_up_report.timings(told).model_dump_json()),
    }


def report_cases(kind: str) -> st.SearchStrategy[tuple[str, bytes]]:
    """(kind, content of its file)"""
    whole = report_files()[kind]
    damaged = st.one_of(
        damaged_json(whole).map(as_json), damaged_json(whole).map(as_json), damaged_bytes(as_json(whole))
    )
    return damaged.map(lambda content: (kind, content))


def check_report(case: tuple[str, bytes], folder: Path) -> bool:
    """There is a page, whole, and it can be stored."""
    kind, content = case
    compiled = folder / "out"
    if not compiled.is_dir():
        made_up_report.folder(compiled, made_up_report.facts(layers=1, blocks=1))
    sound = (compiled / FILE).read_bytes()
    path = compiled / FILE if kind == "report" else folder / f"{kind}.json"
    path.write_bytes(content)
    try:
        text = report_text(compiled, **({} if kind == "report" else {kind: path}))
    finally:
        (compiled / FILE).write_bytes(sound)
    text.encode()
    demand(text.startswith("<!DOCTYPE html>") and text.rstrip().endswith("</html>"), "the page is not whole")
    return True
