"""The journal's file: what was appended is read back, half a line is forgotten, any other damage is found."""

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
    for record in RECORDS:  # each by a writer of its own, as after interruptions
        writer = JournalWriter(tmp_path / "journal")
        writer.append(record)
        writer.close()
    return tmp_path / "journal"


def test_what_was_appended(path: Path) -> None:
    """Catches a line that is lost, or numbers that come back rounded."""
    assert read_lines(path) == (RECORDS, path.stat().st_size)


def test_every_cut_leaves_whole_lines(path: Path) -> None:
    """Catches a crash or half a record for any place at which a power cut can end the file."""
    raw = path.read_bytes()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        records, good = read_lines(path)
        assert records == RECORDS[: raw[:length].count(b"\n")] and good == len(raw[:length].rpartition(b"\n")[0]) + (
            b"\n" in raw[:length]
        )
        path.write_bytes(raw[:length] + bytes(100))  # blocks that were allocated and never written
        assert read_lines(path)[0] == records


def test_every_changed_byte_is_found(path: Path) -> None:
    """Catches a record that is believed although it is not what was written."""
    raw = path.read_bytes()
    last = raw[:-1].rfind(b"\n") + 1
    for place in range(len(raw)):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 4]) + raw[place + 1 :])
        if place == last - 1:  # the last two lines are one, which counts as torn
            assert read_lines(path)[0] == RECORDS[:-2]
        elif place < last:
            with pytest.raises(DamagedJournal):
                read_lines(path)
        else:
            assert read_lines(path)[0] == RECORDS[:-1]


def test_a_line_in_the_middle_cannot_go(path: Path) -> None:
    """Catches checksums that know only their own line."""
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[2] + lines[2])
    with pytest.raises(DamagedJournal):
        read_lines(path)


def test_what_is_torn_goes_before_the_next_line(path: Path) -> None:
    """Catches a line that is appended to half of another one."""
    path.write_bytes(path.read_bytes()[:-5])
    writer = JournalWriter(path)
    writer.append(RECORDS[2])
    writer.close()
    assert read_lines(path)[0] == RECORDS
