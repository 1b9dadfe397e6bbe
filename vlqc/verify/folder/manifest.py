"""MANIFEST.json against the folder: every file is there, of that size, with those bytes, and there are no others."""

import hashlib
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vlqc.files import sha256_of
from vlqc.frontend.checkpoint.files import link_faults
from vlqc.verify.findings import VerificationResult
from vlqc.verify.folder.contents import MANIFEST
from vlqc.verify.folder.reader import read_json_object

FACTS = "vlqc_report.json"
CHECK = "manifest"
DIGEST = re.compile(r"[0-9a-f]{64}")
THREADS = 4
AGAIN = "copy the folder again, or compile again"


def check_manifest(folder: Path, result: VerificationResult, *, finished: bool = True) -> None:
    """Faults of a folder against its list of files. One without a list, from another tool, gets a note.

    finished: whether the folder stands at its place: the list is written last.
    """
    for fault in link_faults(folder):
        result.add_fault(
            CHECK, Path(fault.where).name, fault.what.replace("checkpoint", "compiled"), fault.why, fault.fix
        )
    if finished and (folder / FACTS).is_file() and not (folder / MANIFEST).exists():
        why = f"vlqc has written this folder ({FACTS} says so), with a list of its files"
        result.add_fault(CHECK, MANIFEST, f"{MANIFEST} is missing", why, AGAIN)
        return
    if not (folder / MANIFEST).is_file():
        result.facts[CHECK] = f"no {MANIFEST}: nothing tells whether files changed since they were written"
        return
    listed = _listed(folder, result)
    if listed is None:
        return
    result.manifest = sha256_of(folder / MANIFEST)
    result.add_examined(CHECK, len(listed))
    there = {path.name for path in folder.iterdir()} - {MANIFEST}
    for name in sorted(there - listed.keys()):
        why = "it was not there when the folder was written"
        result.add_fault(CHECK, name, f"{name} is not in {MANIFEST}", why, "remove it")
    for name in sorted(listed.keys() - there):
        result.add_fault(CHECK, name, f"{name} is missing", f"{MANIFEST} lists it", AGAIN)
    names = sorted(listed.keys() & there)
    with ThreadPoolExecutor(THREADS) as pool:
        for name, trouble in zip(
            names, pool.map(lambda name: _trouble(folder / name, *listed[name]), names), strict=True
        ):
            if trouble:
                result.add_fault(CHECK, name, f"{name} {trouble}", "its bytes are not those that were written", AGAIN)


def _listed(folder: Path, result: VerificationResult) -> dict[str, tuple[int, str]] | None:
    """File name -> (size, SHA-256); None, and a fault, if the list is damaged."""
    content, trouble = read_json_object(folder / MANIFEST)
    files: Any = None if content is None else content.get("files")
    if content is not None and (content.get("manifest") != 1 or not isinstance(files, Mapping)):
        trouble = "has no list of files of a kind that is known"
    elif content is not None:
        for name, entry in files.items():
            if name in ("", ".", "..", MANIFEST) or "/" in name or "\\" in name or not _is_entry(entry):
                trouble = f"is damaged at {name!r}"
    if trouble:
        result.add_fault(CHECK, MANIFEST, f"{MANIFEST} {trouble}", "no file can be compared with it", AGAIN)
        return None
    return {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, Mapping) or entry.keys() != {"size", "sha256"}:
        return False
    size, digest = entry["size"], entry["sha256"]
    return type(size) is int and size >= 0 and isinstance(digest, str) and bool(DIGEST.fullmatch(digest))


def _trouble(path: Path, size: int, digest: str) -> str:
    """What is wrong with a file, in words; empty if nothing is."""
    try:
        if not path.is_file():
            return "is no file"
        if (found := path.stat().st_size) != size:
            return f"has {found} bytes, {size} were written"
        with path.open("rb") as file:
            return "" if hashlib.file_digest(file, "sha256").hexdigest() == digest else "was changed"
    except OSError as error:
        return f"cannot be read: {error}"
