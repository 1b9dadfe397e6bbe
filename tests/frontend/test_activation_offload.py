"""Activations stay in memory up to the budget, are moved to files beyond it, and keep their values."""

import errno
import filecmp
import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vlqc
from tools.demo import tiny_task
from vlqc.errors import UserError
from vlqc.frontend.activation_offload import GIB, MIN_BYTES, ActivationOffload

TINY = Path(tiny_task.__file__).parent / "tiny_vl"


def rows(count: int, seed: int = 0) -> Tensor:
    """float32, `count` times the smallest size that is offloaded."""
    return torch.randn(count, MIN_BYTES // 4, generator=torch.Generator().manual_seed(seed))


def in_memory(*sizes: int) -> float:
    """A budget in GiB of this many smallest sizes."""
    return sum(sizes) * MIN_BYTES / GIB


def test_all_references_keep_their_values(tmp_path: Path) -> None:
    """Catches a tensor object that is replaced, so that other references keep the data in memory."""
    tensors = [rows(2, seed) for seed in range(3)]
    frame, before = {"kept": tensors[1]}, [it.clone() for it in tensors]
    offload = ActivationOffload(tmp_path, in_memory(2))
    offload.offload((tensors[0],), {"x": tensors[1]}, [tensors[2]])
    offload.offload(tensors)
    assert frame["kept"] is tensors[1]
    assert all(torch.equal(one, other) for one, other in zip(tensors, before, strict=True))
    assert offload.offloaded == 2 * 2 * MIN_BYTES and offload.resident == 2 * MIN_BYTES


def test_in_place_changes_are_kept(tmp_path: Path) -> None:
    """Catches pages that are dropped before they are written, so that in-place additions are lost."""
    tensors = rows(3)
    expected = tensors + 1
    offload = ActivationOffload(tmp_path, 0.0)
    offload.offload(tensors)
    tensors.add_(1)
    offload.offload(tensors)
    assert torch.equal(tensors, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_every_dtype_and_stride(tmp_path: Path, dtype: torch.dtype) -> None:
    """Catches a mask or a transposed tensor with other values."""
    tensors = (rows(16).T > 0).to(dtype)
    before = tensors.clone()
    ActivationOffload(tmp_path, 0.0).offload(tensors)
    assert torch.equal(tensors, before) and tensors.dtype == dtype


def test_deleted_tensors_free_the_budget(tmp_path: Path) -> None:
    """Catches a budget that is never freed, so that later stages are offloaded completely."""
    offload = ActivationOffload(tmp_path, in_memory(4))
    for seed in range(5):
        tensors = rows(4, seed)
        offload.offload(tensors)
        del tensors
        gc.collect()
    assert offload.offloaded == 0 and offload.resident == 0


def test_files_are_unnamed(tmp_path: Path) -> None:
    """Catches files that remain after a crash, or get into the result."""
    tensors = rows(2)
    ActivationOffload(tmp_path, 0.0).offload(tensors)
    assert list(tmp_path.iterdir()) == []


def test_without_a_budget_nothing_is_offloaded(tmp_path: Path) -> None:
    """Catches offloading without a budget, and of small tensors."""
    tensors, small = rows(2), torch.ones(3)
    address = tensors.data_ptr()
    ActivationOffload(tmp_path / "none", None).offload(tensors, small)
    ActivationOffload(tmp_path / "none", 0.0).offload(small)
    assert tensors.data_ptr() == address


def test_a_budget_does_not_change_the_result(tmp_path: Path) -> None:
    """Catches offloaded activations that change the result."""
    samples = tiny_task.samples(6, seed=3)
    folders = [tmp_path / "free", tmp_path / "bound"]
    for folder, budget in zip(folders, (None, 0.0), strict=True):
        vlqc.compile(model_path=TINY, save_directory=folder, samples=samples, memory_budget=budget)
    names = [path.name for path in folders[0].iterdir()]
    assert filecmp.cmpfiles(*folders, names, shallow=False) == (names, [], [])


def test_a_full_disk_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches SIGBUS, which a write to a mapping raises if the disk is full."""

    def full(handle: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    monkeypatch.setattr("vlqc.frontend.activation_offload.MIN_BYTES", 1)
    with pytest.raises(UserError, match=r"No space left"):
        samples = tiny_task.samples(2, seed=3)
        vlqc.compile(model_path=TINY, save_directory=tmp_path / "out", samples=samples, memory_budget=0)
    assert list(tmp_path.iterdir()) == []
