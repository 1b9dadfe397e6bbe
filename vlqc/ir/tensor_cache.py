"""Versions of tensors and modules, which show whether they changed, and a cache of results per tensor."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class TensorVersion:
    """The state of a tensor: the object, its data pointer and its version counter."""

    reference: "weakref.ref[Tensor]"
    data_ptr: int
    version: int

    @classmethod
    def of(cls, tensor: Tensor, on_delete: "Callable[[weakref.ref[Tensor]], object] | None" = None) -> "TensorVersion":
        """on_delete: callback for the garbage collection of the tensor."""
        return cls(weakref.ref(tensor, on_delete), tensor.data_ptr(), tensor._version)

    def matches(self, tensor: Tensor) -> bool:
        """Whether it is the same object with unchanged data."""
        return self.reference() is tensor and (self.data_ptr, self.version) == (tensor.data_ptr(), tensor._version)


@dataclass(frozen=True)
class ModuleVersion:
    """The state of a module: the objects of its submodules, and the state of all parameters and buffers, by path.

    It does not notice writes through `Tensor.data`, nor attributes that are neither modules nor tensors.
    """

    modules: "dict[str, weakref.ref[nn.Module]]"
    tensors: dict[str, TensorVersion]

    @classmethod
    def of(cls, module: nn.Module) -> "ModuleVersion":
        modules = {path: weakref.ref(child) for path, child in module.named_modules(remove_duplicate=False)}
        return cls(modules, {path: TensorVersion.of(tensor) for path, tensor in _tensors(module).items()})

    def matches(self, module: nn.Module) -> bool:
        """Whether the module has the same submodules, parameters and buffers with unchanged data."""
        modules, tensors = dict(module.named_modules(remove_duplicate=False)), _tensors(module)
        return (
            self.modules.keys() == modules.keys()
            and self.tensors.keys() == tensors.keys()
            and all(self.modules[path]() is child for path, child in modules.items())
            and all(self.tensors[path].matches(tensor) for path, tensor in tensors.items())
        )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by path, those that several modules share once for each."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}


class TensorCache(Generic[T]):
    """Memoizes a function of tensors. Results are dropped together with the tensors."""

    def __init__(self, function: Callable[..., T]) -> None:
        self.function = function
        self._results: dict[tuple[int, ...], tuple[list[TensorVersion], T]] = {}

    def __call__(self, *tensors: Tensor) -> T:
        key = tuple(map(id, tensors))
        cached = self._results.get(key)
        if cached is not None:
            versions, result = cached
            if all(version.matches(tensor) for version, tensor in zip(versions, tensors, strict=True)):
                return result
        result = self.function(*tensors)
        versions = [TensorVersion.of(tensor, lambda _: self._results.pop(key, None)) for tensor in tensors]
        self._results[key] = versions, result
        return result
