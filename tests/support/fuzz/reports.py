"""Damaged input files of `vlqc report`: vlqc_report.json, a verification, timings."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.support import synthetic_report
from tests.support.fuzz.damage import as_json, damaged_bytes, damaged_json
from tests.support.fuzz.files import put
from tests.support.fuzz.verdict import demand
from tests.support.report_pages import VERIFIED
from vlqc.reporting.html import report_text
from vlqc.reporting.html.schema import DATA_FILE


@cache
def report_files() -> dict[str, Any]:
    """The valid content of the three files, by kind."""
    data = synthetic_report.report_data(layers=1, blocks=1)
    return {
        "report": json.loads(data.model_dump_json()),
        "verification": VERIFIED,
        "timings": json.loads(synthetic_report.timings(data).model_dump_json()),
    }


def report_cases(kind: str) -> st.SearchStrategy[tuple[str, bytes]]:
    """(kind, content of the damaged file)"""
    valid = report_files()[kind]
    damaged = st.one_of(
        damaged_json(valid).map(as_json), damaged_json(valid).map(as_json), damaged_bytes(as_json(valid))
    )
    return damaged.map(lambda content: (kind, content))


def check_report(case: tuple[str, bytes], folder: Path) -> bool:
    """The page is complete and can be encoded; UserError is raised for invalid files."""
    kind, content = case
    compiled = folder / "out"
    if not compiled.is_dir():
        synthetic_report.write_folder(compiled, synthetic_report.report_data(layers=1, blocks=1))
    valid = (compiled / DATA_FILE).read_bytes()
    path = compiled / DATA_FILE if kind == "report" else folder / f"{kind}.json"
    put(path, content)
    try:
        text = report_text(compiled, **({} if kind == "report" else {kind: path}))
    finally:
        put(compiled / DATA_FILE, valid)
    text.encode()
    demand(text.startswith("<!DOCTYPE html>") and text.rstrip().endswith("</html>"), "the page is not whole")
    return True
