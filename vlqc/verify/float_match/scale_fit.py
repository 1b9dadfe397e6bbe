"""Stored weights against float weights, up to the channel scales that smoothing may move between layers.

Smoothing is an exact change of variables: a stored matrix is `diag(rows) W diag(columns)`, rounded. `columns` is what
the producer in front gave away (a norm divided by it), `rows` what the consumer behind takes back. Both are fitted
from the matrices themselves, so nothing that the compiler recorded is believed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlqc.verify.float_match.weight_pair import SIGMAS, Scales, WeightPair
from vlqc.verify.folder.reader import Array

NOISE = 0.29  # standard deviation of a rounding error, in steps (1/sqrt(12))
MEAN_TO_NOISE = 4 * NOISE  # of a rounding error's mean size, 1/4 of a step
OTHER_NOISE = 0.6  # ... of an error of rounding that looks at other weights, too
OTHER_ROUNDING_SHARE = 1e-3  # more misfits than that are no damage but another way of rounding
NEAREST = 0.65  # steps: the nearest integer under a fitted scale is hardly ever further away
FURTHER_THAN_NEAREST = 3e-4  # if more than this share of them is, they were chosen in another way; 16 may be damage
# Such errors follow the inputs' common directions, and so do weights: they do not average out as independent ones do.
LEANING_ROWS, LEANING_COLUMNS = 3.5, 2.0
GROSS_STEPS = {8: 16.0, 4: 6.0}  # ... which still moves no weight by that many steps, of 8 or 4 bits,
GROSS_NOISE = 8.0  # ... but for columns that take over the errors of others: there by so many times their noise


@dataclass(frozen=True)
class Misfits:
    """Weights that are not the rounding of the scaled float weight, and how good the matrix is as a whole."""

    count: int
    gross: int
    total: int
    first: tuple[int, int] | None
    first_gross: tuple[int, int] | None
    sqnr: float  # dB
    integers: bool
    scaled: list[tuple[int, int, float]]  # rows, and groups in them, as a whole larger or smaller by this factor

    @property
    def other_rounding(self) -> bool:
        return self.integers and self.count > max(16.0, OTHER_ROUNDING_SHARE * self.total)


def fit_columns(parts: Sequence[tuple[WeightPair, int]]) -> Scales:
    """[(pair, number of its first rows to use)], all reading one input -> the scale of each input channel [K].

    Least squares, then the scale that most weights agree on where a damaged weight pulled the first one away.
    """
    columns = parts[0][0].columns
    product, square = np.zeros(columns), np.zeros(columns)
    for pair, end in parts:
        for _, source, stored in pair.chunks(end=end):
            inside = pair.inside(stored)
            product += (source * stored * inside).sum(axis=0, dtype=np.float64)
            square += (source * source * inside).sum(axis=0, dtype=np.float64)
    scales = _scales(product, square)
    suspicious, beyond = np.zeros(columns, bool), 0
    distances, largest = np.zeros(columns), np.zeros(columns)
    worst = np.zeros((2, columns))  # the weight that is furthest off: source and stored
    for pair, end in parts:
        for start, source, stored in pair.chunks(end=end):
            predicted = source * scales.values
            distance = pair.distance(stored, predicted)
            suspicious |= (distance > pair.allowed(start, predicted, _finite(scales.sigma))).any(axis=0)
            distances += distance.sum(axis=0, dtype=np.float64)
            furthest = np.expand_dims(distance.argmax(axis=0), 0)
            here = np.concatenate([np.take_along_axis(it, furthest, axis=0) for it in (distance, source, stored)])
            worst = np.where(here[0] > largest, here[1:], worst)
            largest = np.maximum(largest, here[0])
            beyond += int((distance > NEAREST).sum())
    rows = sum(end for _, end in parts)
    noise = _noise(distances, largest, rows)  # of each column
    least = LEANING_COLUMNS if parts[0][0].bits == 4 else 1.0  # few integers also lean towards 0, or away from it
    scales.sigma[:] *= _widening(parts[0][0], noise, _otherwise(beyond, rows * columns), LEANING_COLUMNS, least)
    if _otherwise(beyond, rows * columns):  # suspicious are many; a damaged weight is one that pulled a whole column
        pulled = largest > GROSS_STEPS[parts[0][0].bits]
        without = _scales(product - worst[0] * worst[1], square - worst[0] ** 2).values
        scales.values[pulled] = without[pulled]
        # A column that took over more than it holds itself tells nothing of its scale.
        drowned = noise > np.abs(scales.values) * np.sqrt(square / rows)
        scales.sigma[drowned] = np.inf
    elif suspicious.sum() <= max(8, columns // 10):
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
        inside = pair.inside(stored)
        product = (scaled * stored * inside).sum(axis=1, dtype=np.float64)
        fitted = _scales(product, (scaled * scaled * inside).sum(axis=1, dtype=np.float64))
        predicted = scaled * fitted.values[:, None]
        sigma = _finite(fitted.sigma)[:, None] + _finite(columns.sigma)
        distance = pair.distance(stored, predicted)
        otherwise = pair.scale is not None and _otherwise(int((distance > NEAREST).sum()), distance.size)
        beyond = np.asarray((distance > pair.allowed(start, predicted, sigma)).any(axis=1))
        # Where integers are not the nearest ones, no scale makes them so: least squares is as good as it gets.
        for row in [] if otherwise else np.flatnonzero(beyond):
            # Rounding is no noise where the row's largest weight puts the others on a grid of half steps.
            slack = pair.slack(stored[row]) + SIGMAS * _finite(columns.sigma) * np.abs(scaled[row])
            fitted.values[row] = most_agreed_scale(scaled[row], stored[row], slack)
        result.values[start : start + len(source)] = fitted.values
        noise = _noise(distance.sum(axis=1, dtype=np.float64), distance.max(axis=1), pair.columns)
        result.sigma[start : start + len(source)] = fitted.sigma * _widening(pair, noise, otherwise, LEANING_ROWS)
    return result


def _noise(distances: Array, largest: Array, count: int) -> Array:
    """Sums of `count` distances, and the largest of each -> their noise, in steps, whatever one damaged weight does."""
    return np.asarray(MEAN_TO_NOISE * (distances - largest) / max(count - 1, 1))


def _otherwise(further: int, total: int) -> bool:
    """Whether integers were chosen in another way than as the nearest ones: so many are further away than those."""
    return further > max(16, FURTHER_THAN_NEAREST * total)


def _widening(pair: WeightPair, noise: Array, otherwise: bool, leaning: float, least: float = 1.0) -> Array:
    """How much less a fit knows than it would of independent errors of NOISE; noise: of rows or columns, in steps."""
    usual = np.full_like(noise, np.median(noise))
    if otherwise and pair.scale is not None:
        usual, least = np.maximum(noise, usual), max(least, leaning)  # faint columns take over the errors of others
    return np.asarray(np.maximum(usual / NOISE, 1.0) * (1.0 if pair.scale is None else least), np.float32)


def misfits(pair: WeightPair, rows: Scales, columns: Scales) -> Misfits:
    """The pair under its fitted scales -> the weights that no rounding explains.

    Coarse integers pull a fit off by more than it knows. So where the fitted scales leave misfits, no scales at all
    are tried, which is what an unsmoothed layer has.
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
    for start, source, stored in pair.chunks():
        mine = slice(start, start + len(source))
        predicted = source * columns.values * rows.values[mine, None]
        distance = pair.distance(stored, predicted)
        sigma = _finite(rows.sigma[mine])[:, None] + _finite(columns.sigma)
        allowed = pair.allowed(start, predicted, sigma)
        beyond = ~(distance <= allowed)
        if first is None:
            first = _first(beyond, start)
        count += int(beyond.sum())
        distances += distance.sum(axis=0, dtype=np.float64)
        largest = np.maximum(largest, distance.max(axis=0))
        if pair.scale is not None:
            scaled += _scaled(pair, start, stored, predicted, sigma)
        signal += float((predicted.astype(np.float64) ** 2).sum())
        noise += float((distance.astype(np.float64) ** 2).sum())
    sqnr = 10 * float(np.log10(max(signal, 1e-300) / noise)) if noise else 200.0  # zeros that stayed zeros, too
    found = Misfits(count, 0, pair.rows * pair.columns, first, None, min(sqnr, 200.0), pair.scale is not None, scaled)
    if not found.other_rounding:
        return found
    limit = np.maximum(GROSS_STEPS[pair.bits], GROSS_NOISE * _noise(distances, largest, pair.rows))  # [K]
    gross, first_gross = _gross(pair, rows, columns, limit)
    return replace(found, gross=gross, first_gross=first_gross)


def _gross(pair: WeightPair, rows: Scales, columns: Scales, limit: Array) -> tuple[int, tuple[int, int] | None]:
    """(number, first) of the weights that lie further than `limit` [K] steps from where they are allowed to."""
    count, first = 0, None
    for start, source, stored in pair.chunks():
        mine = slice(start, start + len(source))
        predicted = source * columns.values * rows.values[mine, None]
        sigma = _finite(rows.sigma[mine])[:, None] + _finite(columns.sigma)
        far = ~(pair.distance(stored, predicted) <= pair.allowed(start, predicted, sigma) + limit)
        first = _first(far, start) if first is None else first
        count += int(far.sum())
    return count, first


def _scaled(
    pair: WeightPair, start: int, stored: Array, predicted: Array, sigma: Array
) -> list[tuple[int, int, float]]:
    """Rows, or their groups, whose integers are the prediction times some other factor: their scale is not theirs."""
    assert pair.scale is not None
    groups = (len(stored), pair.scale.shape[1], -1)
    known = np.where(pair.inside(stored), predicted, 0).reshape(groups).astype(np.float64)
    square = (known**2).sum(axis=2)
    factor = (known * stored.reshape(groups)).sum(axis=2) / np.where(square > 0, square, 1)  # [n, K/G]
    unsure = np.sqrt((known**2 * (sigma**2).reshape(groups)).sum(axis=2))
    allowed = 0.01 + SIGMAS * (OTHER_NOISE + unsure) / np.sqrt(np.where(square > 0, square, 1e-12))
    return [
        (int(row) + start, int(group), float(factor[row, group]))
        for row, group in np.argwhere(abs(factor - 1) > allowed)
    ]


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
