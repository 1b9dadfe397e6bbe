"""vlqc.reporting.summary: the result as a table, on a console and in a notebook."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from vlqc.reporting.summary import Result

LONG_COMMAND = "serve " + "--flag value " * 20
EXPECTED = ("language", "W8A8", "4.0 KiB -> 1.0 KiB (25%)", "1:15", "3.0 MiB", "a <note>", "E 1.0", LONG_COMMAND)


@pytest.fixture
def result() -> Result:
    counts = {("language", "W8A8"): 7, ("vision", "FLOAT"): 3}
    notes = ["a <note>", "a warning\nwhy: a reason"]
    return Result(Path("out"), counts, 4096, 1024, 75.0, 3 << 20, notes, ["E 1.0"], [LONG_COMMAND])


def test_summary_on_a_console(result: Result) -> None:
    """Catches a summary without a figure, and a command that is wrapped or cut so that it cannot be copied."""
    shown = io.StringIO()
    result.render(Console(file=shown, width=60))
    lines = shown.getvalue().splitlines()
    assert all(any(text in line for line in lines) for text in EXPECTED)
    assert next(number for number, line in enumerate(lines) if "vision" in line) < next(
        number for number, line in enumerate(lines) if "language" in line
    )


def test_summary_in_a_notebook(result: Result) -> None:
    """Catches a cell that ends in the repr of a dataclass, and names that are interpreted as HTML."""
    bundle = result._repr_mimebundle_(include=[], exclude=[])
    assert set(bundle) == {"text/plain", "text/html"}
    for text in EXPECTED:
        assert text in bundle["text/plain"]
        assert text.replace("<", "&lt;").replace(">", "&gt;") in bundle["text/html"]


def test_dict_and_table_agree(result: Result) -> None:
    """Catches JSON that lacks a part of the table."""
    content = result.to_dict()
    assert [(row["part"], row["scheme"], row["linears"]) for row in content["counts"]] == [
        ("language", "W8A8", 7),
        ("vision", "FLOAT", 3),
    ]
    assert content["folder"] == "out" and content["bytes_after"] == 1024
