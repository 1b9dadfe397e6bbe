"""The journal file: records are read back, an incomplete last line is ignored, other damage is detected."""

from pathlib import Path
from typing import Any

import pytest

from vlqc.emit.resume.journal_file import DamagedJournal, JournalWriter, read_lines

RECORDS: list[dict[str, Any]] = [
    {"kind": "begin", "text": "ein\nZeichen ä"},
    {"kind": "stage", "noise": 0.1 + 0.2},
    {"kind": "end", "n": 3},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    for record in RECORDS:  # each by a new writer, as after interruptions
        writer = JournalWriter(tmp_path / "journal")
        writer.append(record)
        writer.close()
    return tmp_path / "journal"


def test_records_are_read_back(path: Path) -> None:
    """Catches a missing record, and rounded numbers."""
    assert read_lines(path) == (RECORDS, path.stat().st_size)


def test_a_truncated_file_has_the_complete_lines(path: Path) -> None:
    """Catches an exception or a partial record for any length of the file after a power failure."""
    raw = path.read_bytes()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        records, good = read_lines(path)
        assert records == RECORDS[: raw[:length].count(b"\n")] and good == len(raw[:length].rpartition(b"\n")[0]) + (
            b"\n" in raw[:length]
        )
        path.write_bytes(raw[:length] + bytes(100))  # allocated blocks that were not written
        assert read_lines(path)[0] == records


def test_every_changed_byte_is_detected(path: Path) -> None:
    """Catches a changed record that is accepted."""
    raw = path.read_bytes()
    last = raw[:-1].rfind(b"\n") + 1
    for index in range(len(raw)):
        path.write_bytes(raw[:index] + bytes([raw[index] ^ 4]) + raw[index + 1 :])
        if index == last - 1:  # joins the last two lines to one incomplete line
            assert read_lines(path)[0] == RECORDS[:-2]
        elif index < last:
            with pytest.raises(DamagedJournal):
                read_lines(path)
        else:
            assert read_lines(path)[0] == RECORDS[:-1]


def test_a_removed_line_is_detected(path: Path) -> None:
    """Catches checksums that cover only their own line."""
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[2] + lines[2])
    with pytest.raises(DamagedJournal):
        read_lines(path)


def test_an_incomplete_line_is_truncated_before_an_append(path: Path) -> None:
    """Catches a line that is appended to an incomplete one."""
    path.write_bytes(path.read_bytes()[:-5])
    writer = JournalWriter(path)
    writer.append(RECORDS[2])
    writer.close()
    assert read_lines(path)[0] == RECORDS
