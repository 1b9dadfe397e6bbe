"""The multiple-choice knapsack: one option per item, least total value, total weight within a limit.

The problem is NP-hard. The dynamic program over rounded values is its usual approximation scheme: Kellerer, Pferschy
and Pisinger, Knapsack Problems (2004), section 11.9. Its bounds come from the relaxed problem, in which an item may
take a mixture of options, and from the greedy algorithm that solves it.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

PRECISION = 0.01  # upper bound of the result's excess over the optimum, relative to the optimum
COARSE = 1.0  # the precision of a first run, whose result bounds the second one
ROUNDING = 1e-12  # relative error of a sum of weights; sums that decide are exact


@dataclass(frozen=True)
class Option:
    """value, weight: 0 or more; rank: of options that are equal in value, the lowest is preferred."""

    value: float
    weight: float
    rank: int = 0


def choose_options(items: Sequence[Sequence[Option]], limit: float) -> list[int] | None:
    """The index of one option per item, or None if even the lightest options are beyond the limit.

    The total weight is at most `limit`. The total value is at most 1 + PRECISION times the least possible one. The
    result is deterministic. Of equal items, the first ones get the heavier option where the greedy algorithm is good
    enough.
    """
    lightest = [_lightest(options, range(len(options))) for options in items]
    if _weight(items, lightest) > limit:
        return None
    bottleneck, chosen = _bottleneck(items, limit)
    relaxed, greedy = _greedy(items, limit)
    chosen = min(chosen, greedy, key=lambda each: _value(items, each))
    least = max(bottleneck, relaxed)
    for precision in (COARSE, PRECISION):
        chosen = _improve(items, chosen, limit)
        if _value(items, chosen) <= (1 + PRECISION) * least:
            break
        unit = precision * least / len(items)
        least, found = _by_rounded_values(items, limit, unit, math.floor(_value(items, chosen) / unit), least)
        chosen = min(chosen, found or chosen, key=lambda each: _value(items, each))
    return _improve(items, chosen, limit)


def _bottleneck(items: Sequence[Sequence[Option]], limit: float) -> tuple[float, list[int]]:
    """The least bound of all values under which the lightest options are within the limit, and these options.

    Every feasible choice has an option of at least that value.
    """
    values = sorted({option.value for options in items for option in options})
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        chosen = _lightest_below(items, values[middle])
        if chosen is not None and _weight(items, chosen) <= limit:
            high = middle
        else:
            low = middle + 1
    return values[low], _lightest_below(items, values[low]) or []


def _lightest_below(items: Sequence[Sequence[Option]], largest: float) -> list[int] | None:
    allowed = [[index for index, option in enumerate(options) if option.value <= largest] for options in items]
    if not all(allowed):
        return None
    return [_lightest(options, indices) for options, indices in zip(items, allowed, strict=True)]


def _greedy(items: Sequence[Sequence[Option]], limit: float) -> tuple[float, list[int]]:
    """(least value of the relaxed problem, a choice).

    From the lightest options on, it takes steps along the lower convex hull of each item's weights and values, those
    that remove most value per weight first, as long as they are within the limit.
    """
    steps = []
    chosen = [_lightest(options, range(len(options))) for options in items]
    for number, options in enumerate(items):
        before = chosen[number]
        for efficiency, index in _hull(options, before):
            steps.append((-efficiency, number, before, index))
            before = index
    left, relaxed = limit - _weight(items, chosen), None
    blocked: set[int] = set()
    for _, number, before, index in sorted(steps, key=lambda step: step[:2]):  # stable: an item's steps stay in order
        if number in blocked:
            continue
        added = items[number][index].weight - items[number][before].weight
        if added > left:
            if relaxed is None:  # the first step of which only a part is within the limit
                removed = items[number][before].value - items[number][index].value
                relaxed = _value(items, chosen) - removed * max(left, 0.0) / added
            blocked.add(number)
            continue
        left -= added
        chosen[number] = index
    relaxed = _value(items, chosen) if relaxed is None else relaxed
    if _weight(items, chosen) > limit:  # by rounding of `left`
        chosen = [_lightest(options, range(len(options))) for options in items]
    return max(0.0, relaxed * (1 - ROUNDING)), chosen


def _hull(options: Sequence[Option], start: int) -> Iterator[tuple[float, int]]:
    """(value removed per weight, index) of the steps along the lower convex hull, not increasing."""
    now, last = start, math.inf
    while True:
        ahead = [
            (_efficiency(options[now], option), -option.value, -index)
            for index, option in enumerate(options)
            if option.value < options[now].value and option.weight >= options[now].weight
        ]
        if not ahead:
            return
        efficiency, _, index = max(ahead)
        now, last = -index, min(last, efficiency)  # not increasing, in spite of rounding
        yield last, now


def _efficiency(before: Option, after: Option) -> float:
    added = after.weight - before.weight
    return (before.value - after.value) / added if added > 0 else math.inf


def _by_rounded_values(
    items: Sequence[Sequence[Option]], limit: float, unit: float, largest: int, least: float
) -> tuple[float, list[int] | None]:
    """(lower bound of the value, choice of the least value), values rounded down to multiples of `unit`.

    largest: sum of the rounded values that the optimum does not exceed; least: a known lower bound. The value of the
    choice exceeds the optimum by less than one unit per item.
    """
    states = largest + 1
    weights = np.full(states, np.inf)  # least weight by sum of rounded values
    weights[0] = 0.0
    choices = []
    for options in items:
        after, choice = np.full(states, np.inf), np.zeros(states, dtype=np.int16)
        for index in sorted(range(len(options)), key=lambda index: (options[index].value, options[index].rank)):
            shift = math.floor(options[index].value / unit)
            if shift >= states:
                continue
            moved = weights[: states - shift] + options[index].weight
            better = moved < after[shift:]
            after[shift:][better] = moved[better]
            choice[shift:][better] = index
        weights = after
        choices.append(choice)
    reached = np.flatnonzero(weights <= limit * (1 + ROUNDING))
    if not len(reached):
        return least, None
    least = max(least, float(reached[0]) * unit)
    for state in reached.tolist():
        chosen = []
        for options, choice in zip(reversed(items), reversed(choices), strict=True):
            index = int(choice[state])
            chosen.append(index)
            state -= math.floor(options[index].value / unit)
        chosen.reverse()
        if _weight(items, chosen) <= limit:
            return least, chosen
    return least, None


def _improve(items: Sequence[Sequence[Option]], chosen: Sequence[int], limit: float) -> list[int]:
    """Changes single items to options of less value, or of the same value and a lower rank, within the limit."""
    chosen = list(chosen)
    gains = sorted(
        range(len(items)),
        key=lambda number: min(option.value for option in items[number]) - items[number][chosen[number]].value,
    )
    for number in gains:
        options, before = items[number], chosen[number]
        for index in sorted(range(len(options)), key=lambda index: (options[index].value, options[index].rank)):
            if (options[index].value, options[index].rank) >= (options[before].value, options[before].rank):
                break
            chosen[number] = index
            if _weight(items, chosen) <= limit:
                break
            chosen[number] = before
    return chosen


def _lightest(options: Sequence[Option], indices: Iterable[int]) -> int:
    return min(indices, key=lambda index: (options[index].weight, options[index].value, options[index].rank))


def _value(items: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    return math.fsum(options[index].value for options, index in zip(items, chosen, strict=True))


def _weight(items: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    return math.fsum(options[index].weight for options, index in zip(items, chosen, strict=True))
