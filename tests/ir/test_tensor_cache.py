"""TensorCache: when results are reused, recomputed and dropped."""

import gc

import pytest
import torch
from torch import Tensor

from vlqc.ir.tensor_cache import TensorCache


@pytest.fixture
def computed() -> list[float]:
    return []


@pytest.fixture
def total(computed: list[float]) -> TensorCache[float]:
    def function(*tensors: Tensor) -> float:
        computed.append(sum(float(tensor.sum()) for tensor in tensors))
        return computed[-1]

    return TensorCache(function)


def test_result_is_reused(total: TensorCache[float], computed: list[float]) -> None:
    """Catches a cache that stores nothing, or confuses the order or the number of tensors."""
    one, two = torch.ones(3), torch.full((2,), 5.0)
    assert [total(one, two), total(one, two), total(two), total(one)] == [13.0, 13.0, 10.0, 3.0]
    assert computed == [13.0, 10.0, 3.0]


@torch.no_grad()
def test_result_is_recomputed_after_a_change(total: TensorCache[float]) -> None:
    """Catches stale results after a write in place, through a view, or of new data in the same object."""
    tensor = torch.nn.Parameter(torch.ones(4))
    assert total(tensor) == 4
    tensor.mul_(2)
    assert total(tensor) == 8
    tensor[1:3].zero_()
    assert total(tensor) == 4
    tensor.data = torch.full((4,), 3.0)
    assert total(tensor) == 12


def test_results_of_deleted_tensors_are_dropped(total: TensorCache[float], computed: list[float]) -> None:
    """Catches memory that grows with every stage, and a result of a deleted tensor with the address of a new one."""
    for value in range(50):
        tensor = torch.full((1 << 12,), float(value))
        assert total(tensor) == value * (1 << 12)
        del tensor
        gc.collect()
    assert len(computed) == 50 and not total._results


@torch.no_grad()
def test_a_changed_tensor_has_one_entry(total: TensorCache[float]) -> None:
    """Catches a cache that keeps a result for every version of a tensor."""
    tensor = torch.ones(4)
    for factor in (1, 2, 3):
        assert total(tensor.mul_(factor)) == float(tensor.sum())
    assert len(total._results) == 1
