"""vlqc.options and vlqc.folders: names and defaults that command lines rely on, and one clear answer to every slip."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlqc.engines import Scheme
from vlqc.errors import UserError
from vlqc.options import Options, extra_of

# The reference script's parameters: a command line written for it has to work unchanged.
SEED_DEFAULTS = {
    "calib_images": Path("../calibImages"), "part_file_size": None, "w_bit": 8, "a_bit": 8, "device_type": "cpu",
    "trust_remote_code": False, "anti_method": "m2", "act_method": 2, "open_outlier": True, "is_dynamic": False,
    "is_lowbit": False, "group_size": 64, "mindie_format": False,
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
    ours = {"target": None, "overwrite": False, "skip_bad_images": False, "dump_ir": None, "pipeline": None}
    assert {name: getattr(options, name) for name in ours} == ours
    assert set(Options.model_fields) == {*folders, *SEED_DEFAULTS, *ours}
    assert options.scheme is Scheme.W8A8 and options.engine_target == "both"


def test_every_option_has_help_and_a_panel() -> None:
    """Catches an option that --help cannot explain."""
    assert all(field.description and extra_of(field)["panel"] for field in Options.model_fields.values())


def test_text_reads_like_values(folders: dict[str, Any]) -> None:
    """Catches text from a command line being taken for something else than the value it spells."""
    text = {"w-bit": "8", "act_method": "1", "part-file-size": "4", "anti_method": "none", "open_outlier": "False"}
    from_text = Options.from_user(**{name: str(path) for name, path in folders.items()}, **text)
    values = {"w_bit": 8, "act_method": 1, "part_file_size": 4, "anti_method": "none", "open_outlier": False}
    assert from_text == Options.from_user(**folders, **values)
    assert Options.from_user(**folders, part_file_size="None").part_file_size is None


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


CHOICES = {
    "w_bit": [4, 8], "is_dynamic": [True, False], "is_lowbit": [True, False], "open_outlier": [True, False],
    "act_method": [1, 2, 3], "group_size": [64, 512], "mindie_format": [True, False],
    "target": [None, "vllm-ascend", "mindie", "both"],
}  # fmt: skip


def legal(chosen: dict[str, Any]) -> bool:
    """The table of schemes and targets, written out once more."""
    dynamic, w4 = chosen["is_dynamic"], chosen["w_bit"] == 4
    if w4:
        scheme = dynamic and chosen["is_lowbit"] and not chosen["open_outlier"] and chosen["act_method"] in (1, 2)
    else:
        scheme = not chosen["is_lowbit"]
    group = not (w4 and chosen["mindie_format"] and chosen["group_size"] == 512)
    target = not (chosen["mindie_format"] and chosen["target"] in ("vllm-ascend", "both"))
    return bool(scheme and group and target and not (chosen["target"] == "both" and (w4 or dynamic)))


def has_work_behind_it(chosen: dict[str, Any]) -> bool:
    later = chosen["w_bit"] == 4 or chosen["is_dynamic"] or chosen["act_method"] == 3
    return not (later or chosen["mindie_format"] or chosen["target"] == "mindie")


def test_every_combination(folders: dict[str, Any]) -> None:
    """Catches an illegal combination that is compiled, and a legal one that is refused or put off wrongly."""
    for values in itertools.product(*CHOICES.values()):
        chosen = dict(zip(CHOICES, values, strict=True))
        try:
            Options.from_user(**folders, **chosen)
            answer = "compiled"
        except UserError as error:
            answer = "not yet" if str(error).startswith("not yet") else "refused"
        wanted = "refused" if not legal(chosen) else "compiled" if has_work_behind_it(chosen) else "not yet"
        assert answer == wanted, chosen


@pytest.mark.parametrize(
    ("chosen", "flags"),
    [
        ({"w_bit": 4}, ["--is_dynamic True", "--is_lowbit True", "--open_outlier False", "--w_bit 8"]),
        ({**W4A8, "is_lowbit": False}, ["--is_lowbit True"]),
        ({**W4A8, "act_method": 3}, ["--act_method 1"]),
        ({"is_lowbit": True}, ["--is_lowbit False", "--w_bit 4"]),
        ({"mindie_format": True, "target": "both"}, ["--mindie_format", "--target"]),
        ({**W4A8, "mindie_format": True, "group_size": 512}, ["--group_size 256"]),
        ({"is_dynamic": True, "target": "both"}, ["--target vllm-ascend", "--is_dynamic False"]),
    ],
)
def test_refused_combinations_name_the_flags_to_change(
    folders: dict[str, Any], chosen: dict[str, Any], flags: list[str]
) -> None:
    """Catches a refusal that leaves the user to guess which flag to change."""
    (fault,) = faults_of(**folders, **chosen)
    assert all(flag in fault.split("what to do:")[1] for flag in flags)


@pytest.mark.parametrize(
    ("chosen", "named"),
    [
        ({"anti_method": "m4"}, "--anti_method m4"),
        ({"act_method": 3}, "--act_method 3"),
        ({"is_dynamic": True}, "W8A8_DYNAMIC"),
        (W4A8, "W4A8_DYNAMIC"),
        ({"mindie_format": True}, "--mindie_format"),
        ({"target": "mindie"}, "--target mindie"),
        ({"device_type": "npu"}, "--device_type npu"),
        ({"device_type": "cuda"}, "--device_type cuda"),
    ],
)
def test_not_yet(folders: dict[str, Any], chosen: dict[str, Any], named: str) -> None:
    """Catches an option without work behind it that is accepted and silently ignored."""
    (fault,) = faults_of(**folders, **chosen)
    assert fault.startswith("not yet") and named in fault


def test_scheme_and_target_of_what_comes_later(tmp_path: Path) -> None:
    """Catches flags that select another scheme or engine than the table says."""
    here = {"model_path": tmp_path, "save_directory": tmp_path}
    assert Options(**here, **W4A8).scheme is Scheme.W4A8_DYNAMIC
    assert Options(**here, is_dynamic=True).scheme is Scheme.W8A8_DYNAMIC
    assert Options(**here, is_dynamic=True).engine_target == "vllm-ascend"
    assert Options(**here, mindie_format=True).engine_target == "mindie"
    assert Options(**here, target="vllm-ascend").engine_target == "vllm-ascend"


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
