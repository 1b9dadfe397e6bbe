"""error_model: the formula against simulation, the measurement against NumPy, and which rows stand for all."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlqc.engines import Scheme
from vlqc.ir import Site
from vlqc.passes.error_model import (
    Arithmetic,
    Reader,
    arithmetic_of,
    balanced,
    representative_inputs,
    representative_rows,
)

ROWS, INPUTS, OUTPUTS, GROUP = 400, 24, 16, 8
STATIC, PER_TOKEN, IN_GROUPS = Arithmetic(), Arithmetic(per_token=True), Arithmetic(True, 7, GROUP)
EVERY_ARITHMETIC = pytest.mark.parametrize(
    "arithmetic", [STATIC, PER_TOKEN, IN_GROUPS], ids=["static", "per token", "in groups"]
)


def rows_and_weight(seed: int, outlier: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x [400, 24] with one channel `outlier` times as large and an offset in another, W [16, 24]; float32."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(ROWS, INPUTS, generator=generator)
    rows[:, 3] *= outlier
    rows[:, 7] += 2
    return rows, torch.randn(OUTPUTS, INPUTS, generator=generator)


def reader_of(
    rows: torch.Tensor,
    weight: torch.Tensor,
    arithmetic: Arithmetic = STATIC,
    share: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
) -> Reader:
    """Every column is a channel; rows weighted by `share`, else equally; `seen`: the rows that give the range."""
    equal = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
    seen = rows if seen is None else seen
    return Reader(
        channel=torch.arange(rows.shape[1]),
        low=seen.amin(0),
        high=seen.amax(0),
        second_moment=rows.square().mean(0),
        rows=rows,
        row_weight=equal if share is None else share,
        weight=weight,
        arithmetic=arithmetic,
    )


def in_groups(matrix: np.ndarray, arithmetic: Arithmetic) -> np.ndarray:
    parts: np.ndarray = matrix.reshape(len(matrix), -1, arithmetic.group_size or matrix.shape[1])
    return parts


def weight_steps(heavy: np.ndarray, arithmetic: Arithmetic) -> np.ndarray:
    """[N, K]: the step of each weight."""
    parts = in_groups(heavy, arithmetic)
    steps = np.abs(parts).max(2, keepdims=True) / arithmetic.weight_max
    return np.broadcast_to(steps, parts.shape).reshape(heavy.shape)


def input_steps(smooth: np.ndarray, bottom: float, top: float, arithmetic: Arithmetic) -> np.ndarray:
    """[T, 1]"""
    if arithmetic.per_token:
        largest: np.ndarray = np.abs(smooth).max(1, keepdims=True)
        return largest / 127
    return np.full((len(smooth), 1), (top - bottom) / 255)


def by_numpy(reader: Reader, scale: torch.Tensor) -> float:
    """The engines' arithmetic in float64: q = clamp(rint(x/step + offset), -128, 127), or rint(x/step) per row."""
    tensors = (reader.rows, reader.row_weight, reader.weight, scale, reader.low, reader.high)
    x, share, w, s, low, high = (tensor.double().numpy() for tensor in tensors)
    bottom, top = min((low / s).min(), 0.0), max((high / s).max(), 0.0)
    step = input_steps(x / s, bottom, top, reader.arithmetic)
    if reader.arithmetic.per_token:
        rounded = np.rint(x / s / step) * step
    else:
        offset = -128 - np.rint(bottom / step)
        rounded = (np.clip(np.rint(x / s / step) + offset, -128, 127) - offset) * step
    weight_step = weight_steps(w * s, reader.arithmetic)
    error = rounded @ (np.rint(w * s / weight_step) * weight_step).T - x @ w.T
    return float(((error**2).sum(1) * share).sum())


# ---- expected --------------------------------------------------------------------------------------------------------


@EVERY_ARITHMETIC
@pytest.mark.parametrize("outlier", [1.0, 8.0])
def test_expected_error_of_uniform_noise(outlier: float, arithmetic: Arithmetic) -> None:
    """A wrong factor (1/12, a square, a step): drawing the noise that the formula assumes must give its result.

    2000 draws of noise uniform in half a step to either side; 3 % is six times the deviation that so many leave. Every
    row is drawn five times: steps and rows that differ leave no deviation of their own.
    """
    rows, weight = rows_and_weight(0, outlier)
    scale = torch.linspace(0.5, 3, INPUTS)
    got = reader_of(rows, weight, arithmetic).expected_error(scale[None]).item()
    random = np.random.default_rng(1)
    x, w, s = rows.double().numpy(), weight.double().numpy(), scale.double().numpy()
    smooth, heavy = x / s, w * s
    steps = input_steps(smooth, min(smooth.min(), 0), max(smooth.max(), 0), arithmetic)
    steps_of_weight = weight_steps(heavy, arithmetic)
    total = 0.0
    for draw in range(2000):
        row = draw % ROWS
        noise = random.uniform(-0.5, 0.5, INPUTS) * steps[row]
        weight_noise = random.uniform(-0.5, 0.5, heavy.shape) * steps_of_weight
        total += ((noise @ heavy.T + smooth[row] @ weight_noise.T) ** 2).sum()
    assert got == pytest.approx(total / 2000, rel=0.03)


@EVERY_ARITHMETIC
@pytest.mark.parametrize("seed", range(4))
def test_expected_error_predicts_real_rounding(seed: int, arithmetic: Arithmetic) -> None:
    """A model of noise that does not describe the integers: within 25 % of what is measured on 400 rows.

    Per token 35 %, in groups 60 %: the largest value of every row and group is hit exactly, one in 24 and in 8 here.
    """
    rows, weight = rows_and_weight(seed, 8.0)
    reader = reader_of(rows, weight, arithmetic)
    for scale in (torch.ones(INPUTS), torch.maximum(reader.high, -reader.low).sqrt()):
        within = 0.6 if arithmetic.group_size else 0.35 if arithmetic.per_token else 0.25
        assert reader.expected_error(scale[None]).item() == pytest.approx(reader.measured_error(scale), rel=within)


@EVERY_ARITHMETIC
def test_expected_error_of_candidates_one_by_one(arithmetic: Arithmetic) -> None:
    """A candidate that is judged by another one's ranges."""
    reader = reader_of(*rows_and_weight(2, 20.0), arithmetic)
    scales = torch.stack([torch.ones(INPUTS), torch.linspace(1, 9, INPUTS), torch.full((INPUTS,), 2.0)])
    together = reader.expected_error(scales)
    assert together.dtype == torch.float64 and together.shape == (3,)
    assert torch.equal(together, torch.cat([reader.expected_error(scale[None]) for scale in scales]))
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
    reader = reader_of(rows, weight, Arithmetic(True, 7, 1), share)
    moments = rows.square().mean(0).tolist()  # of the statistics, not of the weighted rows
    by_hand = ((0.75 * 1 + 0.25 * 4) * (7**2 + 21**2) + 1**2 * moments[0] + 3**2 * moments[1]) / 12
    assert reader.expected_error(torch.ones(1, 2)).item() == pytest.approx(by_hand)


# ---- measured --------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    shift=st.sampled_from([-40.0, 0.0, 40.0]),
    beyond=st.booleans(),
    arithmetic=st.sampled_from([STATIC, PER_TOKEN, IN_GROUPS, Arithmetic(False, 7, 12)]),
)
def test_measured_error_against_numpy(seed: int, shift: float, beyond: bool, arithmetic: Arithmetic) -> None:
    """A wrong zero, clipping, a transposed product, a step of another row or group, rows not weighted: NumPy's way."""
    rows, weight = rows_and_weight(seed, 5.0)
    rows += shift
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(INPUTS, generator=generator) + 0.5
    share = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    # Of static arithmetic, rows beyond the range are clipped.
    reader = reader_of(rows, weight, arithmetic, share / share.sum(), rows[: ROWS // 2] if beyond else rows)
    # float32 may round a value in the middle to the other side
    assert reader.measured_error(scale) == pytest.approx(by_numpy(reader, scale), rel=0.02)


@EVERY_ARITHMETIC
def test_measured_error_of_nothing(arithmetic: Arithmetic) -> None:
    """Division by a step of zero where an input, a row, a weight or a group is all zeros."""
    zero, one = torch.zeros(3, INPUTS), torch.ones(INPUTS)
    assert reader_of(zero, torch.ones(2, INPUTS), arithmetic).measured_error(one) == 0
    assert reader_of(torch.ones(3, INPUTS), torch.zeros(2, INPUTS), arithmetic).measured_error(one) == 0
    rows, weight = torch.eye(3, INPUTS), torch.zeros(2, INPUTS)
    rows[1] = 0
    weight[:, 0] = 1
    assert reader_of(rows, weight, arithmetic).measured_error(one) < 1e-4
    assert bool(torch.isfinite(reader_of(rows, weight, arithmetic).expected_error(one[None])).all())


def test_columns() -> None:
    """A column without a channel scaled by the last channel's scale (index -1), of one candidate or of several."""
    rows, weight = rows_and_weight(0, 1.0)
    reader = Reader(
        torch.tensor([1, -1, 0, 0]), rows[0], rows[0], rows[0], rows, torch.ones(ROWS).double(), weight, STATIC
    )
    assert reader.columns(torch.tensor([2.0, 3.0])).tolist() == [3, 1, 2, 2]
    assert reader.columns(torch.tensor([[2.0, 3.0], [5.0, 7.0]])).tolist() == [[3, 1, 2, 2], [7, 1, 5, 5]]


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (None, Arithmetic(False, 127, None)),
        (Scheme.W8A8, Arithmetic(False, 127, None)),
        (Scheme.W8A8_DYNAMIC, Arithmetic(True, 127, None)),
        (Scheme.W4A8_DYNAMIC, Arithmetic(True, 7, 64)),
    ],
)
def test_arithmetic_of(scheme: Scheme | None, expected: Arithmetic) -> None:
    """A search that optimises for another scheme than the site will run in."""
    assert (
        arithmetic_of(Site("a", "a", "x", (8, 128), scheme, 64 if scheme == Scheme.W4A8_DYNAMIC else None)) == expected
    )


# ---- which rows ------------------------------------------------------------------------------------------------------


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
