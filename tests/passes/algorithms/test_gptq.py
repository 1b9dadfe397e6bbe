"""GPTQ, Hessian and scale search: against the published algorithm, and on rows outside the calibration set."""

import gc
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlqc.kernels_ref.int4_groups import quantize_weight_per_group_absmax
from vlqc.kernels_ref.quantize import quantize_weight_per_channel_absmax
from vlqc.passes.algorithms import gptq
from vlqc.passes.algorithms import hessian as hessian_algorithm
from vlqc.passes.algorithms.gptq import activation_order, gptq_quantize
from vlqc.passes.algorithms.hessian import gram_matrix, search_shrinkage
from vlqc.passes.algorithms.weight_clipping import ChannelScaleGrid, GroupScaleGrid, column_importance, search_scales

DTYPE = torch.bfloat16
ROWS_AND_WIDTH = [(1024, 4096), (96, 4096), (1024, 128), (96, 128)]  # rows, above and below K; columns per block
GROUPS = [None, 64, 128, 256]


def correlated(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two samples float32 [rows, K], [512, K] of one distribution: a few common causes, and columns of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(16, columns, generator=generator)
    size = torch.randn(columns, generator=generator).exp()

    def sample(count: int) -> Tensor:
        common = torch.randn(count, 16, generator=generator) @ causes / 4
        return (common + 0.5 * torch.randn(count, columns, generator=generator)) * size

    return sample(rows), sample(512)


def weight_of(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1000)) / 16


def uniform(rows: Tensor) -> Tensor:
    return torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)


def moments(rows: Tensor) -> Tensor:
    return column_importance(rows.double().square().mean(0))


def grid(weight: Tensor, group_size: int | None, importance: Tensor) -> ChannelScaleGrid | GroupScaleGrid:
    if group_size is None:
        return ChannelScaleGrid(weight, importance, None, DTYPE)
    return GroupScaleGrid(weight, importance, group_size, DTYPE)


def value(integers: Tensor, scales: tuple[Tensor, ...]) -> Tensor:
    """float64 [N, K]"""
    scale = scales[0].double() if len(scales) == 1 else scales[0].double() * scales[1].double()
    return integers.double() * scale.repeat_interleave(integers.shape[1] // scale.shape[1], 1)


def by_rounding(weight: Tensor, group_size: int | None) -> Tensor:
    if group_size is None:
        integers, *scales = quantize_weight_per_channel_absmax(weight, scale_dtype=DTYPE)
    else:
        integers, *scales = quantize_weight_per_group_absmax(weight, group_size, DTYPE)
    return value(integers, tuple(scales))


def by_clipping(weight: Tensor, group_size: int | None, rows: Tensor) -> Tensor:
    chosen = grid(weight, group_size, moments(rows))
    return value(chosen.round_to_nearest(), chosen.stored_scales())


def by_gptq(weight: Tensor, group_size: int | None, rows: Tensor, width: int = 4096) -> Tensor:
    chosen = grid(weight, group_size, moments(rows))
    (integers,) = gptq_quantize([weight], [chosen], rows, uniform(rows), moments(rows), width)
    return value(integers, chosen.stored_scales())


def decibels(weight: Tensor, stored: Tensor, rows: Tensor) -> float:
    exact, error = rows.double() @ weight.double().T, rows.double() @ (weight.double() - stored).T
    return float(10 * torch.log10(exact.square().sum() / error.square().sum()))


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize(("rows", "width"), ROWS_AND_WIDTH)
@settings(max_examples=3)
@given(seed=st.integers(0, 2**16))
def test_better_on_rows_never_seen(rows: int, width: int, group_size: int | None, seed: int) -> None:
    """Compensation that fits the noise of few rows, or blocks that hand their error on with the wrong sign or scale."""
    columns = 256
    if group_size and group_size > width:
        width = group_size
    calibration, held_out = correlated(rows, columns, seed)
    weight = weight_of(48, columns, seed)
    plain = decibels(weight, by_rounding(weight, group_size), held_out)
    clipped = decibels(weight, by_clipping(weight, group_size, calibration), held_out)
    best = decibels(weight, by_gptq(weight, group_size, calibration, width), held_out)
    assert clipped >= plain - 0.1
    assert best >= max(clipped, plain) + (2 if rows > columns else 1)


def test_blocks_compensate_earlier_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches blocks that do not compensate earlier blocks' errors, or with a wrong sign or scale."""
    calibration, held_out = correlated(4096, 256, 5)
    weight = weight_of(48, 256, 5)
    whole, parts = (decibels(weight, by_gptq(weight, 64, calibration, width), held_out) for width in (256, 64))
    block = hessian_algorithm._block
    monkeypatch.setattr(
        hessian_algorithm, "_block", lambda *arguments, several, first: block(*arguments, several=False, first=True)
    )
    alone = decibels(weight, by_gptq(weight, 64, calibration, 64), held_out)
    assert alone + 0.2 < parts < whole + 0.1


def textbook(weight: Tensor, scale: Tensor, hessian: npt.NDArray[np.float64], limit: int) -> npt.NDArray[np.float64]:
    """GPTQ as published: float64, column by column, through the Cholesky factor of the inverse."""
    remaining, steps = weight.double().numpy().copy(), scale.double().numpy()[:, 0]
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    integers = np.zeros_like(remaining)
    for column in range(remaining.shape[1]):
        integers[:, column] = np.clip(np.rint(remaining[:, column] / steps), -limit, limit)
        error = (remaining[:, column] - integers[:, column] * steps) / upper[column, column]
        remaining[:, column:] -= error[:, None] * upper[column, column:]
    return integers


@pytest.mark.parametrize("columns", [5, 16, 33, 100])
@pytest.mark.parametrize("shrinkage", [0.05, 0.5])
def test_the_integers_of_the_published_algorithm(
    columns: int, shrinkage: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A factor that is flipped, transposed or scaled the wrong way, a column that misses the errors of some before."""
    monkeypatch.setattr(hessian_algorithm, "search_shrinkage", lambda *_: shrinkage)
    calibration, _ = correlated(300, columns, columns)
    calibration = calibration[
        :, calibration.square().sum(0).argsort(descending=True)
    ]  # in the order in which columns are taken
    weight = weight_of(7, columns, columns)
    chosen = ChannelScaleGrid(weight, moments(calibration), None, DTYPE)
    (integers,) = gptq_quantize([weight], [chosen], calibration, uniform(calibration), moments(calibration))
    hessian = calibration.double().numpy().T @ calibration.double().numpy() / len(calibration)
    shrunk = (1 - shrinkage) * hessian + shrinkage * np.diag(np.diag(hessian))
    np.testing.assert_array_equal(integers, textbook(weight, chosen.scale, shrunk, 127))


def descended(weight: Tensor, steps: Tensor, hessian: npt.NDArray[np.float64], group_size: int) -> Tensor:
    """The integers of each group from minima over all 16 values, with later columns free: float64, no factorization."""
    weights, step = weight.double().numpy(), steps.double().numpy()
    error, integers = np.zeros_like(weights), np.zeros_like(weights)

    def cost_of(count: int) -> npt.NDArray[np.float64]:
        """The Hessian of the errors of the first columns, if the others make up for them as well as they can."""
        first, cross, others = hessian[:count, :count], hessian[:count, count:], hessian[count:, count:]
        return first - cross @ np.linalg.solve(others, cross.T)

    def choose(column: int, cost: npt.NDArray[np.float64]) -> None:
        for row in range(len(weights)):
            tried = np.repeat(error[row : row + 1, : len(cost)], 16, axis=0)
            tried[:, column] = weights[row, column] - step[row, column // group_size] * np.arange(-8, 8)
            best = int(np.einsum("ti,ij,tj->t", tried, cost, tried).argmin())
            error[row, column], integers[row, column] = tried[best, column], best - 8

    for begin in range(0, weights.shape[1], group_size):
        columns = range(begin, begin + group_size)
        for column in columns:
            choose(column, cost_of(column + 1))
        for column in [*columns] * gptq.SWEEPS:
            choose(column, cost_of(begin + group_size))
    return torch.from_numpy(integers)


@pytest.mark.parametrize("group_size", [8, 24, 48])
def test_groups_are_rounded_again_given_all_their_columns(group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a gradient that misses errors of earlier groups or of some columns, or that is not kept up to date."""
    monkeypatch.setattr(hessian_algorithm, "search_shrinkage", lambda *_: 0.05)
    calibration, _ = correlated(300, 48, group_size)
    order = activation_order(moments(calibration), group_size)
    calibration, weight = calibration[:, order], weight_of(6, 48, 7)
    chosen = GroupScaleGrid(weight, moments(calibration), group_size, DTYPE)
    (integers,) = gptq_quantize([weight], [chosen], calibration, uniform(calibration), moments(calibration))
    hessian = calibration.double().numpy().T @ calibration.double().numpy() / len(calibration)
    shrunk = 0.95 * hessian + 0.05 * np.diag(np.diag(hessian))
    expected = descended(weight, chosen.first * chosen.second, shrunk, group_size)
    assert torch.equal(integers.double(), expected)


def test_weights_that_share_an_input_are_independent() -> None:
    """Catches integers or errors that are written to another weight of the group, or to other rows."""
    calibration, _ = correlated(64, 128, 3)
    weights = [weight_of(rows, 128, rows) for rows in (2050, 3, 1)]  # more rows than go through at a time, and few
    grids = [grid(weight, 64, moments(calibration)) for weight in weights]
    together = gptq_quantize(weights, grids, calibration, uniform(calibration), moments(calibration), 64)
    for weight, integers, one in zip(weights, together, grids, strict=True):
        apart = by_gptq(weight, 64, calibration, 64)
        wrong = (value(integers, one.stored_scales()) != apart).float().mean()
        assert float(wrong) < 0.02  # other shapes of products, other last bits


@pytest.mark.parametrize("group_size", [None, 64])
def test_one_row_allows_no_compensation(group_size: int | None) -> None:
    """A single row of statistics taken for the whole truth: every column would make up for every other one."""
    calibration, _ = correlated(1, 128, 1)
    weight = weight_of(16, 128, 1)
    assert torch.equal(by_gptq(weight, group_size, calibration), by_clipping(weight, group_size, calibration))


@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("width", [4096, 64])
def test_dead_columns_and_rows(group_size: int | None, width: int) -> None:
    """A division by zero, or columns that were silent at first and are destroyed by errors pushed into them."""
    calibration, held_out = correlated(200, 128, 2)
    weight = weight_of(16, 128, 2)
    dead, weight[3] = torch.tensor([0, 64, 65, 127]), 0
    calibration[:, dead] = 0
    stored = by_gptq(weight, group_size, calibration, width)
    assert bool(stored.isfinite().all()) and not bool(stored[3].any())
    plain = by_rounding(weight, group_size)
    kept, usual = (decibels(weight[:, dead], one[:, dead], held_out[:, dead]) for one in (stored, plain))
    assert kept > usual - 6  # a row's outlier may be cut that only a dead column has
    held_out[:, dead] = 0
    assert decibels(weight, stored, held_out) > decibels(weight, plain, held_out) + 1
    silent = torch.zeros_like(calibration)
    assert bool(by_gptq(weight, group_size, silent, width).isfinite().all())


@pytest.mark.parametrize("width", [4096, 256])
def test_threads_change_no_bit(width: int) -> None:
    """Integers that depend on how many threads happened to share a matrix product."""
    calibration, _ = correlated(300, 512, 4)
    weights = [weight_of(rows, 512, rows) for rows in (2500, 40)]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            grids = [GroupScaleGrid(weight, moments(calibration), 128, DTYPE) for weight in weights]
            integers = gptq_quantize(weights, grids, calibration, uniform(calibration), moments(calibration), width)
            assert torch.get_num_threads() == count
            results.append([*integers, *(scale for one in grids for scale in one.stored_scales())])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other, strict=True))


# ---- the Gram matrix -------------------------------------------------------------------------------------------------


def test_gram_in_panels() -> None:
    """A panel that is not mirrored, or mirrored to the wrong place."""
    rows = torch.randn(40, 1100, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gram_matrix(rows), rows.T @ rows)


def test_shrinkage_follows_the_rows() -> None:
    """A constant: rows without correlations, and few rows, need more of it than many rows with strong ones."""
    shrinkages = []
    for rows, columns in ((4000, 64), (30, 64)):
        calibration, _ = correlated(rows, columns, 0)
        size = calibration.square().mean(0).sqrt()
        known, held_out = hessian_algorithm.holdout_split(calibration / size / len(calibration) ** 0.5)
        shrinkages.append(search_shrinkage(gram_matrix(known), held_out, size))
    noise = torch.randn(300, 64, generator=torch.Generator().manual_seed(1)) / 300**0.5
    known, held_out = hessian_algorithm.holdout_split(noise)
    assert shrinkages[0] < shrinkages[1] <= search_shrinkage(gram_matrix(known), held_out, torch.ones(64))
    assert shrinkages[0] <= 0.1


def test_order_keeps_groups_together() -> None:
    """Catches an order that mixes columns of two groups, whose scales could not be chosen in time."""
    importance = torch.tensor([1.0, 2, 9, 0, 5, 5])
    assert activation_order(importance, 2).tolist() == [4, 5, 2, 3, 1, 0]
    assert activation_order(importance, None).tolist() == [2, 4, 5, 1, 0, 3]


# ---- the search for steps --------------------------------------------------------------------------------------------


def test_search_scales_against_every_candidate() -> None:
    """Catches a search that ignores importance, evaluates the wrong rows, or returns a scale that it did not try."""
    generator = torch.Generator().manual_seed(0)
    values, importance = torch.randn(300, 700, generator=generator), torch.rand(700, generator=generator)
    shares, covering = (1.0, 0.8, 0.6, 0.4), values.abs().amax(1) / 7
    scales = search_scales(values, importance, covering, (-8, 7), shares, lambda step, rows: step + rows.start * 1e-9)
    exact, weights = values.double().numpy(), importance.double().numpy()
    errors = []
    for share in shares:
        step = (covering.double().numpy() * share)[:, None]
        errors.append(((np.clip(np.rint(exact / step), -8, 7) * step - exact) ** 2) @ weights)
    expected = covering.numpy() * np.array(shares, np.float32)[np.argmin(errors, 0)]
    assert float((torch.isclose(scales, torch.from_numpy(expected), rtol=1e-4)).float().mean()) > 0.99
    assert len(set(np.argmin(errors, 0))) > 1


def test_an_outlier_without_input_is_clipped() -> None:
    """A range that covers the largest weight whatever it is multiplied by; one that cuts it where it counts."""
    weight = weight_of(4, 256, 0)
    weight[:, 17] = 2.0
    quiet, loud = torch.ones(256), torch.ones(256)
    quiet[17] = 1e-6
    for group_size in (None, 64):
        steps = [grid(weight, group_size, column_importance(second_moment)) for second_moment in (quiet, loud)]
        for one in steps:
            one.round_to_nearest()
        cut, whole = (float(one.stored_scales()[-1][0, 0]) for one in steps)
        assert cut < 0.8 * whole


def test_nothing_stays_behind_until_garbage_is_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a reference cycle in the rounding: it kept a block and its rows alive, gigabytes in a large layer."""
    blocks: list[weakref.ref[object]] = []
    rounded = gptq._quantize_block

    def noted(made: Tensor, block: hessian_algorithm.HessianBlock, *rest: Any) -> Tensor:
        blocks.extend([weakref.ref(block), weakref.ref(made)])
        return rounded(made, block, *rest)

    monkeypatch.setattr(gptq, "_quantize_block", noted)
    weight, rows = weight_of(8, 64, 0), torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    importance = column_importance(rows.square().mean(0))
    gc.disable()
    try:
        gptq_quantize([weight], [grid(weight, None, importance)], rows, torch.full((32,), 1 / 32).double(), importance)
        assert blocks and all(block() is None for block in blocks)
    finally:
        gc.enable()
