"""Checks of the model folder, the save folder, dumps and timings, which must not overlap."""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.option_cases import faults_of, two_folders
from vlqc.options.options import Options


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Any]:
    return two_folders(tmp_path)


def test_model_folder_must_be_there(tmp_path: Path) -> None:
    """Catches a misspelt model folder without a suggestion, and a hub name that is read as a folder."""
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
        (model / "quantized", "is inside the model folder"),
        (tmp_path / "link" / "quantized", "is inside the model folder"),
        (tmp_path / "above", "is inside it"),
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
    assert "a file with this name" in fault
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
        assert "replaced as a whole" in faults[0] or "is inside it" in faults[0], save


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_mount_point(
    folders: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """Catches a mount point, also through a link: it cannot be renamed at the end of the compilation."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    monkeypatch.setattr("vlqc.options.paths.os.path.ismount", lambda path: Path(path) == tmp_path / "disk")
    for save in ("disk", "link"):
        (fault,) = faults_of(**{**folders, "save_directory": tmp_path / save, "overwrite": overwrite})
        assert "mount point" in fault and "a folder inside it" in fault
    inside = tmp_path / "disk" / "out"
    assert Options.from_user(**{**folders, "save_directory": inside}).save_directory == inside


def test_dump_and_pictures_outside_the_save_folder(folders: dict[str, Any], tmp_path: Path) -> None:
    """Catches dumps in a checkpoint, images in the save folder, and timings that would block on a pipe."""
    save, model = folders["save_directory"], folders["model_path"]
    (fault,) = faults_of(**folders, dump_ir=save / "dump")
    assert "--dump_ir" in fault and "save folder" in fault
    (fault,) = faults_of(**folders, dump_ir=model / "dump")
    assert "--dump_ir" in fault and "does not modify" in fault
    (fault,) = faults_of(**folders, calib_images=save / "images")
    assert "--calib_images" in fault and "replaced as a whole" in fault
    (tmp_path / "taken").write_text("")
    (fault,) = faults_of(**folders, dump_ir=tmp_path / "taken")
    assert "it is a file" in fault
    os.mkfifo(tmp_path / "pipe")
    (fault,) = faults_of(**folders, timings=tmp_path / "pipe")
    assert "not a regular file" in fault


def test_unreadable_names(folders: dict[str, Any], tmp_path: Path) -> None:
    """Catches an OSError for a name that is too long, or a loop of links."""
    (fault,) = faults_of(**{**folders, "save_directory": tmp_path / ("x" * 300)})
    assert "cannot access folder" in fault
    (tmp_path / "round").symlink_to(tmp_path / "about")
    (tmp_path / "about").symlink_to(tmp_path / "round")
    faults = faults_of(**{**folders, "save_directory": tmp_path / "round"})
    assert "round" in faults[0]
