"""MANIFEST.json: size and SHA-256 of every other file of a compiled folder."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vlqc.files import sha256_of

MANIFEST = "MANIFEST.json"
VERSION = 1
THREADS = 4  # files hashed at the same time: one thread reaches about 1.8 GB/s


def write_manifest(folder: Path) -> None:
    """Writes the manifest of a folder that is complete otherwise; the same files give the same bytes.

    Reads every file once more: the header of a weight file comes first but is written last, so it cannot be hashed
    while it is written.
    """
    paths = sorted(path for path in folder.rglob("*") if path.name != MANIFEST and path.is_file())
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(sha256_of, paths))
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }
    text = json.dumps({"manifest": VERSION, "files": files}, indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
