"""windowed_attention and mask_windows: which masks are windows, and equal numbers for every window."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.windowed_stage import DEPTH, HEADS, KINDS, WINDOWS, by_hand, mask_of
from vlqc.passes.split_window_attention import mask_windows, windowed_attention


@given(WINDOWS, st.sampled_from(KINDS), st.integers(0, 2))
def test_windows_are_read_off_the_mask(windows: list[int], kind: str, more: int) -> None:
    """Catches an end of a window that is one row off, a kind of mask that is not known, too many dimensions."""
    mask = mask_of(windows, kind)[0]
    assert mask_windows(mask[(None,) * more]) == windows


@given(WINDOWS, st.sampled_from(KINDS), st.data())
def test_any_other_value_is_no_window(windows: list[int], kind: str, data: st.DataObject) -> None:
    """Catches a mask that is almost block-diagonal and passes for it: one pair more or less would be lost."""
    mask = mask_of(windows, kind)
    row, column = (data.draw(st.integers(0, sum(windows) - 1)) for _ in range(2))
    value = mask[0, row, column]
    mask[0, row, column] = ~value if kind == "bool" else data.draw(st.sampled_from([-5.0, 1.0, torch.nan]))
    assert mask_windows(mask) == []


def test_pairs_that_change_places() -> None:
    """Catches a mask that passes for block-diagonal because it allows as many pairs, and neighbors the same way."""
    mask = mask_of([3, 3])[0]
    mask[0, 2] = mask[2, 0] = False
    mask[0, 5] = mask[5, 0] = True
    assert mask_windows(mask) == []


@pytest.mark.parametrize("shape", [(4,), (4, 5), (2, 4, 4), (0, 0)])
def test_masks_of_other_shapes(shape: tuple[int, ...]) -> None:
    """Catches a mask that differs between heads, or is not square, taken for one of windows."""
    assert mask_windows(torch.ones(shape, dtype=torch.bool)) == []


@given(WINDOWS, st.sampled_from([(HEADS,), (1, HEADS), (3, HEADS)]), st.integers(0, 9))
def test_equals_attention_under_the_mask(windows: list[int], leading: tuple[int, ...], seed: int) -> None:
    """Catches rows or samples that change places, and scores across windows; windows of one row, one window only."""
    random = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, *leading, sum(windows), DEPTH, generator=random)
    got = windowed_attention(q, k, v, windows)
    assert got.shape == q.shape
    torch.testing.assert_close(got.double(), by_hand(q, k, v, mask_of(windows)), rtol=1e-5, atol=1e-6)


def test_grouped_queries_and_scale() -> None:
    """Catches a `scale` or grouped heads that get lost on the way into the windows."""
    torch.manual_seed(0)
    q, (k, v) = torch.randn(1, 4, 9, DEPTH), torch.randn(2, 1, 2, 9, DEPTH)
    each_k, each_v = (it.repeat_interleave(2, 1) for it in (k, v))
    expected = by_hand(q * 0.5 * DEPTH**0.5, each_k, each_v, mask_of([4, 4, 1]))
    got = windowed_attention(q, k, v, [4, 4, 1], scale=0.5, enable_gqa=True)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
