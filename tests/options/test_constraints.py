"""Valid and invalid combinations of options, and the flags that their errors name."""

import functools
import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.option_cases import W4A8, faults_of, two_folders
from vlqc.options import constraints
from vlqc.options.options import Options
from vlqc.targets import advice as engine_advice

CHOICES: dict[str, list[Any]] = {
    "w_bit": [8, 4], "is_dynamic": [False, True], "is_lowbit": [False, True], "open_outlier": [True, False],
    "act_method": [2, 1, 3], "group_size": [64, 128, 256, 512], "anti_method": ["m2", "m4", "none"],
    "mindie_format": [False, True], "target": [None, "vllm-ascend", "mindie@2.2", "both"],
    "w4a8_scope": ["engine", "all"], "anti_alpha": [None, 0.5], "shift": [False, True], "strict_target": [False, True],
}  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Any]:
    return two_folders(tmp_path)


def legal(
    *, w_bit: int, is_dynamic: bool, is_lowbit: bool, open_outlier: bool, act_method: int, group_size: int,
    anti_method: str, mindie_format: bool, target: str | None, w4a8_scope: str, anti_alpha: float | None, shift: bool,
    strict_target: bool,
) -> bool:  # fmt: skip
    """The table of schemes, targets and methods, independent of the product's rules."""
    match w_bit, is_dynamic, is_lowbit:
        case 8, False, False:
            scheme = "W8A8"
        case 8, True, False:
            scheme = "W8A8_DYNAMIC"
        case 4, True, True if not open_outlier and act_method != 3:
            scheme = "W4A8_DYNAMIC"
        case _:
            return False
    if mindie_format and target not in (None, "mindie@2.2"):
        return False
    mindie = mindie_format or target == "mindie@2.2"
    if target == "both" and scheme != "W8A8":
        return False
    if scheme == "W4A8_DYNAMIC":
        if mindie and (group_size == 512 or strict_target):
            return False
        if w4a8_scope == "all" and strict_target:
            return False
    elif w4a8_scope == "all":
        return False
    if anti_alpha is not None and anti_method != "m4":
        return False
    return not (shift and (scheme != "W8A8" or anti_method == "none" or target == "both"))


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"--(\w+)", text))


@functools.cache
def legal_combinations() -> frozenset[tuple[Any, ...]]:
    """Values in the order of CHOICES."""
    combinations = itertools.product(*CHOICES.values())
    return frozenset(values for values in combinations if legal(**dict(zip(CHOICES, values, strict=True))))


@functools.cache
def legal_rests(named: frozenset[str]) -> frozenset[tuple[Any, ...]]:
    """Values of the other options for which some values of the named options are a legal combination."""
    return frozenset(rest_of(values, named) for values in legal_combinations())


def rest_of(values: tuple[Any, ...], named: frozenset[str]) -> tuple[Any, ...]:
    return tuple(value for name, value in zip(CHOICES, values, strict=True) if name not in named)


@pytest.mark.slow
def test_every_combination(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an illegal combination that is accepted, a legal one that is rejected, and an error that does not name
    the flags to change: changing only these must make the combination legal. --scheme stands for the flags it sets."""
    monkeypatch.setattr(
        engine_advice, "incompatibilities", functools.cache(engine_advice.incompatibilities)
    )  # called thousands of times
    monkeypatch.setattr(constraints, "config_of", lambda model_path: {"model_type": "qwen2_5_vl"})
    counted = {True: 0, False: 0}
    for values in itertools.product(*CHOICES.values()):
        chosen = dict(zip(CHOICES, values, strict=True))
        _, faults = Options._checked({"model_path": ".", "save_directory": ".", **chosen})
        assert (values in legal_combinations()) == (not faults), (chosen, faults)
        named = frozenset(flag for fault in faults for flag in flags_in(fault.fix)) - {"scheme"}
        assert named <= set(CHOICES) and (not faults or rest_of(values, named) in legal_rests(named)), (chosen, faults)
        counted[not faults] += 1
    assert counted[True] + counted[False] == 2**9 * 3**2 * 4**2 and min(counted.values()) > 1000


@pytest.mark.parametrize("chosen", [{}, {"is_dynamic": True}, W4A8])
@pytest.mark.parametrize(("name", "value"), [("a_bit", 4), ("w_bit", 16), ("group_size", 32), ("act_method", 0)])
def test_no_combination_allows_another_value(
    folders: dict[str, Any], chosen: dict[str, Any], name: str, value: int
) -> None:
    """Catches a value of no scheme that is accepted together with the flags of a scheme."""
    (fault,) = faults_of(**folders, **{**chosen, name: value})
    assert f"--{name}" in fault


@pytest.mark.parametrize(
    ("chosen", "flags"),
    [
        ({"w_bit": 4}, ["--scheme w4a8_dynamic", "--w_bit 4"]),
        ({**W4A8, "is_lowbit": False}, ["--scheme w4a8_dynamic", "--is_lowbit False"]),
        ({**W4A8, "a_bit": 16}, ["--scheme w4a8_dynamic", "--a_bit 16"]),
        ({**W4A8, "act_method": 3}, ["--act_method 1"]),
        ({"is_lowbit": True}, ["--scheme w4a8_dynamic", "--is_lowbit True"]),
        ({"mindie_format": True, "target": "both"}, ["--mindie_format", "--target"]),
        ({"mindie_format": True, "target": "vllm-ascend@0.18"}, ["--mindie_format", "--target"]),
        ({**W4A8, "mindie_format": True, "group_size": 512}, ["--group_size 256"]),
        ({**W4A8, "target": "mindie@2.2", "group_size": 512}, ["--group_size 256"]),
        ({"is_dynamic": True, "target": "both"}, ["--target vllm-ascend", "--scheme w8a8", "--is_dynamic True"]),
        ({"anti_alpha": 0.5}, ["--anti_alpha", "--anti_method m4"]),
        ({"shift": True, "anti_method": "none"}, ["--shift", "--anti_method m2"]),
        (
            {"shift": True, "target": "vllm-ascend", "fallback": "auto", "max_bytes": 10**9},
            ["--shift", "--min_sqnr"],
        ),
        ({"shift": True, "is_dynamic": True}, ["--shift", "--scheme w8a8 instead of --is_dynamic True"]),
        ({"w4a8_scope": "all"}, ["--w4a8_scope", "--scheme w4a8_dynamic"]),
        ({**W4A8, "target": "mindie", "strict_target": True}, ["--strict_target", "--target", "--scheme"]),
        ({"float_as": "w8a16", "target": "both"}, ["remove --float_as w8a16", "--target vllm-ascend"]),
        ({"float_as": "w8a16", "mindie_format": True}, ["--target vllm-ascend instead of --mindie_format"]),
        ({"float_as": "w8a16", "target": "vllm-ascend@0.11"}, ["--float_as", "--target vllm-ascend"]),
        (
            {"float_as": "w8a16", "fallback": "auto", "max_bytes": 9},
            ["remove --float_as w8a16", "--target vllm-ascend"],
        ),
        ({"exclude": ["*.o_proj"], "include": ["lm_head", "*.o_proj"]}, ["--exclude", "--include"]),
    ],
)
def test_refused_combinations_name_the_flags_to_change(
    folders: dict[str, Any], chosen: dict[str, Any], flags: list[str]
) -> None:
    """Catches an error that does not name the flag to change."""
    (fault,) = faults_of(**folders, **chosen)
    assert all(flag in fault.split("what to do:")[1] for flag in flags)


@pytest.mark.parametrize("fallback", ["reference", "none", "auto"])
@pytest.mark.parametrize("min_sqnr", [None, 0, 30.5])
@pytest.mark.parametrize(("max_float_groups", "max_bytes"), [(None, None), (0, None), (4, None), (None, 9), (4, 9)])
def test_a_search_has_one_target(
    folders: dict[str, Any],
    fallback: str,
    min_sqnr: float | None,
    max_float_groups: int | None,
    max_bytes: int | None,
) -> None:
    """Catches a search without a goal, one with two, and a goal that is ignored because there is no search.

    Every error names all flags in use, zeros too, and its suggestion is valid.
    """
    given = {"min_sqnr": min_sqnr, "max_float_groups": max_float_groups, "max_bytes": max_bytes}
    flags = [f"--{name} {value}" for name, value in given.items() if value is not None]
    chosen = {**folders, "fallback": fallback, **given}
    if len(flags) == (1 if fallback == "auto" else 0):
        options = Options.from_user(**chosen)
        assert {name: getattr(options, name) for name in chosen if name not in folders} == {
            "fallback": fallback,
            **given,
        }
        return
    (fault,) = faults_of(**chosen)
    first, fix = fault.split("\n")[0], fault.split("what to do:")[1]
    assert all(flag in first for flag in (f"--fallback {fallback}", *flags))
    if fallback == "auto":
        assert "--min_sqnr" in fix and "--max_float_groups" in fix and "--max_bytes" in fix
        Options.from_user(**{**chosen, "min_sqnr": 30, "max_float_groups": None, "max_bytes": None})
    else:
        assert "--fallback auto" in fix
        assert len(flags) > 1 or Options.from_user(**{**chosen, "fallback": "auto"})


def test_a_target_that_cannot_be_read_has_no_echo(folders: dict[str, Any]) -> None:
    """Catches a second error about a missing goal when its value is illegal."""
    (fault,) = faults_of(**folders, fallback="auto", min_sqnr="many")
    assert fault.startswith("--min_sqnr many")
    (fault,) = faults_of(**folders, fallback="atuo", min_sqnr=30)
    assert fault.startswith("--fallback atuo")


def test_all_combinations_at_once(folders: dict[str, Any]) -> None:
    """Catches an error that stops at the first fault, and rules that repeat the fault of an illegal value."""
    faults = faults_of(
        **folders, is_lowbit=True, mindie_format=True, target="both", anti_alpha=1, w4a8_scope="all",
        fallback="none", min_sqnr=20, max_float_groups=3,
    )  # fmt: skip
    assert [fault.split("\n")[0] for fault in faults] == [
        "--is_lowbit True",
        "--mindie_format with --target both",
        "--target both",
        "--anti_alpha 1 with --anti_method m2",
        "--min_sqnr 20 with --max_float_groups 3 with --fallback none",
    ]
    faults = faults_of(**folders, w_bit=5, is_lowbit=True, w4a8_scope="all", anti_alpha=1)
    assert [fault.split("\n")[0] for fault in faults] == ["--w_bit 5", "--anti_alpha 1 with --anti_method m2"]


def test_strict_target_knows_versions(folders: dict[str, Any]) -> None:
    """Catches --strict_target that rejects a scheme that loads, accepts one that does not, or ignores --exclude."""
    strict = {**folders, **W4A8, "strict_target": True}
    assert Options.from_user(**strict, target="vllm-ascend@0.18").strict_target
    (fault,) = faults_of(**strict, target="vllm-ascend@0.27")
    assert "0.27" in fault and "W4A8_DYNAMIC" in fault
    assert Options.from_user(**strict, w4a8_scope="all", exclude=["visual.*", "*.[qkv]_proj"]).exclude
