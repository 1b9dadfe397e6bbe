"""compensation: what is foreseen of GPTQ, against GPTQ itself on inputs that it was not calibrated with."""

import pytest
import torch
from torch import Tensor

from vlqc.ir.observation import ChannelRange, Observation
from vlqc.ir.stage import Edge
from vlqc.passes.algorithms.compensation import uncompensated_share
from vlqc.passes.algorithms.error_model import ConsumerGroup, SchemeNoise
from vlqc.passes.algorithms.gptq import gptq_quantize
from vlqc.passes.algorithms.smoothing_search import MIN_GAIN, SmoothingTask
from vlqc.passes.algorithms.weight_clipping import GroupScaleGrid, column_importance
from vlqc.passes.smooth_m2 import candidate_scales

COLUMNS, OUTPUTS, GROUP, ROWS, UNSEEN = 64, 192, 32, 768, 1024


def inputs(seed: int, common: float) -> Tensor:
    """[ROWS + UNSEEN, COLUMNS]: normal, plus `common` times a vector of signs with a factor per row, as a rotation
    makes of a massive channel."""
    generator = torch.Generator().manual_seed(seed)
    signs = 1 - 2 * torch.randint(2, (COLUMNS,), generator=generator).float()
    factors = torch.randn(ROWS + UNSEEN, 1, generator=generator)
    return torch.randn(ROWS + UNSEEN, COLUMNS, generator=generator) + common * factors * signs


def few_directions(seed: int) -> Tensor:
    """[ROWS + UNSEEN, COLUMNS]: 12 directions and little else, in columns of unequal size, as attention returns."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(12, COLUMNS, generator=generator) * torch.randn(COLUMNS, generator=generator).mul(0.4).exp()
    noise = torch.randn(ROWS + UNSEEN, COLUMNS, generator=generator)
    return torch.randn(ROWS + UNSEEN, 12, generator=generator) @ mixing + 0.3 * noise


def observation_of(rows: Tensor) -> Observation:
    spans = ChannelRange(len(rows), rows.amin(0), rows.amax(0), rows.sum(0).double(), rows.square().sum(0).double())
    kept = torch.zeros(len(rows), dtype=torch.int8)
    return Observation(rows.shape[1], {"text": spans}, kept=rows, kept_modality=kept, samples=1)


def group_of(rows: Tensor, weight: Tensor) -> ConsumerGroup:
    """W4A8 in groups, rounded by GPTQ; only weights are rounded."""
    observation = observation_of(rows)
    return ConsumerGroup(
        channel=torch.arange(COLUMNS),
        low=observation.minimum(),
        high=observation.maximum(),
        second_moment=observation.second_moment(),
        rows=rows[:256],
        row_weight=torch.full((256,), 1 / 256, dtype=torch.float64),
        weight=weight,
        noise=SchemeNoise(True, 7, GROUP, weights="gptq", rounds_input=False),
        uncompensated=lambda: uncompensated_share(observation, weight.square().sum(0), GROUP),
    )


def gptq_error(rows: Tensor, unseen: Tensor, weight: Tensor, scale: Tensor) -> float:
    """Squared error per unseen row of weights that GPTQ rounds after smoothing."""
    smooth, scaled = rows / scale, weight * scale
    importance = column_importance(smooth.square().mean(0))
    grid = GroupScaleGrid(scaled, importance, GROUP, torch.float32)
    equal = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
    (integers,) = gptq_quantize([scaled], [grid], smooth, equal, importance)
    rounded = integers.float() * (grid.first * grid.second).repeat_interleave(GROUP, 1)
    return float((unseen / scale @ (rounded - scaled).T).square().sum(1).mean())


@pytest.mark.parametrize("common", [0.0, 1.0, 3.0])
def test_error_of_gptq_is_foreseen(common: float) -> None:
    """Catches one fixed factor for GPTQ: from independent to strongly correlated inputs, what it leaves of the error
    of round-to-nearest falls from all of it to a tenth."""
    x, generator = inputs(0, common), torch.Generator().manual_seed(9)
    weight = torch.randn(OUTPUTS, COLUMNS, generator=generator)
    group = group_of(x[:ROWS], weight)
    assert group.uncompensated is not None
    share = (group.uncompensated() * group.second_moment).sum() / group.second_moment.sum()
    assert {0.0: share > 0.95, 1.0: 0.4 < share < 0.6, 3.0: share < 0.2}[common]
    for power in (0.0, 0.4):
        scale = torch.rand(COLUMNS, generator=generator).add(0.2) ** power
        got = group.measured_error(scale)
        assert got == pytest.approx(gptq_error(x[:ROWS], x[ROWS:], weight, scale), rel=0.2)


@pytest.mark.parametrize("seed", range(4))
def test_search_does_not_lose_on_correlated_inputs(seed: int) -> None:
    """Catches a choice by the error of round-to-nearest on a few rows: with correlated inputs it is chance, and GPTQ
    removes most of it. The chosen scale must not be worse than none once GPTQ has rounded the weights."""
    x, generator = few_directions(seed), torch.Generator().manual_seed(seed)
    weight = torch.randn(OUTPUTS, COLUMNS, generator=generator)
    edge = Edge("norm", torch.ones(COLUMNS, dtype=torch.bool), {"group": torch.arange(COLUMNS)})
    task = SmoothingTask(edge, torch.nn.Identity(), ("norm",), (group_of(x[:ROWS], weight),))
    candidates = candidate_scales(task, 20)
    chosen = candidates[task.best_candidate(candidates, 4)]
    without = gptq_error(x[:ROWS], x[ROWS:], weight, torch.ones(COLUMNS))
    assert gptq_error(x[:ROWS], x[ROWS:], weight, chosen) < 1.01 * without


def test_small_gain_changes_nothing() -> None:
    """Catches a scale that is folded for a gain within the deviation of the prediction."""
    rows, weight = inputs(1, 0.0)[:ROWS], torch.ones(4, COLUMNS)
    weight[:, 0] = 1.02  # the largest weight of the first group
    edge = Edge("norm", torch.ones(COLUMNS, dtype=torch.bool), {"group": torch.arange(COLUMNS)})
    task = SmoothingTask(edge, torch.nn.Identity(), ("norm",), (group_of(rows, weight),))
    candidates = torch.ones(2, COLUMNS)
    candidates[1, 0] = 1 / 1.02
    without, smoothed = (task.consumers[0].expected_error(row[None]).item() for row in candidates)
    assert (1 - MIN_GAIN) * without < smoothed < without
