"""The charts of the report page: outliers, SQNR and time over the stages, ranges per input, smoothing scales."""

import math
from collections.abc import Sequence
from itertools import accumulate

from vlqc.reporting.html.schema import SHARES, InputData, Modality, StageData, Timings
from vlqc.reporting.html.svg import (
    HEIGHT,
    WIDTH,
    Chart,
    SvgPath,
    Tick,
    layer_ticks,
    linear_axis,
    logarithmic_axis,
    magnitude,
)
from vlqc.reporting.html.towers import (
    MEDIAN,
    Tower,
    input_label,
    largest_magnitude,
    median_magnitude,
    outlier_factor,
)

MODALITIES: tuple[Modality, ...] = ("text", "image", "video")
BAND_EDGES = (SHARES.index(0.9), SHARES.index(0.1))  # between them are 80 % of the channels
MANY_STAGES = 50  # with more stages, dots are smaller
SHARE_LABELS = {0.0: "max", 0.012: "1 %", 0.1: "10 %", 0.5: "50 %", 1.0: "min"}


def depth_charts(towers: Sequence[Tower]) -> list[Chart]:
    """Two charts with one x axis over all stages: the outlier factor and the SQNR."""
    stages = [stage for tower in towers for stage in tower.stages]
    charts = [_outlier_chart(stages), _sqnr_chart(towers, stages)]
    for chart in charts:
        _separate_towers(chart, towers)
    return charts


def _outlier_chart(stages: Sequence[StageData]) -> Chart:
    before, after = ([outlier_factor(stage, after=smoothed) for stage in stages] for smoothed in (False, True))
    chart = Chart("Largest channel relative to the median channel", _describe_outliers(before, after), css="tall")
    axis = logarithmic_axis([*before, *after, 1.0])
    chart.ticks(axis)
    for css, values in (("before", before), ("after", after)):
        chart.band(css, values, [None if value is None else axis.low for value in values], axis)
    for css, values in (("before", before), ("after", after)):
        chart.line(css, values, axis)
    chart.y_ticks = [Tick(tick.at, f"{tick.text}×") for tick in chart.y_ticks]
    return chart


def _sqnr_chart(towers: Sequence[Tower], stages: Sequence[StageData]) -> Chart:
    chart = Chart("SQNR of each stage", _describe_sqnr(stages), x_ticks=_tower_ticks(towers))
    chart.css = "tall dense" if len(stages) > MANY_STAGES else "tall"
    values = {name: [stage.sqnr.get(name) for stage in stages] for name in MODALITIES}
    axis = linear_axis([value for rows_per_modality in values.values() for value in rows_per_modality], 5)
    chart.ticks(axis)
    for name, rows_per_modality in values.items():
        for positions in _tower_positions(towers):  # lines do not connect towers
            if len(positions) > 1:
                inside = [value if index in positions else None for index, value in enumerate(rows_per_modality)]
                chart.line(f"sqnr {name}", inside, axis)
        chart.dots(f"sqnr {name}", rows_per_modality, axis)
        if name != "text":  # hollow: a smaller dot in the color of the background
            chart.dots("hole", rows_per_modality, axis)
    chart.y_ticks = [Tick(tick.at, f"{tick.text} dB") for tick in chart.y_ticks]
    return chart


def time_chart(towers: Sequence[Tower], timings: Timings) -> Chart:
    """Seconds per stage. After an interruption only the stages of the last run have a value."""
    seconds = {stage.name: stage.seconds for stage in timings.stages}
    values = [seconds.get(stage.name) for tower in towers for stage in tower.stages]
    longest = max(seconds, key=lambda name: seconds[name], default="")
    description = f"The longest is {longest} with {seconds[longest]:.1f} s." if longest else "No stage was timed."
    chart = Chart("Seconds per stage", description, x_ticks=_tower_ticks(towers))
    step = 10.0 ** math.floor(math.log10(max([*seconds.values(), 0.01])))
    axis = linear_axis([0.0, *values], step)
    chart.ticks(axis)
    chart.band("time", values, [None if value is None else 0.0 for value in values], axis)
    chart.line("time", values, axis)
    _separate_towers(chart, towers)
    return chart


def range_charts(tower: Tower) -> list[Chart]:
    """One per input: the median and the largest channel over the layers, before and after smoothing."""
    return [_range_chart(tower, label) for label in tower.input_labels]


def _range_chart(tower: Tower, label: str) -> Chart:
    inputs = tower.inputs(label)
    largest = {
        after: [None if data is None else largest_magnitude(data, after=after) for data in inputs]
        for after in (False, True)
    }
    medians = {
        after: [None if data is None else median_magnitude(data, after=after) for data in inputs]
        for after in (False, True)
    }
    axis = logarithmic_axis([*largest[False], *largest[True], *medians[False], *medians[True]])
    description = _describe_ranges(label, largest[False], largest[True])
    chart = Chart(label, description, x_ticks=layer_ticks(tower.labels))
    chart.subtitle = "" if any(data and data.scales for data in inputs) else "not smoothed"
    chart.ticks(axis)
    chart.band("before", largest[False], medians[False], axis)
    chart.band("after", largest[True], medians[True], axis)
    limits = [_static_limit(stage, data) for stage, data in zip(tower.stages, inputs, strict=True)]
    chart.line("reach", limits, axis)
    for name in MODALITIES:
        before = [None if data is None else data.before.get(name) for data in inputs]
        after = [None if data is None else data.after.get(name) for data in inputs]
        chart.line(f"before {name}", [None if curve is None else curve[0] for curve in before], axis)
        chart.line(f"after {name}", [None if curve is None else curve[0] for curve in after], axis)
    return chart


def scale_charts(tower: Tower) -> list[Chart]:
    """One per smoothed input: the smoothing scales of its channels, over the layers."""
    charts = []
    for label in tower.input_labels:
        curves = [None if data is None else data.scales for data in tower.inputs(label)]
        smoothed = [scales for scales in curves if scales]
        if not smoothed:
            continue
        axis = logarithmic_axis([scale for scales in smoothed for scale in (scales[0], scales[-1])], base=2)
        largest = max(scales[0] for scales in smoothed)
        chart = Chart(label, f"Smoothing divides channels of the input of {label} by up to {largest:.3g}.")
        chart.ticks(axis)
        low, high = ([None if scales is None else scales[edge] for scales in curves] for edge in BAND_EDGES)
        chart.band("scale", high, low, axis)
        for css, index in (("scale outer", 0), ("scale", MEDIAN), ("scale outer", -1)):
            chart.line(css, [None if scales is None else scales[index] for scales in curves], axis)
        chart.x_ticks = layer_ticks(tower.labels)
        charts.append(chart)
    return charts


def channel_charts(stage: StageData) -> list[Chart]:
    """One per input of a stage: the largest magnitude per channel, in descending order."""
    return [_channel_chart(input_label(data, stage), data, stage) for data in stage.inputs]


def _channel_chart(label: str, data: InputData, stage: StageData) -> Chart:
    before, after = (_format(largest_magnitude(data, after=smoothed)) for smoothed in (False, True))
    description = f"Input of {label}: the largest channel has magnitude {before} before smoothing and {after} after."
    chart = Chart(label, description, subtitle=f"{data.channels} channels{'' if data.scales else ', not smoothed'}")
    axis = logarithmic_axis(
        value for curves in (data.before, data.after) for curve in curves.values() for value in curve
    )
    chart.ticks(axis)
    chart.line("reach", [_static_limit(stage, data)] * len(SHARES), axis)
    for css, curves in (("before", data.before), ("after", data.after)):
        for name, curve in curves.items():
            chart.line(f"{css} {name}", curve, axis)
    chart.x_ticks = [
        Tick(round((SHARES.index(share) + 0.5) / len(SHARES) * 100, 2), text) for share, text in SHARE_LABELS.items()
    ]
    return chart


def _static_limit(stage: StageData, data: InputData | None) -> float | None:
    """Largest magnitude that the static int8 range of an input represents."""
    readers = [site for site in stage.sites if data is not None and site.name in data.sites]
    return max(
        (max(abs(site.low), abs(site.high)) for site in readers if site.low is not None and site.high is not None),
        default=None,
    )


# ---- the x axis over towers ------------------------------------------------------------------------------------------


def _separate_towers(chart: Chart, towers: Sequence[Tower]) -> None:
    """Adds thin vertical lines between towers."""
    stages = sum(len(tower.stages) for tower in towers)
    path = "".join(f"M{inside.start / stages * WIDTH:.1f} 0V{HEIGHT}" for inside in _tower_positions(towers)[1:])
    if path:
        chart.paths.insert(1, SvgPath("fence", path))


def _tower_ticks(towers: Sequence[Tower]) -> list[Tick]:
    """Titles of towers in the middle of their stages; a tower of one stage is too narrow for its title."""
    positions = _tower_positions(towers)
    return [
        Tick(round((inside.start + inside.stop) / 2 / positions[-1].stop * 100, 2), tower.title)
        for tower, inside in zip(towers, positions, strict=True)
        if len(inside) > 1
    ]


def _tower_positions(towers: Sequence[Tower]) -> list[range]:
    """Indices of each tower's stages among all stages."""
    ends = list(accumulate(len(tower.stages) for tower in towers))
    return [range(end - len(tower.stages), end) for tower, end in zip(towers, ends, strict=True)]


# ---- descriptions for screen readers ---------------------------------------------------------------------------------


def _describe_outliers(before: Sequence[float | None], after: Sequence[float | None]) -> str:
    large, small = (max((value for value in values if value is not None), default=None) for values in (before, after))
    if large is None or small is None:
        return "No layer is quantized."
    return (
        f"The largest channel has up to {magnitude(large)} times the magnitude of the median channel before smoothing "
        f"and up to {magnitude(small)} times after."
    )


def _describe_sqnr(stages: Sequence[StageData]) -> str:
    measured = [(sqnr, stage.name) for stage in stages for sqnr in stage.sqnr.values()]
    if not measured:
        return "No stage was measured."
    (low, worst), (high, best) = min(measured), max(measured)
    return f"From {low:.1f} dB at {worst} to {high:.1f} dB at {best}."


def _describe_ranges(label: str, before: Sequence[float | None], after: Sequence[float | None]) -> str:
    large, small = (
        _format(max((value for value in values if value is not None), default=None)) for values in (before, after)
    )
    return f"Input of {label}: the largest channel of any layer has {large} before smoothing and {small} after."


def _format(value: float | None) -> str:
    return "unknown" if value is None or not math.isfinite(value) else magnitude(value)
