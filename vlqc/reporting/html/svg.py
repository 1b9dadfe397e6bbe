"""Charts as SVG paths: axes, ticks, lines, bands and dots.

A drawing is 1000 wide and 100 high, y downwards, and the page stretches it. It therefore contains no text and its lines
keep their width; tick labels are HTML beside it, placed by percentages.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

WIDTH, HEIGHT = 1000, 100
SMALLEST = 1e-6  # lower limit of logarithmic axes; smaller values are drawn there
SINGLE_WIDTH = (-0.3, 0.3)  # a single value is drawn this far to both sides, as a share of the distance of two values
MARGIN = 1.25  # factor between the extreme values and the ends of a logarithmic axis
MOST_TICKS = 4
INTERMEDIATE = (1, 1.5, 2, 3, 5, 7)  # tick labels where the axis has at most one power of its base
DECADES = 5  # largest range of a logarithmic axis; smaller values are drawn at its lower end

T = TypeVar("T")
Values = Sequence[float | None]  # one per position along x; None is a gap


@dataclass(frozen=True)
class Tick:
    """at: position along the axis in percent, from the left or from below."""

    at: float
    text: str


@dataclass(frozen=True)
class SvgPath:
    """css: class names; d: path data."""

    css: str
    d: str


@dataclass
class Chart:
    """title: what is shown; description: the same in words, for screen readers; css: class names, "tall" for a large
    chart, "dense" for one with many dots; subtitle: a small line below the title."""

    title: str
    description: str
    x_ticks: list[Tick] = field(default_factory=list)
    y_ticks: list[Tick] = field(default_factory=list)
    paths: list[SvgPath] = field(default_factory=list)
    css: str = ""
    subtitle: str = ""

    def band(self, css: str, upper: Values, lower: Values, axis: "Axis") -> None:
        """Fills the area between two lines, wherever both have values."""
        pairs = [None if high is None or low is None else (high, low) for high, low in zip(upper, lower, strict=True)]
        for run in _runs(pairs):
            forth = [f"{_x(position, len(upper))} {axis.y(high)}" for position, (high, _) in run]
            back = [f"{_x(position, len(upper))} {axis.y(low)}" for position, (_, low) in reversed(run)]
            self.paths.append(SvgPath(f"band {css}", f"M{'L'.join([*forth, *back])}Z"))

    def line(self, css: str, values: Values, axis: "Axis") -> None:
        """A line through all values, interrupted at gaps."""
        parts = [
            f"M{'L'.join(f'{_x(position, len(values))} {axis.y(value)}' for position, value in run)}"
            for run in _runs(values)
        ]
        if parts:
            self.paths.append(SvgPath(f"line {css}", "".join(parts)))

    def dots(self, css: str, values: Values, axis: "Axis") -> None:
        """A dot per value. Lines of length 0 with round ends stay round when the drawing is stretched."""
        path = "".join(
            f"M{_x(position, len(values))} {axis.y(value)}h0"
            for position, value in enumerate(values)
            if value is not None
        )
        if path:
            self.paths.append(SvgPath(f"dots {css}", path))

    def ticks(self, axis: "Axis") -> None:
        """Labels of the y axis and horizontal grid lines."""
        self.y_ticks = axis.ticks
        grid = "".join(f"M0 {_short(HEIGHT - tick.at)}H{WIDTH}" for tick in axis.ticks)
        self.paths.insert(0, SvgPath("grid", grid))


@dataclass(frozen=True)
class Axis:
    """A y axis from low to high, upwards, linear or logarithmic."""

    low: float
    high: float
    logarithmic: bool
    ticks: list[Tick]

    def y(self, value: float) -> str:
        return _short(HEIGHT - self.percent(value))

    def percent(self, value: float) -> float:
        """Percent of the height."""
        low, high, value = (self._transformed(number) for number in (self.low, self.high, value))
        return max(0.0, min(100.0, (value - low) / (high - low) * 100))

    def _transformed(self, value: float) -> float:
        return math.log10(max(value, SMALLEST)) if self.logarithmic else value


def logarithmic_axis(values: Iterable[float | None], base: int = 10) -> Axis:
    """An axis around all values, over DECADES at most, with about four labels at powers of `base`.

    With less than two powers, labels are at intermediate values.
    """
    known = [value for value in values if value is not None and value > SMALLEST] or [1.0]
    high = max(known) * MARGIN
    low = max(min(known) / MARGIN, high / 10**DECADES)
    axis = Axis(low, high, True, [])
    first, last = math.ceil(math.log(low, base) - 1e-9), math.floor(math.log(high, base) + 1e-9)
    step = max(1, math.ceil((last - first + 1) / MOST_TICKS))
    labels = [float(base) ** power for power in range(first, last + 1) if power % step == 0]
    if len(labels) < 2:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        candidates = [digit * 10.0**power for power in powers for digit in INTERMEDIATE]
        labels = [value for value in candidates if low <= value <= high]
        labels = labels[:: math.ceil(len(labels) / MOST_TICKS)] if labels else [math.sqrt(low * high)]
    axis.ticks.extend(Tick(round(axis.percent(value), 2), magnitude(value)) for value in labels)
    return axis


def linear_axis(values: Iterable[float | None], step: float, unit: str = "") -> Axis:
    """An axis around all values, in multiples of `step`, with about four labels."""
    known = [value for value in values if value is not None] or [0.0]
    low, high = math.floor(min(known) / step) * step, math.ceil(max(known) / step) * step
    high = max(high, low + step)
    stride = step * max(1, math.ceil((high - low) / step / 4))
    axis = Axis(low, high, False, [])
    value = math.ceil(low / stride) * stride
    while value <= high:
        axis.ticks.append(Tick(round(axis.percent(value), 2), f"{value:g}{unit}"))
        value += stride
    return axis


def magnitude(value: float) -> str:
    """0.001 -> "0.001", 1000 -> "1k", 2000000 -> "2M": short enough for a tick label."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def layer_ticks(labels: Sequence[str], max_ticks: int = 6) -> list[Tick]:
    """At most `max_ticks` of the labels along x, at round numbers."""
    count = len(labels)
    step = next(
        step for step in (1, 2, 4, 5, 8, 10, 20, 25, 50, 100, count) if count / step <= max_ticks or step >= count
    )
    return [Tick(round((index + 0.5) / count * 100, 2), labels[index]) for index in range(0, count, step)]


def _runs(values: Sequence[T | None]) -> list[list[tuple[float, T]]]:
    """(position, value) lists without gaps. A single value is doubled, so that its line has a length."""
    runs: list[list[tuple[float, T]]] = [[]]
    for position, value in enumerate(values):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((position, value))
    return [
        [(run[0][0] + offset, run[0][1]) for offset in SINGLE_WIDTH] if len(run) == 1 else run for run in runs if run
    ]


def _x(position: float, count: int) -> str:
    return _short((position + 0.5) / count * WIDTH)


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")
