"""kernels_ref.rotation against dense matrices in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.rotation_matrices import rotation_matrix
from vlqc.kernels_ref import rotation
from vlqc.kernels_ref.rotation import Rotation, hadamard_orders, paley_matrix, sylvester_matrix

# Sizes of heads and hidden states of the supported families -> orders of their Sylvester and Paley matrices.
MODEL_SIZES = {
    64: (64, 1),
    80: (4, 20),
    128: (128, 1),
    576: (16, 36),
    896: (32, 28),
    1024: (1024, 1),
    1152: (32, 36),
    1280: (64, 20),
    1536: (128, 12),
    2048: (2048, 1),
    3584: (128, 28),
    5120: (256, 20),
}


def random_rows(rows: int, size: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(size).standard_normal((rows, size), dtype=np.float32))


@pytest.mark.parametrize(("size", "orders"), MODEL_SIZES.items())
def test_sizes_of_models_are_mixed_completely(size: int, orders: tuple[int, int]) -> None:
    """Catches an order that is not found: such a size would fall back to small blocks."""
    assert hadamard_orders(size) == orders
    assert Rotation(size, 0, "residual").blocks == 1


@pytest.mark.parametrize(("size", "blocks"), [(1, 1), (97, 97), (75, 75), (30, 15), (1176, 147), (4304, 269)])
def test_sizes_without_a_hadamard_matrix_are_divided_into_blocks(size: int, blocks: int) -> None:
    """Catches odd sizes and such without a Paley matrix, whose blocks are the largest power of two."""
    assert Rotation(size, 0, "residual").blocks == blocks


@pytest.mark.parametrize("order", [12, 20, 28, 36, 76, 104, 140, 148])
def test_paley_matrices_are_hadamard_matrices(order: int) -> None:
    """Catches a wrong construction: 76 and 148 are of Paley's second one only."""
    h = paley_matrix(order).astype(np.float64)
    assert set(np.unique(h)) == {-1, 1}
    np.testing.assert_array_equal(h @ h.T, order * np.eye(order))


def test_orders_without_a_paley_matrix_are_refused() -> None:
    """Catches an order that is neither q + 1 nor 2 (q + 1) being built from a composite number."""
    for order in (18, 40, 92):
        with pytest.raises(ValueError, match="no Paley matrix"):
            paley_matrix(order)


@pytest.mark.parametrize("keeps_mean", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4, 7, 30, 64, 80, 97, 128, 576, 896, 1152])
def test_rotation_is_the_defined_matrix(size: int, keeps_mean: bool) -> None:
    """Catches wrong signs, factors in another order, R^T instead of R, and a reflection that is not one."""
    r = rotation_matrix(size, 7, "residual", keeps_mean)
    x = random_rows(9, size)
    rotated = Rotation(size, 7, "residual", keeps_mean)
    np.testing.assert_allclose(rotated.rotate(x).numpy(), x.double().numpy() @ r, rtol=0, atol=3e-6)
    np.testing.assert_allclose(rotated.unrotate(x).numpy(), x.double().numpy() @ r.T, rtol=0, atol=3e-6)
    np.testing.assert_allclose(
        rotated.rotate_columns_(x.T.clone()).numpy(), r.T @ x.double().numpy().T, rtol=0, atol=3e-6
    )


@settings(max_examples=40)
@given(size=st.integers(1, 700), keeps_mean=st.booleans(), seed=st.integers(0, 2**40))
def test_rotation_is_orthogonal(size: int, keeps_mean: bool, seed: int) -> None:
    """Catches sizes whose factors do not multiply to the size, and means or norms that change."""
    rotated = Rotation(size, seed, "heads", keeps_mean)
    matrix = rotated.rotate(torch.eye(size)).double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(rotated.unrotate(matrix).double(), torch.eye(size).double(), rtol=0, atol=1e-5)
    if keeps_mean:
        torch.testing.assert_close(rotated.rotate(torch.ones(size)), torch.ones(size), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [3584, 5120])
@pytest.mark.parametrize("keeps_mean", [False, True])
def test_large_rotations_spread_one_channel_evenly(size: int, keeps_mean: bool) -> None:
    """Catches a rotation that leaves an outlier in few channels, or one whose inverse loses more than rounding."""
    rotated = Rotation(size, 1, "residual", keeps_mean)
    x = torch.zeros(3, size)
    x[0, 5] = x[1, size - 1] = x[2, 0] = 1
    y = rotated.rotate(x)
    assert float(y.abs().max()) <= (5 if keeps_mean else 1.0001) / math.sqrt(size)
    torch.testing.assert_close(rotated.unrotate(y), x, rtol=0, atol=1e-6)


def test_other_names_and_seeds_have_other_signs() -> None:
    """Catches a name or a seed that is not used, where all heads would share one rotation."""
    x = torch.ones(64)
    results = [Rotation(64, seed, name).rotate(x) for seed in (0, 1) for name in ("head 0", "head 1")]
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


@pytest.mark.parametrize("keeps_mean", [False, True])
def test_same_bytes_for_all_threads_and_pieces(keeps_mean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches sums whose order depends on the number of threads or on how a tensor is divided."""
    rotated = Rotation(1280, 3, "residual", keeps_mean)
    x = random_rows(600, 1280)
    threads = torch.get_num_threads()
    results = []
    try:
        for count, piece_bytes in ((1, 2**21), (2, 2**21), (2, 2**19), (1, 2**27)):
            torch.set_num_threads(count)
            monkeypatch.setattr(rotation, "CPU_PIECE_BYTES", piece_bytes)
            results.append((rotated.rotate(x), rotated.unrotate(x), rotated.rotate_columns_(x.T.clone())))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


def test_forms_in_place_write_to_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a copy being rotated instead of the weight, and pieces that miss rows or columns."""
    monkeypatch.setattr(rotation, "CPU_PIECE_BYTES", 4 * 80 * 3)
    rotated = Rotation(80, 3, "head 1")
    weight = random_rows(13, 240)
    expected = weight.clone()
    expected[:, 80:160] = rotated.rotate(weight[:, 80:160])
    changed = weight.clone()
    rotated.rotate_(changed[:, 80:160])
    torch.testing.assert_close(changed, expected, rtol=0, atol=0)
    rotated.rotate_(changed.view(13, 3, 80)[:, ::2])
    expected.view(13, 3, 80)[:, ::2] = rotated.rotate(weight.view(13, 3, 80)[:, ::2])
    torch.testing.assert_close(changed, expected, rtol=0, atol=0)
    written = weight.T.clone()  # [240, 13]
    rotated.rotate_columns_(written[80:160])
    torch.testing.assert_close(written[80:160], rotated.rotate(weight[:, 80:160]).T, rtol=0, atol=1e-6)
    assert torch.equal(written[160:], weight.T[160:]) and torch.equal(written[:80], weight.T[:80])
    convolution = weight.T[:80].reshape(80, 13, 1).clone()
    assert torch.equal(rotated.rotate_columns_(convolution)[..., 0], rotated.rotate_columns_(weight.T[:80].clone()))
    assert torch.equal(rotated.rotate_columns_(weight[0, :80].clone()), rotated.rotate(weight[0, :80]))


def test_input_dtypes_and_empty_inputs() -> None:
    """Catches sums in bfloat16 or float64 results, and no rows."""
    rotated = Rotation(64, 3, "residual")
    x = random_rows(5, 64)
    assert torch.equal(rotated.rotate(x.double()), rotated.rotate(x))
    assert torch.equal(rotated.rotate(x.bfloat16()), rotated.rotate(x.bfloat16().float()))
    assert rotated.rotate(x[:0]).shape == (0, 64)
    assert rotated.rotate_columns_(x.T[:, :0]).shape == (64, 0)


def test_other_sizes_and_dtypes_are_refused() -> None:
    """Catches a tensor of another size being rotated in parts, and one of integers or half precision in place."""
    rotated = Rotation(64, 3, "residual")
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        rotated.rotate(torch.zeros(2, 128))
    with pytest.raises(ValueError, match=r"got torch\.int8"):
        rotated.rotate(torch.zeros(2, 64, dtype=torch.int8))
    with pytest.raises(ValueError, match="in place"):
        rotated.rotate_(torch.zeros(2, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="expected"):
        rotated.rotate_columns_(torch.zeros(128, 2))
    with pytest.raises(ValueError, match="positive"):
        Rotation(0, 3, "residual")


def test_sylvester_matrix_is_its_definition() -> None:
    """Catches another order of the rows, of which other implementations of the same rotation know nothing."""
    expected = [[(-1) ** (i & j).bit_count() for j in range(32)] for i in range(32)]
    np.testing.assert_array_equal(sylvester_matrix(32), expected)
