"""The options table: names and defaults that command lines rely on, and the error of every illegal value."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.option_cases import W4A8, faults_of, two_folders
from vlqc.errors import UserError
from vlqc.options.fields import PANELS, option_info
from vlqc.options.options import Options
from vlqc.targets.schemes import Scheme

# The parameters of the original script, whose command lines must work unchanged.
REFERENCE_DEFAULTS = {
    "calib_images": Path("../calibImages"), "part_file_size": None, "w_bit": 8, "a_bit": 8, "device_type": "cpu",
    "trust_remote_code": False, "anti_method": "m2", "act_method": 2, "open_outlier": True, "is_dynamic": False,
    "is_lowbit": False, "group_size": 64, "mindie_format": False,
}  # fmt: skip
OUR_DEFAULTS = {
    "target": None, "strict_target": False, "anti_alpha": None, "shift": False, "modality_balance": True,
    "weight_method": "auto", "propagate": "float", "fallback": "reference", "min_sqnr": None, "max_float_groups": None,
    "max_bytes": None,
    "exclude": (), "include": (), "w4a8_scope": "engine", "max_samples": None, "memory_budget": None,
    "seed": 0, "max_tokens": None, "overwrite": False, "skip_bad_images": False, "dump_ir": None, "pipeline": None,
    "timings": None, "resume": False, "start_over": False, "dump_stages": (), "dump_formats": "text",
    "print_after": None, "family": None, "rotate": "auto", "dtype": "auto", "follow_links": False,
    "lora": (), "max_frames": None, "kv_cache": "none", "scheme": Scheme.W8A8,
    "float_as": Scheme.FLOAT,
}  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Any]:
    return two_folders(tmp_path)


def test_names_and_defaults(folders: dict[str, Any]) -> None:
    """Catches a renamed option or a changed default."""
    options = Options.from_user(**folders)
    assert {name: getattr(options, name) for name in REFERENCE_DEFAULTS} == REFERENCE_DEFAULTS
    assert {name: getattr(options, name) for name in OUR_DEFAULTS} == OUR_DEFAULTS
    assert set(Options.model_fields) == {*folders, *REFERENCE_DEFAULTS, *OUR_DEFAULTS}
    assert options.scheme is Scheme.W8A8 and options.engine_target == "both"


def test_every_option_has_help_and_a_panel() -> None:
    """Catches an option without help text, panel or legal values, which help and documentation are generated from."""
    described = [option_info(name) for name in Options.model_fields]
    assert all(info.help.endswith(".") and info.legal and info.metavar for info in described)
    assert all(info.panel in PANELS for info in described)


def test_legal_values_in_words() -> None:
    """Catches bounds or choices that the documentation states differently from what is checked."""
    legal = {name: option_info(name).legal for name in ("a_bit", "group_size", "max_samples", "seed", "min_sqnr")}
    assert legal == {
        "a_bit": "8 or 16",
        "group_size": "64, 128, 256 or 512",
        "max_samples": "an integer >= 1",
        "seed": "an integer >= 0",
        "min_sqnr": "a number from 0 to 100",
    }


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (123, 123), ("123", 123), ("123B", 123), ("5.5GB", 5_500_000_000), ("5.5 GiB", 11 * 2**29),
        ("0.1kib", 102), ("1TiB", 2**40), ("none", None),
    ],
)  # fmt: skip
def test_sizes_with_units(folders: dict[str, Any], value: object, size: int | None) -> None:
    """Catches a unit that is off by 2.4 % or more, and binary fractions of decimal numbers."""
    options = Options.from_user(**folders, fallback="auto", max_bytes=value, min_sqnr=9 if size is None else None)
    assert options.max_bytes == size


def test_text_reads_like_values(folders: dict[str, Any]) -> None:
    """Catches text from a command line that is read as another value."""
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
    """Catches a spelling of True that is rejected or read as False."""
    assert Options.from_user(**folders, trust_remote_code=word).trust_remote_code is True


@pytest.mark.parametrize("word", ["False", "false", "0", "no", False])
def test_words_for_false(folders: dict[str, Any], word: object) -> None:
    """Catches the classic `bool("False")`."""
    assert Options.from_user(**folders, open_outlier=word).open_outlier is False


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("w_bit", "7", "4 or 8"),
        ("w_bit", True, "4 or 8"),
        ("w_bit", 8.5, "4 or 8"),
        ("act_method", True, "1, 2 or 3"),
        ("max_samples", True, "an integer >= 1"),
        ("max_samples", 10**18, "an integer >= 1"),
        ("max_samples", "9" * 5000, "an integer >= 1"),
        ("a_bit", 4, "choose 8 or 16"),
        ("act_method", "histogram", "1, 2 or 3"),
        ("group_size", 100, "64, 128, 256 or 512"),
        ("anti_method", "m3", "did you mean m"),
        ("device_type", "nppu", "did you mean npu"),
        ("target", "mindi", "did you mean mindie"),
        ("target", "vllm-ascend@new", "not a version of vLLM Ascend"),
        ("target", "both@2", "without a version"),
        ("target", 2, "vllm-ascend, mindie or both"),
        ("w4a8_scope", "al", "did you mean all"),
        ("modality_balance", "both", "True or False"),
        ("weight_method", "gtpq", "did you mean gptq"),
        ("propagate", "quantised", "did you mean quantized"),
        ("fallback", "atuo", "did you mean auto"),
        ("min_sqnr", -1, "from 0 to 100"),
        ("min_sqnr", 101, "from 0 to 100"),
        ("min_sqnr", "inf", "from 0 to 100"),
        ("max_float_groups", -1, "an integer >= 0"),
        ("max_float_groups", 2.5, "an integer >= 0"),
        ("max_bytes", "5.5", "5.5GiB"),
        ("max_bytes", "5 GiBs", "5.5GiB"),
        ("max_bytes", "-5GB", "5.5GiB"),
        ("max_bytes", 0, "5.5GiB"),
        ("max_bytes", True, "5.5GiB"),
        ("max_bytes", 5.5e9, "5.5GiB"),
        ("anti_alpha", 1.5, "from 0 to 1"),
        ("anti_alpha", "nan", "from 0 to 1"),
        ("anti_alpha", True, "from 0 to 1"),
        ("max_samples", 0, "an integer >= 1"),
        ("max_tokens", "many", "an integer >= 1"),
        ("seed", -1, "an integer >= 0"),
        ("part_file_size", 0, "an integer >= 1"),
        ("part_file_size", "-1", "an integer >= 1"),
        ("part_file_size", "4.5", "an integer >= 1"),
        ("is_dynamic", "maybe", "True or False"),
        ("float_as", "w8a8", "it quantizes inputs"),
        ("float_as", "w8a61", "did you mean w8a16"),
        ("dump_ir", "", "path"),
        ("calib_images", 3, "path"),
        ("pipeline", 3, "text"),
        ("dump_formats", "text,xml", "'xml'"),
    ],
)
def test_one_bad_value(folders: dict[str, Any], name: str, value: object, words: str) -> None:
    """Catches an illegal value that is accepted, or an error without the flag and the legal values."""
    (fault,) = faults_of(**folders, **{name: value})
    assert f"--{name}" in fault and words in fault


def test_all_faults_at_once(tmp_path: Path) -> None:
    """Catches an error that stops at the first fault."""
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
    """Catches paths that are checked only if all values are legal."""
    faults = faults_of(model_path=tmp_path / "absent", save_directory=tmp_path / "save", w_bit=5)
    assert len(faults) == 2 and "no such folder" in faults[1]


@pytest.mark.parametrize(
    ("chosen", "scheme", "target"),
    [
        ({}, Scheme.W8A8, "both"),
        ({"is_dynamic": True}, Scheme.W8A8_DYNAMIC, "vllm-ascend"),
        (W4A8, Scheme.W4A8_DYNAMIC, "vllm-ascend"),
        ({"mindie_format": True}, Scheme.W8A8, "mindie"),
        ({"float_as": "W8A16"}, Scheme.W8A8, "vllm-ascend"),
        ({"scheme": "w8a8-mix"}, Scheme.W8A8_MIX, "vllm-ascend"),
        ({"is_dynamic": True, "mindie_format": True}, Scheme.W8A8_DYNAMIC, "mindie"),
        ({**W4A8, "target": "vLLM-Ascend@0.18"}, Scheme.W4A8_DYNAMIC, "vllm-ascend@0.18"),
        ({"target": "mindie@2.2", "mindie_format": True}, Scheme.W8A8, "mindie@2.2"),
    ],
)
def test_scheme_and_target(folders: dict[str, Any], chosen: dict[str, Any], scheme: Scheme, target: str) -> None:
    """Catches flags that select another scheme or engine than documented."""
    options = Options.from_user(**folders, **chosen)
    assert (options.scheme, options.engine_target) == (scheme, target)


def test_patterns(folders: dict[str, Any]) -> None:
    """Catches a pattern that is split into characters, lost order, and patterns that pipeline syntax cannot hold."""
    assert Options.from_user(**folders, exclude="*.o_proj").exclude == ("*.o_proj",)
    several = ["b*", "a?", "b*", "[qk]"]
    assert Options.from_user(**folders, include=several).include == ("b*", "a?", "[qk]")
    assert Options.from_user(**folders, include=()).include == ()
    for bad in ("a,b", "a;b", "a b", "{a}", ""):
        (fault,) = faults_of(**folders, exclude=["fine", bad])
        assert "--exclude" in fault.split("what to do")[0] and repr(bad) in fault
    (fault,) = faults_of(**folders, include=[3])
    assert "--include 3" in fault and "glob" in fault


def test_seed_is_another_name_for_reference(folders: dict[str, Any]) -> None:
    """Catches command lines of earlier versions that fail."""
    assert Options.from_user(**folders, fallback="seed") == Options.from_user(**folders, fallback="reference")


def test_checked_options_pass_through(folders: dict[str, Any]) -> None:
    """Catches options that are checked twice, and values beside them that are silently ignored."""
    options = Options.from_user(**folders)
    assert Options.from_user(options=options) is options
    (fault,) = faults_of(options=options, w_bit=4)
    assert "w_bit" in fault


def test_without_paths() -> None:
    """Catches `passes --explain` that requires folders."""
    assert Options.without_paths(act_method="1").act_method == 1
    with pytest.raises(UserError):
        Options.without_paths(act_method="9")


@given(
    st.dictionaries(st.sampled_from([*Options.model_fields, "x"]), st.text() | st.integers() | st.none(), max_size=6)
)
def test_nothing_but_a_user_error(given_options: dict[str, Any]) -> None:
    """Catches input for which an exception of pydantic or of the file system is not turned into a UserError."""
    try:
        Options.from_user(**given_options)
    except UserError as error:
        assert error.faults
