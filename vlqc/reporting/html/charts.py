"""Numbers to drawings: what a template needs to draw a chart that stretches with the page.

A drawing is 1000 wide and 100 high, y downwards, and is stretched to whatever room it gets; so it holds no text, and
its lines keep their width. Labels stand beside it, at percentages.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

WIDTH, HEIGHT = 1000, 100
SMALLEST = 1e-6  # of a logarithmic axis: what is below it lies on it
LONE = (-0.3, 0.3)  # of the distance between two places: how far what is alone reaches to either side
ROOM = 1.25  # between the values and the ends of a logarithmic axis
MOST_TICKS = 4
BETWEEN = (1, 1.5, 2, 3, 5, 7)  # labels where there is at most one power
DECADES = 5  # a logarithmic axis spans at most so many: what is smaller lies at its lower end

T = TypeVar("T")
Points = Sequence[float | None]  # per position along x; None: nothing there


@dataclass(frozen=True)
class Tick:
    """at: percent of the way along its axis, from the left or from below."""

    at: float
    text: str


@dataclass(frozen=True)
class Mark:
    """One path of a drawing; kind: CSS classes."""

    kind: str
    path: str


@dataclass
class Chart:
    """title: what is shown; told: the same in words, for those who do not see it; kind: CSS classes, "tall" for
    a large one, "dense" for one with many dots; aside: a small line below the title."""

    title: str
    told: str
    x_ticks: list[Tick] = field(default_factory=list)
    y_ticks: list[Tick] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    kind: str = ""
    aside: str = ""

    def band(self, kind: str, upper: Points, lower: Points, axis: "Axis") -> None:
        """Filled between two lines, wherever both are."""
        pairs = [None if high is None or low is None else (high, low) for high, low in zip(upper, lower, strict=True)]
        for run in _runs(pairs):
            if len(run) == 1:  # a lone place: nearly as wide as it is
                run = [(run[0][0] + by, run[0][1]) for by in LONE]
            there = [f"{_x(at, len(upper))} {axis.y(high)}" for at, (high, _) in run]
            back = [f"{_x(at, len(upper))} {axis.y(low)}" for at, (_, low) in reversed(run)]
            self.marks.append(Mark(f"band {kind}", f"M{'L'.join([*there, *back])}Z"))

    def line(self, kind: str, values: Points, axis: "Axis") -> None:
        """Through all values; broken where there is none."""
        parts = []
        for run in _runs(values):
            if len(run) == 1:
                run = [(run[0][0] + by, run[0][1]) for by in LONE]
            parts.append(f"M{'L'.join(f'{_x(at, len(values))} {axis.y(value)}' for at, value in run)}")
        if parts:
            self.marks.append(Mark(f"line {kind}", "".join(parts)))

    def dots(self, kind: str, values: Points, axis: "Axis") -> None:
        """A dot per value: a line of no length with round ends stays round when the drawing is stretched."""
        path = "".join(f"M{_x(at, len(values))} {axis.y(it)}h0" for at, it in enumerate(values) if it is not None)
        if path:
            self.marks.append(Mark(f"dots {kind}", path))

    def ticks(self, axis: "Axis") -> None:
        self.y_ticks = axis.ticks
        grid = "".join(f"M0 {_short(HEIGHT - tick.at)}H{WIDTH}" for tick in axis.ticks)
        self.marks.insert(0, Mark("grid", grid))


@dataclass(frozen=True)
class Axis:
    """Values from low to high, upwards; logarithmic or not."""

    low: float
    high: float
    logarithmic: bool
    ticks: list[Tick]

    def y(self, value: float) -> str:
        return _short(HEIGHT - self.at(value))

    def at(self, value: float) -> float:
        """Percent of the height."""
        low, high, value = (self._on_scale(it) for it in (self.low, self.high, value))
        return max(0.0, min(100.0, (value - low) / (high - low) * 100))

    def _on_scale(self, value: float) -> float:
        return math.log10(max(value, SMALLEST)) if self.logarithmic else value


def logarithmic_axis(values: Iterable[float | None], base: int = 10) -> Axis:
    """Around all values with a little room, over DECADES at most; labels at powers of the base, about four of them.

    Where powers are too few, there are labels between them.
    """
    known = [it for it in values if it is not None and it > SMALLEST] or [1.0]
    high = max(known) * ROOM
    low = max(min(known) / ROOM, high / 10**DECADES)
    axis = Axis(low, high, True, [])
    first, last = math.ceil(math.log(low, base) - 1e-9), math.floor(math.log(high, base) + 1e-9)
    step = max(1, math.ceil((last - first + 1) / MOST_TICKS))
    marks = [float(base) ** power for power in range(first, last + 1) if power % step == 0]
    if len(marks) < 2:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marks = [it for it in (digit * 10.0**power for power in powers for digit in BETWEEN) if low <= it <= high]
        marks = marks[:: math.ceil(len(marks) / MOST_TICKS)] if marks else [math.sqrt(low * high)]
    axis.ticks.extend(Tick(round(axis.at(it), 2), magnitude(it)) for it in marks)
    return axis


def linear_axis(values: Iterable[float | None], step: float, unit: str = "") -> Axis:
    """Around all values, in multiples of `step` or of a multiple of it, of which about four get a label."""
    known = [it for it in values if it is not None] or [0.0]
    low, high = math.floor(min(known) / step) * step, math.ceil(max(known) / step) * step
    high = max(high, low + step)
    stride = step * max(1, math.ceil((high - low) / step / 4))
    axis = Axis(low, high, False, [])
    value = math.ceil(low / stride) * stride
    while value <= high:
        axis.ticks.append(Tick(round(axis.at(value), 2), f"{value:g}{unit}"))
        value += stride
    return axis


def magnitude(value: float) -> str:
    """0.001 -> "0.001", 1000 -> "1k", 2000000 -> "2M": short enough to stand beside an axis."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def layer_ticks(labels: Sequence[str], most: int = 6) -> list[Tick]:
    """Of numbered places along x, a few at round numbers."""
    count = len(labels)
    step = next(it for it in (1, 2, 4, 5, 8, 10, 20, 25, 50, 100, count) if count / it <= most or it >= count)
    return [Tick(round((at + 0.5) / count * 100, 2), labels[at]) for at in range(0, count, step)]


def _runs(values: Sequence[T | None]) -> list[list[tuple[float, T]]]:
    """Values with their places, cut where one is missing."""
    found: list[list[tuple[float, T]]] = [[]]
    for at, value in enumerate(values):
        if value is None:
            found.append([])
        else:
            found[-1].append((at, value))
    return [run for run in found if run]


def _x(at: float, count: int) -> str:
    return _short((at + 0.5) / count * WIDTH)


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")
