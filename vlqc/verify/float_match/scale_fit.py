"""Fits the channel scales between a stored weight and its float weight, and finds weights that they do not explain.

Smoothing is an equivalent transformation: a stored matrix is `diag(rows) W diag(columns)`, rounded. The producer of the
layer's input is divided by `columns`, the consumer of its output by `rows`. Both are fitted from the matrices, so
nothing that the compiler recorded is used. Weights are compared in quantization steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlqc.verify.float_match.rotated_source import FLOAT32_ERROR, is_rotated
from vlqc.verify.folder.reader import Array, StoredTensor
from vlqc.verify.numbers.integers import INT8_MAX, StoredIntegers

SIGMAS = 5.0  # standard deviations that none of 1e7 weights exceeds by chance
ULP = {"BF16": 2.0**-8, "F16": 2.0**-10, "F32": 2.0**-23}  # one unit in the last place, relative
SMALLEST = {"F16": 2.0**-24}  # distance of subnormal numbers, where weights can be that small
FAR = 1e9  # steps; stands for damaged values up to infinity, further than any weight
INTEGER_ROUNDING, FLOAT_ROUNDING = 0.501, 1e-6  # steps that rounding may move a weight
NOISE = 0.29  # standard deviation of a rounding error, in steps (1/sqrt(12))
MEAN_TO_NOISE = 4 * NOISE  # standard deviation over mean absolute value of a rounding error, which is 1/4 step
OTHER_NOISE = 0.6  # standard deviation, in steps, of error-compensated rounding (GPTQ)
OTHER_ROUNDING_SHARE = 1e-3  # a larger share of misfits is not damage but another method of rounding
NEAREST = 0.65  # steps: under a fitted scale the nearest integer is rarely further away
FURTHER_THAN_NEAREST = 3e-4  # a larger share of weights beyond NEAREST means another method of rounding
FEW = 16  # as many weights may be damaged without counting as another method of rounding
# Errors of error-compensated rounding correlate along the inputs' common directions, as weights do, so they do not
# average out as independent errors do: factors by which they widen the uncertainty of a fit.
LEANING_ROWS, LEANING_COLUMNS = 3.5, 2.0
GROSS_STEPS = {8: 16.0, 4: 6.0}  # by bits: steps by which such rounding does not move a weight,
GROSS_NOISE = 8.0  # or, in columns that compensate the errors of others, multiples of the column's noise


@dataclass(frozen=True)
class Scales:
    """Fitted scales and their relative standard deviation, infinite where the weights determine no scale."""

    values: Array
    sigma: Array

    @classmethod
    def ones(cls, count: int) -> "Scales":
        return cls(np.ones(count, np.float32), np.zeros(count, np.float32))


class WeightPair:
    """A float weight [N, K] and the stored weight: integers or a float tensor.

    scale: of integers float32 [N, 1], with groups [N, K/G]; None for a float tensor.
    """

    def __init__(
        self, layer: str, source: StoredTensor, stored: StoredTensor | StoredIntegers, scale: Array | None
    ) -> None:
        self.layer, self.source, self.stored, self.scale = layer, source, stored, scale
        self.rows, self.columns = source.shape
        self.bits = stored.bits if isinstance(stored, StoredIntegers) else 8
        self.limits = stored.limits if isinstance(stored, StoredIntegers) else (-INT8_MAX, INT8_MAX)
        self.floor = np.full((self.rows, 1), FLOAT_ROUNDING, np.float32)  # rounding error of the smallest floats, steps
        if is_rotated(source):
            self.floor += FLOAT32_ERROR * INT8_MAX
        if isinstance(stored, StoredTensor) and stored.dtype in SMALLEST:
            for start, rows in source.rows():
                largest = np.abs(rows).max(axis=1, keepdims=True)
                subnormal = np.where(
                    largest > 0, SMALLEST[stored.dtype] * INT8_MAX / np.where(largest > 0, largest, 1), 0
                )
                self.floor[start : start + len(rows)] += subnormal

    def chunks(self, mask: Array | None = None) -> Iterator[tuple[Array, Array, Array]]:
        """(row numbers [n], float weight, stored weight) of the rows in `mask` bool [N], both in steps, float32 [n, K].

        mask: None for all rows. The step of integers is their scale, that of a float row 1/127 of its largest float
        weight.
        """
        for start, source in self.source.rows():
            here, value = np.arange(start, start + len(source)), self.stored.part(start, start + len(source))
            if mask is not None:
                chosen = mask[here]
                here, source, value = here[chosen], source[chosen], value[chosen]
            if not len(here):
                continue
            wide, value = source.astype(np.float32), value.astype(np.float32)
            if self.scale is not None:
                yield here, wide / self.steps(here), value
            else:
                step = np.maximum(np.abs(wide).max(axis=1, keepdims=True), np.float32(1e-30)) / INT8_MAX
                # A damaged exponent may give infinity, which would turn the sums of its column into NaN.
                with np.errstate(over="ignore"):
                    value = np.nan_to_num(value / step, nan=FAR, posinf=FAR, neginf=-FAR)
                yield here, wide / step, np.clip(value, -FAR, FAR)

    def steps(self, here: Array) -> Array:
        """Steps of the integers of these rows, [n, 1] or [n, K]."""
        assert self.scale is not None
        scale = self.scale[here]
        return scale if scale.shape[1] == 1 else np.repeat(scale, self.columns // scale.shape[1], axis=1)

    def unclipped(self, stored: Array) -> Array:
        """Mask of the stored weights that are not at a limit; clipped ones do not determine a scale."""
        if self.scale is None:
            return np.asarray(np.True_)
        return (stored > self.limits[0]) & (stored < self.limits[1])

    def allowed(self, here: Array, predicted: Array, sigma: Array) -> Array:
        """Distance in steps that rounding and the fit's uncertainty explain. predicted: [n, K], of the rows `here`."""
        if self.scale is not None:
            rounding: Array = np.full((), INTEGER_ROUNDING, np.float32)
        else:
            rounding = np.abs(predicted) * self._ulp() + self.floor[here]
        return np.asarray(rounding + SIGMAS * sigma * np.abs(predicted), np.float32)

    def slack(self, stored: Array) -> Array:
        """Bound of each stored weight's rounding error, in steps; infinite for clipped ones."""
        if self.scale is None:
            return np.asarray(np.abs(stored) * self._ulp() + np.float32(FLOAT_ROUNDING))
        return np.where(self.unclipped(stored), np.float32(INTEGER_ROUNDING), np.float32(np.inf))

    def distance(self, stored: Array, predicted: Array) -> Array:
        """|stored - predicted| in steps; 0 for a clipped integer if the prediction is beyond the limit."""
        if self.scale is None:
            return np.asarray(np.abs(stored - predicted))
        return np.asarray(np.abs(stored - np.clip(predicted, *self.limits)))

    def _ulp(self) -> float:
        return ULP[self.stored.dtype] if isinstance(self.stored, StoredTensor) else 0.0


@dataclass(frozen=True)
class Misfits:
    """Weights that are not the rounding of the scaled float weight.

    count, first: number of these, and index of the first; gross, first_gross: of those that no method of rounding
    explains; total: number of weights; sqnr: of the matrix, in dB; scaled: (row, group, factor) of rows or groups that
    are larger or smaller as a whole.
    """

    count: int
    gross: int
    total: int
    first: tuple[int, int] | None
    first_gross: tuple[int, int] | None
    sqnr: float
    integers: bool
    scaled: list[tuple[int, int, float]]

    @property
    def other_rounding(self) -> bool:
        """Whether the integers were chosen by another method than rounding to the nearest."""
        return self.integers and self.count > max(FEW, OTHER_ROUNDING_SHARE * self.total)


def fit_columns(parts: Sequence[tuple[WeightPair, Array | None]]) -> Scales:
    """[(pair, mask of the rows to use, None for all)], all with the same input -> scales of the input channels [K].

    Least squares; where a damaged weight distorts that, the scale that most weights agree with.
    """
    columns = parts[0][0].columns
    product, square = np.zeros(columns), np.zeros(columns)
    for pair, mask in parts:
        for _, source, stored in pair.chunks(mask):
            unclipped = pair.unclipped(stored)
            product += (source * stored * unclipped).sum(axis=0, dtype=np.float64)
            square += (source * source * unclipped).sum(axis=0, dtype=np.float64)
    scales = _scales(product, square)
    suspicious, beyond = np.zeros(columns, bool), 0
    distances, largest = np.zeros(columns), np.zeros(columns)
    worst = np.zeros((2, columns))  # source and stored of the weight with the largest distance
    for pair, mask in parts:
        for here, source, stored in pair.chunks(mask):
            predicted = source * scales.values
            distance = pair.distance(stored, predicted)
            suspicious |= (distance > pair.allowed(here, predicted, _finite(scales.sigma))).any(axis=0)
            distances += distance.sum(axis=0, dtype=np.float64)
            furthest = np.expand_dims(distance.argmax(axis=0), 0)
            values = [np.take_along_axis(array, furthest, axis=0) for array in (distance, source, stored)]
            of_chunk = np.concatenate(values)
            worst = np.where(of_chunk[0] > largest, of_chunk[1:], worst)
            largest = np.maximum(largest, of_chunk[0])
            beyond += int((distance > NEAREST).sum())
    rows = sum(pair.rows if mask is None else int(mask.sum()) for pair, mask in parts)
    noise = _noise(distances, largest, rows)  # of each column
    min_factor = LEANING_COLUMNS if parts[0][0].bits == 4 else 1.0  # rounding to few integers is biased
    scales.sigma[:] *= _widening(
        parts[0][0], noise, _is_other_rounding(beyond, rows * columns), LEANING_COLUMNS, min_factor
    )
    if _is_other_rounding(beyond, rows * columns):  # many are suspicious: only a gross distance is a damaged weight
        pulled = largest > GROSS_STEPS[parts[0][0].bits]
        without = _scales(product - worst[0] * worst[1], square - worst[0] ** 2).values
        scales.values[pulled] = without[pulled]
        # A column with more compensated error than weight does not determine its scale.
        drowned = noise > np.abs(scales.values) * np.sqrt(square / rows)
        scales.sigma[drowned] = np.inf
    elif suspicious.sum() <= max(8, columns // 10):
        numbers = np.flatnonzero(suspicious)
        pieces = [
            (source[:, numbers], stored[:, numbers]) for pair, mask in parts for _, source, stored in pair.chunks(mask)
        ]
        for position, column in enumerate(numbers):
            source = np.concatenate([source[:, position] for source, _ in pieces])
            stored = np.concatenate([stored[:, position] for _, stored in pieces])
            scales.values[column] = most_agreed_scale(source, stored, parts[0][0].slack(stored))
    return scales


def fit_rows(pair: WeightPair, mask: Array, columns: Scales) -> Scales:
    """Scales of the rows in `mask` bool [N] of a pair whose column scales are known; 1 for all others."""
    result = Scales.ones(pair.rows)
    for here, source, stored in pair.chunks(mask):
        scaled = source * columns.values
        unclipped = pair.unclipped(stored)
        product = (scaled * stored * unclipped).sum(axis=1, dtype=np.float64)
        fitted = _scales(product, (scaled * scaled * unclipped).sum(axis=1, dtype=np.float64))
        predicted = scaled * fitted.values[:, None]
        sigma = _finite(fitted.sigma)[:, None] + _finite(columns.sigma)
        distance = pair.distance(stored, predicted)
        other_rounding = pair.scale is not None and _is_other_rounding(int((distance > NEAREST).sum()), distance.size)
        beyond = np.asarray((distance > pair.allowed(here, predicted, sigma)).any(axis=1))
        moved = np.zeros(len(source), np.float32)
        # If integers are not the nearest ones, no scale makes them so, and least squares is the best estimate.
        for row in [] if other_rounding else np.flatnonzero(beyond):
            # Rounding errors are not random if the row's largest weight puts the others on a grid of half steps.
            slack = pair.slack(stored[row]) + SIGMAS * _finite(columns.sigma) * np.abs(scaled[row])
            least_squares = fitted.values[row]
            fitted.values[row] = most_agreed_scale(scaled[row], stored[row], slack)
            moved[row] = abs(fitted.values[row] / least_squares - 1)  # both may explain the row, or neither
        result.values[here] = fitted.values
        noise = _noise(distance.sum(axis=1, dtype=np.float64), distance.max(axis=1), pair.columns)
        sigma = fitted.sigma * _widening(pair, noise, other_rounding, LEANING_ROWS)
        result.sigma[here] = np.maximum(sigma, _finite(moved))
    return result


def _noise(distances: Array, largest: Array, count: int) -> Array:
    """Sums of `count` distances, and the largest of each -> noise in steps, robust against one damaged weight."""
    return np.asarray(MEAN_TO_NOISE * (distances - largest) / max(count - 1, 1))


def _is_other_rounding(further: int, total: int) -> bool:
    """Whether so many integers are further away than the nearest ones that another method of rounding chose them."""
    return further > max(FEW, FURTHER_THAN_NEAREST * total)


def _widening(pair: WeightPair, noise: Array, other_rounding: bool, leaning: float, min_factor: float = 1.0) -> Array:
    """Factor of a fit's uncertainty over that for independent errors of NOISE. noise: of rows or columns, in steps."""
    usual = np.full_like(noise, np.median(noise))
    if other_rounding and pair.scale is not None:
        usual, min_factor = (
            np.maximum(noise, usual),
            max(min_factor, leaning),
        )  # small columns compensate others' errors
    return np.asarray(np.maximum(usual / NOISE, 1.0) * (1.0 if pair.scale is None else min_factor), np.float32)


def misfits(pair: WeightPair, rows: Scales, columns: Scales) -> Misfits:
    """Weights of a pair that its fitted scales and rounding do not explain.

    Coarse integers distort a fit by more than its estimated uncertainty. So if misfits remain, scales of 1 are tried,
    which an unsmoothed layer has.
    """
    fitted = _misfits_under(pair, rows, columns)
    if not fitted.count:
        return fitted
    plain = _misfits_under(pair, Scales.ones(pair.rows), Scales.ones(pair.columns))
    return plain if plain.count < fitted.count else fitted


def _misfits_under(pair: WeightPair, rows: Scales, columns: Scales) -> Misfits:
    count, first, distances, largest = 0, None, np.zeros(pair.columns), np.zeros(pair.columns)
    signal = noise = 0.0
    scaled: list[tuple[int, int, float]] = []
    for here, source, stored in pair.chunks():
        predicted = source * columns.values * rows.values[here, None]
        distance = pair.distance(stored, predicted)
        sigma = _finite(rows.sigma[here])[:, None] + _finite(columns.sigma)
        allowed = pair.allowed(here, predicted, sigma)
        beyond = ~(distance <= allowed)
        if first is None:
            first = _first(beyond, here)
        count += int(beyond.sum())
        distances += distance.sum(axis=0, dtype=np.float64)
        largest = np.maximum(largest, distance.max(axis=0))
        if pair.scale is not None:
            scaled += _scaled(pair, here, stored, predicted, sigma)
        signal += float((predicted.astype(np.float64) ** 2).sum())
        noise += float((distance.astype(np.float64) ** 2).sum())
    sqnr = 10 * float(np.log10(max(signal, 1e-300) / noise)) if noise else 200.0  # 200 also for a matrix of zeros
    result = Misfits(count, 0, pair.rows * pair.columns, first, None, min(sqnr, 200.0), pair.scale is not None, scaled)
    if not result.other_rounding:
        return result
    limit = np.maximum(GROSS_STEPS[pair.bits], GROSS_NOISE * _noise(distances, largest, pair.rows))  # [K]
    gross, first_gross = _gross(pair, rows, columns, limit)
    return replace(result, gross=gross, first_gross=first_gross)


def _gross(pair: WeightPair, rows: Scales, columns: Scales, limit: Array) -> tuple[int, tuple[int, int] | None]:
    """(number, first) of the weights whose distance exceeds the allowed one by more than `limit` [K] steps."""
    count, first = 0, None
    for here, source, stored in pair.chunks():
        predicted = source * columns.values * rows.values[here, None]
        sigma = _finite(rows.sigma[here])[:, None] + _finite(columns.sigma)
        far = ~(pair.distance(stored, predicted) <= pair.allowed(here, predicted, sigma) + limit)
        first = _first(far, here) if first is None else first
        count += int(far.sum())
    return count, first


def _scaled(
    pair: WeightPair, here: Array, stored: Array, predicted: Array, sigma: Array
) -> list[tuple[int, int, float]]:
    """(row, group, factor) where all integers of a row or group are the prediction times a factor other than 1."""
    assert pair.scale is not None
    groups = (len(stored), pair.scale.shape[1], -1)
    known = np.where(pair.unclipped(stored), predicted, 0).reshape(groups).astype(np.float64)
    square = (known**2).sum(axis=2)
    factor = (known * stored.reshape(groups)).sum(axis=2) / np.where(square > 0, square, 1)  # [n, K/G]
    uncertain = np.sqrt((known**2 * (sigma**2).reshape(groups)).sum(axis=2))
    allowed = 0.01 + SIGMAS * (OTHER_NOISE + uncertain) / np.sqrt(np.where(square > 0, square, 1e-12))
    return [
        (int(here[row]), int(group), float(factor[row, group])) for row, group in np.argwhere(abs(factor - 1) > allowed)
    ]


def most_agreed_scale(source: Array, stored: Array, slack: Array) -> float:
    """The scale s with |stored - s * source| <= slack for most elements, each of which allows an interval of s."""
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
    """Least squares of y = scale * x + rounding noise from sum(x y) and sum(x x), with x and y in steps."""
    known = square > 0
    values = np.where(known, product / np.where(known, square, 1), 1).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = NOISE / np.sqrt(square) / np.abs(values)
    sigma = np.where(known & (values != 0), relative, np.inf).astype(np.float32)
    return Scales(values, sigma)


def _finite(sigma: Array) -> Array:
    """sigma, with 0 for undetermined scales: these are of all-zero channels, whose prediction is 0 for any scale."""
    return np.where(np.isfinite(sigma), sigma, np.float32(0))


def _first(mask: Array, here: Array) -> tuple[int, int] | None:
    where = np.argwhere(mask)
    return (int(here[where[0][0]]), int(where[0][1])) if len(where) else None
