"""Prefetching: exactly the bytes that will be read are requested, and each weight is read once."""

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
from vlqc.frontend.checkpoint.files import tensor_ranges
from vlqc.frontend.checkpoint.prefetch import CHUNK, ByteRange, Prefetcher


class Requests:
    """Replaces os.posix_fadvise and records the ranges of bytes that are requested."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.posix_fadvise = os.posix_fadvise
        monkeypatch.setattr("os.posix_fadvise", self)

    def __call__(self, descriptor: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        self.posix_fadvise(descriptor, offset, length, advice)
        self.ranges.append((offset, offset + length))


def test_all_ranges_are_requested_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the rest of a range that is not requested, or requested twice."""
    file = tmp_path / "weights"
    file.write_bytes(bytes(2 * CHUNK + 100))
    requests, prefetcher = Requests(monkeypatch), Prefetcher()
    prefetcher.start([ByteRange(file, 50, 60), ByteRange(file, 10, 20), ByteRange(file, 100, 2 * CHUNK + 90)])
    prefetcher.wait()
    assert requests.ranges == [(10, 20), (50, 60), (100, 100 + CHUNK), (100 + CHUNK, 2 * CHUNK + 90)]


def test_missing_and_short_files_are_ignored(tmp_path: Path) -> None:
    """Catches a thread that fails or never ends where reading the file would report a clear error."""
    (tmp_path / "short").write_bytes(b"12")
    prefetcher = Prefetcher()
    ranges = [(tmp_path / "none", 0, 5), (tmp_path / "short", 0, 5), (tmp_path / "short", 9, 12)]
    prefetcher.start(ByteRange(*each) for each in ranges)
    prefetcher.wait()


def test_a_new_set_cancels_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches two threads that compete for the disk, and requests for bytes that are no longer needed."""
    file = tmp_path / "weights"
    file.write_bytes(bytes(100))
    prefetcher = Prefetcher()
    requests = Requests(monkeypatch)
    prefetcher.cancel()
    prefetcher.start([ByteRange(file, 0, 10)])
    prefetcher.start([ByteRange(file, 20, 30)])
    prefetcher.wait()
    assert requests.ranges[-1] == (20, 30)


def test_tensor_ranges_contain_the_values(tmp_path: Path) -> None:
    """Catches offsets that do not account for the header."""
    tensors = {"a": torch.arange(5, dtype=torch.int32), "b": torch.arange(7, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "x.safetensors")
    spans, raw = tensor_ranges(tmp_path / "x.safetensors"), (tmp_path / "x.safetensors").read_bytes()
    values = {name: raw[span.begin : span.end] for name, span in spans.items()}
    assert values == {name: bytes(tensor.view(torch.uint8).tolist()) for name, tensor in tensors.items()}


def test_a_damaged_header_raises(tmp_path: Path) -> None:
    """Catches ranges from a header that is not one, and errors that `Checkpoint` does not turn into faults."""
    (tmp_path / "x").write_bytes(b"\x02\0\0\0\0\0\0\0[]")
    with pytest.raises(ValueError, match="header"):
        tensor_ranges(tmp_path / "x")
    with pytest.raises(OSError):
        tensor_ranges(tmp_path / "none")


@pytest.mark.slow
def test_each_weight_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights that are read again for proofs, checks or writing, and prefetching of weights already read."""
    read: Counter[str] = Counter()
    prefetched: Counter[str] = Counter()
    tensor, start = Checkpoint.tensor, Checkpoint.prefetch

    def counted(checkpoint: Checkpoint, name: str) -> Tensor:
        read[name] += 1
        return tensor(checkpoint, name)

    def counted_prefetch(checkpoint: Checkpoint, names: Sequence[str]) -> None:
        prefetched.update(list(names))
        start(checkpoint, names)

    monkeypatch.setattr(Checkpoint, "tensor", counted)
    monkeypatch.setattr(Checkpoint, "prefetch", counted_prefetch)
    vlqc.compile(model_path=tiny.TINY, save_directory=tmp_path / "out", samples=tiny_task.samples(1, seed=0))
    names = Checkpoint(tiny.TINY).names
    assert read == dict.fromkeys(names, 1)
    first = {name for name in names if name.startswith("visual.blocks.0.")}
    assert prefetched == dict.fromkeys(set(names) - first, 1)
