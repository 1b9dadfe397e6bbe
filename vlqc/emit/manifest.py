"""MANIFEST.json: the size and the SHA-256 of every file of a compiled folder but itself."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vlqc.files import sha256_of

MANIFEST = "MANIFEST.json"
VERSION = 1
THREADS = 4  # files are hashed beside each other: one thread takes about 1.8 GB/s


def write_manifest(folder: Path) -> None:
    """Writes it for a folder that is complete otherwise; the same files give the same bytes.

    Files are read once more for it: the header of a weight file stands before its data and is written after them, so
    that what goes through the writer is not in the order of the file.
    """
    paths = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(sha256_of, paths))
    files = {
        path.name: {"size": path.stat().st_size, "sha256": digest} for path, digest in zip(paths, digests, strict=True)
    }
    text = json.dumps({"manifest": VERSION, "files": files}, indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
