"""Reading ahead: what is brought from the disk is what will be wanted, and each weight is read once."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import vlqc
from tests.support import tiny
from tools.demo import tiny_task
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.checkpoint.files import spans_of
from vlqc.frontend.checkpoint.prefetch import BUFFER_BYTES, ReadAhead, Span


class Disk:
    """Stands for os.preadv: notes which bytes of which file were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[tuple[int, int]] = []
        self.preadv = os.preadv
        monkeypatch.setattr("os.preadv", self)

    def __call__(self, handle: int, buffers: Sequence[memoryview], position: int) -> int:
        got = self.preadv(handle, buffers, position)
        self.read.append((position, position + got))
        return got


def test_all_bytes_of_all_spans_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rest of a span that is left out, or read twice."""
    file = tmp_path / "weights"
    file.write_bytes(bytes(2 * BUFFER_BYTES + 100))
    disk, ahead = Disk(monkeypatch), ReadAhead()
    ahead.start([Span(file, 50, 60), Span(file, 10, 20), Span(file, 100, 2 * BUFFER_BYTES + 90)])
    ahead.wait()
    assert disk.read == [
        (10, 20),
        (50, 60),
        (100, 100 + BUFFER_BYTES),
        (100 + BUFFER_BYTES, 2 * BUFFER_BYTES + 90),
    ]


def test_a_missing_or_short_file_is_left_to_the_reader(tmp_path: Path) -> None:
    """Catches a thread that dies with a traceback, or never ends, where the real reader has a clear error to give."""
    (tmp_path / "short").write_bytes(b"12")
    ahead = ReadAhead()
    ahead.start([Span(tmp_path / "none", 0, 5), Span(tmp_path / "short", 0, 5), Span(tmp_path / "short", 9, 12)])
    ahead.wait()


def test_a_new_set_ends_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches two threads that compete for the disk, and a stage that waits for bytes nobody wants any more."""
    file = tmp_path / "weights"
    file.write_bytes(bytes(100))
    ahead = ReadAhead()
    disk = Disk(monkeypatch)
    ahead.stop()
    ahead.start([Span(file, 0, 10)])
    ahead.start([Span(file, 20, 30)])
    ahead.wait()
    assert disk.read[-1] == (20, 30)


def test_spans_are_where_the_values_lie(tmp_path: Path) -> None:
    """Catches offsets that are counted from the wrong end of the header."""
    tensors = {"a": torch.arange(5, dtype=torch.int32), "b": torch.arange(7, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "x.safetensors")
    spans, raw = spans_of(tmp_path / "x.safetensors"), (tmp_path / "x.safetensors").read_bytes()
    found = {name: raw[span.begin : span.end] for name, span in spans.items()}
    assert found == {name: bytes(it.view(torch.uint8).tolist()) for name, it in tensors.items()}


def test_a_damaged_header_is_told(tmp_path: Path) -> None:
    """Catches places in a file that were made up, and other errors than those that opening a checkpoint explains."""
    (tmp_path / "x").write_bytes(b"\x02\0\0\0\0\0\0\0[]")
    with pytest.raises(ValueError, match="header"):
        spans_of(tmp_path / "x")
    with pytest.raises(OSError):
        spans_of(tmp_path / "none")


def test_each_weight_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a compiler that reads weights again for proofs, checks or writing, and one that reads ahead of itself
    what it has already seen."""
    read: Counter[str] = Counter()
    ahead: Counter[str] = Counter()
    tensor, start = Checkpoint.tensor, Checkpoint.read_ahead

    def counted(checkpoint: Checkpoint, name: str) -> Tensor:
        read[name] += 1
        return tensor(checkpoint, name)

    def counted_ahead(checkpoint: Checkpoint, names: Sequence[str]) -> None:
        ahead.update(list(names))
        start(checkpoint, names)

    monkeypatch.setattr(Checkpoint, "tensor", counted)
    monkeypatch.setattr(Checkpoint, "read_ahead", counted_ahead)
    vlqc.compile(model_path=tiny.TINY, save_directory=tmp_path / "out", samples=tiny_task.samples(1, seed=0))
    names = Checkpoint(tiny.TINY).names
    assert read == dict.fromkeys(names, 1)
    first = {name for name in names if name.startswith("visual.blocks.0.")}
    assert ahead == dict.fromkeys(set(names) - first, 1)
