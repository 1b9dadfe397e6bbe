"""A folder that appears whole or not at all: written beside its place, then renamed into it."""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vlqc.emit.shard_writer import sync
from vlqc.errors import Fault, UserError

FOLDER_MODE = 0o750
FILE_MODE = 0o640
NAME_BYTES, HASH_DIGITS = 100, 8  # of the target's name in those of folders beside it; most systems allow 255 in all
# All that ever lies in a work folder: what is to appear, and what an interrupted run goes on from.
RESULT, OUTPUTS, JOURNAL = WORK = ("result", "outputs", "journal.jsonl")
BEFORE, MARKER = "before", "moved_aside"  # what stood at the target while it is exchanged, and who put it there
# What a disk or its settings can answer to a write; any other fault inside is not one of the save folder.
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}
REMEDIES = {
    errno.EFBIG: "give --part_file_size for smaller files, raise `ulimit -f`, or choose a disk without that limit",
    errno.EROFS: "choose a folder that may be written",
    errno.EACCES: "choose a folder that may be written",
    errno.EPERM: "choose a folder that may be written",
    errno.EIO: "choose another disk",
    errno.EBUSY: "the system keeps that folder, as it does with a mount point: name a folder inside it",
    errno.EXDEV: "that folder and the one above it lie on two disks: name a folder inside it",
    errno.ENOTEMPTY: "something has appeared there meanwhile: look at it, or add --overwrite to replace it",
    errno.EEXIST: "something has appeared there meanwhile: look at it, or add --overwrite to replace it",
    errno.ENOTDIR: "something has appeared there meanwhile: look at it, or name another folder",
}
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # Linux: <fcntl.h>, <linux/fs.h>


def work_folders(target: Path) -> list[Path]:
    """Those that lie beside `target`, of runs that go on or were interrupted; nothing that only has such a name."""
    target = Path(os.path.realpath(target))
    return [folder for folder in _made_by_runs(target, _prefix(target)) if _names_in(folder) <= set(WORK)]


class WorkFolder:
    """A folder of one run beside its target, locked for as long as this process lives.

    folder: its path; result: the folder inside that is to appear.
    """

    def __init__(self, target: Path, folder: Path | None = None) -> None:
        """A new one, or with `folder` one that is there. UserError if it cannot be made, InUse if it is another's."""
        self.target = Path(os.path.realpath(target))  # a link stays and what it points to is exchanged
        self._new_parents = [parent for parent in self.target.parents if not parent.exists()]
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            # A name of its own: two runs into one folder must not write into each other's work.
            self.folder = folder or Path(tempfile.mkdtemp(prefix=_prefix(self.target), dir=self.target.parent))
            self._lock = _locked(self.folder)
            self.result = self.folder / RESULT
            if folder is None:
                self.folder.chmod(FOLDER_MODE)
                self.result.mkdir(FOLDER_MODE)
        except OSError as error:
            raise UserError(Fault("the save folder cannot be made", str(self.target), str(error))) from error

    @property
    def locks(self) -> bool:
        """Whether the disk has locks, so that nobody else can be using it."""
        return self._lock is not None

    def publish(self, overwrite: bool) -> None:
        """Gives the finished result its place; what was there before stays until then, and goes with `remove`.

        OSError if that is not possible; then all is as before.
        """
        for path in self.result.iterdir():
            path.chmod(FILE_MODE)
            sync(path)
        self.result.chmod(FOLDER_MODE)
        sync(self.result)
        sync(self.folder)
        if overwrite and self.target.is_dir() and any(self.target.iterdir()):
            exchange(self.result, self.target)
        else:
            self.result.rename(self.target)  # nothing or an empty folder is there, otherwise an error
        sync(self.target.parent)

    def remove(self) -> None:
        """It and everything in it, and folders above it that were made for it and are empty."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if not self.target.exists():
            with contextlib.suppress(OSError):
                for parent in self._new_parents:
                    parent.rmdir()

    def close(self) -> None:
        """Lets others have it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class InUse(Exception):
    """Another process that lives has this work folder."""


def exchange(one: Path, other: Path) -> None:
    """Two folders of one file system take each other's place, at once where the system can do that.

    Elsewhere there is a moment in which `other` is missing; if it is the last one, `restore_replaced` mends that.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):  # which say that this file system cannot
            raise OSError(code, os.strerror(code), str(other))
    aside = Path(tempfile.mkdtemp(prefix=_replaced(other), dir=other.parent))
    before = aside / BEFORE
    try:
        _mark(aside, other)
        other.rename(before)
        try:
            one.rename(other)
        except OSError:
            before.rename(other)
            raise
        before.rename(one)
    finally:
        _unmark(aside)


def restore_replaced(target: Path) -> None:
    """Puts back what a run moved aside that was killed before something else stood there; else it goes.

    Nothing that only has such a name: a run has said, in a file of its own beside it, what it moved aside.
    """
    target = Path(os.path.realpath(target))
    for aside in _made_by_runs(target, _replaced(target)):
        before = aside / BEFORE
        if not (_names_in(aside) <= {BEFORE, MARKER} and _marked(aside, target)):
            continue
        with contextlib.suppress(OSError):
            if not target.exists() and before.is_dir():
                before.rename(target)
            elif before.is_dir():
                shutil.rmtree(before)
        _unmark(aside)


def unwritable(target: Path, error: OSError) -> UserError:
    """What to tell of a write that failed."""
    fix = REMEDIES.get(error.errno or 0, "free space or choose another folder")
    return UserError(Fault("the result cannot be written", str(target), str(error), fix))


def nearest_folder(target: Path) -> Path:
    """The folder that exists nearest above a path."""
    return next(folder for folder in Path(os.path.realpath(target)).parents if folder.is_dir())


def bytes_in(folder: Path) -> int:
    """What the files in a folder take on the disk, those in folders inside included."""
    return sum(entry.stat().st_blocks * 512 for entry in _files(folder))


def require_space(target: Path, needed: int) -> None:
    """UserError unless the disk that will hold `target` has `needed` bytes free."""
    existing = nearest_folder(target)
    free = shutil.disk_usage(existing).free
    if free < needed:
        why = f"the result takes about {_readable(needed)}, {_readable(free)} are free"
        raise UserError(
            Fault("not enough disk space", str(existing), why, "free space or choose another --save_directory")
        )


def _made_by_runs(target: Path, prefix: str) -> list[Path]:
    """Folders beside `target` with names as `mkdtemp` makes them; links are none."""
    named = re.compile(re.escape(prefix) + "[a-z0-9_]{8}")
    there = target.parent.iterdir() if target.parent.is_dir() else ()
    return sorted(path for path in there if named.fullmatch(path.name) and path.is_dir() and not path.is_symlink())


def _names_in(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except OSError:
        return {""}


def _prefix(target: Path) -> str:
    return f".{_short_name(target)}.partial-"


def _replaced(target: Path) -> str:
    return f".{_short_name(target)}.replaced-"


def _short_name(target: Path) -> str:
    """The name of a folder, as it is or, where nothing could be added to it, cut; no other folder has the same one."""
    encoded = os.fsencode(target.name)  # the system counts bytes
    if len(encoded) <= NAME_BYTES:
        return target.name
    # Longer than any name that stays as it is, so it is none of those.
    return f"{encoded[:NAME_BYTES].decode(errors='ignore')}-{hashlib.sha256(encoded).hexdigest()[:HASH_DIGITS]}"


def _marker_of(target: Path) -> bytes:
    return b"vlqc has moved aside " + os.fsencode(target.name)


def _mark(aside: Path, target: Path) -> None:
    """Says, on the disk before anything is moved, that a folder holds what stood at `target`."""
    marker = aside / MARKER
    marker.write_bytes(_marker_of(target))
    sync(marker)
    sync(aside)


def _marked(aside: Path, target: Path) -> bool:
    marker = aside / MARKER
    try:
        return not marker.is_symlink() and marker.is_file() and marker.read_bytes() == _marker_of(target)
    except OSError:
        return False


def _unmark(aside: Path) -> None:
    """Clears up an empty folder; one that holds something stays as it is, to be put back."""
    if _names_in(aside) <= {MARKER}:
        with contextlib.suppress(OSError):
            (aside / MARKER).unlink(missing_ok=True)
            aside.rmdir()


def _locked(folder: Path) -> int | None:
    """A handle that holds a lock on a folder for as long as this process lives; None where the disk has no locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise InUse from error
        return None
    return handle


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _readable(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
