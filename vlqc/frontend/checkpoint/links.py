"""Links in a checkpoint folder: followed inside of it and to where the Hugging Face cache keeps files, nowhere else."""

from collections.abc import Iterator
from pathlib import Path

from vlqc.errors import Fault

SNAPSHOTS, BLOBS = "snapshots", "blobs"  # models--NAME/snapshots/REVISION/FILE -> ../../blobs/DIGEST


def link_faults(folder: Path) -> list[Fault]:
    """A fault for every file in the folder that is a link to a file elsewhere. OSError if it cannot be looked at.

    Whoever made a checkpoint could otherwise have any file of this machine read, and copied into the result.
    """
    real = folder.resolve()
    allowed = [real, *_blobs(real)]
    faults = []
    for path in sorted(real.iterdir()):
        if path.is_symlink() and path.is_file():
            target = path.resolve()
            if not any(place in target.parents for place in allowed):
                fix = "copy the file itself into the folder"
                what = f"{path.name} is a link out of the checkpoint folder"
                faults.append(Fault(what, str(folder / path.name), f"it leads to {target}", fix))
    return faults


def _blobs(folder: Path) -> Iterator[Path]:
    """Where the files of a snapshot lie: in the same repository of the cache, and in no other one."""
    for inner in (folder, *folder.parents):
        if inner.parent.name == SNAPSHOTS:
            yield inner.parent.parent / BLOBS
            return
