"""Attention in three dimensions, run as in four."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attention

from vlqc.ir.execution import FusedAttention

HEADS, ROWS, DEPTH = 4, 37, 16


@pytest.mark.parametrize("mask", [None, "2-D bool", "3-D bool", "3-D float"])
@pytest.mark.parametrize("by_name", [False, True])
def test_same_numbers(mask: str | None, by_name: bool) -> None:
    """Catches a mask applied to the wrong dimension, and keyword arguments that are ignored."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, HEADS, ROWS, DEPTH, generator=generator)
    allowed = torch.rand(ROWS, ROWS, generator=generator) > 0.4
    allowed.fill_diagonal_(True)
    masks = {
        None: None,
        "2-D bool": allowed,
        "3-D bool": allowed[None],
        "3-D float": torch.where(allowed, 0.0, -torch.inf)[None],
    }
    scores = q @ k.mT / DEPTH**0.5
    if mask is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    expected = scores.softmax(-1) @ v
    with FusedAttention():
        if by_name:
            got = attention(query=q, key=k, value=v, attn_mask=masks[mask])
        else:
            got = attention(q, k, v, masks[mask], dropout_p=0.0)
    assert got.shape == (HEADS, ROWS, DEPTH)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_four_dimensions_stay_as_they_are() -> None:
    """Catches a batch that is lost: other attention calls must not be touched."""
    q, k, v = torch.randn(3, 2, HEADS, ROWS, DEPTH)
    with FusedAttention():
        assert torch.equal(attention(q, k, v), attention(q, k, v))
        assert attention(q, k, v).shape == (2, HEADS, ROWS, DEPTH)


def test_scores_are_never_written_out() -> None:
    """Catches a form of the call for which PyTorch has no fused kernel after all."""
    q = torch.randn(HEADS, ROWS, DEPTH)
    mask = torch.ones(1, ROWS, ROWS, dtype=torch.bool)
    with torch.profiler.profile() as profile, FusedAttention():
        attention(q, q, q, mask)
    called = {event.key for event in profile.key_averages()}
    assert any("flash" in name for name in called) and "aten::_scaled_dot_product_attention_math" not in called
