"""Finds the files of a checkpoint folder: weight files, tensors in them, config.json, links that leave the folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlqc.errors import Fault, UserError
from vlqc.files import FOLLOW_LINKS, are_links_trusted, read_json_object
from vlqc.formatting import enumerate_first, excerpt
from vlqc.frontend.checkpoint.adapters import WEIGHTS, adapter_as_model, is_adapter
from vlqc.frontend.checkpoint.header import read_header
from vlqc.frontend.checkpoint.prefetch import ByteRange
from vlqc.frontend.checkpoint.situations import (
    BLOBS,
    SNAPSHOTS,
    link_fault,
    pointer_faults,
    without_config,
    without_weights,
)

INDEX = "model.safetensors.index.json"
FAULTS_SHOWN = 3  # of one header


def file_stamp(path: Path) -> list[int]:
    """Size in bytes, modification and change time in ns, and inode: equal stamps mean unchanged content."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def tensor_ranges(path: Path) -> dict[str, ByteRange]:
    """safetensors file -> stored name -> byte range of its data. OSError or ValueError without a valid header."""
    header = read_header(path)
    if header.faults:
        raise ValueError("; ".join(header.faults[:FAULTS_SHOWN]))
    return {name: ByteRange(path, entry.begin, entry.end) for name, entry in header.tensors.items()}


def read_config(folder: Path) -> dict[str, Any]:
    """The object in config.json. UserError without one, or if the folder holds links that lead out of it, or pointers
    in place of files."""
    if not folder.is_dir():
        raise UserError(Fault("no such checkpoint folder", str(folder), fix="pass the folder that holds config.json"))
    if faults := link_faults(folder) or pointer_faults(folder):
        raise UserError(*faults)

    def missing() -> UserError:
        return UserError(adapter_as_model(folder) if is_adapter(folder) else without_config(folder))

    return read_json_object(folder / "config.json", missing=missing)


def weight_files(folder: Path) -> list[str]:
    """File names of the shards: those of the index, or every *.safetensors but that of an adapter if there is none."""
    index = folder / INDEX
    if not index.is_file():
        files = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file() and path.name != WEIGHTS)
        if not files and is_adapter(folder):
            raise UserError(adapter_as_model(folder))
        if not files:
            raise UserError(without_weights(folder))
        return files
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        why = "it has no weight_map, which maps tensors to files"
        raise UserError(Fault("the index of weight files cannot be read", str(index), why, "copy it again"))
    present = {path.name for path in folder.iterdir() if path.is_file()}  # listed, because a name may be malformed
    faults = []
    if wrong := [name for name, file in weight_map.items() if not isinstance(file, str)]:
        why = f"it maps {excerpt(wrong[0], 120)} to {excerpt(weight_map[wrong[0]])}, which is not the name of a file"
        raise UserError(Fault("the index of weight files cannot be read", str(index), why, "copy it again"))
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or file in ("", ".", ".."):
            why = "weight files must be in the checkpoint's own folder"
            faults.append(Fault(f"the index names {excerpt(file, 200)}", str(index), why))
        elif file not in present:
            what, why = f"weight file {enumerate_first([file])} is missing", f"{INDEX} names it"
            faults.append(Fault(what, str(folder), why, "download it again"))
    if faults:
        raise UserError(*faults)
    return sorted(set(weight_map.values()))


def outside_links(folder: Path) -> dict[str, Path]:
    """Names of the files in the folder that are links to files elsewhere -> these. OSError if it cannot be read.

    The Hugging Face cache may link to its own blobs. Any other link could make a checkpoint read, and copy into the
    output, any file of this machine.
    """
    real = folder.resolve()
    allowed = [real, *_blobs(real)]
    targets = {path.name: path.resolve() for path in sorted(real.iterdir()) if path.is_symlink() and path.is_file()}
    return {name: path for name, path in targets.items() if not any(parent in path.parents for parent in allowed)}


def link_faults(folder: Path) -> list[Fault]:
    """The fault of links out of a checkpoint folder, unless `trust_links` was called for it."""
    targets = {} if are_links_trusted(folder) else outside_links(folder)
    return [link_fault(folder, targets, FOLLOW_LINKS)] if targets else []


def _blobs(folder: Path) -> Iterator[Path]:
    """The folder of the files of a snapshot, in the same repository of the Hugging Face cache."""
    for inner in (folder, *folder.parents):
        if inner.parent.name == SNAPSHOTS:
            yield inner.parent.parent / BLOBS
            return
