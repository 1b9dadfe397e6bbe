"""Stored weights against float weights, up to the channel scales that smoothing may move between layers.

Smoothing is an exact change of variables: a stored matrix is `diag(rows) W diag(columns)`, rounded. `columns` is what
the producer in front gave away (a norm divided by it), `rows` what the consumer behind takes back. Both are fitted
from the matrices themselves, so nothing that the compiler recorded is believed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vlqc.verify.folder import Array, StoredTensor

INT8_MAX = 127
NOISE = 0.29  # standard deviation of a rounding error, in steps (1/sqrt(12))
SIGMAS = 5.0  # so that of 1e7 weights none is beyond by chance
ULP = {"BF16": 2.0**-8, "F16": 2.0**-10, "F32": 2.0**-23}  # one unit in the last place, relative
FAR = 1e9  # steps; farther than any weight lies
OTHER_ROUNDING_SHARE = 1e-3  # more misfits than that are no damage but another way of rounding
GROSS_STEPS = 16.0  # ... which still moves no weight by that many steps


@dataclass(frozen=True)
class Scales:
    """Fitted scales and their relative uncertainty (one standard deviation); infinite where nothing can be known."""

    values: Array
    sigma: Array

    @classmethod
    def ones(cls, count: int) -> "Scales":
        return cls(np.ones(count, np.float32), np.zeros(count, np.float32))


@dataclass(frozen=True)
class Misfits:
    """Weights that are not the rounding of the scaled float weight, and how good the matrix is as a whole."""

    count: int
    gross: int
    total: int
    first: tuple[int, int] | None
    first_gross: tuple[int, int] | None
    sqnr: float  # dB

    @property
    def other_rounding(self) -> bool:
        return self.count > max(16.0, OTHER_ROUNDING_SHARE * self.total)


class WeightPair:
    """A float weight [N, K] and its stored counterpart; `scale` float32 [N] when that is int8, else None."""

    def __init__(self, layer: str, source: StoredTensor, stored: StoredTensor, scale: Array | None) -> None:
        self.layer, self.source, self.stored, self.scale = layer, source, stored, scale
        self.rows, self.columns = source.shape

    def chunks(self, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, Array, Array]]:
        """(first row, float weight, stored weight) of rows begin..end, both in steps of their row, float32 [n, K].

        A step of an int8 row is its scale; of a float row 1/127 of its largest float weight.
        """
        end = self.rows if end is None else end
        for (start, source), (_, stored) in zip(self.source.rows(), self.stored.rows(), strict=True):
            low, high = max(begin - start, 0), min(end - start, len(source))
            if low >= high:
                continue
            wide = source[low:high].astype(np.float32)
            value = stored[low:high].astype(np.float32)
            if self.scale is not None:
                step = self.scale[start + low : start + high, None]
                yield start + low, wide / step, value
            else:
                step = np.maximum(np.abs(wide).max(axis=1, keepdims=True), np.float32(1e-30)) / INT8_MAX
                # A damaged exponent gives anything up to infinity, which would drown its whole column in NaN.
                with np.errstate(over="ignore"):
                    value = np.nan_to_num(value / step, nan=FAR, posinf=FAR, neginf=-FAR)
                yield start + low, wide / step, np.clip(value, -FAR, FAR)

    def allowed(self, predicted: Array, sigma: Array) -> Array:
        """The distance, in steps, that rounding and an uncertain fit explain."""
        if self.scale is not None:
            rounding: Array = np.full((), 0.501, np.float32)
        else:
            rounding = np.abs(predicted) * ULP[self.stored.dtype] + np.float32(1e-6)
        return np.asarray(rounding + SIGMAS * sigma * np.abs(predicted), np.float32)

    def slack(self, stored: Array) -> Array:
        """The rounding that each stored weight may hide, in steps; infinite for clipped ones."""
        if self.scale is None:
            return np.asarray(np.abs(stored) * ULP[self.stored.dtype] + np.float32(1e-6))
        return np.where(np.abs(stored) < INT8_MAX, np.float32(0.501), np.float32(np.inf))

    def distance(self, stored: Array, predicted: Array) -> Array:
        """|stored - predicted| in steps; an int8 at its limit may stand for anything beyond it (clipping)."""
        if self.scale is None:
            return np.asarray(np.abs(stored - predicted))
        return np.asarray(np.abs(stored - np.clip(predicted, -INT8_MAX, INT8_MAX)))


def fit_columns(parts: Sequence[tuple[WeightPair, int]]) -> Scales:
    """[(pair, number of its first rows to use)], all reading one input -> the scale of each input channel [K].

    Least squares, then the scale that most weights agree on where a damaged weight pulled the first one away.
    """
    columns = parts[0][0].columns
    product, square = np.zeros(columns), np.zeros(columns)
    for pair, end in parts:
        for _, source, stored in pair.chunks(end=end):
            inside = np.abs(stored) < INT8_MAX if pair.scale is not None else np.True_  # clipped weights tell nothing
            product += (source * stored * inside).sum(axis=0, dtype=np.float64)
            square += (source * source * inside).sum(axis=0, dtype=np.float64)
    scales = _scales(product, square)
    suspicious = np.zeros(columns, bool)
    for pair, end in parts:
        for _, source, stored in pair.chunks(end=end):
            predicted = source * scales.values
            beyond = pair.distance(stored, predicted) > pair.allowed(predicted, _finite(scales.sigma))
            suspicious |= beyond.any(axis=0)
    if suspicious.sum() <= max(8, columns // 10):
        for column in np.flatnonzero(suspicious):
            pieces = [chunk for pair, end in parts for chunk in pair.chunks(end=end)]
            source = np.concatenate([source[:, column] for _, source, _ in pieces])
            stored = np.concatenate([stored[:, column] for _, _, stored in pieces])
            scales.values[column] = most_agreed_scale(source, stored, parts[0][0].slack(stored))
    return scales


def fit_rows(pair: WeightPair, begin: int, columns: Scales) -> Scales:
    """Rows begin.. of a pair whose column scales are known -> the scale of each of its rows; 1 for the rows before."""
    result = Scales.ones(pair.rows)
    for start, source, stored in pair.chunks(begin):
        scaled = source * columns.values
        inside = np.abs(stored) < INT8_MAX if pair.scale is not None else np.True_
        product = (scaled * stored * inside).sum(axis=1, dtype=np.float64)
        fitted = _scales(product, (scaled * scaled * inside).sum(axis=1, dtype=np.float64))
        predicted = scaled * fitted.values[:, None]
        sigma = _finite(fitted.sigma)[:, None] + _finite(columns.sigma)
        beyond = pair.distance(stored, predicted) > pair.allowed(predicted, sigma)
        for row in np.flatnonzero(beyond.any(axis=1)):
            # Rounding is no noise where the row's largest weight puts the others on a grid of half steps.
            slack = pair.slack(stored[row]) + SIGMAS * _finite(columns.sigma) * np.abs(scaled[row])
            fitted.values[row] = most_agreed_scale(scaled[row], stored[row], slack)
        result.values[start : start + len(source)] = fitted.values
        result.sigma[start : start + len(source)] = fitted.sigma
    return result


def misfits(pair: WeightPair, rows: Scales, columns: Scales) -> Misfits:
    """The pair under its fitted scales -> the weights that no rounding explains."""
    count = gross = 0
    first = first_gross = None
    signal = noise = 0.0
    for start, source, stored in pair.chunks():
        mine = slice(start, start + len(source))
        predicted = source * columns.values * rows.values[mine, None]
        distance = pair.distance(stored, predicted)
        sigma = _finite(rows.sigma[mine])[:, None] + _finite(columns.sigma)
        allowed = pair.allowed(predicted, sigma)
        beyond = ~(distance <= allowed)
        far = ~(distance <= allowed + GROSS_STEPS)
        if first is None:
            first = _first(beyond, start)
        if first_gross is None:
            first_gross = _first(far, start)
        count += int(beyond.sum())
        gross += int(far.sum())
        signal += float((predicted.astype(np.float64) ** 2).sum())
        noise += float((distance.astype(np.float64) ** 2).sum())
    sqnr = 10 * float(np.log10(max(signal, 1e-300) / max(noise, 1e-300)))
    return Misfits(count, gross, pair.rows * pair.columns, first, first_gross, min(sqnr, 200.0))


def most_agreed_scale(source: Array, stored: Array, slack: Array) -> float:
    """The scale s for which |stored - s * source| <= slack holds for most elements: each allows an interval of s."""
    used = (source != 0) & np.isfinite(slack)
    if not used.any():
        return 1.0
    source, stored, slack = source[used].astype(np.float64), stored[used], slack[used]
    ends = np.sort(np.stack([(stored - slack) / source, (stored + slack) / source]), axis=0)
    edges = ends.reshape(-1)
    opening = np.repeat([1, -1], len(source))
    order = np.lexsort((-opening, edges))  # where one interval ends and another begins, both count
    best = int(np.argmax(np.cumsum(opening[order])))
    return float(edges[order[best : best + 2]].mean())


def _scales(product: Array, square: Array) -> Scales:
    """Least squares from sum(x y) and sum(x x), x and y in steps: y = scale * x + rounding noise."""
    known = square > 0
    values = np.where(known, product / np.where(known, square, 1), 1).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = NOISE / np.sqrt(square) / np.abs(values)
    sigma = np.where(known & (values != 0), relative, np.inf).astype(np.float32)
    return Scales(values, sigma)


def _finite(sigma: Array) -> Array:
    """Unknown scales belong to all-zero channels, whose prediction is 0 whatever the scale."""
    return np.where(np.isfinite(sigma), sigma, np.float32(0))


def _first(mask: Array, start: int) -> tuple[int, int] | None:
    where = np.argwhere(mask)
    return (int(where[0][0]) + start, int(where[0][1])) if len(where) else None
