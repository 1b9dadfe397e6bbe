"""Compares a folder with its MANIFEST.json: every file must be listed and have the listed size and SHA-256."""

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vlqc.files import sha256_of
from vlqc.frontend.checkpoint.files import outside_links
from vlqc.verify.findings import COPY_AGAIN, VerificationResult
from vlqc.verify.folder.contents import MANIFEST
from vlqc.verify.folder.reader import read_json_object

SUMMARY = "vlqc_report.json"
CHECK = "manifest"
DIGEST = re.compile(r"[0-9a-f]{64}")
THREADS = 4


def check_manifest(folder: Path, result: VerificationResult, *, finished: bool = True) -> None:
    """Adds faults for every difference between the folder and its manifest; another tool's folder may have none.

    finished: False for a folder that vlqc is still writing; the manifest is written last.
    """
    for name, target in outside_links(folder).items():
        what, why = f"{name} is a link out of the compiled folder", f"its target is {target}"
        result.add_fault(CHECK, name, what, why, "copy the file itself into the folder")
    if finished and (folder / SUMMARY).is_file() and not (folder / MANIFEST).exists():
        why = f"every folder with a {SUMMARY}, which vlqc writes, has a manifest"
        result.add_fault(CHECK, MANIFEST, f"{MANIFEST} is missing", why, COPY_AGAIN)
        return
    if not (folder / MANIFEST).is_file():
        result.facts[CHECK] = f"no {MANIFEST}: changed files cannot be detected"
        return
    entries = _read_manifest(folder, result)
    if entries is None:
        return
    result.manifest = sha256_of(folder / MANIFEST)
    result.add_examined(CHECK, len(entries))
    present = _files(folder) - {MANIFEST}
    for name in sorted(present - entries.keys()):
        why = "it was added after the folder was written"
        result.add_fault(CHECK, name, f"{name} is not in {MANIFEST}", why, "remove it")
    for name in sorted(entries.keys() - present):
        result.add_fault(CHECK, name, f"{name} is missing", f"{MANIFEST} lists it", COPY_AGAIN)
    names = sorted(entries.keys() & present)
    with ThreadPoolExecutor(THREADS) as pool:
        errors = pool.map(lambda name: _file_error(folder / name, *entries[name]), names)
        for name, error in zip(names, errors, strict=True):
            if error:
                result.add_fault(CHECK, name, f"{name} {error}", f"it differs from {MANIFEST}", COPY_AGAIN)


def _read_manifest(folder: Path, result: VerificationResult) -> dict[str, tuple[int, str]] | None:
    """File name -> (size in bytes, SHA-256); None, and a fault, if the manifest is damaged."""
    content, error = read_json_object(folder / MANIFEST)
    files: Any = None if content is None else content.get("files")
    if content is not None and (content.get("manifest") != 1 or not isinstance(files, Mapping)):
        error = "has no list of files in a supported format"
    elif content is not None:
        for name, entry in files.items():
            parts = name.split("/")
            inside = len(parts) <= 2 and not {"", ".", ".."} & set(parts) and "\\" not in name
            if not inside or name == MANIFEST or not _is_entry(entry):
                error = f"has a damaged entry {name!r}"
    if error:
        result.add_fault(CHECK, MANIFEST, f"{MANIFEST} {error}", "no file can be compared with it", COPY_AGAIN)
        return None
    return {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}


def _files(folder: Path) -> set[str]:
    """Names of all files, those in folders with a `/`; of what is deeper or a link to a folder, the name only."""
    files = set()
    for path in folder.iterdir():
        inner = list(path.iterdir()) if path.is_dir() and not path.is_symlink() else []
        files |= {f"{path.name}/{each.name}" for each in inner} or {path.name}
    return files


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, Mapping) or entry.keys() != {"size", "sha256"}:
        return False
    size, digest = entry["size"], entry["sha256"]
    return type(size) is int and size >= 0 and isinstance(digest, str) and bool(DIGEST.fullmatch(digest))


def _file_error(path: Path, size: int, digest: str) -> str:
    """How a file differs from its entry, to follow its name; empty if it does not."""
    try:
        if not path.is_file():
            return "is not a file"
        if (actual := path.stat().st_size) != size:
            return f"has {actual} bytes instead of {size}"
        return "" if sha256_of(path) == digest else "has another SHA-256"
    except OSError as error:
        return f"cannot be read: {error}"
