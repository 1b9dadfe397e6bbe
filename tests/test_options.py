"""vlqc.options and vlqc.folders: names and defaults that command lines rely on, and one clear answer to every slip."""

import functools
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlqc import engine_advice
from vlqc.engines import Scheme
from vlqc.errors import UserError
from vlqc.options import PANELS, Options, extra_of

# The reference script's parameters: a command line written for it has to work unchanged.
SEED_DEFAULTS = {
    "calib_images": Path("../calibImages"), "part_file_size": None, "w_bit": 8, "a_bit": 8, "device_type": "cpu",
    "trust_remote_code": False, "anti_method": "m2", "act_method": 2, "open_outlier": True, "is_dynamic": False,
    "is_lowbit": False, "group_size": 64, "mindie_format": False,
}  # fmt: skip
OUR_DEFAULTS = {
    "target": None, "strict_target": False, "anti_alpha": None, "shift": False, "modality_balance": True,
    "weight_method": "auto", "propagate": "float", "fallback": "seed", "min_sqnr": None, "max_float_groups": None,
    "exclude": (), "include": (), "w4a8_scope": "engine", "max_samples": None, "memory_budget": None,
    "seed": 0, "max_tokens": None, "overwrite": False, "skip_bad_images": False, "dump_ir": None, "pipeline": None,
    "timings": None, "resume": False, "start_over": False, "dump_stages": (), "dump_formats": "text",
    "print_after": None,
}  # fmt: skip
W4A8 = {"w_bit": 4, "is_dynamic": True, "is_lowbit": True, "open_outlier": False, "act_method": 1}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "model").mkdir()
    return {"model_path": tmp_path / "model", "save_directory": tmp_path / "save"}


def faults_of(**given: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        Options.from_user(**given)
    return [str(fault) for fault in caught.value.faults]


def test_names_and_defaults(folders: dict[str, Any]) -> None:
    """Catches a renamed option or a changed default: old command lines would break or mean something else."""
    options = Options.from_user(**folders)
    assert {name: getattr(options, name) for name in SEED_DEFAULTS} == SEED_DEFAULTS
    assert {name: getattr(options, name) for name in OUR_DEFAULTS} == OUR_DEFAULTS
    assert set(Options.model_fields) == {*folders, *SEED_DEFAULTS, *OUR_DEFAULTS}
    assert options.scheme is Scheme.W8A8 and options.engine_target == "both"


def test_every_option_has_help_and_a_panel() -> None:
    """Catches an option that --help cannot explain."""
    assert all(field.description and extra_of(field)["panel"] in PANELS for field in Options.model_fields.values())


def test_text_reads_like_values(folders: dict[str, Any]) -> None:
    """Catches text from a command line being taken for something else than the value it spells."""
    text = {"w-bit": "8", "act_method": "1", "part-file-size": "4", "anti_method": "none", "open_outlier": "False"}
    from_text = Options.from_user(**{name: str(path) for name, path in folders.items()}, **text)
    values = {"w_bit": 8, "act_method": 1, "part_file_size": 4, "anti_method": "none", "open_outlier": False}
    assert from_text == Options.from_user(**folders, **values)
    assert Options.from_user(**folders, part_file_size="None").part_file_size is None
    text = {"anti-method": "m4", "anti_alpha": "0.75", "max-samples": "30", "seed": "0", "max_tokens": "none"}
    values = {"anti_method": "m4", "anti_alpha": 0.75, "max_samples": 30}
    assert Options.from_user(**folders, **text) == Options.from_user(**folders, **values)


@pytest.mark.parametrize("word", ["True", "true", "1", "yes", "YES", True])
def test_words_for_true(folders: dict[str, Any], word: object) -> None:
    """Catches a spelling of True that is refused or taken for False."""
    assert Options.from_user(**folders, trust_remote_code=word).trust_remote_code is True


@pytest.mark.parametrize("word", ["False", "false", "0", "no", False])
def test_words_for_false(folders: dict[str, Any], word: object) -> None:
    """Catches the classic `bool("False")`."""
    assert Options.from_user(**folders, open_outlier=word).open_outlier is False


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("w_bit", "7", "--w_bit is 4 or 8"),
        ("w_bit", True, "--w_bit is 4 or 8"),
        ("w_bit", 8.5, "--w_bit is 4 or 8"),
        ("a_bit", 4, "--a_bit is 8"),
        ("act_method", "histogram", "1, 2 or 3"),
        ("group_size", 100, "64, 128, 256 or 512"),
        ("anti_method", "m3", "did you mean m"),
        ("device_type", "nppu", "did you mean npu"),
        ("target", "mindi", "did you mean mindie"),
        ("target", "vllm-ascend@new", "no version of vLLM Ascend"),
        ("target", "both@2", "without a version"),
        ("target", 2, "not text"),
        ("w4a8_scope", "al", "did you mean all"),
        ("modality_balance", "both", "neither True nor False"),
        ("weight_method", "gtpq", "did you mean gptq"),
        ("propagate", "quantised", "did you mean quantized"),
        ("fallback", "atuo", "did you mean auto"),
        ("min_sqnr", -1, "from 0 to 100"),
        ("min_sqnr", 101, "from 0 to 100"),
        ("min_sqnr", "inf", "from 0 to 100"),
        ("max_float_groups", -1, "0 or more"),
        ("max_float_groups", 2.5, "0 or more"),
        ("anti_alpha", 1.5, "from 0 to 1"),
        ("anti_alpha", "nan", "from 0 to 1"),
        ("anti_alpha", True, "from 0 to 1"),
        ("max_samples", 0, "above 0"),
        ("max_tokens", "many", "above 0"),
        ("seed", -1, "0 or more"),
        ("part_file_size", 0, "above 0"),
        ("part_file_size", "-1", "above 0"),
        ("part_file_size", "4.5", "above 0"),
        ("is_dynamic", "maybe", "neither True nor False"),
        ("dump_ir", "", "not the name"),
        ("calib_images", 3, "not the name"),
        ("pipeline", 3, "not text"),
    ],
)
def test_one_bad_value(folders: dict[str, Any], name: str, value: object, words: str) -> None:
    """Catches a bad value that passes, or an answer that names neither the flag nor what is allowed."""
    (fault,) = faults_of(**folders, **{name: value})
    assert f"--{name}" in fault and words in fault


def test_all_faults_at_once(tmp_path: Path) -> None:
    """Catches answers one at a time, which make the user run the command again and again."""
    faults = faults_of(modl_path="x", w_bit=5, is_lowbit="what", save_directory=tmp_path / "a" / "b", part_file_size=0)
    assert [fault.split("\n")[0] for fault in faults] == [
        "there is no option --modl_path",
        "--model_path is missing",
        "--part_file_size 0",
        "--w_bit 5",
        "--is_lowbit what",
    ]
    assert "did you mean --model_path" in faults[0]


def test_bad_values_do_not_hide_bad_paths(tmp_path: Path) -> None:
    """Catches path rules that only run once the values are right."""
    faults = faults_of(model_path=tmp_path / "absent", save_directory=tmp_path / "save", w_bit=5)
    assert len(faults) == 2 and "no such folder" in faults[1]


# ---- combinations ----------------------------------------------------------------------------------------------------

CHOICES: dict[str, list[Any]] = {
    "w_bit": [8, 4], "is_dynamic": [False, True], "is_lowbit": [False, True], "open_outlier": [True, False],
    "act_method": [2, 1, 3], "group_size": [64, 128, 256, 512], "anti_method": ["m2", "m4", "none"],
    "mindie_format": [False, True], "target": [None, "vllm-ascend", "mindie@2.2", "both"],
    "w4a8_scope": ["engine", "all"], "anti_alpha": [None, 0.5], "shift": [False, True], "strict_target": [False, True],
}  # fmt: skip


def legal(
    *, w_bit: int, is_dynamic: bool, is_lowbit: bool, open_outlier: bool, act_method: int, group_size: int,
    anti_method: str, mindie_format: bool, target: str | None, w4a8_scope: str, anti_alpha: float | None, shift: bool,
    strict_target: bool,
) -> bool:  # fmt: skip
    """The table of schemes, targets and methods, written out once more."""
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
    """What the options that are not named may be, so that some values of the named ones make a legal combination."""
    return frozenset(rest_of(values, named) for values in legal_combinations())


def rest_of(values: tuple[Any, ...], named: frozenset[str]) -> tuple[Any, ...]:
    return tuple(value for name, value in zip(CHOICES, values, strict=True) if name not in named)


def test_every_combination(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an illegal combination that is compiled, a legal one that is refused, and a refusal that does not name
    the flags to change: with them alone the combination must become legal."""
    monkeypatch.setattr(
        engine_advice, "cannot_load", functools.cache(engine_advice.cannot_load)
    )  # asked thousands of times
    counted = {True: 0, False: 0}
    for values in itertools.product(*CHOICES.values()):
        chosen = dict(zip(CHOICES, values, strict=True))
        _, faults = Options._checked({"model_path": ".", "save_directory": ".", **chosen})
        assert (values in legal_combinations()) == (not faults), (chosen, faults)
        named = frozenset(flag for fault in faults for flag in flags_in(fault.fix))
        assert named <= set(CHOICES) and (not faults or rest_of(values, named) in legal_rests(named)), (chosen, faults)
        counted[not faults] += 1
    assert counted[True] + counted[False] == 2**9 * 3**2 * 4**2 and min(counted.values()) > 1000


@pytest.mark.parametrize("chosen", [{}, {"is_dynamic": True}, W4A8])
@pytest.mark.parametrize(("name", "value"), [("a_bit", 4), ("w_bit", 16), ("group_size", 32), ("act_method", 0)])
def test_no_combination_allows_another_value(
    folders: dict[str, Any], chosen: dict[str, Any], name: str, value: int
) -> None:
    """Catches a value that no scheme knows and that passes beside the right flags."""
    (fault,) = faults_of(**folders, **{**chosen, name: value})
    assert f"--{name}" in fault


@pytest.mark.parametrize(
    ("chosen", "flags"),
    [
        ({"w_bit": 4}, ["--is_dynamic True", "--is_lowbit True", "--open_outlier False", "--w_bit 8"]),
        ({**W4A8, "is_lowbit": False}, ["--is_lowbit True"]),
        ({**W4A8, "act_method": 3}, ["--act_method 1"]),
        ({"is_lowbit": True}, ["--is_lowbit False", "--w_bit 4"]),
        ({"mindie_format": True, "target": "both"}, ["--mindie_format", "--target"]),
        ({"mindie_format": True, "target": "vllm-ascend@0.18"}, ["--mindie_format", "--target"]),
        ({**W4A8, "mindie_format": True, "group_size": 512}, ["--group_size 256"]),
        ({**W4A8, "target": "mindie@2.2", "group_size": 512}, ["--group_size 256"]),
        ({"is_dynamic": True, "target": "both"}, ["--target vllm-ascend", "--is_dynamic False"]),
        ({"anti_alpha": 0.5}, ["--anti_alpha", "--anti_method m4"]),
        ({"shift": True, "anti_method": "none"}, ["--shift", "--anti_method m2"]),
        ({"shift": True, "is_dynamic": True}, ["--shift", "--is_dynamic False"]),
        ({"w4a8_scope": "all"}, ["--w4a8_scope", "--w_bit 4"]),
        ({**W4A8, "target": "mindie", "strict_target": True}, ["--strict_target", "--target", "--w_bit"]),
        ({"exclude": ["*.o_proj"], "include": ["lm_head", "*.o_proj"]}, ["--exclude", "--include"]),
    ],
)
def test_refused_combinations_name_the_flags_to_change(
    folders: dict[str, Any], chosen: dict[str, Any], flags: list[str]
) -> None:
    """Catches a refusal that leaves the user to guess which flag to change."""
    (fault,) = faults_of(**folders, **chosen)
    assert all(flag in fault.split("what to do:")[1] for flag in flags)


@pytest.mark.parametrize("fallback", ["seed", "none", "auto"])
@pytest.mark.parametrize("min_sqnr", [None, 0, 30.5])
@pytest.mark.parametrize("max_float_groups", [None, 0, 4])
def test_a_search_has_one_target(
    folders: dict[str, Any], fallback: str, min_sqnr: float | None, max_float_groups: int | None
) -> None:
    """Catches a search without an end, one with two, and a target that is silently forgotten as nobody searches.

    Every refusal names all flags that were given, zeros too, and what it advises is accepted.
    """
    given = {"min_sqnr": min_sqnr, "max_float_groups": max_float_groups}
    flags = [f"--{name} {value}" for name, value in given.items() if value is not None]
    chosen = {**folders, "fallback": fallback, **given}
    if len(flags) == (1 if fallback == "auto" else 0):
        options = Options.from_user(**chosen)
        assert (options.fallback, options.min_sqnr, options.max_float_groups) == (fallback, min_sqnr, max_float_groups)
        return
    (fault,) = faults_of(**chosen)
    first, fix = fault.split("\n")[0], fault.split("what to do:")[1]
    assert all(flag in first for flag in (f"--fallback {fallback}", *flags))
    if fallback == "auto":
        assert "--min_sqnr" in fix and "--max_float_groups" in fix
        Options.from_user(**{**chosen, "min_sqnr": 30, "max_float_groups": None})
    else:
        assert "--fallback auto" in fix
        assert len(flags) == 2 or Options.from_user(**{**chosen, "fallback": "auto"})


def test_a_target_that_cannot_be_read_has_no_echo(folders: dict[str, Any]) -> None:
    """Catches a search called aimless because its target was misspelt: one mistake, one answer."""
    (fault,) = faults_of(**folders, fallback="auto", min_sqnr="many")
    assert fault.startswith("--min_sqnr many")
    (fault,) = faults_of(**folders, fallback="atuo", min_sqnr=30)
    assert fault.startswith("--fallback atuo")


def test_all_combinations_at_once(folders: dict[str, Any]) -> None:
    """Catches answers one at a time, and rules that echo a value which could not be read."""
    faults = faults_of(
        **folders, is_lowbit=True, mindie_format=True, target="both", anti_alpha=1, w4a8_scope="all",
        fallback="none", min_sqnr=20, max_float_groups=3,
    )  # fmt: skip
    assert [fault.split("\n")[0] for fault in faults] == [
        "--is_lowbit True",
        "--mindie_format with --target both",
        "--anti_alpha 1 with --anti_method m2",
        "--w4a8_scope all with --w_bit 8",
        "--min_sqnr 20 with --max_float_groups 3 with --fallback none",
    ]
    faults = faults_of(**folders, w_bit=5, is_lowbit=True, w4a8_scope="all", anti_alpha=1)
    assert [fault.split("\n")[0] for fault in faults] == ["--w_bit 5", "--anti_alpha 1 with --anti_method m2"]


def test_strict_target_knows_versions(folders: dict[str, Any]) -> None:
    """Catches --strict_target that refuses what loads, lets pass what does not, or judges an exclusion unseen."""
    strict = {**folders, **W4A8, "strict_target": True}
    assert Options.from_user(**strict, target="vllm-ascend@0.18").strict_target
    (fault,) = faults_of(**strict, target="vllm-ascend@0.27")
    assert "0.27" in fault and "W4A8_DYNAMIC" in fault
    assert Options.from_user(**strict, w4a8_scope="all", exclude=["visual.*", "*.[qkv]_proj"]).exclude


@pytest.mark.parametrize(
    ("chosen", "scheme", "target"),
    [
        ({}, Scheme.W8A8, "both"),
        ({"is_dynamic": True}, Scheme.W8A8_DYNAMIC, "vllm-ascend"),
        (W4A8, Scheme.W4A8_DYNAMIC, "vllm-ascend"),
        ({"mindie_format": True}, Scheme.W8A8, "mindie"),
        ({"is_dynamic": True, "mindie_format": True}, Scheme.W8A8_DYNAMIC, "mindie"),
        ({**W4A8, "target": "vLLM-Ascend@0.18"}, Scheme.W4A8_DYNAMIC, "vllm-ascend@0.18"),
        ({"target": "mindie@2.2", "mindie_format": True}, Scheme.W8A8, "mindie@2.2"),
    ],
)
def test_scheme_and_target(folders: dict[str, Any], chosen: dict[str, Any], scheme: Scheme, target: str) -> None:
    """Catches flags that select another scheme or engine than the table says."""
    options = Options.from_user(**folders, **chosen)
    assert (options.scheme, options.engine_target) == (scheme, target)


def test_patterns(folders: dict[str, Any]) -> None:
    """Catches one pattern that is taken for its letters, lost order, and patterns that no pipeline text could carry."""
    assert Options.from_user(**folders, exclude="*.o_proj").exclude == ("*.o_proj",)
    several = ["b*", "a?", "b*", "[qk]"]
    assert Options.from_user(**folders, include=several).include == ("b*", "a?", "[qk]")
    assert Options.from_user(**folders, include=()).include == ()
    for bad in ("a,b", "a;b", "a b", "{a}", ""):
        (fault,) = faults_of(**folders, exclude=["fine", bad])
        assert "--exclude" in fault.split("what to do")[0] and repr(bad) in fault
    (fault,) = faults_of(**folders, include=[3])
    assert "list of patterns" in fault


def test_without_paths() -> None:
    """Catches `passes --explain` asking for folders that it does not need."""
    assert Options.without_paths(act_method="1").act_method == 1
    with pytest.raises(UserError):
        Options.without_paths(act_method="9")


@given(
    st.dictionaries(st.sampled_from([*Options.model_fields, "x"]), st.text() | st.integers() | st.none(), max_size=6)
)
def test_nothing_but_a_user_error(given_options: dict[str, Any]) -> None:
    """Catches any input for which pydantic or the file system raises something raw."""
    try:
        Options.from_user(**given_options)
    except UserError as error:
        assert error.faults


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_model_folder_must_be_there(tmp_path: Path) -> None:
    """Catches a misspelt model folder that is only noticed later, and a hub name taken for a folder."""
    (tmp_path / "Qwen2.5-VL-7B").mkdir()
    (tmp_path / "file").write_text("")
    save = {"save_directory": tmp_path / "save"}
    (fault,) = faults_of(model_path=tmp_path / "Qwen2.5-VL-7b", **save)
    assert "did you mean Qwen2.5-VL-7B?" in fault
    (fault,) = faults_of(model_path=tmp_path / "file", **save)
    assert "it is a file" in fault
    (fault,) = faults_of(model_path="Qwen/Qwen2.5-VL-7B-Instruct", **save)
    assert "download the model first" in fault


def test_save_folder_apart_from_model_folder(tmp_path: Path) -> None:
    """Catches a run that would write into, or replace, the model folder, also through links and `..`."""
    model = tmp_path / "above" / "model"
    model.mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    for save, words in (
        (model, "model folder itself"),
        (tmp_path / "link", "model folder itself"),
        (model / "x" / ".." / ".." / "model", "model folder itself"),
        (model / "quantized", "lies inside the model folder"),
        (tmp_path / "link" / "quantized", "lies inside the model folder"),
        (tmp_path / "above", "lies inside it"),
    ):
        (fault,) = faults_of(model_path=model, save_directory=save, overwrite=True)
        assert words in fault, save


def test_save_folder_in_use(folders: dict[str, Any]) -> None:
    """Catches files of the user that are overwritten without --overwrite."""
    save: Path = folders["save_directory"]
    save.mkdir()
    assert Options.from_user(**folders).save_directory == save
    (save / "thesis.txt").write_text("")
    (fault,) = faults_of(**folders)
    assert "not empty" in fault and "--overwrite" in fault
    assert Options.from_user(**folders, overwrite=True).overwrite
    (fault,) = faults_of(**{**folders, "save_directory": save / "thesis.txt"}, overwrite=True)
    assert "a file of that name exists" in fault
    (fault,) = faults_of(**{**folders, "save_directory": save / "thesis.txt" / "deeper"})
    assert "thesis.txt is a file" in fault


def test_folders_out_of_bounds(folders: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches --overwrite replacing the home folder, the current folder, or one above."""
    (tmp_path / "home" / "me").mkdir(parents=True)
    (tmp_path / "work" / "here").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    monkeypatch.chdir(tmp_path / "work" / "here")
    for save in (tmp_path / "home", "~", ".", "..", "/"):
        faults = faults_of(model_path=folders["model_path"], save_directory=save, overwrite=True)
        assert "replaced as a whole" in faults[0] or "lies inside it" in faults[0], save


def test_dump_and_pictures_outside_the_save_folder(folders: dict[str, Any], tmp_path: Path) -> None:
    """Catches dumps inside the finished checkpoint or the source, and pictures deleted by --overwrite."""
    save, model = folders["save_directory"], folders["model_path"]
    (fault,) = faults_of(**folders, dump_ir=save / "dump")
    assert "--dump_ir" in fault and "save folder" in fault
    (fault,) = faults_of(**folders, dump_ir=model / "dump")
    assert "--dump_ir" in fault and "only reads" in fault
    (fault,) = faults_of(**folders, calib_images=save / "pictures")
    assert "--calib_images" in fault and "replaced as a whole" in fault
    (tmp_path / "taken").write_text("")
    (fault,) = faults_of(**folders, dump_ir=tmp_path / "taken")
    assert "it is a file" in fault


def test_unreadable_names(folders: dict[str, Any], tmp_path: Path) -> None:
    """Catches a raw OSError for a name too long or a circle of links."""
    (fault,) = faults_of(**{**folders, "save_directory": tmp_path / ("x" * 300)})
    assert "cannot be looked at" in fault
    (tmp_path / "round").symlink_to(tmp_path / "about")
    (tmp_path / "about").symlink_to(tmp_path / "round")
    faults = faults_of(**{**folders, "save_directory": tmp_path / "round"})
    assert "round" in faults[0]
