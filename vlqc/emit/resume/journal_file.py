"""The journal file: one JSON object per line, each with a checksum that also covers all lines before it.

A power failure can leave a partial last line, or one of zeros; it is ignored. Any other invalid line is damage.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]
CHECKSUM_DIGITS = 16  # hexadecimal, at the start of each line


class DamagedJournal(Exception):
    """An invalid line is followed by others."""


def read_lines(path: Path) -> tuple[list[Record], int]:
    """Returns the records of a journal file, and the number of bytes that they take. Raises DamagedJournal."""
    content = path.read_bytes()
    records: list[Record] = []
    previous, valid_bytes = "", 0
    while valid_bytes < len(content):
        line, newline, _ = content[valid_bytes:].partition(b"\n")
        record = _parse(line, previous) if newline else None
        if record is None:
            if content[valid_bytes + len(line) + 1 :].strip(b"\0\n"):
                raise DamagedJournal(f"checksum mismatch in line {len(records) + 1} of {path.name}")
            break
        records.append(record)
        previous = line[:CHECKSUM_DIGITS].decode("ascii")
        valid_bytes += len(line) + 1
    return records, valid_bytes


def _parse(line: bytes, previous: str) -> Record | None:
    checksum, _, text = line.partition(b" ")
    if checksum.decode("ascii", "replace") != _checksum(previous, text):
        return None
    record: Record = json.loads(text)
    return record


def _checksum(previous: str, text: bytes) -> str:
    """previous: checksum of the line before, so that no line can be removed or moved."""
    return hashlib.sha256(previous.encode() + text).hexdigest()[:CHECKSUM_DIGITS]


class JournalWriter:
    """Appends records to a journal file. An incomplete last line is truncated first."""

    def __init__(self, path: Path) -> None:
        _, valid_bytes = read_lines(path) if path.exists() else ([], 0)
        self._file = path.open("r+b" if path.exists() else "x+b", buffering=0)
        self._file.truncate(valid_bytes)
        self._file.seek(0)
        lines = self._file.read().splitlines()
        self._previous = lines[-1][:CHECKSUM_DIGITS].decode("ascii") if lines else ""

    def append(self, record: Record) -> None:
        """Appends a record and syncs it to disk. If that raises OSError, the file is as before."""
        text = json.dumps(record, separators=(",", ":")).encode()
        line = _checksum(self._previous, text).encode() + b" " + text + b"\n"
        end = self._file.tell()
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) or 0 :]
            os.fsync(self._file.fileno())
        except OSError:
            self._file.seek(end)
            self._file.truncate()
            raise
        self._previous = line[:CHECKSUM_DIGITS].decode("ascii")

    def close(self) -> None:
        self._file.close()
