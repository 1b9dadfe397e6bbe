"""Caches results per tensor, invalidated by its version counter and data pointer."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

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
