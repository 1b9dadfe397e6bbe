"""The distribution of a token budget over images, and the shapes of images: properties of every case."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlqc.frontend.calibration.image_budget import fit_grid, split_budget

RATIO = 200
TOKENS = st.lists(st.integers(4, 400), min_size=1, max_size=6)


@given(TOKENS, st.integers(-5, 1500), st.integers(1, 8))
def test_every_budget_is_kept(tokens: list[int], budget: int, least: int) -> None:
    """Catches limits above the budget or above the image's size, unequal limits, and tokens left unused."""
    shares = split_budget(tokens, budget, least)
    limit = max(n for n in range(-1, 401) if n < 0 or sum(min(count, n) for count in tokens) <= budget)
    if sum(tokens) <= budget:
        assert shares == tokens
    elif limit < least:
        assert shares is None
    else:
        assert shares == [min(count, limit) for count in tokens]


def test_shares_by_hand() -> None:
    """Catches a mistake that the property test repeats."""
    assert split_budget([400, 6, 100], 106, 4) == [50, 6, 50]
    assert split_budget([4, 4, 4], 11, 4) is None
    assert split_budget([4, 4, 4], 12, 4) == [4, 4, 4]


@given(st.floats(math.log(1 / 200), math.log(200)), st.integers(4, 2000), st.integers(1, 4))
def test_every_grid_fits(log_ratio: float, most: int, least: int) -> None:
    """Catches grids that are too large, too small, too elongated for the image processor, or distorted."""
    rows, columns = fit_grid(math.exp(log_ratio), least, most, RATIO)
    assert least <= rows * columns <= most
    assert max(rows, columns) <= RATIO * min(rows, columns)
    if most >= 1000 and abs(log_ratio) < 1:
        assert abs(math.log(rows / columns) - log_ratio) < 0.1 and rows * columns > 0.9 * most


def test_grids_by_hand() -> None:
    """Catches swapped rows and columns."""
    assert fit_grid(0.5, 4, 8, RATIO) == (2, 4)
    assert fit_grid(2.0, 4, 8, RATIO) == (4, 2)
    assert fit_grid(150.0, 4, 10, RATIO) == (10, 1)
    with pytest.raises(ValueError, match="between 4 and 3"):
        fit_grid(1.0, 4, 3, RATIO)
