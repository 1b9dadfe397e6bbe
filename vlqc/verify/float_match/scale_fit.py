"""Fits the channel scales between a stored weight and its float weight, and finds weights that they do not explain.

Smoothing is an equivalent transformation: a stored matrix is `diag(rows) W diag(columns)`, rounded. The producer of the
layer's input is divided by `columns`, the consumer of its output by `rows`. Both are fitted from the matrices, so
nothing that the compiler recorded is used. Weights are compared in quantization steps.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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
OTHER_ROUNDING_SHARE = 1e-3  # a larger share of misfits is not damage but another method of rounding
CERTAIN = 0.02  # steps: weights whose prediction has less uncertainty show how they were rounded
MEAN_TO_DEVIATION = 1.25  # standard deviation of a normal variable over its mean absolute value
NEAREST = 0.65  # steps: under a fitted scale the nearest integer is rarely further away
FURTHER_THAN_NEAREST = 3e-4  # a larger share of weights beyond NEAREST means another method of rounding
CLIPPING_MARGIN = 2.0  # steps; errors of rounding are smaller, so that integers this far from the limit are not clipped
FEW = 16  # as many weights may be damaged without counting as another method of rounding
# Errors of error-compensated rounding correlate along the inputs' common directions, as weights do, so they do not
# average out as independent errors do: factors by which they widen the uncertainty of a fit.
LEANING_ROWS, LEANING_COLUMNS = 3.5, 2.0
COMMON = LEANING_ROWS / LEANING_COLUMNS  # what the fits of all columns share, as a factor of each one's uncertainty
EDGE_SIGMAS = 7.0  # standard deviations that none of 1e9 channels exceeds by chance, with no rounding beside them
UNEVEN = 2.0  # factor between the largest compensated errors of some columns and those of the average one
# Columns that are rounded first compensate no errors of others, and those after them few: whatever method is used, a
# tenth, a quarter and half of the columns have errors up to so many times NOISE. Compensation on inputs with extreme
# outliers that are not smoothed leaves 1.3, 2 and 4.7; noise that was added to other columns than a few shows there.
QUIET = ((0.1, 2.0), (0.25, 3.0), (0.5, 6.0))
NO_OFFSET = 0.05  # steps; mean error of all weights that the fits may leave
# Rounding errors of all rows have one covariance: a row's are within so many times the usual ones, and hardly differ in
# the half of the columns with the smallest errors: by up to 1.2 times with 8 bits, 3 times with 4 bits.
NOISY_ROW, NOISY_ROW_OF_QUIET = 6.0, {8: 3.5, 4: 5.0}
GROSS_STEPS = {8: 16.0, 4: 6.0}  # by bits: steps by which such rounding does not move a weight,
GROSS_NOISE = 12.0  # or multiples of the column's noise: 8.4 is the largest that was measured, with extreme inputs


@dataclass(frozen=True)
class Scales:
    """Fitted scales [C] and what they are worth.

    sigma: relative standard deviation, infinite where the weights determine no scale; deviation: absolute standard
    deviation, infinite where the float weights are zero, so that it is known for a fitted scale of 0, too; independent:
    sigma if all rounding errors were independent.
    """

    values: Array
    sigma: Array
    deviation: Array
    independent: Array

    @classmethod
    def ones(cls, count: int) -> "Scales":
        return cls.known(np.ones(count, np.float32), np.zeros(count, np.float32))

    @classmethod
    def known(cls, values: Array, sigma: Array) -> "Scales":
        """Scales that no fit determined, with their relative standard deviation."""
        return cls(values, sigma, np.asarray(sigma * np.abs(values), np.float32), sigma.copy())

    def unread(self, mask: Array) -> "Scales":
        """These scales, with 1 in the channels of a mask."""
        for each, value in ((self.values, 1), (self.sigma, 0), (self.deviation, 0), (self.independent, 0)):
            each[mask] = value
        return self

    def or_else(self, implied: "Scales") -> "Scales":
        """These scales, with implied ones where the weights determine none: no scale of a channel is 0 or negative."""
        degenerate = ~(self.values > 0) | ~np.isfinite(self.values) | ~np.isfinite(self.sigma)
        if not degenerate.any():
            return self
        usable = np.isfinite(implied.values) & (implied.values > 0)
        values = np.where(degenerate, np.where(usable, implied.values, 1), self.values)
        sigma, independent = (
            np.where(degenerate, _finite(implied.sigma), each).astype(np.float32)
            for each in (self.sigma, self.independent)
        )
        return Scales(values.astype(np.float32), sigma, self.deviation, independent)


class WeightPair:
    """A float weight [N, K] and the stored weight: integers or a float tensor.

    scale: of integers float32 [N, 1], with groups [N, K/G]; None for a float tensor. scale_error: largest relative
    error that rounding to the dtype of the stored scale leaves, 0 for one that is not rounded.
    """

    def __init__(
        self,
        layer: str,
        source: StoredTensor,
        stored: StoredTensor | StoredIntegers,
        scale: Array | None,
        scale_error: float = 0.0,
    ) -> None:
        self.layer, self.source, self.stored, self.scale = layer, source, stored, scale
        self.scale_error = scale_error
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

    def settled(self, predicted: Array) -> Array:
        """Mask of the predictions whose integers are hardly clipped.

        It does not depend on the rounding errors, which a choice by the stored integers does: among the largest ones
        it would leave out those that were rounded up, and the fitted scale would be too small.
        """
        return np.asarray(np.abs(predicted) <= self.limits[1] - CLIPPING_MARGIN)

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
    are larger or smaller as a whole; scaled_columns: (column, factor) likewise; common: the factor of all weights, None
    if it is 1; offset: their mean error in steps, None if it is 0; noise: (share, standard deviation in steps) if fewer
    than that share of the columns have smaller errors, and no method of rounding makes such ones; noisy_rows: whose
    errors are many times larger than those of others;
    other_rounding: whether the integers were chosen by another method than rounding to the nearest.
    """

    count: int
    gross: int
    total: int
    first: tuple[int, int] | None
    first_gross: tuple[int, int] | None
    sqnr: float
    scaled: list[tuple[int, int, float]]
    scaled_columns: list[tuple[int, float]]
    common: float | None
    offset: float | None
    noise: tuple[float, float] | None
    noisy_rows: list[int]
    other_rounding: bool


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
    is_coarse = parts[0][0].bits == 4
    refit = np.zeros((2, columns))
    distances, largest = np.zeros(columns), np.zeros(columns)
    worst = np.zeros((2, columns))  # source and stored of the weight with the largest distance
    for pair, mask in parts:
        for here, source, stored in pair.chunks(mask):
            predicted = source * scales.values
            distance = pair.distance(stored, predicted)
            suspicious |= (distance > pair.allowed(here, predicted, _finite(scales.sigma))).any(axis=0)
            if is_coarse:
                settled = pair.settled(predicted)
                refit[0] += (source * stored * settled).sum(axis=0, dtype=np.float64)
                refit[1] += (source * source * settled).sum(axis=0, dtype=np.float64)
            distances += distance.sum(axis=0, dtype=np.float64)
            furthest = np.expand_dims(distance.argmax(axis=0), 0)
            values = [np.take_along_axis(array, furthest, axis=0) for array in (distance, source, stored)]
            of_chunk = np.concatenate(values)
            worst = np.where(of_chunk[0] > largest, of_chunk[1:], worst)
            largest = np.maximum(largest, of_chunk[0])
            beyond += int((distance > NEAREST).sum())
    rows = sum(pair.rows if mask is None else int(mask.sum()) for pair, mask in parts)
    noise = _noise(distances, largest, rows)  # of each column
    if is_coarse:
        scales = _scales(*refit)
    min_factor = LEANING_COLUMNS if is_coarse else 1.0  # rounding to few integers is biased
    widening = _widening(parts[0][0], noise, _is_other_rounding(beyond, rows * columns), LEANING_COLUMNS, min_factor)
    scales.sigma[:] *= widening
    scales.deviation[:] *= widening
    if _is_other_rounding(beyond, rows * columns):  # many are suspicious: only a gross distance is a damaged weight
        pulled = largest > GROSS_STEPS[parts[0][0].bits]
        without = _scales(product - worst[0] * worst[1], square - worst[0] ** 2).values
        scales.values[pulled] = without[pulled]
        # A column with more compensated error than weight does not determine its scale.
        drowned = noise > np.abs(scales.values) * np.sqrt(square / rows)
        scales.sigma[drowned] = scales.deviation[drowned] = np.inf
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
        if pair.bits == 4:
            settled = pair.settled(predicted)
            product = (scaled * stored * settled).sum(axis=1, dtype=np.float64)
            fitted = _scales(product, (scaled * scaled * settled).sum(axis=1, dtype=np.float64))
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
        widening = _widening(pair, noise, other_rounding, LEANING_ROWS)
        result.sigma[here] = np.maximum(fitted.sigma * widening, _finite(moved))
        result.deviation[here] = np.maximum(fitted.deviation * widening, _finite(moved * np.abs(fitted.values)))
        result.independent[here] = fitted.independent
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


class _Residuals:
    """Sums over a matrix that tell how it was rounded and scaled."""

    def __init__(self, pair: WeightPair, rows: Scales, columns: Scales) -> None:
        self.pair, self.rows, self.columns = pair, rows, columns
        self.many = max(FEW, OTHER_ROUNDING_SHARE * pair.rows * pair.columns)
        self.count: int = 0
        self.first: tuple[int, int] | None = None
        self.distances, self.largest, self.energy = np.zeros((3, pair.columns))
        self.row_noise, self.clipped = np.zeros((2, pair.rows))  # clipped: largest error of a clipped weight
        self.signal = self.noise = 0.0
        self.certain = self.expected = self.beyond = 0.0
        self.product = self.error = self.settled = 0.0
        # by column, of weights that are not clipped: sums of predicted * stored, predicted^2 and stored^2
        self.column_sums = np.zeros((3, pair.columns))
        self.scaled: list[tuple[int, int, float]] = []

    def add(self, here: Array, source: Array, stored: Array) -> None:
        """Rows `here` [n] of the float weight and of the stored one, both in steps, float32 [n, K]."""
        pair, rows, columns = self.pair, self.rows, self.columns
        predicted = source * columns.values * rows.values[here, None]
        distance = pair.distance(stored, predicted)
        sigma = _finite(rows.sigma[here])[:, None] + _finite(columns.sigma)
        wrong = ~(distance <= pair.allowed(here, predicted, sigma))
        if self.first is None:
            self.first = _first(wrong, here)
        self.count += int(wrong.sum())
        self.distances += distance.sum(axis=0, dtype=np.float64)
        self.largest = np.maximum(self.largest, distance.max(axis=0))
        self.signal += float(np.einsum("nk,nk->n", predicted, predicted).sum(dtype=np.float64))
        self.noise += float(np.einsum("nk,nk->n", distance, distance).sum(dtype=np.float64))
        self.row_noise[here] = _noise(distance.sum(axis=1, dtype=np.float64), distance.max(axis=1), pair.columns)
        if pair.scale is not None:
            if self.count <= self.many:
                self._add_certain(here, predicted, distance)
            self._add_factors(here, stored, predicted, sigma)

    def _add_certain(self, here: Array, predicted: Array, distance: Array) -> None:
        relative: Array = _finite(self.columns.independent)
        if (of_rows := _finite(self.rows.independent[here])).any():
            relative = np.hypot(of_rows[:, None], relative)
        uncertain = np.abs(predicted) * relative  # standard deviation of the predictions
        certain = (uncertain < CERTAIN) & (predicted != 0)
        self.certain += float(certain.sum())
        self.expected += float((uncertain * certain).sum(dtype=np.float64)) / MEAN_TO_DEVIATION
        self.beyond += float(((distance > INTEGER_ROUNDING) & certain).sum())

    def _add_factors(self, here: Array, stored: Array, predicted: Array, sigma: Array) -> None:
        settled = self.pair.settled(predicted)
        known, integers = predicted * settled, stored * settled
        self.error += float(integers.sum(dtype=np.float64) - known.sum(dtype=np.float64))
        self.settled += float(settled.sum())
        for sums, left, right in zip(
            self.column_sums, (known, known, integers), (integers, known, integers), strict=True
        ):
            sums += np.einsum("nk,nk->k", left, right)
        low, high = self.pair.limits
        self.clipped[here] = np.maximum(predicted.max(axis=1) - high, low - predicted.min(axis=1)).clip(min=0)
        unscaled = self.rows.sigma[here] == 0  # the fitted scale of a row makes its factor 1
        if unscaled.any():
            known, integers = (known, integers) if unscaled.all() else (known[unscaled], integers[unscaled])
            self.product += float(np.einsum("nk,nk->n", known, integers).sum(dtype=np.float64))
            self.energy += np.einsum("nk,nk->k", known, known)
        self.scaled += _scaled(self.pair, here, stored * settled, predicted * settled, sigma)

    @property
    def is_other_rounding(self) -> bool:
        """Whether so many integers are not the nearest ones that another method of rounding chose them.

        An uncertain prediction with standard deviation d steps, and only such a one, is wrong about the nearest integer
        with a probability of 0.8 d.
        """
        few = max(FEW, OTHER_ROUNDING_SHARE * self.certain)
        return self.count > self.many or self.beyond > few + self.expected + SIGMAS * self.expected**0.5

    @property
    def overshoot(self) -> float:
        """Steps by which compensated errors that leave no more integers off the nearest one may move a weight further.

        An error of standard deviation d, added to uniform rounding errors, puts 0.8 d of the integers off the nearest.
        """
        if self.beyond + self.count < 2 or not self.certain:
            return 0.0  # one alone is damage
        most = max(self.beyond - self.expected, 0.0) + 3 * self.beyond**0.5 + 1
        return float(UNEVEN * SIGMAS * MEAN_TO_DEVIATION * most / self.certain)

    def furthest(self, noise: Array) -> Callable[[Array], Array]:
        """Steps that compensated errors move the weights of the rows [n] at most, [n, K]. noise: of each column [K].

        They are within some multiples of the column's noise, more in rows with larger errors than others. A clipped
        weight has a larger error than rounding, and so have the weights that compensate it.
        """
        bits = self.pair.bits
        most = np.maximum(GROSS_STEPS[bits], GROSS_NOISE * noise)  # [K]
        usual = max(float(np.median(self.row_noise)), NOISE)
        of_row = (
            GROSS_NOISE * np.maximum(self.row_noise / usual, 1) + self.clipped / NOISE
        )  # [N], in multiples of noise
        return lambda here: np.minimum(most, of_row[here, None] * np.maximum(noise, NOISE))

    def scaled_columns(self) -> list[tuple[int, float]]:
        """(column, factor) where all integers of a column are the prediction times a factor other than 1."""
        product, energy, squares = self.column_sums
        live = energy > 0
        factor = product / np.where(live, energy, 1)
        # Errors are those that are left under the factor: a column of zeros has none.
        left = np.sqrt(np.maximum(squares - factor * product, 0) / self.pair.rows)
        errors = LEANING_COLUMNS * np.maximum(left, NOISE) / np.sqrt(np.where(live, energy, 1))
        uncertain = np.hypot(_finite(self.columns.sigma), self._row_uncertainty())
        wrong = live & (np.abs(factor - 1) > self.pair.scale_error + EDGE_SIGMAS * np.hypot(errors, uncertain))
        wrong &= np.isfinite(self.columns.sigma)
        return [(int(column), float(factor[column])) for column in np.flatnonzero(wrong)]

    def _row_uncertainty(self) -> float:
        """Largest relative standard deviation of a row's scale."""
        return float(_finite(self.rows.sigma).max(initial=0))

    def offset(self) -> float | None:
        """Mean rounding error in steps if it is not 0, as of integers that are truncated, else None."""
        if not self.settled:
            return None
        mean = self.error / self.settled
        sigma = LEANING_ROWS * max(float(np.median(self.row_noise)), NOISE) / self.settled**0.5
        return mean if abs(mean) > NO_OFFSET + EDGE_SIGMAS * sigma else None

    def common_factor(self) -> float | None:
        """The factor between all stored and predicted weights of unscaled rows if it is not 1, else None."""
        energy, rows = float(self.energy.sum()), int((self.rows.sigma == 0).sum())
        if not energy > 0:
            return None
        noise = LEANING_ROWS * max(float(np.median(self.row_noise)), NOISE) / energy**0.5
        of_columns = float(np.linalg.norm(self.energy * _finite(self.columns.sigma))) / energy
        of_scales = self.pair.scale_error / np.sqrt(3 * max(rows, 1))
        factor = self.product / energy
        sigma = np.sqrt(noise**2 + (COMMON * of_columns) ** 2 + of_scales**2)
        return factor if abs(factor - 1) > EDGE_SIGMAS * sigma else None


def _misfits_under(pair: WeightPair, rows: Scales, columns: Scales) -> Misfits:
    sums = _Residuals(pair, rows, columns)
    for here, source, stored in pair.chunks():
        sums.add(here, source, stored)
    # 200 also for a matrix of zeros
    sqnr = 10 * float(np.log10(max(sums.signal, 1e-300) / sums.noise)) if sums.noise else 200.0
    noise = _noise(sums.distances, sums.largest, pair.rows)  # of each column
    excess, noisy_rows = None, list[int]()
    is_other = pair.scale is not None and sums.is_other_rounding
    if pair.scale is not None:
        excess = _excess(noise[noise > 0])
        usual = max(float(np.median(sums.row_noise)), NOISE)
        noisy_rows = np.flatnonzero(sums.row_noise > NOISY_ROW * usual).tolist() or _noisy_rows(
            pair, rows, columns, noise, sums.row_noise
        )
    count, first, gross, first_gross = sums.count, sums.first, 0, None
    if is_other:
        gross, first_gross = _gross(pair, rows, columns, sums.furthest(noise))
    elif count and pair.scale is not None and (further := sums.overshoot) > 0:
        count, first = _gross(pair, rows, columns, lambda here: np.full((), further))
    is_integer = pair.scale is not None
    return Misfits(
        count,
        gross,
        pair.rows * pair.columns,
        first,
        first_gross,
        min(sqnr, 200.0),
        sums.scaled,
        sums.scaled_columns() if is_integer else [],
        sums.common_factor() if is_integer else None,
        sums.offset() if is_integer else None,
        excess,
        noisy_rows,
        is_other,
    )


def _excess(noise: Array) -> tuple[float, float] | None:
    """(share, noise) if too few columns have errors as small as those of rounding; noise: of columns, in steps, > 0."""
    for share, most in QUIET:
        if noise.size and (found := float(np.quantile(noise, share, method="lower"))) > most * NOISE:
            return share, found
    return None


def _noisy_rows(pair: WeightPair, rows: Scales, columns: Scales, noise: Array, row_noise: Array) -> list[int]:
    """Rows whose errors are many times larger than those of others in the half of the columns with the smallest ones.

    noise, row_noise: of all columns and rows, in steps.
    """
    suspicious = row_noise > 2 * max(float(np.median(row_noise)), NOISE)
    if not suspicious.any():
        return []
    quiet = np.argsort(noise, kind="stable")[: -(-len(noise) // 2)]
    of_quiet = np.zeros(pair.rows)
    for here, source, stored in pair.chunks():
        predicted = source[:, quiet] * columns.values[quiet] * rows.values[here, None]
        distance = pair.distance(stored[:, quiet], predicted)
        of_quiet[here] = _noise(distance.sum(axis=1, dtype=np.float64), distance.max(axis=1), len(quiet))
    usual = max(float(np.median(of_quiet)), NOISE)
    return np.flatnonzero(suspicious & (of_quiet > NOISY_ROW_OF_QUIET[pair.bits] * usual)).tolist()


def _gross(
    pair: WeightPair, rows: Scales, columns: Scales, limit: Callable[[Array], Array]
) -> tuple[int, tuple[int, int] | None]:
    """(number, first) of the weights whose distance exceeds the allowed one by more than `limit`, in steps by rows."""
    count, first = 0, None
    for here, source, stored in pair.chunks():
        predicted = source * columns.values * rows.values[here, None]
        sigma = _finite(rows.sigma[here])[:, None] + _finite(columns.sigma)
        far = ~(pair.distance(stored, predicted) <= pair.allowed(here, predicted, sigma) + limit(here))
        first = _first(far, here) if first is None else first
        count += int(far.sum())
    return count, first


def _scaled(
    pair: WeightPair, here: Array, stored: Array, predicted: Array, sigma: Array
) -> list[tuple[int, int, float]]:
    """(row, group, factor) where all integers of a row or group are the prediction times a factor other than 1.

    stored, predicted: [n, K], 0 for clipped weights.
    """
    assert pair.scale is not None
    shape = (len(stored), pair.scale.shape[1], -1)
    known, integers = predicted.reshape(shape), stored.reshape(shape)
    square = np.einsum("ngk,ngk->ng", known, known).astype(np.float64)
    square = np.where(square > 0, square, 1e-12)
    factor = np.einsum("ngk,ngk->ng", known, integers) / square  # [n, K/G]
    # Errors are those that are left under the factor: they are of usual size in a row that is scaled as a whole.
    left = np.einsum("ngk,ngk->n", integers, integers) - (factor**2 * square).sum(axis=1)
    noise = np.sqrt(np.maximum(left, 0) / pair.columns)[:, None]
    uncertain = predicted * sigma
    uncertain = np.sqrt(np.einsum("ngk,ngk->ng", uncertain.reshape(shape), uncertain.reshape(shape)))
    errors = LEANING_ROWS * np.maximum(noise, NOISE) + uncertain
    wrong = abs(factor - 1) > pair.scale_error + SIGMAS * errors / np.sqrt(square)
    return [(int(here[row]), int(group), float(factor[row, group])) for row, group in np.argwhere(wrong)]


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
        deviation = np.where(known, NOISE / np.sqrt(square), np.inf).astype(np.float32)
    sigma = np.where(known & (values != 0), relative, np.inf).astype(np.float32)
    return Scales(values, sigma, deviation, sigma.copy())


def _finite(sigma: Array) -> Array:
    """sigma, with 0 for undetermined scales: these are of all-zero channels, whose prediction is 0 for any scale."""
    return np.where(np.isfinite(sigma), sigma, np.float32(0))


def _first(mask: Array, here: Array) -> tuple[int, int] | None:
    where = np.argwhere(mask)
    return (int(here[where[0][0]]), int(where[0][1])) if len(where) else None
