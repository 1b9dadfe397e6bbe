"""The save folder appears whole or not at all, and what stood there before is safe until then."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from vlqc.emit.folder import appearing_folder, require_space
from vlqc.errors import UserError


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def around(target: Path) -> list[str]:
    """What lies beside the target, hidden files included."""
    return sorted(path.name for path in target.parent.iterdir() if path.name != target.name)


def write(target: Path, *, overwrite: bool = False, text: str = "new") -> None:
    with appearing_folder(target, overwrite=overwrite) as work:
        (work / "file").write_text(text)


def test_it_appears_at_the_end(tmp_path: Path) -> None:
    """Catches a half-written folder that an engine or a user could take for a finished one."""
    target = tmp_path / "deep" / "down" / "out"
    with appearing_folder(target, overwrite=False) as work:
        (work / "file").write_text("new")
        assert not target.exists() and work.parent == target.parent
    assert content(target) == {"file": "new"} and around(target) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", ["nothing", "empty", "old"])
def test_nothing_appears_after_an_error(tmp_path: Path, error: type[BaseException], before: str) -> None:
    """Catches leftovers, and an old result that is lost, when a compilation fails or is interrupted."""
    target = tmp_path / "out"
    if before != "nothing":
        target.mkdir()
    if before == "old":
        (target / "file").write_text("old")
    with pytest.raises(error), appearing_folder(target, overwrite=True) as work:
        (work / "file").write_text("new")
        raise error
    assert around(target) == []
    assert target.exists() == (before != "nothing")
    if before == "old":
        assert content(target) == {"file": "old"}


def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    """Catches a refusal of a folder that the user has made beforehand."""
    target = tmp_path / "out"
    target.mkdir()
    write(target)
    assert content(target) == {"file": "new"} and around(target) == []


def test_a_full_folder_stays_without_overwrite(tmp_path: Path) -> None:
    """Catches a result that replaces what appeared in its place during a long compilation."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "file").write_text("old")
    with pytest.raises(UserError, match="cannot be written"):
        write(target)
    assert content(target) == {"file": "old"} and around(target) == []


def test_overwrite_exchanges_the_whole_folder(tmp_path: Path) -> None:
    """Catches old files that stay among the new ones, and an old folder that is emptied before the new one stands."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "stale").write_text("old")
    with appearing_folder(target, overwrite=True) as work:
        (work / "file").write_text("new")
        assert content(target) == {"stale": "old"}
    assert content(target) == {"file": "new"} and around(target) == []


def fail_on(call: int, real: Callable[..., Path]) -> Callable[..., Path]:
    calls = []

    def rename(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        return real(path, target)

    return rename


@pytest.mark.parametrize("failing", [1, 2])
def test_the_old_folder_comes_back_if_the_exchange_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Catches an exchange that has moved the old folder away and cannot put the new one in its place."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "file").write_text("old")
    monkeypatch.setattr(Path, "rename", fail_on(failing, Path.rename))
    with pytest.raises(UserError, match="No space left"):
        write(target, overwrite=True)
    assert content(target) == {"file": "old"} and around(target) == []


def test_a_failing_rename_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a work folder that stays behind when the last step fails."""
    monkeypatch.setattr(Path, "rename", fail_on(1, Path.rename))
    with pytest.raises(UserError, match="No space left"):
        write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_run_do_not_get_in(tmp_path: Path) -> None:
    """Catches files of a killed compilation that end up in the next result, or stay for ever."""
    target, leftover = tmp_path / "out", tmp_path / ".out.partial-abc"
    leftover.mkdir()
    (leftover / "stale").write_text("stale")
    target.mkdir()
    write(target, overwrite=True)
    assert content(target) == {"file": "new"} and around(target) == []


def test_two_runs_at_once_do_not_meet(tmp_path: Path) -> None:
    """Catches a second run into the same folder that removes or mixes what the first one is writing."""
    target = tmp_path / "out"
    with appearing_folder(target, overwrite=True) as first:
        (first / "file").write_text("first")
        with appearing_folder(target, overwrite=True) as second:
            assert second != first
            (second / "file").write_text("second")
        assert content(target) == {"file": "second"}
    assert content(target) == {"file": "first"} and around(target) == []


def test_modes(tmp_path: Path) -> None:
    """Catches files that engines refuse because others may write them, or folders that are open to all."""
    before = os.umask(0)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "out" / "file").stat().st_mode) == 0o640


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    """Catches a link (to a larger disk, say) that is replaced by a folder on the wrong one."""
    real, link = tmp_path / "disk" / "real", tmp_path / "out"
    real.mkdir(parents=True)
    (real / "file").write_text("old")
    link.symlink_to(real)
    write(link, overwrite=True)
    assert link.is_symlink() and content(real) == {"file": "new"} and around(real) == []


def test_a_relative_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a work folder that is made elsewhere, on another disk, so that the rename cannot work."""
    monkeypatch.chdir(tmp_path)
    with appearing_folder(Path("out"), overwrite=False) as work:
        assert work.parent == tmp_path
        (work / "file").write_text("new")
    assert content(tmp_path / "out") == {"file": "new"}


def test_a_place_that_cannot_be_written_is_an_error_of_the_user(tmp_path: Path) -> None:
    """Catches a traceback where the folder above is a file."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="save folder cannot be made"):
        write(tmp_path / "file" / "out")
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "file", overwrite=False)
    assert (tmp_path / "file").read_text() == "x"


def test_a_write_error_is_an_error_of_the_user(tmp_path: Path) -> None:
    """Catches a traceback when the disk runs full in the middle."""
    with pytest.raises(UserError, match="No space left"), appearing_folder(tmp_path / "out", overwrite=False):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_disk_space_is_asked_for_before(tmp_path: Path) -> None:
    """Catches hours of work for a result that has no room, and a folder above that does not exist yet."""
    require_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(UserError, match="not enough disk space") as caught:
        require_space(tmp_path / "not" / "there" / "yet", 2**60)
    assert f"{2**30:.2f} GiB" in str(caught.value) and str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []
