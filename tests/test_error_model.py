"""error_model: the formula against simulation, the measurement against NumPy, and which rows stand for all."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlqc.passes.error_model import balanced, expected_error, measured_error, representative_inputs, representative_rows

ROWS, INPUTS, OUTPUTS = 400, 24, 16


def rows_and_weight(seed: int, outlier: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x [400, 24] with one channel `outlier` times as large and an offset in another, W [16, 24]; float32."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(ROWS, INPUTS, generator=generator)
    rows[:, 3] *= outlier
    rows[:, 7] += 2
    return rows, torch.randn(OUTPUTS, INPUTS, generator=generator)


def range_of(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return rows.amin(0), rows.amax(0)


@pytest.mark.parametrize("outlier", [1.0, 8.0])
def test_expected_error_of_uniform_noise(outlier: float) -> None:
    """A wrong factor (1/12, a square, a step): drawing the noise that the formula assumes must give its result.

    2000 draws of noise uniform in half a step to either side; 3 % is six times the deviation that so many leave.
    """
    rows, weight = rows_and_weight(0, outlier)
    scale = torch.linspace(0.5, 3, INPUTS)
    low, high = range_of(rows)
    got = expected_error(low, high, rows.square().mean(0), weight, scale[None]).item()
    random = np.random.default_rng(1)
    x, w, s = rows.double().numpy(), weight.double().numpy(), scale.double().numpy()
    smooth, heavy = x / s, w * s
    step = (max(smooth.max(), 0) - min(smooth.min(), 0)) / 255
    step_per_row = np.abs(heavy).max(1, keepdims=True) / 127
    total = 0.0
    for _ in range(2000):
        row = smooth[random.integers(ROWS)]
        noise = random.uniform(-0.5, 0.5, INPUTS) * step
        weight_noise = random.uniform(-0.5, 0.5, heavy.shape) * step_per_row
        total += ((noise @ heavy.T + row @ weight_noise.T) ** 2).sum()
    assert got == pytest.approx(total / 2000, rel=0.03)


@pytest.mark.parametrize("seed", range(4))
def test_expected_error_predicts_real_rounding(seed: int) -> None:
    """A model of noise that does not describe int8: within 25 % of what is measured on 400 rows."""
    rows, weight = rows_and_weight(seed, 8.0)
    low, high = range_of(rows)
    equal = torch.full((ROWS,), 1 / ROWS, dtype=torch.float64)
    for scale in (torch.ones(INPUTS), torch.maximum(high, -low).sqrt()):
        formula = expected_error(low, high, rows.square().mean(0), weight, scale[None]).item()
        measured = measured_error(rows, equal, weight, scale, low, high)
        assert formula == pytest.approx(measured, rel=0.25)


def test_expected_error_of_candidates_one_by_one() -> None:
    """A candidate that is judged by another one's ranges."""
    rows, weight = rows_and_weight(2, 20.0)
    given = (*range_of(rows), rows.square().mean(0), weight)
    scales = torch.stack([torch.ones(INPUTS), torch.linspace(1, 9, INPUTS), torch.full((INPUTS,), 2.0)])
    together = expected_error(*given, scales)
    assert together.dtype == torch.float64 and together.shape == (3,)
    assert torch.equal(together, torch.cat([expected_error(*given, scale[None]) for scale in scales]))
    assert together[2].item() == pytest.approx(together[0].item(), rel=1e-6)  # a common factor changes nothing


def test_expected_error_by_hand() -> None:
    """One input in 0 .. 255, one weight of 127: both steps are 1, so 127^2/12 + 1/12 * mean square."""
    moment = torch.tensor([100.0])
    error = expected_error(torch.zeros(1), torch.tensor([255.0]), moment, torch.tensor([[127.0]]), torch.ones(1, 1))
    assert error.item() == pytest.approx((127**2 + 100) / 12)


def by_numpy(
    x: np.ndarray, share: np.ndarray, w: np.ndarray, s: np.ndarray, low: np.ndarray, high: np.ndarray
) -> float:
    """The int8 arithmetic of the engines in float64: q = clamp(rint(x/step + offset), -128, 127)."""
    top, bottom = max((high / s).max(), 0.0), min((low / s).min(), 0.0)
    step = (top - bottom) / 255
    offset = -128 - np.rint(bottom / step)
    integers = np.clip(np.rint(x / s / step) + offset, -128, 127)
    heavy = w * s
    weight_step = np.abs(heavy).max(1, keepdims=True) / 127
    error = ((integers - offset) * step) @ (np.rint(heavy / weight_step) * weight_step).T - x @ w.T
    return float(((error**2).sum(1) * share).sum())


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), shift=st.sampled_from([-40.0, 0.0, 40.0]), beyond=st.booleans())
def test_measured_error_against_numpy(seed: int, shift: float, beyond: bool) -> None:
    """A wrong zero, clipping, a transposed product, rows not weighted: compared with the engines' formula in NumPy."""
    rows, weight = rows_and_weight(seed, 5.0)
    rows += shift
    low, high = range_of(rows[: ROWS // 2] if beyond else rows)  # rows beyond the range are clipped
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(INPUTS, generator=generator) + 0.5
    share = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    share /= share.sum()
    got = measured_error(rows, share, weight, scale, low, high)
    expected = by_numpy(*(tensor.double().numpy() for tensor in (rows, share, weight, scale, low, high)))
    assert got == pytest.approx(expected, rel=0.02)  # float32 may round a value in the middle to the other side


def test_measured_error_of_nothing() -> None:
    """Division by a step of zero where an input or a weight is all zeros."""
    zero, one = torch.zeros(3, 4), torch.ones(4)
    share = torch.full((3,), 1 / 3, dtype=torch.float64)
    assert measured_error(zero, share, torch.ones(2, 4), one, zero[0], zero[0]) == 0
    assert measured_error(torch.ones(3, 4), share, torch.zeros(2, 4), one, one, one) == 0


def test_balanced() -> None:
    """Weights that do not sum to 1, or that let many picture rows outvote few text rows."""
    weights = balanced(torch.tensor([0, 1, 1, 1, 1, 0], dtype=torch.int8))
    assert weights.dtype == torch.float64
    assert weights.tolist() == [0.25, 0.125, 0.125, 0.125, 0.125, 0.25]
    assert balanced(torch.tensor([1, 1], dtype=torch.int8)).tolist() == [0.5, 0.5]
    assert balanced(torch.empty(0, dtype=torch.int8)).shape == (0,)


@pytest.mark.parametrize("rows", [(3,), (1024,), (1025,), (4096, 1024, 1024)])
def test_representative_weight_rows(rows: tuple[int, ...]) -> None:
    """More rows than the bound, a consumer without a row, or a part of a matrix that nobody looks at."""
    weights = [torch.arange(count, dtype=torch.float32)[:, None] + 1e6 * number for number, count in enumerate(rows)]
    chosen = representative_rows(weights, 1024).flatten()
    assert chosen.numel() <= 1024 + len(rows)  # every consumer rounds up
    assert torch.equal(chosen, torch.cat(weights).flatten()) or chosen.numel() > 512
    for number, count in enumerate(rows):
        mine = chosen[(chosen >= 1e6 * number) & (chosen < 1e6 * (number + 1))] - 1e6 * number
        assert mine[0] == 0 and mine[-1] > count - 1 - -(-sum(rows) // 1024)


@pytest.mark.parametrize("per_sample", [2, 8, 16, 64])
def test_representative_inputs_have_no_period(per_sample: int) -> None:
    """Equal strides over rows that come sample by sample: only text, only pictures, or only the first rows of all."""
    half = per_sample // 2
    kinds = torch.tensor(([0] * half + [1] * half) * (4096 // per_sample), dtype=torch.int8)
    place = torch.arange(4096) % half
    index = representative_inputs(kinds, 512)
    assert index.tolist() == sorted(set(index.tolist())) and len(index) == 512
    assert kinds[index].sum() == 256
    counts = torch.bincount(place[index], minlength=half)
    assert counts.min() > 0.5 * 512 / half and counts.max() < 2 * 512 / half
    assert torch.diff(index, append=torch.tensor([4096])).max() < 64  # nowhere a gap, up to the end


def test_representative_inputs_keep_the_rarer_modality() -> None:
    """Three text rows among thousands of picture rows must be among those that a candidate is measured on."""
    kinds = torch.ones(4000, dtype=torch.int8)
    kinds[[5, 2000, 3999]] = 0
    index = representative_inputs(kinds, 512)
    assert {5, 2000, 3999} <= set(index.tolist()) and len(index) <= 512
    assert representative_inputs(torch.zeros(7, dtype=torch.int8)).tolist() == list(range(7))
