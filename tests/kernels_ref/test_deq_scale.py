"""kernels_ref.deq_scale against `struct`, bit by bit."""

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlqc.kernels_ref.deq_scale import decode_deq_scale, encode_deq_scale

finite = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20)


def float32_bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


@given(finite)
def test_round_trip_is_exact(values: list[float]) -> None:
    """Catches a conversion by value instead of by bits, and lost signs, zeros of either sign or subnormals."""
    scales = torch.tensor(values, dtype=torch.float32)
    for dtype, stored in ((torch.bfloat16, torch.float32), (torch.float16, torch.int64)):
        encoded = encode_deq_scale(scales, dtype)
        assert encoded.dtype == stored
        assert torch.equal(decode_deq_scale(encoded).view(torch.int32), scales.view(torch.int32))


@given(finite)
def test_int64_form_is_the_zero_extended_pattern(values: list[float]) -> None:
    """Catches sign extension, a swapped half, and bits of another float format."""
    encoded = encode_deq_scale(torch.tensor(values, dtype=torch.float32), torch.float16)
    assert encoded.tolist() == [float32_bits(value) for value in values]


@given(finite)
def test_truncation_keeps_19_bits(values: list[float]) -> None:
    """Catches rounding instead of truncation and a wrong number of dropped bits."""
    encoded = encode_deq_scale(torch.tensor(values, dtype=torch.float32), torch.float16)
    truncated = [float32_bits(value) for value in decode_deq_scale(encoded, truncate=True).tolist()]
    assert truncated == [float32_bits(value) >> 13 << 13 for value in values]


def test_known_values() -> None:
    """Catches the whole encoding being consistent but different from the engines': 1.0 is 0x3F800000."""
    assert encode_deq_scale(torch.tensor([1.0, 0.1]), torch.float16).tolist() == [0x3F800000, 0x3DCCCCCD]
    high_half = torch.tensor([(7 << 32) | 0x3F800000])
    assert decode_deq_scale(high_half).tolist() == [1.0]
    assert decode_deq_scale(torch.tensor([0x3F801FFF]), truncate=True).tolist() == [1.0]
    just_above_one = torch.tensor([1.0 + 2.0**-20])
    assert torch.equal(decode_deq_scale(just_above_one, truncate=True), just_above_one)  # float32 is used in full


def test_encoded_tensor_is_a_copy() -> None:
    """Catches two layers of a group that share memory, which safetensors refuses to write."""
    scales = torch.ones(2)
    assert encode_deq_scale(scales, torch.bfloat16).data_ptr() != scales.data_ptr()


def test_other_dtypes_are_refused() -> None:
    """Catches a float32 checkpoint or a half-precision deq_scale getting a form that no engine reads."""
    with pytest.raises(ValueError, match="bfloat16 and float16 only"):
        encode_deq_scale(torch.ones(1), torch.float32)
    with pytest.raises(ValueError, match="must be float32"):
        encode_deq_scale(torch.ones(1, dtype=torch.bfloat16), torch.bfloat16)
    with pytest.raises(ValueError, match="float32 or int64"):
        decode_deq_scale(torch.ones(1, dtype=torch.float16))
