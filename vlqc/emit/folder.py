"""A folder that appears whole or not at all: written beside its place, then renamed into it."""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlqc.errors import Fault, UserError
from vlqc.options import Options

FOLDER_MODE = 0o750
FILE_MODE = 0o640
# What a disk or its settings can answer to a write; any other fault inside is not one of the save folder.
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}


@contextmanager
def result_folder(options: Options, needed: int, *, writes: bool) -> Iterator[Path]:
    """For the process that writes the result `appearing_folder`, if the disk has `needed` bytes; for others one nearby.

    They find room to work in there, for files without a name, and leave nothing.
    """
    if not writes:
        yield nearest_folder(options.save_directory)
        return
    require_space(options.save_directory, needed)
    with appearing_folder(options.save_directory, overwrite=options.overwrite) as work:
        yield work


@contextmanager
def appearing_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Inside, an empty work folder beside `target`; on success it becomes `target`, on any error nothing remains.

    With `overwrite` an existing folder stays until the new one is complete, and comes back if the exchange fails.
    """
    target = Path(os.path.realpath(target))  # a link stays and what it points to is exchanged
    new_parents = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{target.name[:100]}.partial-"
        for leftover in target.parent.glob(f"{glob.escape(prefix)}*"):
            _remove_if_abandoned(leftover)
        # A name of its own: two runs into one folder must not write into each other's work.
        work = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        work.chmod(FOLDER_MODE)
        lock = _locked(work)
    except OSError as error:
        raise UserError(Fault("the save folder cannot be made", str(target), str(error))) from error
    try:
        try:
            yield work
        except OSError as error:
            if error.errno not in DISK_FAULTS:
                raise
            raise _unwritable(target, error) from error
        try:
            _publish(work, target, overwrite)
        except OSError as error:
            raise _unwritable(target, error) from error
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(work, ignore_errors=True)
        if not target.exists():
            with contextlib.suppress(OSError):
                for parent in new_parents:
                    parent.rmdir()


def _locked(work: Path) -> int | None:
    """A handle that holds a lock on a folder for as long as this process lives; None where another one holds it."""
    handle = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _remove_if_abandoned(work: Path) -> None:
    """Removes the work folder of a run that was killed; one that is being written is locked, and stays."""
    with contextlib.suppress(OSError):
        lock = _locked(work)
        if lock is not None:
            shutil.rmtree(work, ignore_errors=True)
            os.close(lock)


def _publish(work: Path, target: Path, overwrite: bool) -> None:
    """Gives the finished folder its place; what was there before goes only once the new one stands."""
    for path in work.iterdir():
        path.chmod(FILE_MODE)
        _sync(path)
    _sync(work)
    replaced = None
    if target.exists() and (overwrite or not any(target.iterdir())):
        replaced = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.replaced-", dir=target.parent))
        try:
            target.rename(replaced)  # onto an empty folder
        except OSError:
            replaced.rmdir()
            raise
    try:
        work.rename(target)
    except OSError:
        if replaced is not None and not target.exists():
            replaced.rename(target)
        raise
    _sync(target.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def _unwritable(target: Path, error: OSError) -> UserError:
    return UserError(
        Fault("the result cannot be written", str(target), str(error), "free space or choose another folder")
    )


def _sync(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def nearest_folder(target: Path) -> Path:
    """The folder that exists nearest above a path."""
    return next(folder for folder in Path(os.path.realpath(target)).parents if folder.is_dir())


def _readable(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def require_space(target: Path, needed: int) -> None:
    """UserError unless the disk that will hold `target` has `needed` bytes free."""
    existing = nearest_folder(target)
    free = shutil.disk_usage(existing).free
    if free < needed:
        why = f"the result takes about {_readable(needed)}, {_readable(free)} are free"
        raise UserError(
            Fault("not enough disk space", str(existing), why, "free space or choose another --save_directory")
        )
