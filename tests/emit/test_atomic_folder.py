"""The save folder appears whole or not at all, and what stood there before is safe until then."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vlqc.emit.atomic_folder import (
    InUse,
    WorkFolder,
    exchange,
    require_space,
    restore_replaced,
    unwritable,
    work_folders,
)
from vlqc.errors import UserError


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def around(target: Path) -> list[str]:
    """What lies beside the target, hidden files included."""
    return sorted(path.name for path in target.parent.iterdir() if path.name != target.name)


@contextmanager
def working(target: Path) -> Iterator[WorkFolder]:
    work = WorkFolder(target)
    try:
        yield work
    finally:
        work.remove()
        work.close()


def write(target: Path, *, overwrite: bool = False, text: str = "new") -> None:
    with working(target) as work:
        (work.result / "file").write_text(text)
        work.publish(overwrite)


def cannot_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that knows no exchange of two folders at once."""
    monkeypatch.setattr("vlqc.emit.atomic_folder.ctypes.CDLL", lambda *unused, **unused_too: object())


def test_it_appears_at_the_end(tmp_path: Path) -> None:
    """Catches a half-written folder that an engine or a user could take for a finished one."""
    target = tmp_path / "deep" / "down" / "out"
    with working(target) as work:
        (work.result / "file").write_text("new")
        assert not target.exists() and work.folder.parent == target.parent
        work.publish(False)
        assert content(target) == {"file": "new"}
    assert around(target) == []


@pytest.mark.parametrize("before", ["nothing", "empty", "old"])
def test_nothing_remains_of_what_is_removed(tmp_path: Path, before: str) -> None:
    """Catches leftovers, folders made on the way, and an old result that is lost, where a run ends early."""
    target = tmp_path / "deep" / "out"
    if before != "nothing":
        target.mkdir(parents=True)
    if before == "old":
        (target / "file").write_text("old")
    with working(target) as work:
        (work.result / "file").write_text("new")
    if before == "nothing":
        assert list(tmp_path.iterdir()) == []
    else:
        assert around(target) == [] and content(target) == ({"file": "old"} if before == "old" else {})


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
    with pytest.raises(OSError, match="not empty"):
        write(target)
    assert content(target) == {"file": "old"} and around(target) == []


@pytest.mark.parametrize("at_once", [True, False])
def test_overwrite_exchanges_the_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool) -> None:
    """Catches old files that stay among the new ones, and an old folder that is emptied before the new one stands."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "stale").write_text("old")
    if not at_once:
        cannot_exchange(monkeypatch)
    with working(target) as work:
        (work.result / "file").write_text("new")
        assert content(target) == {"stale": "old"}
        work.publish(True)
        assert content(target) == {"file": "new"} and content(work.result) == {"stale": "old"}
    assert content(target) == {"file": "new"} and around(target) == []


def test_the_exchange_has_no_moment_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an exchange in two steps where the system has one: killed between them, it leaves no save folder."""
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(Path, "rename", lambda *unused: pytest.fail("two steps"))
    exchange(tmp_path / "one", tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "one", tmp_path / "nowhere")


def fail_on(call: int, real: Callable[..., Path], *, later_too: bool = False) -> Callable[..., Path]:
    calls = []

    def rename(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == call or (later_too and len(calls) > call):
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
    cannot_exchange(monkeypatch)
    monkeypatch.setattr(Path, "rename", fail_on(failing, Path.rename))
    with pytest.raises(OSError, match="No space left"):
        write(target, overwrite=True)
    assert content(target) == {"file": "old"} and around(target) == []


def killed_between(target: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An exchange that ended with the old folder moved aside and nothing in its place; where that now is."""
    target.mkdir()
    (target / "file").write_text("old")
    with monkeypatch.context() as patched:
        cannot_exchange(patched)
        patched.setattr(Path, "rename", fail_on(2, Path.rename, later_too=True))
        with pytest.raises(OSError, match="No space left"):
            write(target, overwrite=True)
    (aside,) = target.parent.iterdir()
    assert aside.name.startswith(".out.replaced-")
    return aside


@pytest.mark.parametrize("stands", [False, True])
def test_what_a_killed_run_moved_aside_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stands: bool
) -> None:
    """Catches an old result that stays under a hidden name, or one that comes back over the new one."""
    target = tmp_path / "out"
    killed_between(target, monkeypatch)
    if stands:
        target.mkdir()
        (target / "file").write_text("new")
    restore_replaced(target)
    assert content(target) == {"file": "new" if stands else "old"} and around(target) == []


@pytest.mark.parametrize("stands", [False, True])
@pytest.mark.parametrize("foreign", ["no marker", "another's marker", "more beside it", "only a name", "nothing"])
def test_what_no_run_moved_aside_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreign: str, stands: bool
) -> None:
    """Catches a user's folder that is deleted, or becomes the result, because of what it is called."""
    target = tmp_path / "out"
    aside = killed_between(target, monkeypatch)
    if foreign in ("only a name", "nothing"):
        (aside / "before" / "file").rename(aside / "file")
        (aside / "before").rmdir()
    if foreign == "nothing":
        (aside / "file").unlink()
    if foreign == "another's marker":
        (aside / "moved_aside").write_text("vlqc has moved aside out2")
    elif foreign == "more beside it":
        (aside / "thesis.txt").write_text("x")
    else:
        (aside / "moved_aside").unlink()
    if stands:
        target.mkdir()
    before = sorted(tmp_path.rglob("*"))
    restore_replaced(target)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_died_before_it_moved_anything_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a marked folder with nothing in it that stays for ever."""
    aside = killed_between(tmp_path / "out", monkeypatch)
    (aside / "before").rename(tmp_path / "out")
    restore_replaced(tmp_path / "out")
    assert content(tmp_path / "out") == {"file": "old"} and around(tmp_path / "out") == []


def test_two_runs_at_once_do_not_meet(tmp_path: Path) -> None:
    """Catches a second run into the same folder that takes what the first one is writing."""
    target = tmp_path / "out"
    with working(target) as first:
        (first.result / "file").write_text("first")
        with working(target) as second:
            assert second.folder != first.folder
            for path in work_folders(target):
                with pytest.raises(InUse):
                    WorkFolder(target, path)
        first.close()
        again = WorkFolder(target, first.folder)
        assert content(again.result) == {"file": "first"}
        again.close()


def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a crash, or a folder that counts as somebody's, where the file system knows no locks."""

    def refuse(*unused: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("vlqc.emit.atomic_folder.fcntl.flock", refuse)
    with working(tmp_path / "out") as work:
        assert not work.locks
        work.publish(False)
    assert (tmp_path / "out").is_dir()


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
    write(Path("out"))
    assert content(tmp_path / "out") == {"file": "new"} and around(tmp_path / "out") == []


def test_a_place_that_cannot_be_written_is_an_error_of_the_user(tmp_path: Path) -> None:
    """Catches a traceback where the folder above is a file."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="save folder cannot be made"):
        write(tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV])
def test_advice_for_a_mount_point(tmp_path: Path, code: int) -> None:
    """Catches advice that cannot work, such as to free space, where a mount point went unnoticed until the end."""
    told = str(unwritable(tmp_path / "out", OSError(code, os.strerror(code))))
    assert "name a folder inside it" in told and "free space" not in told


def test_disk_space_is_asked_for_before(tmp_path: Path) -> None:
    """Catches hours of work for a result that has no room, and a folder above that does not exist yet."""
    require_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(UserError, match="not enough disk space") as caught:
        require_space(tmp_path / "not" / "there" / "yet", 2**60)
    assert f"{2**30:.2f} GiB" in str(caught.value) and str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "times", [("x", 100), ("x", 101), ("x", 253), ("\u6a21", 34), ("\u6a21", 84), ("\udcff", 200)], ids=ascii
)
def test_long_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: tuple[str, int]) -> None:
    """Catches folders beside the target that belong to another one too, and names with too many bytes for a system."""
    name = times[0] * times[1]
    target, others = tmp_path / name, [tmp_path / (name[:-1] + "y"), tmp_path / name[:-1]]
    with working(target) as work:
        assert work_folders(target) == [work.folder]
        for other in others:
            assert work_folders(other) == []
        (work.result / "file").write_text("new")
        work.publish(False)
    cannot_exchange(monkeypatch)
    write(target, overwrite=True, text="newer")
    assert content(target) == {"file": "newer"} and around(target) == []


def test_folders_of_others_stay(tmp_path: Path) -> None:
    """Catches a user's folder that goes because of how it is called, or a link that is followed."""
    theirs = [".out.partial-backup", ".out.partial-abcdefgh", ".out.replaced-backup", ".out.replaced-abcdefgh"]
    for name in theirs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "important").write_text("x")
    (tmp_path / ".out.partial-linkaway").symlink_to(tmp_path / theirs[0])
    assert work_folders(tmp_path / "out") == []
    (tmp_path / "out").mkdir()
    restore_replaced(tmp_path / "out")
    assert all((tmp_path / name / "important").exists() for name in theirs)
