"""Remembers what was found out about tensors, for as long as PyTorch knows that nothing was written to them."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Mark:
    """Which tensor one was, where its values lay, and how often they had been changed."""

    reference: "weakref.ref[Tensor]"
    place: int
    version: int

    @classmethod
    def of(cls, tensor: Tensor, gone: "Callable[[weakref.ref[Tensor]], object] | None" = None) -> "Mark":
        """gone: called when the tensor is."""
        return cls(weakref.ref(tensor, gone), tensor.data_ptr(), tensor._version)

    def is_of(self, tensor: Tensor) -> bool:
        """Whether it is the same object, with its values at the same place, changed as often as it was."""
        return self.reference() is tensor and (self.place, self.version) == (tensor.data_ptr(), tensor._version)


class TensorCache(Generic[T]):
    """A function of tensors that is not asked twice about the same ones, as their marks tell.

    Nothing is kept of tensors that are gone.
    """

    def __init__(self, function: Callable[..., T]) -> None:
        self.function = function
        self._known: dict[tuple[int, ...], tuple[list[Mark], T]] = {}

    def __call__(self, *tensors: Tensor) -> T:
        key = tuple(map(id, tensors))
        known = self._known.get(key)
        if known is not None and all(mark.is_of(it) for mark, it in zip(known[0], tensors, strict=True)):
            return known[1]
        found = self.function(*tensors)
        self._known[key] = [Mark.of(tensor, lambda _: self._known.pop(key, None)) for tensor in tensors], found
        return found
