"""The journal's file: one JSON object per line, each with a checksum that also covers every line before it.

A power cut can leave half of the last line, or a line of zeros: it counts as never written. A line that is wrong
anywhere else is damage.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]
CHECKSUM = 16  # hexadecimal digits at the start of each line


class DamagedJournal(Exception):
    """A line that is wrong although others follow it."""


def read_lines(path: Path) -> tuple[list[Record], int]:
    """File -> (its records, how many bytes they take: what is behind them was never completed). DamagedJournal."""
    content = path.read_bytes()
    records: list[Record] = []
    known, good = "", 0
    while good < len(content):
        line, newline, _ = content[good:].partition(b"\n")
        record = _record(line, known) if newline else None
        if record is None:
            if content[good + len(line) + 1 :].strip(b"\0\n"):
                raise DamagedJournal(f"line {len(records) + 1} of {path.name} is not what was written")
            break
        records.append(record)
        known = line[:CHECKSUM].decode("ascii")
        good += len(line) + 1
    return records, good


def _record(line: bytes, known: str) -> Record | None:
    checksum, _, text = line.partition(b" ")
    if checksum.decode("ascii", "replace") != _checksum(known, text):
        return None
    record: Record = json.loads(text)
    return record


def _checksum(known: str, text: bytes) -> str:
    return hashlib.sha256(known.encode() + text).hexdigest()[:CHECKSUM]


class JournalWriter:
    """Appends lines, each of which is on the disk when `append` returns. What is torn at the end goes first."""

    def __init__(self, path: Path) -> None:
        _, good = read_lines(path) if path.exists() else ([], 0)
        self._file = path.open("r+b" if path.exists() else "x+b", buffering=0)
        self._file.truncate(good)
        self._file.seek(0)
        written = self._file.read().splitlines()
        self._known = written[-1][:CHECKSUM].decode("ascii") if written else ""

    def append(self, record: Record) -> None:
        """OSError if the disk is full; the file then ends with the line before."""
        text = json.dumps(record, separators=(",", ":")).encode()
        line = _checksum(self._known, text).encode() + b" " + text + b"\n"
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
        self._known = line[:CHECKSUM].decode("ascii")

    def close(self) -> None:
        self._file.close()
