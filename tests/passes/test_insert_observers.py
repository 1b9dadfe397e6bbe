"""insert-observers: statistics against NumPy over every row, and what running a stage must not leave behind."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.exact_stage import exact_stage, linears, text_after
from tests.support.observations import add_rows
from tests.support.random_stage import EVERY_LINEAR, decoder, outputs, staged, through
from vlqc.errors import UserError
from vlqc.ir.execution import Call
from vlqc.ir.observation import MODALITIES, Observation
from vlqc.ir.printer import print_stage
from vlqc.ir.stage import Stage, observe
from vlqc.passes.algorithms.observer import split_evenly
from vlqc.passes.insert_observers import InsertObservers
from vlqc.passes.quantize_activations import QuantizeActivations

pytestmark = pytest.mark.usefixtures("float32_runs")  # the same numbers on every processor

TARGETS = {  # a linear that reads each node
    "input_layernorm": "self_attn.q_proj",
    "post_attention_layernorm": "mlp.gate_proj",
    "mul": "mlp.down_proj",
}


def inputs(stage: Stage) -> dict[str, list[np.ndarray]]:
    """By module path: what each Linear is given, call by call, float64 [rows, K], by plain hooks of its own."""
    recorded: dict[str, list[np.ndarray]] = {}
    handles = []
    for path, linear in linears(stage.module).items():
        rows = recorded.setdefault(path, [])
        handles.append(linear.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(flat(args[0]))))
    outputs(stage)
    for handle in handles:
        handle.remove()
    return recorded


def flat(value: Tensor) -> np.ndarray:
    return value.double().flatten(0, -2).numpy()


def hooks(module: nn.Module) -> int:
    return sum(len(child._forward_pre_hooks) + len(child._forward_hooks) for child in module.modules())


def test_golden(golden: Callable[[str, str], None]) -> None:
    """Any change of what the pass adds to a stage shows here as text."""
    golden("after-insert-observers.vlqc", text_after("insert-observers"))


def test_golden_stage_is_exact() -> None:
    """The goldens of all passes hold on every machine only if nothing before the last linear was rounded."""
    stage = exact_stage()
    for call in stage.execution.calls:
        results: list[list[Tensor]] = []
        for block in (copy.deepcopy(stage.module), copy.deepcopy(stage.module).double()):
            values: list[Tensor] = []
            for path, linear in linears(block).items():
                if path != "mlp.down_proj":
                    linear.register_forward_hook(lambda _, args, output, values=values: values.extend([*args, output]))
            block(*(argument.to(next(block.parameters()).dtype) for argument in call.args))
            results.append([value.double() for value in values])
        assert len(results[0]) == 8
        assert all(torch.equal(single, double) for single, double in zip(*results, strict=True))


@pytest.mark.parametrize("source", TARGETS)
def test_statistics_count_every_row_but_padding(source: str) -> None:
    """A row left out, counted twice, of padding, or under the wrong modality; statistics of kept rows only."""
    stage = through(decoder(), InsertObservers(tokens=6))
    rows = np.concatenate(inputs(stage)[TARGETS[source]])
    modality = np.concatenate([call.modality.numpy() for call in stage.execution.calls if call.modality is not None])
    observation = stage.observations[source]
    assert observation.kept.shape[0] <= 6 < (modality == 0).sum() and (modality == -1).sum() == 3
    assert set(observation.ranges) == {"text", "image"}
    for number, name in enumerate(MODALITIES[:2]):
        mine, span = rows[modality == number], observation.ranges[name]
        assert span.rows == len(mine)
        np.testing.assert_array_equal(span.minimum, mine.min(0))
        np.testing.assert_array_equal(span.maximum, mine.max(0))
        np.testing.assert_array_less(np.abs(span.sum - mine.sum(0)), 1e-6 * np.abs(mine).sum(0))  # parts are float32
        np.testing.assert_allclose(span.sum_of_squares, (mine**2).sum(0), rtol=1e-6)  # squares are float32
    present = rows[modality >= 0]
    assert observation.rows == len(present)
    np.testing.assert_array_equal(observation.minimum(), present.min(0))
    np.testing.assert_array_equal(observation.maximum(), present.max(0))


def test_rows_beyond_one_step_count() -> None:
    """An observer that reduces by parts and forgets all but the last part."""
    rows = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0))
    rows[0], rows[2500] = 9, -9
    observation = Observation(3)
    add_rows(observation, rows, None, 7)
    span = observation.ranges["image"]
    assert (span.rows, span.minimum.tolist(), span.maximum.tolist()) == (5000, [-9.0] * 3, [9.0] * 3)
    np.testing.assert_allclose(span.sum, rows.double().numpy().sum(0), rtol=1e-6)


def test_without_modality_all_rows_are_images() -> None:
    """Vision stages, and pooled tokens whose number fits no mask, losing their rows or counting as text."""
    for modality in (None, torch.zeros(8, dtype=torch.int8)):
        observation = Observation(2)
        add_rows(observation, torch.ones(2, 2), modality, 4)
        assert {name: span.rows for name, span in observation.ranges.items()} == {"image": 2}
        assert observation.kept_modality.tolist() == [1, 1]


def test_second_moment_balances_modalities() -> None:
    """Catches modalities weighted by rows: 99 image rows of 1 and one text row of 3 give (1 + 9) / 2, not 1.08."""
    observation = Observation(1)
    add_rows(observation, torch.cat([torch.ones(99, 1), torch.full((1, 1), 3.0)]), torch.tensor([1] * 99 + [0]), 4)
    assert observation.second_moment().tolist() == [5.0]


def test_energy_of_kept_rows() -> None:
    """The energy of another row, of the input, or of a sample's mean: each kept row is looked up in what was returned.

    A stage whose two last samples are nearly silent: their rows count for as much as those of the loud one.
    """
    stage = decoder()
    for call in stage.execution.calls[1:]:
        call.args[0].mul_(2.0**-6)
    through(stage, InsertObservers(tokens=14))
    linear_inputs = inputs(stage)
    returned = [flat(stage.module(*call.args)[0]) for call in stage.execution.calls]
    for source, target in TARGETS.items():
        observation, energies = stage.observations[source], []
        for row in observation.kept.double().numpy():
            (output_energy,) = (
                (returned[sample][number] ** 2).mean()
                for sample, rows in enumerate(linear_inputs[target])
                for number in np.flatnonzero((rows == row).all(1))
            )
            energies.append(output_energy)
        assert len(energies) == 14 and max(energies) > 2.5 * min(energies)
        np.testing.assert_allclose(observation.kept_energy, energies, rtol=1e-5)
        assert observation.kept_energy.dtype == torch.float32 and observation.samples == 3


class Merger(nn.Module):
    """Merges two rows between its linear layers, as the merger does with four."""

    def __init__(self) -> None:
        super().__init__()
        self.apart = nn.Linear(4, 4)
        self.merged = nn.Linear(8, 3)

    def forward(self, rows: Tensor) -> Tensor:
        projected: Tensor = self.merged(self.apart(rows).reshape(-1, 8))
        return projected


def test_rows_that_the_stage_merges() -> None:
    """Catches rows weighted by the energy of another row: rows before a merger have none of their own."""
    generator = torch.Generator().manual_seed(0)
    calls = [Call(sample, (torch.randn(6, 4, generator=generator),), {}) for sample in range(2)]
    stage = through(staged(Merger().requires_grad_(False), calls), InsertObservers())
    before, behind = stage.observations.values()
    assert before.kept.shape == (12, 4) and before.kept_energy.shape == (0,)
    assert before.row_weight().tolist() == [1 / 12] * 12
    expected = torch.cat([stage.module(*call.args).double().square().mean(1) for call in calls])
    np.testing.assert_allclose(behind.kept_energy, expected, rtol=1e-6)


def test_balance_reaches_the_observation() -> None:
    """`--modality_balance False` that changes nothing: modalities then count by all rows seen, not by those kept."""
    for balance in (True, False):
        stage = through(decoder(), InsertObservers(tokens=6, balance=balance))
        for observation in stage.observations.values():
            text = float(observation.row_weight()[observation.kept_modality == 0].sum())
            assert text == pytest.approx(0.5 if balance else observation.ranges["text"].rows / observation.rows)
            assert (observation.ranges["text"].rows / observation.rows) < 0.45 and observation.balance is balance


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=9),
    tokens=st.integers(1, 40),
    kinds=st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=5),
)
def test_kept_rows_stay_within_the_budget(lengths: list[int], tokens: int, kinds: list[int]) -> None:
    """More samples or modalities than the budget has rows must not keep more; none may be kept as another."""
    observation, started = Observation(1), 0
    for length, share in zip(lengths, split_evenly(tokens, len(lengths)), strict=True):
        rows = torch.arange(started, started + length, dtype=torch.float32)[:, None]
        started += length
        modality = torch.tensor([kinds[int(row) % len(kinds)] for row in rows], dtype=torch.int8)
        add_rows(observation, rows, modality, share)
    assert observation.kept.shape[0] == observation.kept_modality.shape[0] <= tokens
    assert all(
        kinds[int(row) % len(kinds)] == kind
        for row, kind in zip(observation.kept.flatten(), observation.kept_modality.tolist(), strict=True)
    )


@given(total=st.integers(0, 1000), parts=st.integers(1, 50))
def test_shares(total: int, parts: int) -> None:
    """A share lost in a division, or all left-over rows given to the last samples."""
    shares = split_evenly(total, parts)
    assert sum(shares) == total and max(shares) - min(shares) <= 1 and shares[0] == max(shares)


def test_kept_rows_are_bounded_by_megabytes() -> None:
    """A wide input (1 MiB holds 4 of its rows) kept by number of tokens alone would take all memory."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Linear(2**16, 1)

        def forward(self, rows: Tensor) -> Tensor:
            narrowed: Tensor = self.down(rows)
            return narrowed

    stage = staged(Wide().requires_grad_(False), [Call(sample, (torch.ones(9, 2**16),), {}) for sample in range(2)])
    through(stage, InsertObservers(tokens=4096, megabytes=1))
    (observation,) = stage.observations.values()
    assert observation.kept.shape == (4, 2**16) and observation.rows == 18


def test_kept_rows_are_evenly_spread_from_the_first() -> None:
    """Keeping only the beginning or the end of a sample, or losing its first row with the massive activations."""
    observation = Observation(1)
    modality = torch.tensor([-1] * 2 + [0] * 10 + [1] * 100)
    add_rows(observation, torch.arange(112.0)[:, None], modality, 10)
    kept = {kind: observation.kept[observation.kept_modality == kind].flatten().tolist() for kind in (0, 1)}
    assert kept == {0: [2, 4, 6, 8, 10], 1: [12, 32, 52, 72, 92]}


def test_more_samples_than_rows_keeps_both_modalities() -> None:
    """Catches single-row quotas that are always given to text."""
    observation = Observation(1)
    for _ in range(10):
        add_rows(observation, torch.ones(4, 1), torch.tensor([0, 0, 1, 1]), 1)
    assert observation.kept_modality.tolist() == [0, 1] * 5


def test_observations_are_deterministic() -> None:
    """A random choice of rows, or an order from a set: two runs of one command would differ."""
    first, second = (print_stage(through(decoder(), InsertObservers(tokens=9))) for _ in range(2))
    assert first == second


def test_one_forward_per_sample_and_its_outputs() -> None:
    """A second forward over the samples doubles the time of a compilation; a changed output spoils all later stages."""
    stage, ran = decoder(), []
    stage.module.register_forward_hook(lambda *_: ran.append(1))
    through(stage, InsertObservers())
    assert len(ran) == len(stage.execution.calls) == len(stage.execution.outputs)
    for call, (output,) in zip(stage.execution.calls, stage.execution.outputs, strict=True):
        assert torch.equal(output, stage.module(*call.args)[0])


def test_group_members_share_an_observer() -> None:
    """An observer per linear would cost three times the memory and could give q, k and v different scales."""
    stage = through(decoder(), InsertObservers())
    assert [[site.target for site in members] for members in stage.groups().values()] == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    assert list(stage.observations) == list(stage.groups())
    assert [node.args[0].name for node in stage.graph.nodes if node.target is observe] == list(stage.groups())


def test_twice_observes_once() -> None:
    """Catches a second run that adds observers or rows again, or reports a change although there is none."""
    stage = through(decoder(), InsertObservers())
    text = print_stage(stage)
    assert InsertObservers().run(stage) is False
    assert print_stage(stage) == text
    assert InsertObservers(tokens=5).run(stage) is True
    assert InsertObservers(tokens=5).run(stage) is False
    stage.module.get_parameter("mlp.down_proj.weight")[0] *= 2  # no linear reads it, but the stage's output changes
    assert InsertObservers(tokens=5).run(stage) is True


@pytest.mark.parametrize("fails", [False, True])
def test_no_hooks_stay(fails: bool) -> None:
    """A hook that outlives the pass, above all after an error, would go on keeping rows."""
    stage = decoder()
    if fails:
        stage.execution.calls = [
            stage.execution.calls[0],
            Call(1, (torch.ones(1, 4, 5),), {}),
        ]  # 5 channels instead of 32
        with pytest.raises(RuntimeError):
            InsertObservers().run(stage)
    else:
        InsertObservers().run(stage)
    assert hooks(stage.module) == 0


def test_rescaled_is_what_rescaled_rows_would_give() -> None:
    """A statistic that does not follow a fold: later passes would take the scales of the outliers that are gone."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(40, 6, generator=generator)
    modality = torch.tensor([0, 1, 1, -1] * 10, dtype=torch.int8)
    divisor = torch.tensor([1.0, 2.0, 0.25, 64.0, 8.0, 0.5])  # powers of two divide without rounding
    before, after = Observation(6), Observation(6)
    add_rows(before, rows, modality, 12)
    add_rows(after, rows / divisor, modality, 12)
    rescaled = before.rescaled(divisor)
    assert rescaled.channels == 6 and torch.equal(rescaled.kept, after.kept)
    assert torch.equal(rescaled.kept_modality, after.kept_modality) and set(rescaled.ranges) == set(after.ranges)
    for name, span in rescaled.ranges.items():
        other = after.ranges[name]
        assert span.rows == other.rows
        for part in ("minimum", "maximum", "sum", "sum_of_squares"):
            assert torch.equal(getattr(span, part), getattr(other, part)), part


def test_missing_observations_are_reported() -> None:
    """A pipeline of the user's own without this pass must name what is missing, not end in a KeyError."""
    stage = through(decoder(), EVERY_LINEAR)
    with pytest.raises(UserError, match="put insert-observers before it"):
        QuantizeActivations().run(stage)
