"""vlqc.reporting.summary: the result as a table, on a console and in a notebook."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.support.tiny import TINY
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.options.options import Options
from vlqc.reporting.summary import Result, dtype_notes, placement_notes

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


@pytest.mark.parametrize(
    ("name", "target", "is_named"),
    [("w8a8", "both", False), ("a+b", "both", True), ("量化 (1)", "mindie", True), ("a+b", "vllm-ascend", False)],
)
def test_save_folders_that_an_engine_refuses(name: str, target: str, is_named: bool, tmp_path: Path) -> None:
    """Catches a result that is said to load from a folder whose name MindIE refuses."""
    options = Options.from_user(model_path=TINY, save_directory=tmp_path / name, target=target)
    notes = placement_notes(options)
    assert [str(tmp_path / name) in note and "MindIE" in note for note in notes] == [True] * is_named
    assert placement_notes(Options.without_saving(model_path=TINY, target=target)) == []


@pytest.mark.parametrize(
    ("stored", "said", "requested", "named"),
    [
        (torch.float32, "float32", "auto", "the checkpoint is float32"),
        (torch.bfloat16, "float16", "auto", "--dtype float16"),
        (torch.bfloat16, "bfloat16", "float16", "from bfloat16 to float16"),
        (torch.bfloat16, "bfloat16", "auto", ""),
        (torch.bfloat16, "bfloat16", "bfloat16", ""),
    ],
)
def test_notes_on_the_dtype(
    stored: torch.dtype, said: str, requested: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a result in another dtype than config.json or the weights have, without a word about it."""
    checkpoint = Checkpoint(TINY)
    monkeypatch.setattr(Checkpoint, "dtype", stored)
    checkpoint.source_config["torch_dtype"] = said
    (note,) = dtype_notes(Options.without_paths(dtype=requested), checkpoint) or [""]
    assert named in note and bool(named) == bool(note)
