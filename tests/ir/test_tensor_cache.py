"""TensorCache: when results are reused, recomputed and dropped. ModuleVersion: which changes it notices."""

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vlqc.ir.tensor_cache import ModuleVersion, TensorCache


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


MODULE_CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "a write in place": lambda module: module[0].weight[1].mul_(2),
    "a write to a buffer": lambda module: module[1].num_batches_tracked.add_(1),
    "new data": lambda module: setattr(module[0].weight, "data", module[0].weight.detach().clone()),
    "another parameter": lambda module: setattr(module[0], "bias", nn.Parameter(module[0].bias.detach().clone())),
    "no bias": lambda module: setattr(module[0], "bias", None),
    "another module": lambda module: module.set_submodule("2", nn.SiLU()),
    "a module around another": lambda module: module.set_submodule("2", nn.Sequential(module[2])),
    "swapped modules": lambda module: module._modules.update({"2": module[3], "3": module[2]}),
    "a module more": lambda module: module.append(nn.SiLU()),
}


@pytest.mark.parametrize("change", MODULE_CHANGES)
@torch.no_grad()
def test_changes_of_a_module_are_noticed(change: str) -> None:
    """Catches a stale result for a module with other weights, buffers or submodules, also equal or reordered ones."""
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.SiLU(), nn.SiLU())
    version = ModuleVersion.of(module)
    module.eval()(torch.ones(2, 4))
    assert version.matches(module) and not version.matches(copy.deepcopy(module))
    MODULE_CHANGES[change](module)
    assert not version.matches(module) and ModuleVersion.of(module).matches(module)
