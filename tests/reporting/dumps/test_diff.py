"""What differs between two dumps, in words."""

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
from vlqc.reporting.dumps.comparison import compare
from vlqc.reporting.dumps.diff import changes

LOWERED = (GOLDENS / "after-lower-linears.vlqc").read_text(encoding="utf-8")
DIGESTS = [found.start() for found in re.finditer(r"digest=", LOWERED)]


def test_words_for_every_kind_of_change(golden: Callable[[str, str], None]) -> None:
    """Catches a change that a reader has to find in two long texts by himself, or that is told of the wrong site."""
    before, after = GOLDENS / "after-insert-observers.vlqc", GOLDENS / "after-lower-linears.vlqc"
    golden("changes.txt", "\n".join(compare(before, after).lines()) + "\n")


@given(st.sampled_from(DIGESTS))
def test_every_digest_that_differs_is_told(place: int) -> None:
    """Catches a tensor, an edge or an observation whose other values go unnoticed."""
    at = place + len("digest=")
    other = LOWERED[:at] + ("0" if LOWERED[at] != "0" else "1") + LOWERED[at + 1 :]
    line = LOWERED[LOWERED.rfind("\n", 0, place) + 1 :].split("\n")[0]
    (about,) = changes(vlqc.parse_stage(LOWERED), vlqc.parse_stage(other))
    assert about.strip("%") in line.replace('.weight"', '"') or about == "the graph"


@given(st.integers(0, LOWERED.count("\n") - 1))
def test_a_line_that_is_gone_is_told(number: int) -> None:
    """Catches lines of a text that the comparison does not look at."""
    lines = LOWERED.splitlines()
    without = "\n".join(lines[:number] + lines[number + 1 :])
    try:
        other = vlqc.parse_stage(without)
    except UserError:  # what it defines is used elsewhere
        return
    assert changes(vlqc.parse_stage(LOWERED), other) and changes(other, vlqc.parse_stage(LOWERED))


def test_equal_texts_do_not_differ() -> None:
    """Catches words about nothing."""
    assert changes(vlqc.parse_stage(LOWERED), vlqc.parse_stage(LOWERED)) == {}


def test_states_are_paired_by_pass(tmp_path: Path) -> None:
    """Catches dumps of two pipelines compared by number: then everything behind an added pass would differ."""
    for dump, names in (("a", ["smooth-m2", "lower-linears"]), ("b", ["smooth-m2", "shift-norms", "lower-linears"])):
        (tmp_path / dump / "s").mkdir(parents=True)
        for number, name in enumerate(names, 1):
            shutil.copy(GOLDENS / f"after-{name}.vlqc", tmp_path / dump / "s" / f"{number:02}-after-{name}.vlqc")
    comparison = compare(tmp_path / "a", tmp_path / "b")
    assert [(it.title, it.only) for it in comparison.states] == [("s/after-shift-norms", "second")]
    assert comparison.same == 2
    assert [it.title for it in compare(tmp_path / "a" / "s", tmp_path / "b" / "s").states] == ["after-shift-norms"]


def test_what_was_told_is_not_told_again(tmp_path: Path) -> None:
    """Catches a page of the same sentences for every pass behind the one that made the difference."""
    for dump, text in (("a", LOWERED), ("b", LOWERED.replace("part=vision", "part=merger"))):
        (tmp_path / dump / "s").mkdir(parents=True)
        for name in ("01-after-x", "02-after-y"):
            (tmp_path / dump / "s" / f"{name}.vlqc").write_text(text)
    first, second = compare(tmp_path / "a", tmp_path / "b").states
    assert first.found == {"the stage": ["part: vision -> merger"]} and (second.found, second.repeated) == ({}, 1)


def test_exit_codes_are_those_of_diff(tmp_path: Path) -> None:
    """Catches a script that cannot tell equal dumps from different ones, or from none."""
    run = CliRunner().invoke
    one, other = (str(GOLDENS / f"after-{name}.vlqc") for name in ("smooth-m2", "smooth-m4"))
    assert run(app, ["diff", one, one]).exit_code == 0
    assert run(app, ["diff", one, other]).exit_code == 1
    assert run(app, ["diff", one, str(tmp_path)]).exit_code == 2
    (tmp_path / "x.vlqc").write_bytes(b"\xff\xfe")
    assert run(app, ["diff", one, str(tmp_path / "x.vlqc")]).exit_code == 2


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_what_is_no_dump_is_refused(tmp_path: Path, name: str) -> None:
    """Catches two misspelt folders that count as equal."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is no dump"):
        compare(tmp_path / name, tmp_path / name)
