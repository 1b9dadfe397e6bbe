"""vlqc.reporting.dumps.diff: differences between two dumps."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import vlqc
from tests.conftest import GOLDENS
from vlqc.cli.commands import app
from vlqc.errors import UserError
from vlqc.reporting.dumps.diff import diff_dumps, diff_stages

LOWERED = (GOLDENS / "after-lower-linears.vlqc").read_text(encoding="utf-8")
ROTATED = (GOLDENS / "after-rotate-heads.vlqc").read_text(encoding="utf-8")
DIGESTS = [found.start() for found in re.finditer(r"digest=", LOWERED)]


def test_every_kind_of_difference(golden: Callable[[str, str], None]) -> None:
    """Catches a difference that is not listed, or listed under the wrong site."""
    before, after = GOLDENS / "after-insert-observers.vlqc", GOLDENS / "after-lower-linears.vlqc"
    golden("changes.txt", "\n".join(diff_dumps(before, after).lines()) + "\n")


def test_differences_of_rotations(golden: Callable[[str, str], None]) -> None:
    """Catches a fact of a rotation that is not compared, or is listed under the wrong layer."""
    planned = (GOLDENS / "after-rotate-residual.vlqc").read_text(encoding="utf-8")
    other = ROTATED
    for old, new in (
        ("size=4 seed=0", "size=2 seed=7 keeps_mean"), ("    output 0\n", "    output 1\n"), ("-> 0.875", "-> 1.5"),
        ("at 8, 10", "at 4, 6"), ('    input "hidden_states"\n', ""), (' after "model.layers.0.norm1"', ""),
        ('    norm "model.layers.0.norm1"\n', ""), ('    rows "model.layers.0.attn.proj" at 0', '    table "t"'),
    ):  # fmt: skip
        assert old in other
        other = other.replace(old, new)
    changes = [diff_stages(*map(vlqc.parse_stage, texts)) for texts in ((planned, ROTATED), (ROTATED, other))]
    lines = ["\n  ".join([heading, *sentences]) for part in changes for heading, sentences in part.items()]
    golden("changes_of_rotations.txt", "\n".join(lines) + "\n")


@given(st.sampled_from(DIGESTS))
def test_every_digest_is_compared(place: int) -> None:
    """Catches a tensor, edge or observation whose values are not compared."""
    at = place + len("digest=")
    other = LOWERED[:at] + ("0" if LOWERED[at] != "0" else "1") + LOWERED[at + 1 :]
    line = LOWERED[LOWERED.rfind("\n", 0, place) + 1 :].split("\n")[0]
    (heading,) = diff_stages(vlqc.parse_stage(LOWERED), vlqc.parse_stage(other))
    assert heading.strip("%") in line.replace('.weight"', '"') or heading == "the graph"


@given(st.sampled_from([(text, number) for text in (LOWERED, ROTATED) for number in range(text.count("\n"))]))
def test_every_line_is_compared(place: tuple[str, int]) -> None:
    """Catches lines of the text that are not compared."""
    text, number = place
    lines = text.splitlines()
    without = "\n".join(lines[:number] + lines[number + 1 :])
    try:
        other = vlqc.parse_stage(without)
    except UserError:  # another line refers to it
        return
    assert diff_stages(vlqc.parse_stage(text), other) and diff_stages(other, vlqc.parse_stage(text))


def test_equal_texts_do_not_differ() -> None:
    """Catches differences of equal texts."""
    assert diff_stages(vlqc.parse_stage(LOWERED), vlqc.parse_stage(LOWERED)) == {}


def test_states_are_matched_by_pass(tmp_path: Path) -> None:
    """Catches states matched by number: all states after an added pass would differ."""
    for dump, names in (("a", ["smooth-m2", "lower-linears"]), ("b", ["smooth-m2", "shift-norms", "lower-linears"])):
        (tmp_path / dump / "s").mkdir(parents=True)
        for number, name in enumerate(names, 1):
            shutil.copy(GOLDENS / f"after-{name}.vlqc", tmp_path / dump / "s" / f"{number:02}-after-{name}.vlqc")
    difference = diff_dumps(tmp_path / "a", tmp_path / "b")
    assert [(state.title, state.only) for state in difference.states] == [("s/after-shift-norms", "second")]
    assert difference.equal == 2
    (state,) = diff_dumps(tmp_path / "a" / "s", tmp_path / "b" / "s").states
    assert state.title == "after-shift-norms"


def test_repeated_differences_are_counted(tmp_path: Path) -> None:
    """Catches the same differences listed again for every later pass."""
    for dump, text in (("a", LOWERED), ("b", LOWERED.replace("part=vision", "part=merger"))):
        (tmp_path / dump / "s").mkdir(parents=True)
        for name in ("01-after-x", "02-after-y"):
            (tmp_path / dump / "s" / f"{name}.vlqc").write_text(text)
    first, second = diff_dumps(tmp_path / "a", tmp_path / "b").states
    assert first.changes == {"the stage": ["part: vision -> merger"]} and (second.changes, second.repeated) == ({}, 1)


def test_exit_codes_are_those_of_diff(tmp_path: Path) -> None:
    """Catches equal exit codes for equal dumps, different dumps and errors."""
    run = CliRunner().invoke
    one, other = (str(GOLDENS / f"after-{name}.vlqc") for name in ("smooth-m2", "smooth-m4"))
    assert run(app, ["diff", one, one]).exit_code == 0
    assert run(app, ["diff", one, other]).exit_code == 1
    assert run(app, ["diff", one, str(tmp_path)]).exit_code == 2
    (tmp_path / "x.vlqc").write_bytes(b"\xff\xfe")
    assert run(app, ["diff", one, str(tmp_path / "x.vlqc")]).exit_code == 2


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_other_paths_are_refused(tmp_path: Path, name: str) -> None:
    """Catches two misspelt paths that are reported as equal."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is not a dump"):
        diff_dumps(tmp_path / name, tmp_path / name)
