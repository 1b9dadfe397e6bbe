"""Writes a folder atomically: into a work folder next to the target, which is then renamed or exchanged."""

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
from vlqc.formatting import format_bytes

FOLDER_MODE = 0o750
FILE_MODE = 0o640
NAME_BYTES, HASH_DIGITS = 100, 8  # longest part of the target's name in other names; most systems allow 255 in all
# The only entries of a work folder: the result, and what an interrupted run resumes from.
RESULT, OUTPUTS, JOURNAL = WORK = ("result", "outputs", "journal.jsonl")
BEFORE, MARKER = "before", "moved_aside"  # during an exchange: the old folder, and the file that names its place
# Errors of a write that are due to the disk or its settings; others are not due to the save folder.
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}
REMEDIES = {
    errno.EFBIG: "pass --part_file_size for smaller files, raise `ulimit -f`, or choose a disk without that limit",
    errno.EROFS: "choose a folder that may be written",
    errno.EACCES: "choose a folder that may be written",
    errno.EPERM: "choose a folder that may be written",
    errno.EIO: "choose another disk",
    errno.EBUSY: "the folder is in use by the system, for example a mount point: name a folder inside it",
    errno.EXDEV: "that folder and its parent are on different disks: name a folder inside it",
    errno.ENOTEMPTY: "a file or folder was created there meanwhile: check it, or add --overwrite to replace it",
    errno.EEXIST: "a file or folder was created there meanwhile: check it, or add --overwrite to replace it",
    errno.ENOTDIR: "a file was created there meanwhile: check it, or name another folder",
}
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # Linux: <fcntl.h>, <linux/fs.h>


def work_folders(target: Path) -> list[Path]:
    """Work folders next to `target`, of running or interrupted runs; only folders with nothing but their entries."""
    target = Path(os.path.realpath(target))
    return [folder for folder in _folders_with_prefix(target, _prefix(target)) if _names_in(folder) <= set(WORK)]


class WorkFolder:
    """The work folder of one run, next to its target and locked until the process ends.

    folder: its path; result: the folder inside that becomes the target.
    """

    def __init__(self, target: Path, folder: Path | None = None) -> None:
        """Creates a work folder, or opens the existing `folder`. UserError if it cannot be created, InUse if another
        process holds its lock."""
        self.target = Path(os.path.realpath(target))  # a link is kept: the folder that it points to is replaced
        self._new_parents = [parent for parent in self.target.parents if not parent.exists()]
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            # A unique name: two runs with the same target must not share a work folder.
            self.folder = folder or Path(tempfile.mkdtemp(prefix=_prefix(self.target), dir=self.target.parent))
            self._lock = _locked(self.folder)
            self.result = self.folder / RESULT
            if folder is None:
                self.folder.chmod(FOLDER_MODE)
                self.result.mkdir(FOLDER_MODE)
        except OSError as error:
            raise UserError(Fault("cannot create the save folder", str(self.target), str(error))) from error

    @property
    def locks(self) -> bool:
        """Whether the file system supports locks, so that no other process can be using the folder."""
        return self._lock is not None

    def publish(self, overwrite: bool) -> None:
        """Makes the finished result the target; an old target moves into the work folder, and `remove` deletes it.

        OSError if that is not possible; then nothing has changed.
        """
        for path in self.result.rglob("*"):
            path.chmod(FOLDER_MODE if path.is_dir() else FILE_MODE)
            sync(path)
        self.result.chmod(FOLDER_MODE)
        sync(self.result)
        sync(self.folder)
        if overwrite and self.target.is_dir() and any(self.target.iterdir()):
            exchange(self.result, self.target)
        else:
            self.result.rename(self.target)  # fails unless the target is missing or empty
        sync(self.target.parent)

    def remove(self) -> None:
        """Deletes the work folder, and empty parent folders that were created for it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if not self.target.exists():
            with contextlib.suppress(OSError):
                for parent in self._new_parents:
                    parent.rmdir()

    def close(self) -> None:
        """Releases the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class InUse(Exception):
    """Another running process uses this work folder."""


def exchange(first: Path, second: Path) -> None:
    """Exchanges two folders of one file system, atomically where the file system supports it.

    Elsewhere `second` is missing for a moment; after a crash in that moment, `restore_replaced` puts it back.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):  # not supported by this file system
            raise OSError(code, os.strerror(code), str(second))
    replaced = Path(tempfile.mkdtemp(prefix=_replaced(second), dir=second.parent))
    before = replaced / BEFORE
    try:
        _mark(replaced, second)
        second.rename(before)
        try:
            first.rename(second)
        except OSError:
            before.rename(second)
            raise
        before.rename(first)
    finally:
        _unmark(replaced)


def restore_replaced(target: Path) -> None:
    """Puts back a folder that an interrupted exchange moved aside; deletes it if the target exists again.

    Only folders with a marker file that a previous run wrote are touched.
    """
    target = Path(os.path.realpath(target))
    for replaced in _folders_with_prefix(target, _replaced(target)):
        before = replaced / BEFORE
        if not (_names_in(replaced) <= {BEFORE, MARKER} and _marked(replaced, target)):
            continue
        with contextlib.suppress(OSError):
            if not target.exists() and before.is_dir():
                before.rename(target)
            elif before.is_dir():
                shutil.rmtree(before)
        _unmark(replaced)


def unwritable(target: Path, error: OSError) -> UserError:
    """The error to raise after a failed write."""
    fix = REMEDIES.get(error.errno or 0, "free space or choose another folder")
    return UserError(Fault("cannot write the result", str(target), str(error), fix))


def nearest_folder(target: Path) -> Path:
    """The closest existing parent folder of a path."""
    return next(folder for folder in Path(os.path.realpath(target)).parents if folder.is_dir())


def bytes_in(folder: Path) -> int:
    """Disk usage of all files in a folder and its subfolders."""
    return sum(entry.stat().st_blocks * 512 for entry in _files(folder))


def require_space(target: Path, needed: int) -> None:
    """UserError unless the disk of `target` has `needed` bytes free."""
    existing = nearest_folder(target)
    free = shutil.disk_usage(existing).free
    if free < needed:
        why = f"the result takes about {format_bytes(needed)}, {format_bytes(free)} are free"
        raise UserError(
            Fault("not enough disk space", str(existing), why, "free space or choose another --save_directory")
        )


def _folders_with_prefix(target: Path, prefix: str) -> list[Path]:
    """Folders next to `target` with names as `mkdtemp` creates them; no links."""
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
    """The name of a folder, shortened if it is too long to be extended; unique for every folder."""
    encoded = os.fsencode(target.name)  # the system counts bytes
    if len(encoded) <= NAME_BYTES:
        return target.name
    # Longer than any name that is kept, so it cannot be equal to one.
    return f"{encoded[:NAME_BYTES].decode(errors='ignore')}-{hashlib.sha256(encoded).hexdigest()[:HASH_DIGITS]}"


def _marker_of(target: Path) -> bytes:
    return b"vlqc has moved aside " + os.fsencode(target.name)


def _mark(replaced: Path, target: Path) -> None:
    """Writes the marker file, synced before anything is moved: the folder holds the old content of `target`."""
    marker = replaced / MARKER
    marker.write_bytes(_marker_of(target))
    sync(marker)
    sync(replaced)


def _marked(replaced: Path, target: Path) -> bool:
    marker = replaced / MARKER
    try:
        return not marker.is_symlink() and marker.is_file() and marker.read_bytes() == _marker_of(target)
    except OSError:
        return False


def _unmark(replaced: Path) -> None:
    """Deletes the folder unless it still holds the old content."""
    if _names_in(replaced) <= {MARKER}:
        with contextlib.suppress(OSError):
            (replaced / MARKER).unlink(missing_ok=True)
            replaced.rmdir()


def _locked(folder: Path) -> int | None:
    """A file descriptor that locks a folder until the process ends; None if the file system has no locks."""
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
