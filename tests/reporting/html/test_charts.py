"""vlqc.reporting.html.svg, .charts and .towers: positions of drawn values, and figures per stage."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import synthetic_report
from vlqc.families.layer_names import combine_names
from vlqc.reporting.html.charts import channel_charts, depth_charts, range_charts, scale_charts, time_chart
from vlqc.reporting.html.svg import Chart, Tick, layer_ticks, linear_axis, logarithmic_axis, magnitude
from vlqc.reporting.html.towers import (
    group_stages,
    input_label,
    largest_magnitude,
    lowest_sqnr,
    median_magnitude,
    outlier_factor,
)

VALUES = st.lists(st.none() | st.floats(0, 1e30), min_size=1, max_size=40)


def coordinates(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", path)]


@given(VALUES, st.sampled_from([2, 10]))
def test_every_value_is_inside_the_drawing(values: list[float | None], base: int) -> None:
    """Catches a line that leaves its drawing, NaN or infinity in a path, and an axis without a label."""
    axis = logarithmic_axis(values, base)
    chart = Chart("", "")
    chart.ticks(axis)
    chart.line("a", values, axis)
    chart.dots("a", values, axis)
    chart.band("a", values, [None if value is None else value / 3 for value in values], axis)
    for path in chart.paths:
        assert re.fullmatch(r"[MLHhZ0-9. ]*", path.d)
        assert all(-8 <= x <= 1008 and 0 <= y <= 100 for x, y in coordinates(path.d))
    assert 1 <= len(chart.y_ticks) <= 6 and all(0 <= tick.at <= 100 for tick in chart.y_ticks)


@given(st.lists(st.floats(-50, 200), min_size=1), st.sampled_from([1, 5]))
def test_linear_axis(values: list[float], step: float) -> None:
    """Catches a value outside the axis, and a tick that is not at its number."""
    axis = linear_axis(values, step)
    assert axis.low <= min(values) and max(values) <= axis.high
    assert 1 <= len(axis.ticks) <= 6
    for tick in axis.ticks:
        assert axis.percent(float(tick.text)) == pytest.approx(tick.at, abs=0.01)


def test_logarithmic_axis() -> None:
    """Catches a wrong logarithm, and an axis that points downwards."""
    axis = logarithmic_axis([1.0, 100.0])  # from 0.8 to 125; 1 and 100 are 4.42 and 95.58 percent up
    assert axis.percent(1.0) == pytest.approx(4.418, abs=1e-3)
    assert axis.percent(100.0) == pytest.approx(95.582, abs=1e-3)
    assert axis.ticks == [Tick(4.42, "1"), Tick(50.0, "10"), Tick(95.58, "100")]
    assert float(axis.y(100.0)) < float(axis.y(1.0))


def test_a_gap_interrupts_the_line() -> None:
    """Catches a line through a layer without a value, and a single value that is not drawn."""
    chart, axis = Chart("", ""), linear_axis([0.0, 10.0], 5)
    chart.line("a", [0.0, 10.0, None, 5.0, None], axis)
    chart.band("b", [None, 10.0, 10.0, None, None], [None, 0.0, 5.0, None, 3.0], axis)
    assert chart.paths[0].d == "M100 100L300 0M640 50L760 50"
    assert chart.paths[1].d == "M300 0L500 0L500 50L300 100Z" and len(chart.paths) == 2


@pytest.mark.parametrize(
    ("number", "text"), [(0.001, "0.001"), (64.0, "64"), (999.0, "999"), (1000.0, "1k"), (2.5e6, "2.5M"), (3e9, "3G")]
)
def test_magnitudes_are_short(number: float, text: str) -> None:
    """Catches labels that do not fit beside an axis."""
    assert magnitude(number) == text


@pytest.mark.parametrize("count", [1, 4, 6, 7, 28, 32, 80, 126])
def test_layer_ticks(count: int) -> None:
    """Catches labels that overlap or are at the position of another layer."""
    ticks = layer_ticks([str(number) for number in range(count)])
    assert 1 <= len(ticks) <= 6 and ticks[0].text == "0"
    assert all(tick.at == pytest.approx((int(tick.text) + 0.5) / count * 100, abs=0.01) for tick in ticks)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["mlp.down_proj"], "mlp.down_proj"),
        (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "self_attn.{q,k,v}_proj"),
        (["mlp.w1", "mlp.w3"], "mlp.{w1,w3}"),
        (["mlp.big_in", "mlp.own_in"], "mlp.{big,own}_in"),
        (["mlp.a_b_c", "mlp.d_b_c"], "mlp.{a,d}_b_c"),
        (["a", "b"], "{a,b}"),
        (["x.a", "y.a"], "x.a, y.a"),
    ],
)
def test_combined_names(names: list[str], text: str) -> None:
    """Catches a combined name from which the single names cannot be read."""
    assert combine_names(names) == text


def test_towers_contain_all_stages_in_order() -> None:
    """Catches a stage that is shown twice, not at all, or in another tower."""
    data = synthetic_report.report_data(layers=3, blocks=2)
    vision, merger, language = towers = group_stages(data)
    assert [(tower.title, tower.labels) for tower in towers] == [
        ("Vision tower", ["0", "1"]),
        ("Merger", ["merger"]),
        ("Language model", ["0", "1", "2"]),
    ]
    assert language.roles[:4] == [f"self_attn.{letter}_proj" for letter in "qkvo"]
    assert language.input_labels[0] == "self_attn.{q,k,v}_proj"
    assert [chart.title for chart in range_charts(language)] == language.input_labels
    assert len(scale_charts(vision)) == 3 and len(scale_charts(merger)) == 1
    assert len(channel_charts(data.stages[0])) == len(data.stages[0].inputs)
    lowest = lowest_sqnr(data.stages)
    assert lowest is not None
    assert f"{lowest[2]:.1f} dB at {lowest[0]}" in depth_charts(towers)[1].description


def test_times_are_at_their_stages() -> None:
    """Catches times in the order of the file, and an error for a resumed run without times of the first stages."""
    data = synthetic_report.report_data(layers=3, blocks=2)
    timings = synthetic_report.timings(data)
    resumed = timings.model_copy(update={"stages": tuple(reversed(timings.stages[3:]))})
    chart = time_chart(group_stages(data), resumed)
    longest = max(resumed.stages, key=lambda stage: stage.seconds)
    assert f"{longest.name} with {longest.seconds:.1f} s" in chart.description
    (line,) = (coordinates(path.d) for path in chart.paths if path.css == "line time")
    assert [x for x, _ in line] == pytest.approx([583.3, 750.0, 916.7])
    heights = [100 - y for _, y in line]
    ratios = [stage.seconds / height for stage, height in zip(timings.stages[3:], heights, strict=True)]
    assert max(ratios) / min(ratios) < 1.01


def test_outlier_factor_of_quantized_layers() -> None:
    """Catches a factor from the input of a float layer, and the median channel confused with the largest."""
    stage = synthetic_report.report_data(layers=1, blocks=0).stages[1]
    factors = {}
    for data in stage.inputs:
        largest, median = largest_magnitude(data, after=False), median_magnitude(data, after=False)
        assert largest is not None and median is not None
        assert largest == max(curve[0] for curve in data.before.values())
        factors[input_label(data, stage)] = largest / median
    assert outlier_factor(stage, after=False) == pytest.approx(max(factors.values()))
    worst = max(factors, key=lambda label: factors[label])
    (worst_input,) = (data for data in stage.inputs if input_label(data, stage) == worst)
    sites = tuple(
        site.model_copy(update={"scheme": "FLOAT"}) if site.name in worst_input.sites else site for site in stage.sites
    )
    other = outlier_factor(stage.model_copy(update={"sites": sites}), after=False)
    assert other is not None and other < factors[worst]
