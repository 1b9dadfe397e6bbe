"""One stored matrix beside its float weight, in chunks of rows that a cache holds; scales with their uncertainty."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vlqc.verify.folder.reader import Array, StoredTensor
from vlqc.verify.numbers.integers import INT8_MAX, StoredIntegers

SIGMAS = 5.0  # so that of 1e7 weights none is beyond by chance
ULP = {"BF16": 2.0**-8, "F16": 2.0**-10, "F32": 2.0**-23}  # one unit in the last place, relative
SMALLEST = {"F16": 2.0**-24}  # the distance of subnormal numbers, where it is within the reach of weights
FAR = 1e9  # steps; farther than any weight lies


@dataclass(frozen=True)
class Scales:
    """Fitted scales and their relative uncertainty (one standard deviation); infinite where nothing can be known."""

    values: Array
    sigma: Array

    @classmethod
    def ones(cls, count: int) -> "Scales":
        return cls(np.ones(count, np.float32), np.zeros(count, np.float32))


class WeightPair:
    """A float weight [N, K] and its stored counterpart: integers with a `scale` float32 [N, 1], or [N, K/G] for groups,
    or another float tensor, whose scale is None."""

    def __init__(
        self, layer: str, source: StoredTensor, stored: StoredTensor | StoredIntegers, scale: Array | None
    ) -> None:
        self.layer, self.source, self.stored, self.scale = layer, source, stored, scale
        self.rows, self.columns = source.shape
        self.bits = stored.bits if isinstance(stored, StoredIntegers) else 8
        self.limits = stored.limits if isinstance(stored, StoredIntegers) else (-INT8_MAX, INT8_MAX)
        self.floor = np.full(
            (self.rows, 1), 1e-6, np.float32
        )  # what a rounded float may always be off, in steps [N, 1]
        if isinstance(stored, StoredTensor) and stored.dtype in SMALLEST:
            for start, rows in source.rows():
                largest = np.abs(rows).max(axis=1, keepdims=True)
                subnormal = np.where(
                    largest > 0, SMALLEST[stored.dtype] * INT8_MAX / np.where(largest > 0, largest, 1), 0
                )
                self.floor[start : start + len(rows)] += subnormal

    def chunks(self, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, Array, Array]]:
        """(first row, float weight, stored weight) of rows begin..end, both in steps of their row, float32 [n, K].

        A step of integers is their scale; of a float row 1/127 of its largest float weight.
        """
        end = self.rows if end is None else end
        for start, source in self.source.rows():
            low, high = max(begin - start, 0), min(end - start, len(source))
            if low >= high:
                continue
            wide = source[low:high].astype(np.float32)
            value = self.stored.part(start, start + len(source))[low:high].astype(np.float32)
            if self.scale is not None:
                step = self.steps(start + low, start + high)
                yield start + low, wide / step, value
            else:
                step = np.maximum(np.abs(wide).max(axis=1, keepdims=True), np.float32(1e-30)) / INT8_MAX
                # A damaged exponent gives anything up to infinity, which would drown its whole column in NaN.
                with np.errstate(over="ignore"):
                    value = np.nan_to_num(value / step, nan=FAR, posinf=FAR, neginf=-FAR)
                yield start + low, wide / step, np.clip(value, -FAR, FAR)

    def steps(self, start: int, stop: int) -> Array:
        """Integers: the size of a step of each weight of rows start..stop, [n, 1] or [n, K]."""
        assert self.scale is not None
        scale = self.scale[start:stop]
        return scale if scale.shape[1] == 1 else np.repeat(scale, self.columns // scale.shape[1], axis=1)

    def inside(self, stored: Array) -> Array:
        """Which stored weights are not at a limit: clipped ones tell nothing of the scale."""
        if self.scale is None:
            return np.asarray(np.True_)
        return (stored > self.limits[0]) & (stored < self.limits[1])

    def allowed(self, start: int, predicted: Array, sigma: Array) -> Array:
        """The distance, in steps, that rounding and an uncertain fit explain. predicted: [n, K] from row start on."""
        if self.scale is not None:
            rounding: Array = np.full((), 0.501, np.float32)
        else:
            rounding = np.abs(predicted) * self._ulp() + self.floor[start : start + len(predicted)]
        return np.asarray(rounding + SIGMAS * sigma * np.abs(predicted), np.float32)

    def slack(self, stored: Array) -> Array:
        """The rounding that each stored weight may hide, in steps; infinite for clipped ones."""
        if self.scale is None:
            return np.asarray(np.abs(stored) * self._ulp() + np.float32(1e-6))
        return np.where(self.inside(stored), np.float32(0.501), np.float32(np.inf))

    def distance(self, stored: Array, predicted: Array) -> Array:
        """|stored - predicted| in steps; an integer at its limit may stand for anything beyond it (clipping)."""
        if self.scale is None:
            return np.asarray(np.abs(stored - predicted))
        return np.asarray(np.abs(stored - np.clip(predicted, *self.limits)))

    def _ulp(self) -> float:
        return ULP[self.stored.dtype] if isinstance(self.stored, StoredTensor) else 0.0
