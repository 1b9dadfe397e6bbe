"""The files of a checkpoint folder: which hold weights, where in them a tensor lies, what config.json says."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlqc.errors import Fault, UserError
from vlqc.files import read_json_object
from vlqc.frontend.checkpoint.header import read_header
from vlqc.frontend.checkpoint.prefetch import Span

SNAPSHOTS, BLOBS = "snapshots", "blobs"  # models--NAME/snapshots/REVISION/FILE -> ../../blobs/DIGEST
INDEX = "model.safetensors.index.json"
FAULTS_SHOWN = 3  # of one header


def times_of(path: Path) -> list[int]:
    """Of a file: size, when its content changed and when anything about it did, number."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def spans_of(path: Path) -> dict[str, Span]:
    """safetensors file -> stored name -> byte range of its data. OSError or ValueError without a valid header."""
    header = read_header(path)
    if header.faults:
        raise ValueError("; ".join(header.faults[:FAULTS_SHOWN]))
    return {name: Span(path, entry.begin, entry.end) for name, entry in header.tensors.items()}


def read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(Fault("no such checkpoint folder", str(folder), fix="give the folder that holds config.json"))
    fix = "give the folder of a Hugging Face checkpoint"
    none = UserError(Fault("the folder holds no config.json", str(folder), fix=fix))
    return read_json_object(folder / "config.json", missing=lambda: none)


def weight_files(folder: Path) -> list[str]:
    """File names of the shards: those of the index if there is one, otherwise every *.safetensors."""
    index = folder / INDEX
    if not index.is_file():
        files = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
        if not files:
            fix = "convert the checkpoint to safetensors first; .bin files are not read because loading them runs code"
            raise UserError(Fault("the folder holds no *.safetensors", str(folder), fix=fix))
        return files
    placed = read_json_object(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        why = "it has no weight_map that says which file holds which tensor"
        raise UserError(Fault("the index of weight files cannot be read", str(index), why, "copy it again"))
    present = {path.name for path in folder.iterdir() if path.is_file()}  # asked of the system: a name may be unusable
    faults = []
    for file in sorted(set(map(str, placed.values()))):
        if Path(file).name != file or file in ("", ".", ".."):
            faults.append(
                Fault(f"the index names {file!r}", str(index), "weight files must lie in the checkpoint's own folder")
            )
        elif file not in present:
            faults.append(
                Fault(f"weight file {file} is missing", str(folder), f"{INDEX} names it", "download it again")
            )
    if faults:
        raise UserError(*faults)
    return sorted(set(placed.values()))


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
