"""error_model: the formula against simulation, the measurement against NumPy, and which rows stand for all."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.numpy_errors import (
    CLIPPED,
    EVERY_NOISE,
    IN_GROUPS,
    INPUTS,
    OUTPUTS,
    PER_TOKEN,
    ROWS,
    STATIC,
    by_numpy,
    clipped_errors,
    input_steps,
    reader_of,
    rows_and_weight,
    weight_steps,
)
from vlqc.ir.stage import Site
from vlqc.passes.algorithms.error_model import (
    STRATA,
    TAIL_VALUES,
    ConsumerGroup,
    QuantizationPreview,
    SchemeNoise,
    WeightMethod,
    representative_rows,
    scheme_noise,
    stratify,
)
from vlqc.targets.schemes import Scheme

# ---- expected --------------------------------------------------------------------------------------------------------


@EVERY_NOISE
@pytest.mark.parametrize("outlier", [1.0, 8.0])
def test_expected_error_of_uniform_noise(outlier: float, noise: SchemeNoise) -> None:
    """A wrong factor (1/12, a square, a step): drawing the noise that the formula assumes must give its result.

    2000 draws of noise uniform in half a step to either side; 3 % is six times the deviation that so many leave. Every
    row is drawn five times: steps and rows that differ leave no deviation of their own. Weights that are rounded
    cleverly leave a share of the noise's power, so the root of it of each draw.
    """
    rows, weight = rows_and_weight(0, outlier)
    scale = torch.linspace(0.5, 3, INPUTS)
    group = reader_of(rows, weight, noise)
    got = group.expected_error(scale[None]).item()
    random = np.random.default_rng(1)
    x, w, s = rows.double().numpy(), weight.double().numpy(), scale.double().numpy()
    smooth, heavy = x / s, w * s
    steps = input_steps(smooth, min(smooth.min(), 0), max(smooth.max(), 0), noise)
    steps_of_weight = weight_steps(heavy, noise)
    total = 0.0
    for draw in range(2000):
        row = draw % ROWS
        input_error = random.uniform(-0.5, 0.5, INPUTS) * steps[row]
        weight_error = random.uniform(-0.5, 0.5, heavy.shape) * steps_of_weight * group.weight_noise**0.5
        total += ((input_error @ heavy.T + smooth[row] @ weight_error.T) ** 2).sum()
    assert got == pytest.approx(total / 2000, rel=0.03)


@EVERY_NOISE
@pytest.mark.parametrize("seed", range(4))
def test_expected_error_predicts_real_rounding(seed: int, noise: SchemeNoise) -> None:
    """A model of noise that does not describe the integers: within 25 % of what is measured on 400 rows.

    Per token 35 %, in groups 60 %: the largest value of every row and group is hit exactly, one in 24 and in 8 here.
    """
    rows, weight = rows_and_weight(seed, 8.0)
    group = reader_of(rows, weight, noise)
    for scale in (torch.ones(INPUTS), torch.maximum(group.high, -group.low).sqrt()):
        within = 0.6 if noise.group_size else 0.35 if noise.per_token else 0.25
        assert group.expected_error(scale[None]).item() == pytest.approx(group.measured_error(scale), rel=within)


@EVERY_NOISE
def test_expected_error_of_candidates_one_by_one(noise: SchemeNoise) -> None:
    """A candidate that is judged by another one's ranges."""
    group = reader_of(*rows_and_weight(2, 20.0), noise)
    scales = torch.stack([torch.ones(INPUTS), torch.linspace(1, 9, INPUTS), torch.full((INPUTS,), 2.0)])
    together = group.expected_error(scales)
    assert together.dtype == torch.float64 and together.shape == (3,)
    assert torch.equal(together, torch.cat([group.expected_error(scale[None]) for scale in scales]))
    assert together[2].item() == pytest.approx(together[0].item(), rel=1e-6)  # a common factor changes nothing


def test_expected_error_by_hand() -> None:
    """Static: one input in 0 .. 255, one weight of 127: both steps are 1, so 127^2/12 + 1/12 * mean square."""
    rows = torch.tensor([[0.0], [255.0]])
    error = reader_of(rows, torch.tensor([[127.0]])).expected_error(torch.ones(1, 1))
    assert error.item() == pytest.approx((127**2 + 255**2 / 2) / 12)


def test_expected_error_of_groups_by_hand() -> None:
    """Per token in two groups of one column: steps 1 and 2 of x (three rows to one), 1 and 3 of the two weights."""
    rows = torch.tensor([[127.0, 0.0], [254.0, 0.0]])
    share = torch.tensor([0.75, 0.25], dtype=torch.float64)
    weight = torch.tensor([[7.0, 21.0]])
    group = reader_of(rows, weight, SchemeNoise(True, 7, 1), share)
    moments = rows.square().mean(0).tolist()  # of the statistics, not of the weighted rows
    by_hand = ((0.75 * 1 + 0.25 * 4) * (7**2 + 21**2) + 1**2 * moments[0] + 3**2 * moments[1]) / 12
    assert group.expected_error(torch.ones(1, 2)).item() == pytest.approx(by_hand)


# ---- clipping --------------------------------------------------------------------------------------------------------


def clipping_reader(kind: str, rows: int, seed: int = 0) -> ConsumerGroup:
    """A static scheme that clips: x [rows, 24] has rare values, or a channel that is always large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, INPUTS, generator=generator)
    if kind == "rare":
        x[rows // 3, 5], x[rows // 2, 9] = 30, -24
    elif kind == "always":
        x[:, 7] = 20 + x[:, 7] / 5
    elif kind == "two signs":
        x[:, 7] = (20 + x[:, 7]) * torch.where(torch.arange(rows) % 2 == 0, 1, -1)
    share = torch.rand(rows, generator=generator, dtype=torch.float64)
    return reader_of(x, torch.randn(OUTPUTS, INPUTS, generator=generator), CLIPPED, share / share.sum())


KINDS = pytest.mark.parametrize("kind", ["normal", "rare", "always", "two signs"])


@KINDS
@pytest.mark.parametrize("rows", [TAIL_VALUES + STRATA, ROWS])
def test_clipping_against_numpy(kind: str, rows: int) -> None:
    """What is cut off counted for the wrong column, side or row, or for a few rows where all are cut off.

    Exact as long as every value is looked at by itself; with more rows, of 5 % and 0.1 % of the noise of the steps.
    """
    group, scale = clipping_reader(kind, rows), torch.linspace(0.5, 2, INPUTS)
    expected = clipped_errors(group, scale)
    got = group._static_errors(scale)
    exact = rows == TAIL_VALUES + STRATA
    rtol, atol = (1e-4, 0.0) if exact else (0.05, 1e-3 * expected[0])
    np.testing.assert_allclose(got, expected[: len(got)], rtol=rtol, atol=atol)
    np.testing.assert_allclose(min(got), min(expected), rtol=rtol, atol=atol)  # shares left out are no better
    weight = group.expected_error(scale[None]).item() - min(got)
    unclipped = reader_of(group.rows, group.weight, STATIC).expected_error(scale[None]).item()
    assert weight == pytest.approx(unclipped - expected[0], rel=1e-4)  # and the weights' part is the same


@KINDS
def test_clipping_is_a_choice(kind: str) -> None:
    """Catches clipping that increases the error: the full range is a candidate, and the only one without `clips`."""
    group, scale = clipping_reader(kind, ROWS), torch.ones(INPUTS)
    plain = reader_of(group.rows, group.weight, STATIC, group.row_weight)
    assert group.expected_error(scale[None]).item() <= plain.expected_error(scale[None]).item()
    assert len(plain._static_errors(scale)) == 1 and plain._static_errors(scale)[0] == group._static_errors(scale)[0]


def test_a_channel_that_is_always_large_is_not_clipped() -> None:
    """Of 512 rows 32 looked at: to cut a channel off in all rows would seem to cost a sixteenth, and pay.

    The same value in one row only is worth cutting off.
    """
    one = torch.ones(4096)
    for always in (True, False):
        rows = torch.randn(512, 4096, generator=torch.Generator().manual_seed(0)) / 4
        rows[:, 7] = torch.where(torch.arange(512) == 300, 20, 20 if always else 0)
        group = reader_of(rows, torch.ones(2, 4096), CLIPPED)
        errors, expected = group._static_errors(one), clipped_errors(group, one)
        assert errors == pytest.approx(expected[: len(errors)], rel=1e-3)
        assert min(errors) == pytest.approx(min(expected), rel=1e-3)
        assert errors.index(min(errors)) == (0 if always else 4)


@pytest.mark.parametrize("rows", [1, TAIL_VALUES, TAIL_VALUES + 1, TAIL_VALUES + STRATA, 100])
def test_strata(rows: int) -> None:
    """A value put into two parts or into none: weights and weighted values keep their sums, the first their place."""
    generator = torch.Generator().manual_seed(rows)
    values, order = torch.randn(rows, 3, generator=generator).sort(0)
    weight = torch.rand(rows, generator=generator)[order]
    weight[-1] = 0  # a part that counts nothing
    mean, total = stratify(values, weight)
    assert mean.shape == total.shape == (min(rows, TAIL_VALUES + STRATA), 3)
    assert torch.equal(mean[:TAIL_VALUES], values[:TAIL_VALUES]) and torch.equal(
        total[:TAIL_VALUES], weight[:TAIL_VALUES]
    )
    torch.testing.assert_close(total.sum(0), weight.sum(0))
    torch.testing.assert_close((mean * total).sum(0), (values * weight).sum(0))


# ---- measured --------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    shift=st.sampled_from([-40.0, 0.0, 40.0]),
    beyond=st.booleans(),
    noise=st.sampled_from([STATIC, PER_TOKEN, IN_GROUPS, SchemeNoise(False, 7, 12)]),
)
def test_measured_error_against_numpy(seed: int, shift: float, beyond: bool, noise: SchemeNoise) -> None:
    """Catches a wrong zero point, clipping, transposition, scale or row weight, against NumPy."""
    rows, weight = rows_and_weight(seed, 5.0)
    rows += shift
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(INPUTS, generator=generator) + 0.5
    share = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    # In a static scheme, values beyond the range are clipped.
    group = reader_of(rows, weight, noise, share / share.sum(), rows[: ROWS // 2] if beyond else rows)
    # float32 may round a value in the middle to the other side
    assert group.measured_error(scale) == pytest.approx(by_numpy(group, scale), rel=0.02)


@KINDS
@pytest.mark.parametrize("seed", range(3))
def test_measured_error_of_a_clipped_range(kind: str, seed: int) -> None:
    """Another range rounded to than the one that the expected error settled for, or its middle not at zero."""
    group = clipping_reader(kind, TAIL_VALUES + STRATA, seed)
    for scale in (torch.ones(INPUTS), torch.linspace(0.5, 2, INPUTS)):
        assert group.measured_error(scale) == pytest.approx(by_numpy(group, scale), rel=0.02)


def test_sides_add_up() -> None:
    """Catches an error of the input or of the weight that is counted twice, or not at all."""
    rows, weight = rows_and_weight(0, 8.0)
    both = reader_of(rows, weight)
    x, w = rows.double(), weight.double()
    steps = torch.from_numpy(weight_steps(w.numpy(), STATIC).copy())
    bottom, top = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (top - bottom) / 255
    product = (torch.round(x / step) * step) @ (torch.round(w / steps) * steps).T - x @ w.T
    together = float(product.square().sum(1).mean())  # as they really meet
    assert both.measured_error(torch.ones(INPUTS)) == pytest.approx(together, rel=0.1)


@EVERY_NOISE
def test_measured_error_of_nothing(noise: SchemeNoise) -> None:
    """Catches a division by zero for an input, row, weight or group of zeros."""
    zero, one = torch.zeros(3, INPUTS), torch.ones(INPUTS)
    assert reader_of(zero, torch.ones(2, INPUTS), noise).measured_error(one) == 0
    assert reader_of(torch.ones(3, INPUTS), torch.zeros(2, INPUTS), noise).measured_error(one) == 0
    rows, weight = torch.eye(3, INPUTS), torch.zeros(2, INPUTS)
    rows[1] = 0
    weight[:, 0] = 1
    assert reader_of(rows, weight, noise).measured_error(one) < 1e-4
    assert bool(torch.isfinite(reader_of(rows, weight, noise).expected_error(one[None])).all())


def test_columns() -> None:
    """A column without a channel scaled by the last channel's scale (index -1), of one candidate or of several."""
    rows, weight = rows_and_weight(0, 1.0)
    group = ConsumerGroup(
        torch.tensor([1, -1, 0, 0]), rows[0], rows[0], rows[0], rows, torch.ones(ROWS).double(), weight, STATIC
    )
    assert group.scale_per_column(torch.tensor([2.0, 3.0])).tolist() == [3, 1, 2, 2]
    assert group.scale_per_column(torch.tensor([[2.0, 3.0], [5.0, 7.0]])).tolist() == [[3, 1, 2, 2], [7, 1, 5, 5]]


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (None, SchemeNoise(False, 127, None)),
        (Scheme.W8A8, SchemeNoise(False, 127, None)),
        (Scheme.W8A8_DYNAMIC, SchemeNoise(True, 127, None)),
        (Scheme.W4A8_DYNAMIC, SchemeNoise(True, 7, 64)),
    ],
)
def test_arithmetic_of(scheme: Scheme | None, expected: SchemeNoise) -> None:
    """A search that optimizes for another scheme than the site will run in."""
    assert (
        scheme_noise(Site("a", "a", "x", (8, 128), scheme, 64 if scheme == Scheme.W4A8_DYNAMIC else None)) == expected
    )


@pytest.mark.parametrize("method", ["round", "clip", "gptq", "auto"])
def test_what_is_foreseen(method: WeightMethod) -> None:
    """Catches clipping of per-token ranges, and a weight method that is ignored in a scheme."""
    rounding = QuantizationPreview(clip=True, weights=method)
    for scheme, clips in (
        (None, True),
        (Scheme.W8A8, True),
        (Scheme.W8A8_DYNAMIC, False),
        (Scheme.W4A8_DYNAMIC, False),
    ):
        got = scheme_noise(Site("a", "a", "x", (8, 128), scheme, 64), rounding)
        assert got.clips is clips and got.weights == method


# ---- which rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [(3,), (1024,), (1025,), (4096, 1024, 1024)])
def test_representative_weight_rows(rows: tuple[int, ...]) -> None:
    """Catches more rows than the bound, and parts of a matrix or consumers without any row."""
    weights = [torch.arange(count, dtype=torch.float32)[:, None] + 1e6 * number for number, count in enumerate(rows)]
    chosen = representative_rows(weights, 1024).flatten()
    assert chosen.numel() <= 1024 + len(rows)  # every consumer rounds up
    assert torch.equal(chosen, torch.cat(weights).flatten()) or chosen.numel() > 512
    for number, count in enumerate(rows):
        mine = chosen[(chosen >= 1e6 * number) & (chosen < 1e6 * (number + 1))] - 1e6 * number
        assert mine[0] == 0 and mine[-1] > count - 1 - -(-sum(rows) // 1024)
