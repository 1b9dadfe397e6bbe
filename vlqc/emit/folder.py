"""A folder that appears whole or not at all: written beside its place, then renamed into it."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlqc.errors import Fault, UserError

FOLDER_MODE = 0o750
FILE_MODE = 0o640
# What a disk or its settings can answer to a write; any other fault inside is not one of the save folder.
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}


@contextmanager
def appearing_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Inside, an empty work folder beside `target`; on success it becomes `target`, on any error nothing remains.

    With `overwrite` an existing folder stays until the new one is complete, and comes back if the exchange fails.
    """
    target = Path(os.path.realpath(target))  # a link stays and what it points to is exchanged
    work, old = (target.with_name(f".{target.name}.{state}") for state in ("partial", "replaced"))
    new_parents = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(mode=FOLDER_MODE)
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
            _publish(work, target, old, overwrite)
        except OSError as error:
            raise _unwritable(target, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if not target.exists():
            with contextlib.suppress(OSError):
                for parent in new_parents:
                    parent.rmdir()


def _publish(work: Path, target: Path, old: Path, overwrite: bool) -> None:
    """Gives the finished folder its place; what was there before goes only once the new one stands."""
    for path in work.iterdir():
        path.chmod(FILE_MODE)
        _sync(path)
    _sync(work)
    if target.exists() and (overwrite or not any(target.iterdir())):
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    try:
        work.rename(target)
    except OSError:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


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


def require_space(target: Path, needed: int) -> None:
    """UserError unless the disk that will hold `target` has `needed` bytes free."""
    existing = next(folder for folder in Path(os.path.abspath(target)).parents if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        why = f"the result takes about {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free"
        raise UserError(
            Fault("not enough disk space", str(existing), why, "free space or choose another --save_directory")
        )
