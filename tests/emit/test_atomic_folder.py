"""vlqc.emit.atomic_folder: the save folder is complete or missing, and an old one is kept until it is replaced."""

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


def siblings(target: Path) -> list[str]:
    """Names next to the target, hidden ones included."""
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
    """A system without an atomic exchange of two folders."""
    monkeypatch.setattr("vlqc.emit.atomic_folder.ctypes.CDLL", lambda *unused, **unused_too: object())


def test_the_target_is_created_at_the_end(tmp_path: Path) -> None:
    """Catches an incomplete folder under the final name."""
    target = tmp_path / "deep" / "down" / "out"
    with working(target) as work:
        (work.result / "file").write_text("new")
        assert not target.exists() and work.folder.parent == target.parent
        work.publish(False)
        assert content(target) == {"file": "new"}
    assert siblings(target) == []


@pytest.mark.parametrize("before", ["nothing", "empty", "old"])
def test_remove_without_publish(tmp_path: Path, before: str) -> None:
    """Catches leftovers, parent folders that are kept, and an old result that is lost, when a run ends early."""
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
        assert siblings(target) == [] and content(target) == ({"file": "old"} if before == "old" else {})


def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    """Catches a refusal of an empty folder that the user created."""
    target = tmp_path / "out"
    target.mkdir()
    write(target)
    assert content(target) == {"file": "new"} and siblings(target) == []


def test_a_full_folder_stays_without_overwrite(tmp_path: Path) -> None:
    """Catches a result that replaces files created at the target during a long compilation."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "file").write_text("old")
    with pytest.raises(OSError, match="not empty"):
        write(target)
    assert content(target) == {"file": "old"} and siblings(target) == []


@pytest.mark.parametrize("atomic", [True, False])
def test_overwrite_exchanges_the_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, atomic: bool) -> None:
    """Catches old files that are mixed with new ones, and an old folder deleted before the new one is in place."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "stale").write_text("old")
    if not atomic:
        cannot_exchange(monkeypatch)
    with working(target) as work:
        (work.result / "file").write_text("new")
        assert content(target) == {"stale": "old"}
        work.publish(True)
        assert content(target) == {"file": "new"} and content(work.result) == {"stale": "old"}
    assert content(target) == {"file": "new"} and siblings(target) == []


def test_the_exchange_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an exchange in two steps where the system supports one: killed in between, it leaves no save folder."""
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
def test_the_old_folder_is_put_back_if_the_exchange_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Catches an old folder that is lost when the new one cannot be moved to its place."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "file").write_text("old")
    cannot_exchange(monkeypatch)
    monkeypatch.setattr(Path, "rename", fail_on(failing, Path.rename))
    with pytest.raises(OSError, match="No space left"):
        write(target, overwrite=True)
    assert content(target) == {"file": "old"} and siblings(target) == []


def killed_between(target: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Interrupts an exchange after the old folder was moved aside; returns the folder that holds it."""
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


@pytest.mark.parametrize("target_exists", [False, True])
def test_a_folder_moved_aside_by_a_killed_run_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target_exists: bool
) -> None:
    """Catches an old result that stays under a hidden name, and one that replaces the new result."""
    target = tmp_path / "out"
    killed_between(target, monkeypatch)
    if target_exists:
        target.mkdir()
        (target / "file").write_text("new")
    restore_replaced(target)
    assert content(target) == {"file": "new" if target_exists else "old"} and siblings(target) == []


@pytest.mark.parametrize("target_exists", [False, True])
@pytest.mark.parametrize("foreign", ["no marker", "another's marker", "another file", "only a name", "nothing"])
def test_other_folders_with_such_a_name_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreign: str, target_exists: bool
) -> None:
    """Catches a user's folder that is deleted, or becomes the result, because of its name."""
    target = tmp_path / "out"
    aside = killed_between(target, monkeypatch)
    if foreign in ("only a name", "nothing"):
        (aside / "before" / "file").rename(aside / "file")
        (aside / "before").rmdir()
    if foreign == "nothing":
        (aside / "file").unlink()
    if foreign == "another's marker":
        (aside / "moved_aside").write_text("vlqc has moved aside out2")
    elif foreign == "another file":
        (aside / "thesis.txt").write_text("x")
    else:
        (aside / "moved_aside").unlink()
    if target_exists:
        target.mkdir()
    before = sorted(tmp_path.rglob("*"))
    restore_replaced(target)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_killed_before_the_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an empty folder with a marker that is never deleted."""
    aside = killed_between(tmp_path / "out", monkeypatch)
    (aside / "before").rename(tmp_path / "out")
    restore_replaced(tmp_path / "out")
    assert content(tmp_path / "out") == {"file": "old"} and siblings(tmp_path / "out") == []


def test_two_runs_at_the_same_time(tmp_path: Path) -> None:
    """Catches a second run with the same target that uses the work folder of the first."""
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
    """Catches a crash, or a folder taken for locked, on a file system without locks."""

    def refuse(*unused: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("vlqc.emit.atomic_folder.fcntl.flock", refuse)
    with working(tmp_path / "out") as work:
        assert not work.locks
        work.publish(False)
    assert (tmp_path / "out").is_dir()


def test_modes(tmp_path: Path) -> None:
    """Catches files that others may write, which engines refuse, and folders that everyone may read."""
    before = os.umask(0)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "out" / "file").stat().st_mode) == 0o640


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    """Catches a link, for example to a larger disk, that is replaced by a folder."""
    real, link = tmp_path / "disk" / "real", tmp_path / "out"
    real.mkdir(parents=True)
    (real / "file").write_text("old")
    link.symlink_to(real)
    write(link, overwrite=True)
    assert link.is_symlink() and content(real) == {"file": "new"} and siblings(real) == []


def test_a_relative_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a work folder on another disk, from where it cannot be renamed."""
    monkeypatch.chdir(tmp_path)
    write(Path("out"))
    assert content(tmp_path / "out") == {"file": "new"} and siblings(tmp_path / "out") == []


def test_a_target_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    """Catches a traceback if the parent folder is a file."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot create the save folder"):
        write(tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV])
def test_advice_for_a_mount_point(tmp_path: Path, code: int) -> None:
    """Catches useless advice, such as to free space, when the target is a mount point."""
    message = str(unwritable(tmp_path / "out", OSError(code, os.strerror(code))))
    assert "name a folder inside it" in message and "free space" not in message


def test_require_space(tmp_path: Path) -> None:
    """Catches a compilation for which there is no disk space, and a failure for a missing parent folder."""
    require_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(UserError, match="not enough disk space") as caught:
        require_space(tmp_path / "not" / "there" / "yet", 2**60)
    assert f"{2**30:.1f} GiB" in str(caught.value) and str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "times", [("x", 100), ("x", 101), ("x", 253), ("\u6a21", 34), ("\u6a21", 84), ("\udcff", 200)], ids=ascii
)
def test_long_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: tuple[str, int]) -> None:
    """Catches work folders that would belong to two targets, and names with too many bytes."""
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
    assert content(target) == {"file": "newer"} and siblings(target) == []


def test_other_folders_are_kept(tmp_path: Path) -> None:
    """Catches a user's folder that is deleted because of its name, or a link that is followed."""
    theirs = [".out.partial-backup", ".out.partial-abcdefgh", ".out.replaced-backup", ".out.replaced-abcdefgh"]
    for name in theirs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "important").write_text("x")
    (tmp_path / ".out.partial-linkaway").symlink_to(tmp_path / theirs[0])
    assert work_folders(tmp_path / "out") == []
    (tmp_path / "out").mkdir()
    restore_replaced(tmp_path / "out")
    assert all((tmp_path / name / "important").exists() for name in theirs)
