"""Weights that are scaled in place are restored with all their bits."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlqc.ir.memory import file_backed, is_file_backed
from vlqc.passes.algorithms.reversible_scaling import ROWS_PER_STEP, scaled

EDGES = [0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000]  # up to subnormal, largest, inf, NaN
PATTERNS = st.integers(0, 2**32 - 1) | st.sampled_from(EDGES + [bits | 1 << 31 for bits in EDGES])
FACTORS = st.floats(width=32, allow_nan=False) | st.floats(2**-8, 2**8, width=32)


@settings(max_examples=200)
@given(
    patterns=st.lists(PATTERNS, min_size=6, max_size=6),
    factors=st.lists(FACTORS, min_size=3, max_size=3),
    by_row=st.booleans(),
    divide=st.booleans(),
)
def test_every_bit_pattern_is_restored(patterns: list[int], factors: list[float], by_row: bool, divide: bool) -> None:
    """Catches a correction that wraps, and values that are not restored after an overflow or a division by zero."""
    bits = torch.tensor(patterns).to(torch.int32).reshape((3, 2) if by_row else (2, 3))
    weight = bits.clone().view(torch.float32)
    factor = torch.tensor(factors)[:, None] if by_row else torch.tensor(factors)
    expected = weight / factor if divide else weight * factor
    scaling = scaled(weight, factor, divide=divide)
    assert torch.equal(weight.view(torch.int32), expected.view(torch.int32))
    scaling.undo()
    assert torch.equal(weight.view(torch.int32), bits)


@pytest.mark.parametrize("in_file", [False, True])
def test_scalings_are_undone_with_a_byte_per_weight(in_file: bool, tmp_path: Path) -> None:
    """Catches copies of ordinary weights, steps restored with another step's factors, and a file read into memory."""
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(2 * ROWS_PER_STEP + 5, 40, generator=generator) * 0.02
    weight = (file_backed(original.shape, torch.float32, tmp_path) if in_file else torch.empty_like(original)).copy_(
        original
    )
    columns, rows = (2 ** torch.empty(size).uniform_(-8, 8, generator=generator) for size in (40, len(original)))
    scalings = [scaled(weight, columns), scaled(weight, rows[:, None], divide=True)]
    torch.testing.assert_close(weight, original * columns / rows[:, None])
    for scaling in reversed(scalings):
        assert scaling.corrections.dtype == torch.int8 and not scaling.copies
        assert is_file_backed(scaling.corrections) == in_file
        scaling.undo()
    assert torch.equal(weight, original)
