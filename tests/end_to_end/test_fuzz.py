"""Every fuzz target with a fixed set of cases, and the fuzzer itself."""

import importlib
import mmap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fuzz.damage import VALUES, damaged_json
from tests.support.fuzz.targets import TARGETS
from tools import fuzz
from vlqc.errors import Fault, UserError

pytestmark = pytest.mark.slow
MIN_CASES = 20_000


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_is_rejected_or_used(name: str, tmp_path: Path) -> None:
    """Catches a traceback, a hang, unbounded memory, or accepted invalid input in any parser."""
    counts = fuzz.run(name, TARGETS[name].examples, None, tmp_path)
    print(f"{name}: {counts[True]} accepted, {counts[False]} rejected")
    assert counts.total() >= TARGETS[name].examples, "hypothesis tried fewer cases than expected"
    assert counts[True] and counts[False], "a target that accepts or rejects all cases tests only half of the parser"


def test_there_are_enough_cases() -> None:
    """Catches a table with too few cases in all."""
    assert sum(target.examples for target in TARGETS.values()) >= MIN_CASES


def test_cases_leave_the_values_as_they_are() -> None:
    """Catches a change of one case that alters what later cases, and those of other targets, are made of."""
    known = repr(VALUES)

    @settings(max_examples=300)
    @given(damaged_json({"a": [1, 2]}, most=4))
    def attempt(case: object) -> None:
        pass

    attempt()
    assert repr(VALUES) == known


def test_cases_do_not_depend_on_imported_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches examples with constants of the modules that happen to be imported: a test then passes when run alone."""

    def examples() -> list[str]:
        seen: list[str] = []

        @settings(max_examples=500)
        @given(st.text())
        def attempt(text: str) -> None:
            seen.append(text)

        attempt()
        return seen

    before = examples()
    (tmp_path / "with_constants.py").write_text(f"WORDS = {[f'{number} words' for number in range(200)]}")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("with_constants")
    assert examples() == before


def hang(case: object, folder: Path) -> bool:
    while True:
        time.sleep(0.01)


def eat(case: object, folder: Path) -> bool:
    try:
        bytearray(4 * fuzz.BYTES_PER_CASE)
    except MemoryError as error:
        raise UserError(Fault("too large")) from error
    return True


def map_much(case: object, folder: Path) -> bool:
    mmap.mmap(-1, 4 * fuzz.BYTES_PER_CASE).close()
    return True


def test_the_fuzzer_detects_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches limits that are not enforced, and messages that are not checked: then all targets would pass."""
    monkeypatch.setattr(fuzz.bounded.__wrapped__, "__defaults__", (0.2, fuzz.BYTES_PER_CASE))  # type: ignore[attr-defined]
    with pytest.raises(fuzz.CaseTimeout):
        fuzz.run_case(hang, None, tmp_path)
    with pytest.raises(fuzz.CaseOutOfMemory):
        fuzz.run_case(eat, None, tmp_path)
    with pytest.raises(OSError):
        fuzz.run_case(map_much, None, tmp_path)

    def refuse(what: object, folder: Path) -> bool:
        error = UserError(Fault("x"))
        error.args = (what,)
        raise error

    for unprintable in ("\x1b[2J", "a\rb", ""):
        with pytest.raises(AssertionError, match="cannot be printed"):
            fuzz.run_case(refuse, unprintable, tmp_path)
    with pytest.raises(UnicodeEncodeError):
        fuzz.run_case(refuse, "\ud800", tmp_path)
    assert fuzz.run_case(refuse, "refused", tmp_path) is False
    with pytest.raises(KeyError):
        fuzz.run_case(lambda case, folder: {}[case], "anything else", tmp_path)
