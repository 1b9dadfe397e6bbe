"""Observations: row weights, representative rows, and statistics after a fold or a shift."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.small_stage import observation
from vlqc.ir.observation import MASSIVE, MASSIVE_SHARE, ChannelRange, Observation, row_classes, row_weights


def modalities(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int8)


def with_rows(rows: Tensor, modality: Tensor, energy: Tensor | None = None, **attributes: bool | int) -> Observation:
    """An observation that has kept rows only, float32 [T, K]."""
    observed = Observation(rows.shape[1], {}, rows, modality, torch.empty(0) if energy is None else energy)
    for name, value in attributes.items():
        setattr(observed, name, value)
    return observed


# ---- row weights ----------------------------------------------------------------------------------------------------


def test_weights_by_hand() -> None:
    """Catches absolute errors, unbalanced modalities, and massive tokens that weigh as much as others.

    Text: 1, 2 and 4 give 4 : 2 : 1 of one half. Image: the median is 2, so 80 is massive and has a tenth of the other
    half; 2, 2 and 1 share the rest as 1 : 1 : 2.
    """
    weights = row_weights(modalities(0, 0, 0, 1, 1, 1, 1), torch.tensor([1.0, 2.0, 4.0, 2.0, 2.0, 80.0, 1.0]))
    assert weights.dtype == torch.float64
    by_hand = [4 / 14, 2 / 14, 1 / 14, 0.45 / 4, 0.45 / 4, 0.05, 0.45 / 2]
    np.testing.assert_allclose(weights, by_hand, rtol=1e-12)


@pytest.mark.parametrize(
    ("energy", "by_hand"),
    [
        ([1, 1, 1, 100, 1, 400], [0.9 / 4, 0.9 / 4, 0.9 / 4, 0.1 * 4 / 5, 0.9 / 4, 0.1 / 5]),  # two massive ones
        ([1, 1, 30], [30 / 61, 30 / 61, 1 / 61]),  # the largest energy of an ordinary row
        ([1, 1, 1, 1e-3, 0], [1 / 23, 1 / 23, 1 / 23, 10 / 23, 10 / 23]),  # low energies count as a tenth
        ([0, 0, 0], [1 / 3, 1 / 3, 1 / 3]),
        ([0, 0, 0, 5], [0.3, 0.3, 0.3, 0.1]),  # with a median of zero, every other energy is massive
        ([7], [1]),
        ([], []),
    ],
)
def test_weights_of_one_modality(energy: list[float], by_hand: list[float]) -> None:
    """Catches a class without a share, a row of low energy that takes all of it, and a division by zero energy."""
    modality = torch.ones(len(energy), dtype=torch.int8)
    weights = row_weights(modality, torch.tensor(energy, dtype=torch.float32))
    np.testing.assert_allclose(weights, by_hand, rtol=1e-7)


def test_weights_without_balance() -> None:
    """Catches `balance=False` without effect: modalities must be weighted by their rows, or by `rows`."""
    modality, energy = modalities(0, 1, 1, 1, 1, 0), torch.ones(6)
    assert row_weights(modality, energy).tolist() == [0.25, 0.125, 0.125, 0.125, 0.125, 0.25]
    np.testing.assert_allclose(row_weights(modality, energy, balance=False), [1 / 6] * 6, rtol=1e-12)
    weights = row_weights(modality, energy, balance=False, rows={0: 30, 1: 10})
    np.testing.assert_allclose(weights, [0.375, 0.0625, 0.0625, 0.0625, 0.0625, 0.375], rtol=1e-12)
    assert torch.equal(row_weights(modality, energy, rows={0: 30, 1: 10}), row_weights(modality, energy))


ENERGIES = st.lists(st.tuples(st.sampled_from([0, 1]), st.floats(0, 1e6, width=32)), min_size=1, max_size=30)


@given(rows=ENERGIES, balance=st.booleans())
def test_weights_are_shares(rows: list[tuple[int, float]], balance: bool) -> None:
    """Catches a row without weight, and weights that do not sum to 1, or to its share in a modality."""
    modality, energy = modalities(*(kind for kind, _ in rows)), torch.tensor([size for _, size in rows])
    weights = row_weights(modality, energy, balance=balance)
    assert bool((weights > 0).all()) and float(weights.sum()) == pytest.approx(1)
    present = set(modality.tolist())
    for number in present:
        members = modality == number
        due = 1 / len(present) if balance else float(members.double().mean())
        assert float(weights[members].sum()) == pytest.approx(due)
        massive = energy[members] > MASSIVE * np.sort(energy[members].numpy())[(int(members.sum()) - 1) // 2]
        expected = due * MASSIVE_SHARE if bool(massive.any()) else 0.0
        assert float(weights[members][massive].sum()) == pytest.approx(expected)


def test_weights_are_invariant_to_the_output_scale() -> None:
    """Catches an absolute threshold: output scales differ between layers by factors of thousands."""
    energy = torch.tensor([0.5, 3.0, 200.0, 0.001, 1.0, 7.0, 2.0])
    modality = modalities(0, 0, 0, 0, 1, 1, 0)
    assert torch.equal(row_weights(modality, energy), row_weights(modality, energy * 2.0**20))


def test_rows_without_energy() -> None:
    """Catches an error for rows before a pooling layer, which have no output energy: they must count equally."""
    observed = with_rows(torch.ones(3, 2), modalities(1, 1, 1))
    assert observed.energy().tolist() == [1, 1, 1] and observed.row_weight().tolist() == [1 / 3] * 3
    observed.kept_energy = torch.ones(2)  # a different number of rows
    assert observed.energy().tolist() == [1, 1, 1]
    assert Observation(2).row_weight().shape == (0,) and Observation(2).representative(4).shape == (0,)


def test_weights_of_selected_rows() -> None:
    """Catches classes computed from the selection alone, whose median, and therefore weights, would differ.

    All 40 massive rows and 40 of 400 ordinary ones: the massive ones still have a tenth, the ordinary the rest.
    """
    energy = torch.cat([torch.linspace(1, 3, 400), torch.linspace(70, 700, 40)])
    observed = with_rows(torch.zeros(440, 1), torch.ones(440, dtype=torch.int8), energy)
    index = torch.cat([torch.arange(0, 400, 10), torch.arange(400, 440)])
    weights = observed.row_weight(index)
    assert float(weights.sum()) == pytest.approx(1) and float(weights[40:].sum()) == pytest.approx(0.1)
    relative = (1 / energy[index]).double()
    np.testing.assert_allclose(weights[:40], 0.9 * relative[:40] / relative[:40].sum(), rtol=1e-6)
    np.testing.assert_allclose(weights[40:], 0.1 * relative[40:] / relative[40:].sum(), rtol=1e-6)
    assert observed.row_weight(index[:40]).sum().item() == pytest.approx(1)  # none of a class among them
    np.testing.assert_allclose(observed.row_weight(torch.arange(440)), observed.row_weight(), rtol=1e-12)


@pytest.mark.parametrize("balance", [True, False])
def test_few_rows_kept_of_many(balance: bool) -> None:
    """Catches `--modality_balance False` that counts the kept rows and not the 10 text and 1000 image rows."""
    observed = observation(4)
    observed.balance = balance
    observed.ranges["text"].rows, observed.ranges["image"].rows = 10, 1000
    share = 0.5 if balance else 10 / 1010
    np.testing.assert_allclose(observed.row_weight(), [share / 2, share / 2, 1 - share], rtol=1e-12)
    np.testing.assert_allclose(observed.row_weight(torch.tensor([1, 2])), [share, 1 - share], rtol=1e-12)


def test_classes_by_hand() -> None:
    """Catches a row in two classes or in none, and massive rows selected by the median of the other modality."""
    energy = torch.tensor([1.0, 50.0, 1.0, 1.0, 50.0, 50.0])
    classes = row_classes(modalities(0, 0, 0, 1, 1, 1), energy)
    assert [members.tolist() for members in classes] == [[0, 2], [1], [3, 4, 5]]
    assert row_classes(modalities(), torch.empty(0)) == []


# ---- weighted statistics ---------------------------------------------------------------------------------------------


def test_moments_against_numpy() -> None:
    """Catches a mean square without weights, and rows lost between the blocks of the sum."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(700, 5, generator=generator) + torch.arange(5.0)
    energy = torch.rand(700, generator=generator) ** 8 * 100
    observed = with_rows(rows, (torch.arange(700) % 3 == 0).to(torch.int8), energy)
    weight, x = observed.row_weight().numpy(), rows.double().numpy()
    assert weight.max() > 5 * weight.min()
    np.testing.assert_allclose(observed.second_moment(), weight @ x**2, rtol=1e-6)
    assert observed.second_moment().dtype == torch.float32


def test_moments_weigh_modalities_equally() -> None:
    """Two text rows of +-1 and one image row 0..3: mean squares 1 and c^2, and each modality has half of the weight."""
    observed = observation(4)
    assert observed.rows == 3
    assert observed.second_moment().tolist() == [0.5, 1.0, 2.5, 5.0]
    assert observed.minimum().tolist() == [-1.0] * 4
    assert observed.maximum().tolist() == [1.0, 1.0, 2.0, 3.0]


# ---- representative rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_sample", [2, 8, 16, 64])
def test_representative_rows_have_no_period(per_sample: int) -> None:
    """Catches equal strides over rows stored by sample: only text, only images, or only first rows."""
    half = per_sample // 2
    modality = torch.tensor(([0] * half + [1] * half) * (4096 // per_sample), dtype=torch.int8)
    place = torch.arange(4096) % half
    index = with_rows(torch.zeros(4096, 1), modality).representative(512)
    assert index.tolist() == sorted(set(index.tolist())) and len(index) == 512
    assert modality[index].sum() == 256
    counts = torch.bincount(place[index], minlength=half)
    assert counts.min() > 0.5 * 512 / half and counts.max() < 2 * 512 / half
    assert torch.diff(index, append=torch.tensor([4096])).max() < 64  # no gaps, also at the end


def test_representative_rows_hold_every_class() -> None:
    """Catches a selection that misses three text rows and two massive tokens among thousands of image rows."""
    modality, energy = torch.ones(4000, dtype=torch.int8), torch.ones(4000)
    modality[[5, 2000, 3999]] = 0
    energy[[17, 3000]] = 1000
    index = with_rows(torch.zeros(4000, 1), modality, energy).representative(512)
    assert {5, 2000, 3999, 17, 3000} <= set(index.tolist()) and len(index) <= 512
    assert (
        len(with_rows(torch.zeros(4000, 1), modality, energy).representative(1)) == 3
    )  # one per class, also above the bound


def test_representative_rows_of_few() -> None:
    """Catches lost or reordered rows where there are fewer than the bound."""
    assert with_rows(torch.zeros(7, 1), torch.zeros(7, dtype=torch.int8)).representative(512).tolist() == list(range(7))


# ---- derived observations --------------------------------------------------------------------------------------------


def non_default() -> Observation:
    """An observation with non-default values of all that a derived one keeps."""
    before = observation(4)
    before.kept_energy, before.balance, before.samples = torch.tensor([3.0, 1.0, 2.0]), False, 17
    return before


def keeps_the_rest(before: Observation, after: Observation) -> bool:
    assert after.kept_modality.tolist() == before.kept_modality.tolist() == [0, 0, 1]
    assert after.kept_energy.tolist() == [3.0, 1.0, 2.0] and torch.equal(after.row_weight(), before.row_weight())
    assert (after.channels, after.balance, after.samples) == (4, False, 17)
    return all(after.ranges[name].rows == span.rows for name, span in before.ranges.items())


def test_rescaled_observation_equals_observing_rescaled_rows() -> None:
    """Catches derived statistics after a fold that differ from those of the divided rows."""
    divisor = torch.tensor([2.0, 0.5, 4.0, 1.0])
    before = non_default()
    after = before.rescaled(divisor)
    text = before.kept[:2].numpy() / divisor.numpy()
    assert keeps_the_rest(before, after)
    assert np.array_equal(after.kept.numpy(), before.kept.numpy() / divisor.numpy())
    assert np.array_equal(after.ranges["text"].minimum.numpy(), text.min(0))
    assert np.array_equal(after.ranges["text"].maximum.numpy(), text.max(0))
    assert np.array_equal(after.ranges["text"].sum_of_squares.numpy(), (text.astype(np.float64) ** 2).sum(0))
    np.testing.assert_allclose(after.second_moment(), before.second_moment() / divisor**2, rtol=1e-7)


def test_shifted_observation_equals_observing_shifted_rows() -> None:
    """Catches derived statistics after a shift that differ from those of the shifted rows."""
    middle = torch.tensor([0.5, -2.0, 0.0, 3.0])
    before = non_default()
    after = before.shifted(middle)
    rows = {"text": before.kept[:2].double().numpy(), "image": before.kept[2:].double().numpy()}
    for name, span in after.ranges.items():
        moved = rows[name] - middle.double().numpy()
        assert span.rows == len(moved)
        assert np.array_equal(span.minimum.numpy(), moved.min(0)) and np.array_equal(span.maximum.numpy(), moved.max(0))
        assert np.array_equal(span.sum.numpy(), moved.sum(0))
        assert np.array_equal(span.sum_of_squares.numpy(), (moved**2).sum(0))
        assert span.sum.dtype == span.sum_of_squares.dtype == torch.float64 and span.minimum.dtype == torch.float32
    assert np.array_equal(after.kept.numpy(), before.kept.numpy() - middle.numpy())
    assert keeps_the_rest(before, after)
    assert torch.equal(before.kept, observation(4).kept)  # not modified in place


@given(st.floats(1.0, 1000.0, width=32), st.integers(1, 2000))
def test_shift_of_a_constant_channel(value: float, rows: int) -> None:
    """Catches a negative sum of squares from the subtraction of nearly equal numbers."""
    constant = torch.full((1,), value)
    squares = constant.square().double() * rows  # squared in float32, as observers do
    span = ChannelRange(rows, constant, constant, constant.double() * rows, squares)
    middle = constant * (1 + 2.0**-20)
    after = Observation(1, {"text": span}, torch.full((3, 1), value), modalities(0, 0, 0)).shifted(middle)
    assert float(after.ranges["text"].sum_of_squares) >= 0 and float(after.second_moment()) < 1e-6 * value**2
