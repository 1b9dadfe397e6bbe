"""TensorCache: what is remembered of tensors, and when it is not."""

import gc

import pytest
import torch
from torch import Tensor

from vlqc.ir.tensor_cache import TensorCache


@pytest.fixture
def asked() -> list[float]:
    return []


@pytest.fixture
def total(asked: list[float]) -> TensorCache[float]:
    def function(*tensors: Tensor) -> float:
        asked.append(sum(float(tensor.sum()) for tensor in tensors))
        return asked[-1]

    return TensorCache(function)


def test_not_asked_twice(total: TensorCache[float], asked: list[float]) -> None:
    """Catches a memory that remembers nothing, or confuses the order or the number of tensors."""
    one, two = torch.ones(3), torch.full((2,), 5.0)
    assert [total(one, two), total(one, two), total(two), total(one)] == [13.0, 13.0, 10.0, 3.0]
    assert asked == [13.0, 10.0, 3.0]


@torch.no_grad()
def test_asked_again_after_a_change(total: TensorCache[float]) -> None:
    """Catches stale answers: after writing in place, through a view, or to other values under the same object."""
    tensor = torch.nn.Parameter(torch.ones(4))
    assert total(tensor) == 4
    tensor.mul_(2)
    assert total(tensor) == 8
    tensor[1:3].zero_()
    assert total(tensor) == 4
    tensor.data = torch.full((4,), 3.0)
    assert total(tensor) == 12


def test_nothing_is_kept_of_what_is_gone(total: TensorCache[float], asked: list[float]) -> None:
    """Catches memory that grows with every stage, and an answer about a tensor that lay where a new one lies now."""
    for value in range(50):
        tensor = torch.full((1 << 12,), float(value))
        assert total(tensor) == value * (1 << 12)
        del tensor
        gc.collect()
    assert len(asked) == 50 and not total._known


@torch.no_grad()
def test_a_changed_tensor_is_kept_once(total: TensorCache[float]) -> None:
    """Catches a memory that keeps an answer for every state that a tensor once had."""
    tensor = torch.ones(4)
    for factor in (1, 2, 3):
        assert total(tensor.mul_(factor)) == float(tensor.sum())
    assert len(total._known) == 1
