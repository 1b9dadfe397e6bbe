"""quantize-activations: against a brute-force search in NumPy, and the inputs that make a range go wrong."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from exact_stage import text_after
from hypothesis import given, settings
from hypothesis import strategies as st
from random_stage import decoder, observed, staged, through

from vlqc.engines import Scheme
from vlqc.ir import Call, InputQuantization, Observation, Stage
from vlqc.kernels_ref.quantize import activation_scale_and_offset
from vlqc.passes.assign_precision import AssignPrecision
from vlqc.passes.insert_observers import InsertObservers, add_rows
from vlqc.passes.quantize_activations import (
    BINS,
    NODES,
    SHARES,
    UNSEEN,
    QuantizeActivations,
    blurred,
    clipped_range,
    output_error,
    weighted_histogram,
)

pytestmark = pytest.mark.usefixtures("float32_runs")  # the same numbers on every processor

DTYPES = [torch.bfloat16, torch.float16]


MANY = 10**12  # samples of which nothing unseen differs


def observation(text: torch.Tensor, image: torch.Tensor | None = None, samples: int = MANY) -> Observation:
    """All rows kept, float32 [T, K] of either modality."""
    seen = Observation(text.shape[1], samples=samples)
    add_rows(seen, text, torch.zeros(len(text), dtype=torch.int8), len(text))
    if image is not None:
        add_rows(seen, image, torch.ones(len(image), dtype=torch.int8), len(image))
    return seen


def limits(seen: Observation) -> tuple[float, float]:
    return float(seen.minimum().amin()), float(seen.maximum().amax())


def rows_of(seed: int, kind: str) -> torch.Tensor:
    """float32 [64, 8] of one shape of distribution."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(64, 8, generator=generator)
    if kind == "heavy tail":
        rows = rows**5
    elif kind == "positive":
        rows = rows.abs() + 0.5
    elif kind == "negative":
        rows = -rows.abs() - 0.5
    elif kind == "outlier":
        rows[3, 2] = 300
    return rows


def numpy_rounded(values: np.ndarray, low: float, high: float, dtype: torch.dtype) -> np.ndarray:
    """The engines' int8 and back, float64, for a range whose scale is rounded up to dtype."""
    wanted = max((high - low) / 255, 2.0**-23 if dtype == torch.bfloat16 else 2.0**-16 + 2.0**-24)
    scale = float(torch.tensor(wanted, dtype=torch.float64).to(dtype))
    if scale < wanted:
        bits = 7 if dtype == torch.bfloat16 else 10
        scale += 2.0 ** (math.floor(math.log2(scale)) - bits)  # one unit in the last place
    offset = -128 - np.rint(low / scale)
    rounded: np.ndarray = (np.clip(np.rint(values / scale + offset), -128, 127) - offset) * scale
    return rounded


FIVE = [(-2, 0.06), (-1, 0.24), (0, 0.4), (1, 0.24), (2, 0.06)]  # standard deviations, and their shares


def numpy_search(
    seen: Observation, energy: np.ndarray, low: float, high: float, dtype: torch.dtype
) -> tuple[float, dict[tuple[float, float], float]]:
    """(smallest error, error per candidate range) on a histogram that is made and judged in NumPy, in float64.

    Every value stands for five, which differ from it as values of unseen inputs may.
    """
    kept, kinds = seen.kept.double().numpy(), seen.kept_modality.numpy()
    deviation = 0.25 / math.sqrt(seen.samples)
    factors = [(math.exp(number * deviation), share) for number, share in FIVE]
    present = np.unique(kinds)
    share = sum((kinds == kind) / (kinds == kind).sum() / len(present) for kind in present)
    edges = np.linspace(low * factors[-1][0], high * factors[-1][0], 2049)
    mass = sum(
        np.histogram(kept * factor, edges, weights=part * share[:, None] * energy[None, :])[0]
        for factor, part in factors
    )
    centres = (edges[1:] + edges[:-1]) / 2
    shares = [1.25, 1.15, 1.05, *(2.0 ** (-step / 8) for step in range(41))]
    errors = {}
    for below in shares if low < 0 else [1.0]:
        for above in shares if high > 0 else [1.0]:
            rounded = numpy_rounded(centres, low * below, high * above, dtype)
            errors[low * below, high * above] = float(((rounded - centres) ** 2 * mass).sum())
    return min(errors.values()), errors


def true_error(seen: Observation, energy: torch.Tensor, low: float, high: float, dtype: torch.dtype) -> float:
    """Weighted squared error of the kept values themselves, float64, every modality counting the same."""
    values = seen.kept.double().numpy()
    error = (numpy_rounded(values, min(low, 0.0), max(high, 0.0), dtype) - values) ** 2 * energy.double().numpy()
    return float((error.sum(1) * seen.row_weight().numpy()).sum())


def test_golden(golden: Callable[[str, str], None]) -> None:
    """Any change of the ranges that the pass chooses for the exact stage shows here as text."""
    golden("after-quantize-activations.vlqc", text_after("quantize-activations"))


# ---- the search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 30, MANY])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "heavy tail", "positive", "negative", "outlier"])
def test_search_against_numpy(kind: str, dtype: torch.dtype, samples: int) -> None:
    """A wrong bin, weight, blur, candidate or rounding: the range found must be the best of a search in NumPy."""
    seen = observation(rows_of(0, kind), rows_of(1, kind)[:5], samples)
    energy = torch.linspace(0.5, 4, 8)
    low, high = limits(seen)
    found = clipped_range(seen, energy, low, high, dtype)
    smallest, errors = numpy_search(seen, energy.double().numpy(), min(low, 0.0), max(high, 0.0), dtype)
    (mine,) = (error for limits, error in errors.items() if limits == pytest.approx(found, rel=1e-12))
    # Values at a bin's edge may fall to either side (float32 here, float64 there); blurred ones were binned twice.
    assert mine <= (1.005 if samples == MANY else 1.03) * smallest
    covering = [error for (bottom, top), error in errors.items() if bottom <= low and top >= high]
    assert covering and mine <= min(covering)


def test_histogram_against_numpy() -> None:
    """Mass that gets lost, is not weighted by modality and energy, or is put into the neighbouring bin."""
    text, image = rows_of(3, "normal"), 10 * rows_of(4, "normal")[:7]
    seen, energy = observation(text, image), torch.arange(1.0, 9.0)
    low, high = limits(seen)
    centres, mass = weighted_histogram(seen, energy, low, high)
    assert len(centres) == len(mass) == BINS
    share = np.concatenate([np.full(64, 0.5 / 64), np.full(7, 0.5 / 7)])
    values = torch.cat([text, image]).double().numpy()
    expected, edges = np.histogram(values, BINS, (low, high), weights=share[:, None] * np.arange(1.0, 9.0))
    np.testing.assert_allclose(centres, (edges[1:] + edges[:-1]) / 2, atol=1e-12)
    assert mass.sum().item() == pytest.approx(36)
    assert np.abs(mass.numpy() - expected).sum() < 0.01 * 36  # of values at an edge


@pytest.mark.parametrize(("low", "high"), [(-3.0, 2.0), (0.0, 4.0), (-5.0, 0.0)])
@pytest.mark.parametrize("deviation", [0.25, 0.05, 1e-7])
def test_blur_against_numpy(low: float, high: float, deviation: float) -> None:
    """Mass lost at the ends, or moved by another factor: no bin's mass may end more than a bin from where it belongs.

    What belongs where: five copies of the bins' centres, sorted. Compared are the amounts below every point.
    """
    random = np.random.default_rng(0)
    width = (high - low) / BINS
    centres, mass = low + (np.arange(BINS) + 0.5) * width, random.random(BINS) ** 4
    got, spread = blurred(torch.from_numpy(centres), torch.from_numpy(mass), deviation)
    wider = float(got[1] - got[0])
    assert got.shape == spread.shape == (BINS,) and wider == pytest.approx(width * math.exp(2 * deviation))
    assert float(spread.sum()) == pytest.approx(mass.sum()) and tuple(FIVE) == NODES
    assert float(got[0]) - wider / 2 == pytest.approx(low * math.exp(2 * deviation), abs=1e-9)
    values = np.concatenate([centres * math.exp(number * deviation) for number, _ in FIVE])
    parts = np.concatenate([mass * share for _, share in FIVE])
    order = values.argsort()
    for point in np.linspace(values.min(), values.max(), 40):
        inside = [parts[order][values[order] <= edge].sum() for edge in (point - wider, point + wider)]
        below = float(spread[got <= point].sum())
        assert inside[0] - 1e-9 <= below <= inside[1] + 1e-9


def test_blur_falls_with_the_samples() -> None:
    """A blur that stays however much was seen: the range is widest for one sample, and the seen one for very many."""
    widths = []
    for samples in (1, 16, MANY):
        seen = observation(rows_of(0, "positive") * 0 + 1.0, samples=samples)
        _, high = clipped_range(seen, torch.ones(8), 1.0, 1.0, torch.bfloat16)
        widths.append(high)
    # All values are 1. The farthest of the five lie at exp(2 * 0.25), further than a range may reach, and exp(2 / 16).
    assert widths == [1.25, 1.15, 1.0] and UNSEEN == 0.25


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["normal", "heavy tail", "positive", "negative", "outlier"]),
    dtype=st.sampled_from(DTYPES),
    samples=st.sampled_from([1, 4, 100, MANY]),
)
def test_never_much_worse_than_minmax_in_truth(seed: int, kind: str, dtype: torch.dtype, samples: int) -> None:
    """Bins that deceive: the error of the values themselves (not of their bins) may be 10 % above min-max at most.

    Room for what is unseen costs more on what is seen, but no more than the range may grow: by a quarter.
    """
    seen, energy = observation(rows_of(seed, kind), samples=samples), torch.linspace(0.5, 4, 8)
    low, high = limits(seen)
    found = true_error(seen, energy, *clipped_range(seen, energy, low, high, dtype), dtype)
    allowed = 1.1 if samples == MANY else 1.1 * 1.25**2
    assert found <= allowed * true_error(seen, energy, low, high, dtype)


def drawn(generator: torch.Generator, kind: str, samples: int) -> torch.Tensor:
    """float32 [16 samples, 8]: every sample has a size of its own, 10 % up or down."""
    rows = torch.randn(samples, 16, 8, generator=generator)
    if kind == "heavy tail":
        rows = rows**3
    elif kind == "positive":
        rows = rows.abs() + 0.5
    elif kind == "uniform":
        rows = torch.rand(samples, 16, 8, generator=generator) * 2 - 1
    return (rows * torch.exp(torch.randn(samples, 1, 1, generator=generator) / 10)).flatten(0, 1)


@pytest.mark.parametrize(("samples", "gain"), [(1, 3.0), (4, 2.0), (16, 0.0)])
def test_room_for_what_is_unseen(samples: int, gain: float) -> None:
    """Ranges that fit calibration too tightly: on 100 further samples the error must not be larger than without room.

    The mean over four kinds of values, three draws of each, in dB; it falls with the samples, as then more was seen.
    """
    gains = []
    for kind, seed in itertools.product(("normal", "heavy tail", "positive", "uniform"), range(3)):
        generator = torch.Generator().manual_seed(seed)
        calibration, unseen = drawn(generator, kind, samples), observation(drawn(generator, kind, 100))
        errors = []
        for count in (samples, MANY):
            seen = observation(calibration, samples=count)
            found = clipped_range(seen, torch.ones(8), *limits(seen), torch.bfloat16)
            errors.append(true_error(unseen, torch.ones(8), *found, torch.bfloat16))
        gains.append(10 * math.log10(errors[1] / errors[0]))
    assert sum(gains) / len(gains) > gain


def test_clipping_where_it_pays() -> None:
    """A histogram method that never clips: 200 000 values within 1 and two of 1.5 are worth more than 1 dB."""
    rows = torch.rand(25000, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows[5, 3], rows[7, 1] = 1.5, -1.5
    seen, energy = observation(rows), torch.ones(8)
    low, high = limits(seen)
    found = clipped_range(seen, energy, low, high, torch.bfloat16)
    gain = true_error(seen, energy, low, high, torch.bfloat16) / true_error(seen, energy, *found, torch.bfloat16)
    assert 10 * math.log10(gain) > 1 and low < found[0] < -0.9 and 0.9 < found[1] < high


def test_rare_modality_is_not_clipped_away() -> None:
    """Two text rows of +-40 beside 1000 picture rows of +-1: papers report a loss of 40 points from clipping such."""
    image = torch.rand(1000, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    text = torch.tensor([[40.0], [-40.0]]).repeat(1, 8) * torch.linspace(0.9, 1, 8)
    low, high = clipped_range(observation(text, image), torch.ones(8), -40.0, 40.0, torch.bfloat16)
    assert low < -38 and high > 38
    mixed = observation(torch.cat([text, image]))  # the same rows, but all of one modality: now it may pay
    low, high = clipped_range(mixed, torch.ones(8), -40.0, 40.0, torch.bfloat16)
    assert high - low >= 2 * 40 * min(SHARES)


def test_columns_that_do_not_matter_are_clipped() -> None:
    """An error of the input instead of the output: a column that meets zero weights decides the range no more."""
    rows = torch.rand(500, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows[:, 2] *= 20
    seen, energy = observation(rows), torch.ones(8)
    wide = clipped_range(seen, energy, -20.0, 20.0, torch.bfloat16)
    energy[2] = 0
    narrow = clipped_range(seen, energy, -20.0, 20.0, torch.bfloat16)
    assert wide[1] > 15 and 0.9 < narrow[1] < 2.5 and -2.5 < narrow[0] < -0.9


# ---- the pass --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_minmax_covers_everything(dtype: torch.dtype) -> None:
    """The mean over samples of their extremes, as in the reference tool, clips every sample above the average."""
    stage = through(observed(decoder(outliers=True, dtype=dtype)), QuantizeActivations(method="minmax"))
    for source, members in stage.groups().items():
        quantization = members[0].input
        assert quantization is not None
        seen, (scale, offset) = stage.observations[source], (quantization.scale, quantization.offset)
        low, high = limits(seen)
        assert (-128 - offset) * scale <= low + scale / 2 and (127 - offset) * scale >= high - scale / 2
        assert 255 * scale <= 1.02 * (max(high, 0) - min(low, 0))  # and is no wider than dtype makes it


@pytest.mark.parametrize("method", ["minmax", "histogram", "automatic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_share_one_representable_scale(method: str, dtype: torch.dtype) -> None:
    """q, k and v with scales of their own; a scale that changes when it is stored; an offset that is not integral."""
    stage = through(observed(decoder(outliers=True, dtype=dtype)), QuantizeActivations(method=method))  # type: ignore[arg-type]
    for members in stage.groups().values():
        (quantization,) = {site.input for site in members}
        assert quantization is not None
        assert float(torch.tensor(quantization.scale, dtype=dtype)) == quantization.scale > 0
        assert quantization.offset.is_integer() and -128 <= quantization.offset <= 127


def test_all_members_of_a_group_have_their_say() -> None:
    """The range judged by the first member only: v's weights on a column that q and k ignore must count."""
    ranges = []
    for loud in (False, True):
        stage = observed(decoder())
        for part in "qkv":
            weight = stage.live.get_parameter(f"self_attn.{part}_proj.weight")
            weight[:, 3] = 100.0 if loud and part == "v" else 0.0
        seen = stage.observations["input_layernorm"]
        seen.kept[:, 3] *= 30
        for span in seen.ranges.values():
            span.minimum[3] *= 30
            span.maximum[3] *= 30
        through(stage, QuantizeActivations())
        quantization = stage.sites["model.layers.0.self_attn.q_proj"].input
        assert quantization is not None
        ranges.append(quantization.scale * 255)
    assert ranges[1] > 5 * ranges[0]


@pytest.mark.parametrize("method", ["minmax", "histogram", "automatic"])
@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (2.0, 3.0), (-3.0, -2.0)])
def test_one_sided_and_zero_inputs(low: float, high: float, method: str) -> None:
    """A range that does not hold zero exactly (padding would turn into a bias), or a scale of zero."""
    stage = observed(decoder())
    for source, seen in stage.observations.items():
        rows = torch.linspace(low, high, 6)[:, None].repeat(1, seen.channels)
        stage.observations[source] = observation(rows)
    through(stage, QuantizeActivations(method=method))  # type: ignore[arg-type]
    for site in stage.sites.values():
        assert site.input is not None and math.isfinite(site.input.scale) and site.input.scale > 0
        assert site.input.offset == (127 if high < 0 else -128)
        if high > low:  # 6 values: clipped to one of them, or covered
            reached = 255 * site.input.scale
            assert 0.5 < reached / max(abs(low), abs(high)) < 1.02


def test_float_sites_stay_without() -> None:
    """Parameters on a site that stays float would be emitted beside its float weight."""
    stage = through(decoder(), InsertObservers(), AssignPrecision(), QuantizeActivations())
    assert {site.target for site in stage.sites.values() if site.input is None} == {"mlp.down_proj"}
    undecided = through(decoder(), InsertObservers())
    assert QuantizeActivations().run(undecided) is False
    assert all(site.input is None for site in undecided.sites.values())


# ---- automatic -------------------------------------------------------------------------------------------------------


def test_output_error_against_numpy() -> None:
    """An error of the input, of one modality, or of another grid: x W^T in float64 with x rounded as engines round."""
    text, image = rows_of(3, "normal"), 10 * rows_of(4, "normal")[:7]
    seen = observation(text, image)
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(5))
    for low, high in ((-12.0, 12.0), (-3.0, 2.0)):
        grid = InputQuantization(*activation_scale_and_offset(low, high, torch.bfloat16))
        share = np.concatenate([np.full(64, 0.5 / 64), np.full(7, 0.5 / 7)])
        values = torch.cat([text, image]).double().numpy()
        error = (numpy_rounded(values, low, high, torch.bfloat16) - values) @ weight.double().numpy().T
        expected = float(((error**2).sum(1) * share).sum())
        assert output_error(seen, weight, grid) == pytest.approx(expected, rel=0.02)


def of_weight(weight: torch.Tensor) -> Stage:
    """A stage that is one static linear."""
    block = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)).requires_grad_(False)
    block.get_parameter("0.weight").copy_(weight)
    stage = through(staged(block, [Call(0, (torch.ones(2, weight.shape[1]),), {})]), InsertObservers())
    for site in stage.sites.values():
        site.scheme = Scheme.W8A8
    return stage


def wide_row() -> torch.Tensor:
    """float32 [512, 512] within 1, but for four values of 1.25 in one row."""
    rows = torch.rand(512, 512, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows[100, :4] = 1.25
    return rows


@pytest.mark.parametrize("signs", [[1.0, 1.0, 1.0, 1.0], [1.0, -1.0, 1.0, -1.0]])
def test_automatic_takes_the_smaller_measured_error(signs: list[float]) -> None:
    """Always the one method, or the worse of the two: four clipped values add up in an output, or cancel each other.

    The histogram sees the same mass in both cases and clips; only the outputs themselves can tell.
    """
    seen, weight = observation(wide_row()), torch.ones(8, 512)
    weight[:, :4] = torch.tensor(signs)
    stage = of_weight(weight)
    (source,) = stage.observations
    stage.observations[source] = seen
    chosen = {}
    for method in ("minmax", "histogram", "automatic"):
        through(stage, QuantizeActivations(method=method))
        (site,) = stage.sites.values()
        assert site.input is not None
        chosen[method] = site.input
    assert chosen["histogram"].scale < 0.97 * chosen["minmax"].scale
    better = "minmax" if len(set(signs)) == 1 else "histogram"
    assert chosen["automatic"] == chosen[better]
    errors = {method: output_error(seen, weight, grid) for method, grid in chosen.items()}
    assert errors["automatic"] == min(errors.values()) < 0.95 * max(errors.values())


@pytest.mark.parametrize("outliers", [False, True])
def test_automatic_is_never_worse_than_either(outliers: bool) -> None:
    """A group that is judged by another group's rows or weights: every group of a stage, with its own."""
    stages = {
        method: through(observed(decoder(outliers=outliers)), QuantizeActivations(method=method))
        for method in ("minmax", "histogram", "automatic")
    }
    for source, members in stages["automatic"].groups().items():
        weight = torch.cat([stages["automatic"].linear(site).weight for site in members])
        errors = {}
        for method, stage in stages.items():
            (quantization,) = {site.input for site in stage.groups()[source]}
            assert quantization is not None
            errors[method] = output_error(stage.observations[source], weight, quantization)
        assert errors["automatic"] == min(errors.values())


@pytest.mark.parametrize("scheme", [Scheme.W8A8_DYNAMIC, Scheme.W4A8_DYNAMIC])
def test_per_token_sites_get_no_static_range(scheme: Scheme) -> None:
    """An input scale on a site whose scale is found at run time: it would be lowered and emitted as static."""
    stage = observed(decoder(), scheme)
    assert QuantizeActivations().run(stage) is False
    assert all(site.input is None for site in stage.sites.values())


def test_second_run_changes_nothing() -> None:
    """A pass that always claims a change is refused as a lie; another method has to be noticed."""
    stage = through(observed(decoder(outliers=True)), QuantizeActivations())
    assert QuantizeActivations().run(stage) is False
    assert QuantizeActivations(method="minmax").run(stage) is True


def test_minmax_is_the_formula() -> None:
    """A range taken from kept rows only, or from one modality: all rows of both, through the one formula."""
    stage = through(decoder(), InsertObservers(tokens=2), AssignPrecision(), QuantizeActivations(method="minmax"))
    full = through(decoder(), InsertObservers())
    site = stage.sites["model.layers.0.self_attn.o_proj"]
    rows = full.observations[site.source].kept
    expected = InputQuantization(*activation_scale_and_offset(rows.min().item(), rows.max().item(), torch.bfloat16))
    assert site.scheme == Scheme.W8A8 and site.input == expected
