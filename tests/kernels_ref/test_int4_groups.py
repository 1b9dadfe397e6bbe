"""kernels_ref.group against NumPy in float64, bytes written by hand, and the bounds its rounding promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vlqc.kernels_ref.int4_groups import (
    SMALLEST_SCALE_SECOND,
    group_size_of,
    int4_fault,
    pack_int4,
    quantize_weight_per_group_absmax,
    scale_bias,
    unpack_int4,
)
from vlqc.kernels_ref.quantize import SMALLEST_SCALE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_weight(seed: int, rows: int, columns: int, spread: float = 0.05) -> torch.Tensor:
    """float32 [N, K] whose groups have very different ranges."""
    random = np.random.default_rng(seed)
    ranges = np.exp(random.normal(0, 2, (rows, columns // 8))).repeat(8, axis=1)
    return torch.from_numpy((random.normal(0, spread, (rows, columns)) * ranges).astype(np.float32))


def random_q4(seed: int, rows: int, columns: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(-8, 8, (rows, columns), dtype=np.int8))


def per_weight(weight_scale: torch.Tensor, weight_scale_second: torch.Tensor, columns: int) -> NDArray[np.float64]:
    """float64 [N, K]: the two factors of every weight, multiplied."""
    product: NDArray[np.float64] = weight_scale.numpy().astype(np.float64) * weight_scale_second.numpy()
    return product.repeat(columns // product.shape[1], axis=1)


def next_below(values: torch.Tensor, dtype: torch.dtype) -> NDArray[np.float64]:
    integer = torch.int32 if dtype is torch.float32 else torch.int16
    below: NDArray[np.float64] = (values.to(dtype).view(integer) - 1).view(dtype).to(torch.float64).numpy()
    return below


# ---- two-level scales ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), group_size=st.sampled_from([1, 8, 16, 48]), rows=st.sampled_from([1, 3, 64, 65]))
def test_no_weight_errs_by_more_than_half_a_step(dtype: torch.dtype, seed: int, group_size: int, rows: int) -> None:
    """Catches integer second scales (they clip small groups), scales rounded too late or down, groups mixed up."""
    weight = random_weight(seed, rows, 48)
    q4, first, second = quantize_weight_per_group_absmax(weight, group_size, dtype)
    assert (q4.dtype, first.dtype, second.dtype) == (torch.int8, torch.float32, torch.float32)
    assert (q4.shape, first.shape, second.shape) == ((rows, 48), (rows, 1), (rows, 48 // group_size))
    assert not int4_fault(q4)
    step = per_weight(first, second, 48)
    error = np.abs(q4.numpy() * step - weight.numpy().astype(np.float64))
    assert (error <= step * (0.5 + 1e-6)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_are_the_finest_with_that_bound(dtype: torch.dtype) -> None:
    """Catches steps that are longer than needed, absmax / 7 for one: the next smaller second scale breaks the bound."""
    weight = random_weight(1, 70, 48)
    _, first, second = quantize_weight_per_group_absmax(weight, 16, dtype)
    groups = weight.numpy().astype(np.float64).reshape(70, 3, 16)
    needed = np.maximum(groups.max(axis=2) / 7.5, -groups.min(axis=2) / 8.5)
    free = second.numpy() > SMALLEST_SCALE_SECOND
    assert free.mean() > 0.9
    assert (first.numpy() * next_below(second, dtype) < needed)[free].all()
    assert (first.numpy() * second.numpy().astype(np.float64) >= needed * (1 - 1e-6)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_are_values_of_the_dtype(dtype: torch.dtype) -> None:
    """Catches scales that engines round when they read them, and products that they round when they multiply."""
    _, first, second = quantize_weight_per_group_absmax(random_weight(2, 70, 64), 16, dtype)
    assert torch.equal(first.to(dtype).float(), first) and torch.equal(second.to(dtype).float(), second)
    mantissa, _ = np.frexp(first.numpy())
    assert (mantissa == 0.5).all()  # a power of two
    product = first.double() * second.double()
    normal = product >= torch.finfo(dtype).tiny
    assert normal.float().mean() > 0.9
    assert torch.equal(product.to(dtype).double()[normal], product[normal])
    assert second.max() <= 17 and second.min() >= SMALLEST_SCALE_SECOND
    assert (second.amax(dim=1) >= 8.5).all()  # the row's largest group uses the range


def test_integers_are_rounded_by_the_rounded_scales() -> None:
    """Catches integers from the exact scale: its step is 1.001, the stored one 1.0078125, and 6.5 steps become 6."""
    weight = torch.tensor([[7.5 * 1.001, 6.5 * 1.001, 6.51 * 1.001, -3.0]])
    q4, first, second = quantize_weight_per_group_absmax(weight, 4, torch.bfloat16)
    assert (first.item(), second.item()) == (0.0625, 16.125)  # 1.001 / 17 = 0.0589 -> 1/16; 16.016 -> 16.125
    assert q4.tolist() == [[7, 6, 6, -3]]
    exact, _, _ = quantize_weight_per_group_absmax(weight, 4, torch.float32)
    assert exact[0, 2].item() == 7


def test_both_ends_are_used_and_ties_go_to_even() -> None:
    """Catches a symmetric range, which wastes -8, ends swapped, half away from zero, and 7.5 wrapping to 8."""
    weight = torch.tensor(
        [[7.5, 0.5, 1.5, 2.5], [-8.5, 0.5, -1.5, -2.5], [7.5, -8.5, 6.5, -0.5], [-8.0, 7.5, 5.5, 0.0]]
    )
    q4, first, second = quantize_weight_per_group_absmax(weight, 4, torch.bfloat16)
    assert (first * second).tolist() == [[1.0]] * 4
    assert q4.tolist() == [[7, 0, 2, 2], [-8, 0, -2, -2], [7, -8, 6, 0], [-8, 7, 6, 0]]


def test_small_groups_keep_their_precision() -> None:
    """Catches integer second scales: a group 13 times smaller than the row's largest would be clipped by a quarter."""
    ramp = torch.linspace(-1, 1, 40)
    for factor in (1, 13, 20, 300):
        weight = torch.cat([ramp, ramp / factor])[None]
        q4, first, second = quantize_weight_per_group_absmax(weight, 40, torch.bfloat16)
        error = (q4.numpy() * per_weight(first, second, 80) - weight.numpy())[0, 40:]
        assert np.sqrt(np.square(error * factor).mean()) < 0.6 * 0.07  # of the ramp's RMS; uniform errors make 6.5 %


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_and_rows_of_zeros(dtype: torch.dtype) -> None:
    """Catches 0 / 0 in pruned rows or groups, and scales of zero or infinity, which verification refuses."""
    weight = torch.zeros(3, 8)
    weight[1, 4:] = torch.tensor([3.75, -1.0, 0.5, 0.25])
    weight[2] = 1e-9
    q4, first, second = quantize_weight_per_group_absmax(weight, 4, dtype)
    assert q4[0].tolist() == [0] * 8 and q4[1].tolist() == [0, 0, 0, 0, 7, -2, 1, 0]
    assert first.flatten().tolist() == [SMALLEST_SCALE, 0.03125, SMALLEST_SCALE]
    assert second[0].tolist() == [SMALLEST_SCALE_SECOND] * 2 and second[1].tolist() == [SMALLEST_SCALE_SECOND, 16.0]
    step = per_weight(first, second, 8)
    assert (np.abs(q4.numpy() * step - weight.numpy()) <= step * 0.5001).all()
    assert torch.equal(second.to(dtype).float(), second) and torch.equal(first.to(dtype).float(), first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_in_the_checkpoints_dtype(dtype: torch.dtype) -> None:
    """Catches steps computed in bfloat16, and the weight being written to."""
    weight = random_weight(3, 5, 32).to(dtype)
    before = weight.clone()
    ours = quantize_weight_per_group_absmax(weight, 16, dtype)
    assert all(map(torch.equal, ours, quantize_weight_per_group_absmax(weight.float(), 16, dtype)))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("group_size", [0, -4, 5, 24, 48])
def test_group_size_must_divide(group_size: int) -> None:
    """Catches a shorter last group, which engines do not support, and dropped columns."""
    with pytest.raises(ValueError, match=f"32 columns cannot be groups of {group_size}"):
        quantize_weight_per_group_absmax(torch.ones(2, 32), group_size, torch.bfloat16)
    with pytest.raises(ValueError, match="cannot be"):
        quantize_weight_per_group_absmax(torch.ones(2, 0), 8, torch.bfloat16)


def test_group_size_from_the_number_of_groups() -> None:
    """Catches a rounded group size, which drops the last columns, and a division by no groups."""
    assert group_size_of(96, 3) == 32 and group_size_of(96, 1) == 96
    for groups in (0, 5, 97):
        with pytest.raises(ValueError, match=f"96 columns cannot be {groups} groups"):
            group_size_of(96, groups)


# ---- packing ---------------------------------------------------------------------------------------------------------


def test_nibbles_of_known_bytes() -> None:
    """Catches swapped nibbles, rows paired as (i, i + N/2), columns paired, and signs other than two's complement."""
    q4 = torch.tensor([[1, -1, 7], [2, 0, -8], [-8, 3, -2], [-7, -5, 4]], dtype=torch.int8)
    expected = np.array([[0x21, 0x0F, 0x87], [0x98, 0xB3, 0x4E]], dtype=np.uint8)
    packed = pack_int4(q4)
    assert packed.dtype == torch.int8
    np.testing.assert_array_equal(packed.numpy().view(np.uint8), expected)
    assert unpack_int4(torch.from_numpy(expected.view(np.int8))).tolist() == q4.tolist()


def test_every_byte_survives() -> None:
    """Catches any pair of values that does not come back: all 256 of them."""
    packed = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).reshape(1, 256)
    q4 = unpack_int4(packed)
    assert sorted(zip(*q4.tolist(), strict=True)) == [(low, high) for low in range(-8, 8) for high in range(-8, 8)]
    assert torch.equal(pack_int4(q4), packed)


@given(seed=st.integers(0, 2**31), pairs=st.integers(0, 5), columns=st.integers(0, 9))
def test_packing_round_trip(seed: int, pairs: int, columns: int) -> None:
    """Catches shapes that are confused, and views: packing half the memory is the whole point."""
    q4 = random_q4(seed, 2 * pairs, columns)
    packed = pack_int4(q4)
    assert packed.shape == (pairs, columns) and packed.is_contiguous()
    assert torch.equal(unpack_int4(packed), q4)
    as_columns = q4.T.contiguous().T  # another order in memory
    assert torch.equal(pack_int4(as_columns), packed)


def test_what_cannot_be_packed_is_refused() -> None:
    """Catches a last row that is dropped, and values whose high bits would spill into the other row."""
    with pytest.raises(ValueError, match="even number of rows"):
        pack_int4(torch.zeros(3, 4, dtype=torch.int8))
    with pytest.raises(ValueError, match="expected int8"):
        pack_int4(torch.zeros(2, 4))
    for value in (8, -9):
        with pytest.raises(ValueError, match=r"is not within -8\.\.7"):
            pack_int4(torch.tensor([[0, 0], [value, 0]], dtype=torch.int8))
    with pytest.raises(ValueError, match="packed weights are int8"):
        unpack_int4(torch.zeros(2, 4, dtype=torch.int32))


# ---- scale_bias ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "group_size"), [(96, 96), (96, 8), (96, 6), (96, 32), (224, 32), (512, 64)])
def test_scale_bias_agrees_with_numpy(columns: int, group_size: int) -> None:
    """Catches parts across groups and groups across parts being mixed up, a lost factor 8, and sums in float32."""
    q4, random = random_q4(columns, 6, columns), np.random.default_rng(group_size)
    first = torch.from_numpy(random.uniform(1e-3, 1e-2, (6, 1)).astype(np.float32))
    second = torch.from_numpy(random.uniform(0.1, 17, (6, columns // group_size)).astype(np.float32))
    weight = q4.numpy() * per_weight(first, second, columns)  # [6, K]
    for row_parallel, parts in ((False, 1), (True, 16)):
        expected = 8 * weight.reshape(6, parts, columns // parts).sum(axis=2)
        ours = scale_bias(q4, first, second, row_parallel)
        assert ours.dtype == torch.float32 and ours.shape == (6, parts)
        np.testing.assert_allclose(ours.numpy(), expected, rtol=2e-7, atol=1e-12 * np.abs(expected).max())


def test_scale_bias_of_known_weights() -> None:
    """Catches both the code and the formula above being wrong in the same way: numbers worked out by hand."""
    q4 = torch.tensor([[1] * 16 + [-2] * 16, [7] * 32], dtype=torch.int8)
    first, second = torch.tensor([[0.5], [2.0]]), torch.tensor([[1.0, 3.0], [0.25, 0.25]])
    assert scale_bias(q4, first, second, row_parallel=False).tolist() == [[8 * (8 - 48)], [8 * 32 * 3.5]]
    by_parts = scale_bias(q4, first, second, row_parallel=True)  # two columns each
    assert by_parts.tolist() == [[8.0] * 8 + [-48.0] * 8, [56.0] * 16]


def test_scale_bias_cancels_in_float64() -> None:
    """Catches float32 sums: large groups cancel and the small one is all that is left."""
    q4 = torch.tensor([[7] * 16 + [-7] * 16 + [1] * 16], dtype=torch.int8)
    second = torch.tensor([[17.0, 17.0, 2.0**-14]])
    assert scale_bias(q4, torch.tensor([[1.0]]), second, row_parallel=False).item() == 8 * 16 * 2.0**-14


def test_scale_bias_needs_sixteenths() -> None:
    """Catches parts of different sizes being made up for a K that engines cannot cut."""
    q4 = torch.ones(2, 24, dtype=torch.int8)
    with pytest.raises(ValueError, match="24 columns cannot be cut into 16 parts"):
        scale_bias(q4, torch.ones(2, 1), torch.ones(2, 3), row_parallel=True)
    assert scale_bias(q4, torch.ones(2, 1), torch.ones(2, 3), row_parallel=False).tolist() == [[192.0]] * 2
