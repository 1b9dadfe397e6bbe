"""Tensors in files: their values survive the release of their pages, and nothing stays behind."""

import gc
from pathlib import Path

import torch

from vlqc.ir.memory import file_backed, file_backed_copy, is_file_backed, release_pages


def resident_file_bytes() -> int:
    """Bytes of files that are mapped and in memory."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssFile"].split()[0]) * 1024 + int(lines["RssShmem"].split()[0]) * 1024


def test_released_pages_leave_memory_and_keep_their_values(tmp_path: Path) -> None:
    """Would catch weights that stay in memory, or that are lost or zero after their pages are dropped."""
    tensor = file_backed((1000, 4000), torch.float32, tmp_path)
    tensor.copy_(torch.arange(4_000_000.0).reshape(1000, 4000))
    tensor.mul_(2)
    before = resident_file_bytes()
    release_pages(tensor)
    assert before - resident_file_bytes() > 0.9 * tensor.nbytes
    assert torch.equal(tensor, torch.arange(4_000_000.0).reshape(1000, 4000) * 2)


def test_copies_are_in_files_if_the_original_is(tmp_path: Path) -> None:
    """Would catch copies of all experts in memory, and tensors that are taken for file-backed by their address."""
    tensor, ordinary = file_backed((8, 16), torch.float32, tmp_path), torch.ones(8, 16)
    tensor.fill_(3)
    copy = file_backed_copy(tensor.to(torch.bfloat16), like=tensor)
    assert is_file_backed(copy)
    assert copy.dtype == torch.bfloat16
    assert torch.equal(copy.float(), tensor)
    assert file_backed_copy(ordinary, like=ordinary) is ordinary
    assert not is_file_backed(ordinary)
    assert not list(tmp_path.iterdir())
    address = copy.data_ptr()
    del copy
    gc.collect()
    reused = torch.empty(0)
    assert reused.data_ptr() != address or not is_file_backed(reused)
