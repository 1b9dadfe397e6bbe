"""vlqc.reporting.html.charts and .towers: drawings lie where their numbers say."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import synthetic_report as made_up_report
from vlqc.reporting.html.charts import Chart, Tick, layer_ticks, linear_axis, logarithmic_axis, magnitude
from vlqc.reporting.html.overview import channel_charts, depth_charts, range_charts, scale_charts, time_chart
from vlqc.reporting.html.towers import folded, outlier_factor, peak, reader_of, towers, typical, worst

values = st.lists(st.none() | st.floats(0, 1e30), min_size=1, max_size=40)


def coordinates(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", path)]


@given(values, st.sampled_from([2, 10]))
def test_every_value_lies_inside(points: list[float | None], base: int) -> None:
    """Catches a line that leaves its drawing, numbers that are none, and an axis without a label."""
    axis = logarithmic_axis(points, base)
    chart = Chart("", "")
    chart.ticks(axis)
    chart.line("a", points, axis)
    chart.dots("a", points, axis)
    chart.band("a", points, [None if it is None else it / 3 for it in points], axis)
    for mark in chart.marks:
        assert re.fullmatch(r"[MLHhZ0-9. ]*", mark.path)
        assert all(-8 <= x <= 1008 and 0 <= y <= 100 for x, y in coordinates(mark.path))
    assert 1 <= len(chart.y_ticks) <= 6 and all(0 <= tick.at <= 100 for tick in chart.y_ticks)


@given(st.lists(st.floats(-50, 200), min_size=1), st.sampled_from([1, 5]))
def test_a_linear_axis_holds_its_values(points: list[float], step: float) -> None:
    """Catches a value beyond the axis, and ticks that are not where their number is."""
    axis = linear_axis(points, step)
    assert axis.low <= min(points) and max(points) <= axis.high
    assert 1 <= len(axis.ticks) <= 6
    for tick in axis.ticks:
        assert axis.at(float(tick.text)) == pytest.approx(tick.at, abs=0.01)


def test_a_logarithmic_axis_by_hand() -> None:
    """Catches the wrong logarithm, and up that is down."""
    axis = logarithmic_axis([1.0, 100.0])  # from 0.8 to 125, in which 1 and 100 lie 4.42 and 95.58 percent up
    assert axis.at(1.0) == pytest.approx(4.418, abs=1e-3) and axis.at(100.0) == pytest.approx(95.582, abs=1e-3)
    assert axis.ticks == [Tick(4.42, "1"), Tick(50.0, "10"), Tick(95.58, "100")]
    assert float(axis.y(100.0)) < float(axis.y(1.0))


def test_a_gap_breaks_the_line() -> None:
    """Catches a line through a layer that has no value; what is alone gets a line of its own."""
    chart, axis = Chart("", ""), linear_axis([0.0, 10.0], 5)
    chart.line("a", [0.0, 10.0, None, 5.0, None], axis)
    chart.band("b", [None, 10.0, 10.0, None, None], [None, 0.0, 5.0, None, 3.0], axis)
    assert chart.marks[0].path == "M100 100L300 0M640 50L760 50"
    assert chart.marks[1].path == "M300 0L500 0L500 50L300 100Z" and len(chart.marks) == 2


@pytest.mark.parametrize(
    ("number", "text"), [(0.001, "0.001"), (64.0, "64"), (999.0, "999"), (1000.0, "1k"), (2.5e6, "2.5M"), (3e9, "3G")]
)
def test_magnitudes_are_short(number: float, text: str) -> None:
    """Catches labels that do not fit beside an axis."""
    assert magnitude(number) == text


@pytest.mark.parametrize("count", [1, 4, 6, 7, 28, 32, 80, 126])
def test_layers_get_a_few_labels(count: int) -> None:
    """Catches labels that run into each other, or stand at another layer."""
    ticks = layer_ticks([str(number) for number in range(count)])
    assert 1 <= len(ticks) <= 6 and ticks[0].text == "0"
    assert all(tick.at == pytest.approx((int(tick.text) + 0.5) / count * 100, abs=0.01) for tick in ticks)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["mlp.down_proj"], "mlp.down_proj"),
        (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "self_attn.{q,k,v}_proj"),
        (["mlp.w1", "mlp.w3"], "mlp.{w1,w3}"),
        (["a", "b"], "{a,b}"),
        (["x.a", "y.a"], "x.a, y.a"),
    ],
)
def test_names_are_folded(names: list[str], text: str) -> None:
    """Catches a name that cannot be read back."""
    assert folded(names) == text


def test_towers_hold_all_stages_in_order() -> None:
    """Catches a stage that is shown twice, not at all, or in another tower."""
    facts = made_up_report.facts(layers=3, blocks=2)
    found = towers(facts)
    assert [(tower.title, tower.labels) for tower in found] == [
        ("Vision tower", ["0", "1"]),
        ("Merger", ["merger"]),
        ("Language model", ["0", "1", "2"]),
    ]
    assert found[2].roles[:4] == [f"self_attn.{it}_proj" for it in "qkvo"]
    assert found[2].readers[0] == "self_attn.{q,k,v}_proj"
    assert [chart.title for chart in range_charts(found[2])] == found[2].readers
    assert all("up to" in chart.told for chart in scale_charts(found[0])) and len(scale_charts(found[0])) == 3
    assert len(channel_charts(facts.stages[0])) == len(facts.stages[0].inputs)
    outliers, noise = depth_charts(found)
    low = worst(facts.stages)
    assert low is not None and f"From {low[2]:.1f} dB at {low[0]}" in noise.told and "times" in outliers.told


def test_times_stand_at_their_stages() -> None:
    """Catches times in the order of the file, and a resumed run that has none of the first stages."""
    facts = made_up_report.facts(layers=3, blocks=2)
    timings = made_up_report.timings(facts)
    some = timings.model_copy(update={"stages": tuple(reversed(timings.stages[3:]))})
    chart = time_chart(towers(facts), some)
    longest = max(some.stages, key=lambda it: it.seconds)
    assert f"{longest.name} with {longest.seconds:.1f} s" in chart.told
    (line,) = (coordinates(mark.path) for mark in chart.marks if mark.kind == "line time")
    assert [x for x, _ in line] == pytest.approx([583.3, 750.0, 916.7])
    heights = [100 - y for _, y in line]
    ratios = [it.seconds / height for it, height in zip(timings.stages[3:], heights, strict=True)]
    assert max(ratios) / min(ratios) < 1.01


def test_outliers_are_measured_where_something_is_quantized() -> None:
    """Catches a factor that a float layer's input makes, or the typical channel taken for the largest."""
    stage = made_up_report.facts(layers=1, blocks=0).stages[1]
    factors = {}
    for read in stage.inputs:
        large, middle = peak(read, after=False), typical(read, after=False)
        assert large is not None and middle is not None and large == max(curve[0] for curve in read.before.values())
        factors[reader_of(read, stage)] = large / middle
    assert outlier_factor(stage, after=False) == pytest.approx(max(factors.values()))
    loudest = max(factors, key=lambda it: factors[it])
    silent = [
        site.model_copy(update={"scheme": "FLOAT"})
        if any(site.name in read.sites for read in stage.inputs if reader_of(read, stage) == loudest)
        else site
        for site in stage.sites
    ]
    rest = outlier_factor(stage.model_copy(update={"sites": tuple(silent)}), after=False)
    assert rest is not None and rest < factors[loudest]
