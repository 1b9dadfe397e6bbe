"""edge_search: what every smoothing pass finds out about an edge, and which candidate it chooses."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support.random_stage import (
    EVERY_LINEAR,
    HIDDEN,
    SCHEMES,
    columns_of_value,
    decoder,
    observed,
    site_at,
    through,
)
from tests.support.smoothing_cases import BOTH, PRODUCERS, Forked, of_random_weights
from vlqc.errors import UserError
from vlqc.ir.stage import Edge
from vlqc.passes.algorithms.error_model import ConsumerGroup, QuantizationPreview, SchemeNoise
from vlqc.passes.algorithms.smoothing_search import (
    SmoothingTask,
    amax_per_channel,
    quantized_consumers,
    smoothing_tasks,
    update_edges,
)
from vlqc.passes.assign_precision import AssignPrecision
from vlqc.passes.insert_observers import InsertObservers
from vlqc.passes.smooth_m2 import SmoothM2
from vlqc.passes.smooth_m4 import SmoothM4
from vlqc.pipeline.pass_api import Pass
from vlqc.targets.schemes import Scheme

pytestmark = pytest.mark.usefixtures("float32_runs")  # the same numbers on every processor


# ---- what is known of an edge ----------------------------------------------------------------------------------------


def test_per_channel_takes_the_largest_column() -> None:
    """A grouped-query channel judged by one of its columns only; a column of no channel taken for channel -1."""
    largest = amax_per_channel(torch.tensor([4.0, 5.0, -2.0, 99.0]), torch.tensor([0, 0, 2, -1]), 4)
    assert largest.tolist() == [5, 0, -2, 0]


@SCHEMES
def test_edges_against_hooks(scheme: Scheme) -> None:
    """Catches a peak of one sample, sign or consumer only, and wrong scheme noise, against sums by hand."""
    stage = observed(decoder(outliers=True), scheme)
    assert update_edges(stage) is True and update_edges(stage) is False
    tasks = {task.edge.producer: task for task in smoothing_tasks(stage, "a test")}
    assert list(tasks) == PRODUCERS
    maps = {"self_attn.v_proj": [columns_of_value(row) for row in range(16)]}
    for producer, task in tasks.items():
        assert task.producer is stage.module.get_submodule(producer) and len(task.consumers) == 1
        (source,) = task.sources
        rows = stage.observations[source].kept.abs().amax(0)  # all rows but padding: the budget is larger than they are
        weights = (
            torch.cat([stage.linear(site_at(stage, target)).weight for target in task.edge.consumers]).abs().amax(0)
        )
        columns = maps.get(producer, [[channel] for channel in range(task.channels)])
        assert task.input_absmax().tolist() == [float(rows[some].amax()) for some in columns]
        assert task.weight_absmax().tolist() == [float(weights[some].amax()) for some in columns]
        expected = {
            Scheme.W8A8: SchemeNoise(False, 127, None),
            Scheme.W8A8_DYNAMIC: SchemeNoise(True, 127, None),
            Scheme.W4A8_DYNAMIC: SchemeNoise(True, 7, 16),
        }[scheme]
        assert task.consumers[0].noise == expected


def test_balance_by_hand() -> None:
    """A scale that is no fourth root, a mean that dead channels shift, or a column of no channel that counts."""
    rows = torch.tensor([[1.0, 4.0, 0.0, 2.0, 9.0]])
    weight = torch.tensor([[2.0, 0.5, 3.0, 0.0, 9.0]])
    task = task_of(rows, weight, torch.tensor([0, 1, 2, 3, -1]), 5)
    ratio = (8 / 0.5) ** 0.5  # of the first two: fourth roots of 1/4 and 16/(1/4), so root 1/2 and root 8
    expected = torch.tensor([1 / ratio**0.5, ratio**0.5, 1, 1, 1])
    torch.testing.assert_close(task.balanced_scales(), expected)
    assert task_of(torch.zeros(1, 5), weight, torch.arange(5), 5).balanced_scales().tolist() == [1] * 5


@pytest.mark.parametrize("fed", [[0, 1, 2, 3], [0, 0, 1, 1], [1, 0, 0, 0]])
def test_balance_leaves_the_least_noise(fed: list[int]) -> None:
    """A channel that feeds several columns judged by one of them: no other scale may leave less of both noises.

    With steps held fixed, sum over columns of s^2 energy + moment / s^2; up to the common factor, which steps decide.
    """
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.rand(6, 4, generator=generator), torch.rand(3, 4, generator=generator)
    task = task_of(rows, weight, torch.tensor(fed), max(fed) + 1)
    (group,) = task.consumers
    moment, energy = group.second_moment.double().numpy(), weight.double().square().sum(0).numpy()
    common = (np.bincount(fed, moment) / np.bincount(fed, energy)).prod() ** (0.25 / (max(fed) + 1))

    def noise(scale: np.ndarray) -> float:
        each = scale[fed]
        return float((each**2 * energy + moment / each**2).sum())

    best = task.balanced_scales().double().numpy() * common
    for channel in range(len(best)):
        for factor in (0.99, 1.01):
            other = best.copy()
            other[channel] *= factor
            assert noise(other) > noise(best)


def task_of(rows: Tensor, weight: Tensor, channel: Tensor, channels: int) -> SmoothingTask:
    """A task with one consumer group of equally weighted rows float32 [T, K]."""
    share = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
    group = ConsumerGroup(channel, rows.amin(0), rows.amax(0), rows.square().mean(0), rows, share, weight)
    edge = Edge("norm", torch.ones(channels, dtype=torch.bool), {"group": channel})
    return SmoothingTask(edge, nn.Identity(), ("norm",), (group,))


def test_foreseen_rounding_reaches_every_reader() -> None:
    """Catches a search that ignores its preview of clipping and weight rounding."""
    stage = observed(decoder())
    update_edges(stage)
    for task in smoothing_tasks(stage, "a test", QuantizationPreview(clip=True, weights="gptq")):
        assert task.consumers[0].noise == SchemeNoise(clips=True, weights="gptq")


def test_readers_weigh_rows_as_the_observation_says() -> None:
    """Rows that count the same where one modality or massive tokens should: each scheme's search starts here."""
    stage = observed(decoder())
    update_edges(stage)
    for task in smoothing_tasks(stage, "a test"):
        seen, (group,) = stage.observations[task.sources[0]], task.consumers
        assert len(seen.kept_energy) == len(seen.kept) == len(group.rows)
        assert torch.equal(group.rows, seen.kept) and torch.equal(group.second_moment, seen.second_moment())
        np.testing.assert_allclose(group.row_weight, seen.row_weight(), rtol=1e-12)
        assert float(group.row_weight.max()) > 1.05 * float(group.row_weight.min())


def test_channels_that_cannot_be_scaled_are_not_judged_so() -> None:
    """A candidate that wins by what it does to channels that a fold leaves alone: then it is the worse one."""
    rows = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([64.0, 8.0, 1.0, 1.0])
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)) / torch.tensor([64.0, 8.0, 1.0, 1.0])
    task = task_of(rows, weight, torch.arange(4), 4)
    candidates = torch.tensor([[1.0, 1, 1, 1], [64.0, 1, 1, 1], [1.0, 8, 1, 1]])
    assert task.best_candidate(candidates, 3) == 1
    task.edge.usable[0] = False
    assert task.best_candidate(candidates, 3) == min(
        (0, 2), key=lambda number: task.consumers[0].measured_error(candidates[number])
    )


def test_undecided_consumers_are_searched_and_float_ones_are_not() -> None:
    """A pipeline that smooths before it assigns; weights moved about for linears that stay float."""
    stage = through(decoder(), InsertObservers())
    update_edges(stage)
    assert [task.edge.producer for task in smoothing_tasks(stage, "a test")] == PRODUCERS
    through(stage, AssignPrecision())  # down_proj stays float in the reference
    assert [task.edge.producer for task in smoothing_tasks(stage, "a test")] == PRODUCERS[:3]
    assert [len(quantized_consumers(stage, edge)) for edge in stage.edges or ()] == [3, 1, 2, 0]


@BOTH
def test_nothing_observed(smooth: Pass) -> None:
    """Catches a pipeline without observers that fails without naming the pass."""
    with pytest.raises(UserError, match=f"{smooth.name} needs observations"):
        smooth.run(through(decoder(), EVERY_LINEAR))


# ---- the choice among candidates -------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("confirm", [1, 3])
def test_search_is_bounded(smooth: SmoothM2 | SmoothM4, confirm: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cost that grows with the outlier, as in the reference tool: measurements per edge must be few and fixed."""
    measured: list[Tensor] = []
    original = ConsumerGroup.measured_error

    def counted(group: ConsumerGroup, scales: Tensor) -> float:
        measured.append(scales)
        return original(group, scales)

    monkeypatch.setattr(ConsumerGroup, "measured_error", counted)
    through(observed(decoder(outliers=True)), type(smooth)(confirm=confirm))
    assert len(measured) <= 4 * (confirm + 1)
    assert sum(torch.equal(scale, torch.ones_like(scale)) for scale in measured) == 4  # to leave it is always a choice


@SCHEMES
def test_best_of_by_hand(scheme: Scheme) -> None:
    """The expected error obeyed where the measured one contradicts it; the first candidate not among the compared."""
    stage = observed(decoder(outliers=True), scheme)
    update_edges(stage)
    task = next(smoothing_tasks(stage, "a test"))
    generator = torch.Generator().manual_seed(0)
    balance = (task.input_absmax() / task.weight_absmax()).sqrt()
    candidates = balance * 2 ** (torch.rand(12, HIDDEN, generator=generator) / 4)  # so alike that the two errors differ
    candidates[0] = 1
    expected = [task.consumers[0].expected_error(row[None]).item() for row in candidates]
    measured = [task.consumers[0].measured_error(row) for row in candidates]
    assert expected.index(min(expected)) != measured.index(min(measured))
    for confirm in (1, 3, 12):
        compared = {0, *sorted(range(12), key=lambda number: expected[number])[:confirm]}
        assert task.best_candidate(candidates, confirm) == min(compared, key=lambda number: measured[number])


def test_every_reader_counts() -> None:
    """A producer with consumers at two nodes judged by the first of them: the sum over both decides."""
    stage = of_random_weights(Forked())
    update_edges(stage)
    (task,) = smoothing_tasks(stage, "a test")
    assert len(task.consumers) == 2 and task.sources == ("norm", "reshape")
    generator = torch.Generator().manual_seed(1)
    candidates = torch.cat([torch.ones(1, HIDDEN), 2 ** (torch.rand(20, HIDDEN, generator=generator) * 4)])
    totals = [sum(group.measured_error(row) for group in task.consumers) for row in candidates]
    alone = [[group.measured_error(row) for row in candidates] for group in task.consumers]
    best = totals.index(min(totals))
    assert task.best_candidate(candidates, 21) == best
    both = torch.maximum(alone_peak(task.consumers[0]), alone_peak(task.consumers[1]))
    assert torch.equal(task.input_absmax(), both) and alone[0] != alone[1]


def alone_peak(group: ConsumerGroup) -> Tensor:
    return amax_per_channel(torch.maximum(group.high, -group.low), group.channel, HIDDEN)
