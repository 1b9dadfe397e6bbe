"""The clipped range search against NumPy, and its margins for unseen inputs."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.numpy_ranges import DTYPES, FIVE, MANY, limits, numpy_search, observation, rows_of, true_error
from vlqc.passes.algorithms.range_search import (
    BINS,
    GAUSSIAN_NODES,
    SHARES,
    UNSEEN_DEVIATION,
    blur_histogram,
    search_clipped_range,
    weighted_histogram,
)

pytestmark = pytest.mark.usefixtures("float32_runs")  # the same numbers on every processor


@pytest.mark.parametrize("samples", [1, 30, MANY])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "heavy tail", "positive", "negative", "outlier"])
def test_search_against_numpy(kind: str, dtype: torch.dtype, samples: int) -> None:
    """A wrong bin, weight, blur, candidate or rounding: the range found must be the best of a search in NumPy."""
    observed = observation(rows_of(0, kind), rows_of(1, kind)[:5], samples)
    energy = torch.linspace(0.5, 4, 8)
    low, high = limits(observed)
    actual = search_clipped_range(observed, energy, low, high, dtype)
    smallest, errors = numpy_search(observed, energy.double().numpy(), min(low, 0.0), max(high, 0.0), dtype)
    (mine,) = (error for limits, error in errors.items() if limits == pytest.approx(actual, rel=1e-12))
    # Values at a bin's edge may fall to either side (float32 here, float64 there); blurred ones were binned twice.
    assert mine <= (1.005 if samples == MANY else 1.03) * smallest
    covering = [error for (bottom, top), error in errors.items() if bottom <= low and top >= high]
    assert covering and mine <= min(covering)


def test_histogram_against_numpy() -> None:
    """Mass that gets lost, is not weighted by modality and energy, or is put into the neighboring bin."""
    text, image = rows_of(3, "normal"), 10 * rows_of(4, "normal")[:7]
    observed, energy = observation(text, image), torch.arange(1.0, 9.0)
    low, high = limits(observed)
    centers, mass = weighted_histogram(observed, energy, low, high)
    assert len(centers) == len(mass) == BINS
    share = np.concatenate([np.full(64, 0.5 / 64), np.full(7, 0.5 / 7)])
    values = torch.cat([text, image]).double().numpy()
    expected, edges = np.histogram(values, BINS, (low, high), weights=share[:, None] * np.arange(1.0, 9.0))
    np.testing.assert_allclose(centers, (edges[1:] + edges[:-1]) / 2, atol=1e-12)
    assert mass.sum().item() == pytest.approx(36)
    assert np.abs(mass.numpy() - expected).sum() < 0.01 * 36  # of values at an edge


@pytest.mark.parametrize(("low", "high"), [(-3.0, 2.0), (0.0, 4.0), (-5.0, 0.0)])
@pytest.mark.parametrize("deviation", [0.25, 0.05, 1e-7])
def test_blur_against_numpy(low: float, high: float, deviation: float) -> None:
    """Mass lost at the ends, or moved by another factor: no bin's mass may end more than a bin from where it belongs.

    What belongs where: five copies of the bins' centers, sorted. Compared are the amounts below every point.
    """
    random = np.random.default_rng(0)
    width = (high - low) / BINS
    centers, mass = low + (np.arange(BINS) + 0.5) * width, random.random(BINS) ** 4
    got, spread = blur_histogram(torch.from_numpy(centers), torch.from_numpy(mass), deviation)
    wider = float(got[1] - got[0])
    assert got.shape == spread.shape == (BINS,) and wider == pytest.approx(width * math.exp(2 * deviation))
    assert float(spread.sum()) == pytest.approx(mass.sum()) and tuple(FIVE) == GAUSSIAN_NODES
    assert float(got[0]) - wider / 2 == pytest.approx(low * math.exp(2 * deviation), abs=1e-9)
    values = np.concatenate([centers * math.exp(number * deviation) for number, _ in FIVE])
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
        observed = observation(rows_of(0, "positive") * 0 + 1.0, samples=samples)
        _, high = search_clipped_range(observed, torch.ones(8), 1.0, 1.0, torch.bfloat16)
        widths.append(high)
    # All values are 1. The farthest of the five lie at exp(2 * 0.25), further than a range may reach, and exp(2 / 16).
    assert widths == [1.25, 1.15, 1.0] and UNSEEN_DEVIATION == 0.25


@example(seed=88, kind="normal", dtype=torch.bfloat16, samples=1)
@settings(max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["normal", "heavy tail", "positive", "negative", "outlier"]),
    dtype=st.sampled_from(DTYPES),
    samples=st.sampled_from([1, 4, 100, MANY]),
)
def test_never_much_worse_than_minmax_in_truth(seed: int, kind: str, dtype: torch.dtype, samples: int) -> None:
    """Bins that deceive: the error of the values themselves (not of their bins) may be 10 % above min-max at most.

    Margins for unseen inputs increase the error on observed ones by at most the growth of the range, a quarter. The
    scale is rounded to the emitted dtype, by up to half an eps, upwards for one range and downwards for the other.
    """
    observed, energy = observation(rows_of(seed, kind), samples=samples), torch.linspace(0.5, 4, 8)
    low, high = limits(observed)
    error = true_error(observed, energy, *search_clipped_range(observed, energy, low, high, dtype), dtype)
    allowed = (1.1 if samples == MANY else 1.1 * 1.25**2) * (1 + torch.finfo(dtype).eps) ** 2
    assert error <= allowed * true_error(observed, energy, low, high, dtype)


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
    """Catches ranges that overfit: on 100 further samples the error must not be larger than without margins.

    The mean over four kinds of values, three draws of each, in dB; it falls with the samples, as then more was seen.
    """
    gains = []
    for kind, seed in itertools.product(("normal", "heavy tail", "positive", "uniform"), range(3)):
        generator = torch.Generator().manual_seed(seed)
        calibration, held_out = drawn(generator, kind, samples), observation(drawn(generator, kind, 100))
        errors = []
        for count in (samples, MANY):
            observed = observation(calibration, samples=count)
            clipped = search_clipped_range(observed, torch.ones(8), *limits(observed), torch.bfloat16)
            errors.append(true_error(held_out, torch.ones(8), *clipped, torch.bfloat16))
        gains.append(10 * math.log10(errors[1] / errors[0]))
    assert sum(gains) / len(gains) > gain


def test_clipping_where_it_pays() -> None:
    """Catches a method that never clips: 200 000 values within 1 and two of 1.5 cost more than 1 dB."""
    rows = torch.rand(25000, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows[5, 3], rows[7, 1] = 1.5, -1.5
    observed, energy = observation(rows), torch.ones(8)
    low, high = limits(observed)
    clipped = search_clipped_range(observed, energy, low, high, torch.bfloat16)
    gain = true_error(observed, energy, low, high, torch.bfloat16) / true_error(
        observed, energy, *clipped, torch.bfloat16
    )
    assert 10 * math.log10(gain) > 1 and low < clipped[0] < -0.9 and 0.9 < clipped[1] < high


def test_rare_modality_is_not_clipped_away() -> None:
    """Catches clipping of rare text values: two text rows of +-40 among 1000 image rows of +-1."""
    image = torch.rand(1000, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    text = torch.tensor([[40.0], [-40.0]]).repeat(1, 8) * torch.linspace(0.9, 1, 8)
    low, high = search_clipped_range(observation(text, image), torch.ones(8), -40.0, 40.0, torch.bfloat16)
    assert low < -38 and high > 38
    mixed = observation(torch.cat([text, image]))  # the same rows, but all of one modality: now it may pay
    low, high = search_clipped_range(mixed, torch.ones(8), -40.0, 40.0, torch.bfloat16)
    assert high - low >= 2 * 40 * min(SHARES)


def test_columns_that_do_not_matter_are_clipped() -> None:
    """Catches a search that minimizes the input's error: a column with zero weights must not affect the range."""
    rows = torch.rand(500, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows[:, 2] *= 20
    observed, energy = observation(rows), torch.ones(8)
    wide = search_clipped_range(observed, energy, -20.0, 20.0, torch.bfloat16)
    energy[2] = 0
    narrow = search_clipped_range(observed, energy, -20.0, 20.0, torch.bfloat16)
    assert wide[1] > 15 and 0.9 < narrow[1] < 2.5 and -2.5 < narrow[0] < -0.9
