"""The charts of the report: outliers and noise through the depth of the model, ranges per input, smoothing scales."""

import math
from collections.abc import Sequence
from itertools import accumulate

from vlqc.reporting.html.charts import (
    HEIGHT,
    WIDTH,
    Chart,
    Mark,
    Tick,
    layer_ticks,
    linear_axis,
    logarithmic_axis,
    magnitude,
)
from vlqc.reporting.html.schema import SHARES, InputFacts, Modality, StageFacts
from vlqc.reporting.html.timings import Timings
from vlqc.reporting.html.towers import MIDDLE, Tower, outlier_factor, peak, reader_of, typical

MODALITIES: tuple[Modality, ...] = ("text", "image")
EDGES = (SHARES.index(0.1), SHARES.index(0.9))  # of a band that holds four channels of five
MANY = 50  # stages: more dots side by side need to be small
SHOWN_SHARES = {0.0: "max", 0.012: "1 %", 0.1: "10 %", 0.5: "50 %", 1.0: "min"}


def depth_charts(towers: Sequence[Tower]) -> list[Chart]:
    """Two drawings with one x axis over all stages: how far outliers stick out, and the SQNR of each stage."""
    stages = [stage for tower in towers for stage in tower.stages]
    before, after = ([outlier_factor(stage, after=it) for stage in stages] for it in (False, True))
    outliers = Chart("How far outliers stick out", _told_outliers(before, after), kind="tall")
    axis = logarithmic_axis([*before, *after, 1.0])
    outliers.ticks(axis)
    outliers.band("before", before, [None if it is None else axis.low for it in before], axis)
    outliers.band("after", after, [None if it is None else axis.low for it in after], axis)
    outliers.line("before", before, axis)
    outliers.line("after", after, axis)
    outliers.y_ticks = [Tick(tick.at, f"{tick.text}×") for tick in outliers.y_ticks]
    noise = Chart("SQNR of each stage", _told_noise(stages), x_ticks=_tower_ticks(towers))
    noise.kind = "tall dense" if len(stages) > MANY else "tall"
    values = {name: [stage.sqnr.get(name) for stage in stages] for name in MODALITIES}
    scale = linear_axis([it for of_one in values.values() for it in of_one], 5)
    noise.ticks(scale)
    for name, of_one in values.items():
        at = 0
        for tower in towers:  # towers stand side by side, they do not run into each other
            inside = range(at, at + len(tower.stages))
            at = inside.stop
            if len(inside) > 1:
                noise.line(
                    f"sqnr {name}", [it if number in inside else None for number, it in enumerate(of_one)], scale
                )
        noise.dots(f"sqnr {name}", of_one, scale)
        if name == "image":  # hollow: a smaller dot of the background's colour
            noise.dots("hole", of_one, scale)
    noise.y_ticks = [Tick(tick.at, f"{tick.text} dB") for tick in noise.y_ticks]
    for chart in (outliers, noise):
        _separate(chart, towers, len(stages))
    return [outliers, noise]


def time_chart(towers: Sequence[Tower], timings: Timings) -> Chart:
    """Seconds per stage; an interrupted run that went on knows those of the later ones."""
    took = {it.name: it.seconds for it in timings.stages}
    values = [took.get(stage.name) for tower in towers for stage in tower.stages]
    longest = max(took, key=lambda name: took[name], default="")
    told = f"The longest is {longest} with {took[longest]:.1f} s." if longest else "No stage was timed."
    chart = Chart("Seconds per stage", told, x_ticks=_tower_ticks(towers))
    step = 10.0 ** math.floor(math.log10(max([*took.values(), 0.01])))
    axis = linear_axis([0.0, *values], step)
    chart.ticks(axis)
    chart.band("time", values, [None if it is None else 0.0 for it in values], axis)
    chart.line("time", values, axis)
    _separate(chart, towers, len(values))
    return chart


def range_charts(tower: Tower) -> list[Chart]:
    """One per input: the typical and the largest channel, before and after smoothing, through the layers."""
    return [_range_chart(tower, reader) for reader in tower.readers]


def scale_charts(tower: Tower) -> list[Chart]:
    """One per input that smoothing changed: by what its channels were divided, through the layers."""
    found = []
    for reader in tower.readers:
        reads = tower.inputs(reader)
        if not any(read is not None and read.scales for read in reads):
            continue
        every = [None if read is None else read.scales for read in reads]
        axis = logarithmic_axis([value for scales in every if scales for value in (scales[0], scales[-1])], base=2)
        most = max(scales[0] for scales in every if scales)
        title = f"{reader}"
        chart = Chart(title, f"Smoothing divides channels of the input of {reader} by up to {most:.3g}.")
        chart.ticks(axis)
        low, high = ([None if it is None else it[end] for it in every] for end in reversed(EDGES))
        chart.band("scale", high, low, axis)
        for kind, end in (("scale outer", 0), ("scale", MIDDLE), ("scale outer", -1)):
            chart.line(kind, [None if it is None else it[end] for it in every], axis)
        chart.x_ticks = layer_ticks(tower.labels)
        found.append(chart)
    return found


def channel_charts(stage: StageFacts) -> list[Chart]:
    """One per input of a stage: the largest magnitude of its channels, in falling order."""
    return [_channel_chart(reader_of(read, stage), read, stage) for read in stage.inputs]


def _range_chart(tower: Tower, reader: str) -> Chart:
    reads = tower.inputs(reader)
    peaks, middles = ([None if it is None else value(it, after=after) for it in reads for after in (False, True)]
                      for value in (peak, typical))  # fmt: skip
    axis = logarithmic_axis([*peaks, *middles])
    chart = Chart(reader, _told_ranges(reader, peaks[::2], peaks[1::2]), x_ticks=layer_ticks(tower.labels))
    chart.aside = "" if any(it and it.scales for it in reads) else "not smoothed"
    chart.ticks(axis)
    chart.band("before", peaks[::2], middles[::2], axis)
    chart.band("after", peaks[1::2], middles[1::2], axis)
    chart.line("reach", [_reach(stage, read) for stage, read in zip(tower.stages, reads, strict=True)], axis)
    for name in MODALITIES:
        chart.line(f"before {name}", [it.before[name][0] if it and name in it.before else None for it in reads], axis)
        chart.line(f"after {name}", [it.after[name][0] if it and name in it.after else None for it in reads], axis)
    return chart


def _channel_chart(reader: str, read: InputFacts, stage: StageFacts) -> Chart:
    large, small = peak(read, after=False), peak(read, after=True)
    told = f"Input of {reader}: the largest channel reaches {_number(large)} before smoothing, {_number(small)} after."
    chart = Chart(reader, told, aside=f"{read.channels} channels{'' if read.scales else ', not smoothed'}")
    axis = logarithmic_axis(value for curves in (read.before, read.after) for it in curves.values() for value in it)
    chart.ticks(axis)
    chart.line("reach", [_reach(stage, read)] * len(SHARES), axis)
    for kind, curves in (("before", read.before), ("after", read.after)):
        for name, curve in curves.items():
            chart.line(f"{kind} {name}", curve, axis)
    chart.x_ticks = [
        Tick(round((SHARES.index(share) + 0.5) / len(SHARES) * 100, 2), text) for share, text in SHOWN_SHARES.items()
    ]
    return chart


def _reach(stage: StageFacts, read: InputFacts | None) -> float | None:
    """The largest magnitude that the static range of an input represents."""
    grids = [site for site in stage.sites if read is not None and site.name in read.sites]
    return max(
        (max(abs(it.low), abs(it.high)) for it in grids if it.low is not None and it.high is not None), default=None
    )


def _separate(chart: Chart, towers: Sequence[Tower], stages: int) -> None:
    """Thin lines between towers."""
    path = "".join(f"M{inside.start / stages * WIDTH:.1f} 0V{HEIGHT}" for inside in _places(towers)[1:])
    if path:
        chart.marks.insert(1, Mark("fence", path))


def _tower_ticks(towers: Sequence[Tower]) -> list[Tick]:
    """Titles of towers below their stages; a tower of one stage has no room for its own."""
    places = _places(towers)
    return [
        Tick(round((inside.start + inside.stop) / 2 / places[-1].stop * 100, 2), tower.title)
        for tower, inside in zip(towers, places, strict=True)
        if len(inside) > 1
    ]


def _places(towers: Sequence[Tower]) -> list[range]:
    """Of each tower's stages among all."""
    ends = list(accumulate(len(tower.stages) for tower in towers))
    return [range(end - len(tower.stages), end) for tower, end in zip(towers, ends, strict=True)]


def _told_outliers(before: Sequence[float | None], after: Sequence[float | None]) -> str:
    large, small = (max((it for it in of if it is not None), default=None) for of in (before, after))
    if large is None or small is None:
        return "Nothing was quantized."
    return (
        f"Before smoothing the largest channel reaches up to {magnitude(large)} times the typical one, after it up to "
        f"{magnitude(small)} times."
    )


def _told_noise(stages: Sequence[StageFacts]) -> str:
    known = [(value, stage.name) for stage in stages for value in stage.sqnr.values()]
    if not known:
        return "No stage was measured."
    (low, where), (high, best) = min(known), max(known)
    return f"From {low:.1f} dB at {where} to {high:.1f} dB at {best}."


def _told_ranges(reader: str, before: Sequence[float | None], after: Sequence[float | None]) -> str:
    large, small = (max((it for it in of if it is not None), default=None) for of in (before, after))
    return (
        f"Input of {reader}: the largest channel of any layer reaches {_number(large)} before smoothing and "
        f"{_number(small)} after."
    )


def _number(value: float | None) -> str:
    return "nothing" if value is None or not math.isfinite(value) else magnitude(value)
