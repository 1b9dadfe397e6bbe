"""The header of a safetensors file: what the library wrote is read back, and every malformed header is rejected."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vlqc.frontend.checkpoint.header import read_header, read_header_bytes

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def file_of(folder: Path, header: Any, data: int = 24, length: int | None = None) -> Path:
    """A safetensors file: header as JSON values or as text, then so many zero bytes."""
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    file = folder / "x.safetensors"
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data))
    return file


def test_entries_are_those_of_the_library(tmp_path: Path) -> None:
    """Catches a shape, dtype or offset that differs from what safetensors wrote."""
    tensors = {"a": torch.arange(6, dtype=torch.int32).reshape(2, 3), "b": torch.ones((), dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    header, raw = read_header(tmp_path / "x.safetensors"), (tmp_path / "x.safetensors").read_bytes()
    assert (header.faults, header.metadata) == ([], {"format": "pt"})
    assert {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()} == {
        "a": ("I32", (2, 3)),
        "b": ("BF16", ()),
    }
    for name, entry in header.tensors.items():
        assert raw[entry.begin : entry.end] == bytes(tensors[name].reshape(-1).view(torch.uint8).tolist())
    assert raw.startswith(read_header_bytes(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    ("header", "faulty"),
    [
        ({"a": [1]}, "a"),
        ({"a": ENTRY | {"dtype": 4}}, "a"),
        ({"a": ENTRY | {"shape": [2, -3]}}, "a"),
        ({"a": ENTRY | {"shape": [True, 6]}}, "a"),
        ({"a": ENTRY | {"shape": [1 << 60, 1 << 60]}}, "a"),
        ({"a": ENTRY | {"data_offsets": [0, 20]}}, "a"),
        ({"a": ENTRY | {"data_offsets": [-24, 0]}}, "a"),
        ({"a": ENTRY | {"data_offsets": [0, 24, 24]}}, "a"),
        ({"a": ENTRY | {"dtype": "F64", "data_offsets": [0, 48]}}, "a"),
        ({"a": ENTRY, "b": ENTRY}, "b"),
        ({"a": ENTRY | {"shape": [3], "data_offsets": [12, 24]}}, "a"),
        ({"a": ENTRY | {"shape": [3], "data_offsets": [0, 12]}}, "12 unused bytes"),
    ],
)
def test_faults_name_the_tensor(tmp_path: Path, header: dict[str, Any], faulty: str) -> None:
    """Catches an entry that would be read from other bytes than its own; safetensors rejects each of them, too."""
    file = file_of(tmp_path, header)
    assert any(faulty in fault for fault in read_header(file).faults)
    with pytest.raises(SafetensorError):
        safe_open(str(file), "pt")


@pytest.mark.parametrize(
    ("header", "length"),
    [("[]", None), ("{", None), ('{"a": NaN}', None), ("{}", 1 << 62), ("{}", 27), ("[" * 100_000, None)],
)
def test_a_header_that_cannot_be_read(tmp_path: Path, header: str, length: int | None) -> None:
    """Catches an allocation as large as the header claims, and any error but the one that callers handle."""
    with pytest.raises(ValueError):
        read_header(file_of(tmp_path, header, length=length))


def test_a_name_given_twice(tmp_path: Path) -> None:
    """Catches two tensors of one name, of which each reader may take another."""
    entry = json.dumps(ENTRY)
    with pytest.raises(ValueError, match="'a'"):
        read_header(file_of(tmp_path, f'{{"a": {entry}, "a": {entry}}}'))


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_without_a_length(tmp_path: Path, size: int) -> None:
    """Catches an empty file that counts as one without tensors."""
    (tmp_path / "x.safetensors").write_bytes(bytes(size))
    with pytest.raises(ValueError):
        read_header(tmp_path / "x.safetensors")


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    """Catches a reader that waits for a pipe."""
    os.mkfifo(tmp_path / "x.safetensors")
    errors: list[Exception] = []

    def read() -> None:
        try:
            read_header(tmp_path / "x.safetensors")
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(10)
    assert errors


def test_long_values_are_shortened(tmp_path: Path) -> None:
    """Catches a fault that prints what a damaged header holds, however long it is."""
    wrong = {"shape": ["x" * 5000], "data_offsets": [0] * 5000, "dtype": ["x" * 5000]}
    entries = [ENTRY | {key: value} for key, value in wrong.items()] + [ENTRY | {"shape": [1] * 5000}]
    faults = read_header(file_of(tmp_path, {"a" * 5000 + str(i): entry for i, entry in enumerate(entries)})).faults
    assert len(faults) >= 4 and max(map(len, faults)) < 500
