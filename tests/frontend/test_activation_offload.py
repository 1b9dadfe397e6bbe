"""What samples hold between stages: within the budget in memory, beyond it in files, and always the same values."""

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
    """float32, `count` times the smallest size that is spilled."""
    return torch.randn(count, MIN_BYTES // 4, generator=torch.Generator().manual_seed(seed))


def in_memory(*sizes: int) -> float:
    """A budget in GiB of so many smallest sizes."""
    return sum(sizes) * MIN_BYTES / GIB


def test_values_stay_for_everyone_who_holds_them(tmp_path: Path) -> None:
    """Catches a tensor that is replaced: the model's own code would go on with the one in memory, or an empty one."""
    held = [rows(2, seed) for seed in range(3)]
    frame, before = {"kept": held[1]}, [it.clone() for it in held]
    offload = ActivationOffload(tmp_path, in_memory(2))
    offload.offload((held[0],), {"x": held[1]}, [held[2]])
    offload.offload(held)
    assert frame["kept"] is held[1]
    assert all(torch.equal(one, other) for one, other in zip(held, before, strict=True))
    assert offload.offloaded == 2 * 2 * MIN_BYTES and offload.resident == 2 * MIN_BYTES


def test_what_is_changed_in_its_file_stays_changed(tmp_path: Path) -> None:
    """Catches pages that are given back before they were written: in-place additions to the stream would be lost."""
    held = rows(3)
    expected = held + 1
    offload = ActivationOffload(tmp_path, 0.0)
    offload.offload(held)
    held.add_(1)
    offload.offload(held)
    assert torch.equal(held, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_every_dtype_and_stride(tmp_path: Path, dtype: torch.dtype) -> None:
    """Catches a mask or a transposed tensor that comes back as something else."""
    held = (rows(16).T > 0).to(dtype)
    before = held.clone()
    ActivationOffload(tmp_path, 0.0).offload(held)
    assert torch.equal(held, before) and held.dtype == dtype


def test_room_comes_back_when_tensors_die(tmp_path: Path) -> None:
    """Catches a budget that fills up once and for all: from some stage on everything would lie on the disk."""
    offload = ActivationOffload(tmp_path, in_memory(4))
    for seed in range(5):
        held = rows(4, seed)
        offload.offload(held)
        del held
        gc.collect()
    assert offload.offloaded == 0 and offload.resident == 0


def test_no_file_has_a_name(tmp_path: Path) -> None:
    """Catches leftovers of a run that was killed, and spilled tensors that would be published with the result."""
    held = rows(2)
    ActivationOffload(tmp_path, 0.0).offload(held)
    assert list(tmp_path.iterdir()) == []


def test_without_a_budget_nothing_is_touched(tmp_path: Path) -> None:
    """Catches files where nobody asked for them, and tiny tensors that would each cost a file."""
    held, small = rows(2), torch.ones(3)
    address = held.data_ptr()
    ActivationOffload(tmp_path / "none", None).offload(held, small)
    ActivationOffload(tmp_path / "none", 0.0).offload(small)
    assert held.data_ptr() == address


def test_a_budget_changes_no_byte(tmp_path: Path) -> None:
    """Catches a sample that goes on with other numbers because it was on the disk meanwhile."""
    samples = tiny_task.samples(6, seed=3)
    folders = [tmp_path / "free", tmp_path / "bound"]
    for folder, budget in zip(folders, (None, 0.0), strict=True):
        vlqc.compile(model_path=TINY, save_directory=folder, samples=samples, memory_budget=budget)
    names = [path.name for path in folders[0].iterdir()]
    assert filecmp.cmpfiles(*folders, names, shallow=False) == (names, [], [])


def test_a_full_disk_is_an_error_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a crash by a signal, which is what writing to a mapping does when the disk has no room behind it."""

    def full(handle: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    monkeypatch.setattr("vlqc.frontend.activation_offload.MIN_BYTES", 1)
    with pytest.raises(UserError, match=r"No space left"):
        samples = tiny_task.samples(2, seed=3)
        vlqc.compile(model_path=TINY, save_directory=tmp_path / "out", samples=samples, memory_budget=0)
    assert list(tmp_path.iterdir()) == []
