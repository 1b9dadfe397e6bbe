"""The digests by which changed tensors are noticed, and the small computations of the IR's types."""

from operator import attrgetter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.small_stage import traced
from vlqc.ir.execution import first_tensor
from vlqc.ir.snapshot import WEIGHT_PARTS, summarize
from vlqc.ir.stage import RENAMED, WeightQuantization, observe
from vlqc.ir.tensor_digest import absmax, digest, fingerprint, fingerprints

BYTES = st.binary(min_size=1, max_size=200)


def tensor_of(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@given(BYTES, st.data())
def test_one_flipped_bit_shows(data: bytes, choose: st.DataObject) -> None:
    """A rewrite that changes one bit of one weight and is not seen."""
    bit = choose.draw(st.integers(0, 8 * len(data) - 1))
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    assert fingerprint(tensor_of(data)) != fingerprint(tensor_of(bytes(changed)))


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=40), st.data())
def test_swapped_words_show(words: list[int], choose: st.DataObject) -> None:
    """Two exchanged pieces leave every sum of the words as it is."""
    first, second = choose.draw(st.lists(st.integers(0, len(words) - 1), min_size=2, max_size=2, unique=True))
    changed = words.copy()
    changed[first], changed[second] = words[second], words[first]
    same = words[first] == words[second]
    assert (fingerprint(torch.tensor(words)) == fingerprint(torch.tensor(changed))) == same


def test_words_far_apart_show() -> None:
    """Long tensors are taken in chunks: words swapped between chunks, and whole chunks swapped, must show."""
    chunk = 1 << 16
    words = torch.arange(3 * chunk)
    fingerprints = {fingerprint(words)}
    swapped = words.clone()
    swapped[[5, chunk + 5]] = words[[chunk + 5, 5]]
    fingerprints.add(fingerprint(swapped))
    fingerprints.add(fingerprint(words.reshape(3, chunk)[[1, 0, 2]]))
    assert len(fingerprints) == 3


@given(BYTES)
def test_the_complement_shows(data: bytes) -> None:
    """A shift that copies the sign bit gives a word and its complement the same digest."""
    assert fingerprint(tensor_of(data)) != fingerprint(~tensor_of(data))


def test_lengths_show() -> None:
    """Zeros at the end, as in padding to whole words, must not be equal to nothing."""
    assert len({fingerprint(torch.zeros(length, dtype=torch.uint8)) for length in range(40)}) == 40


def test_many_at_a_time_are_the_same() -> None:
    """Catches digests that depend on other tensors, or are stored under another name."""
    tensors = {str(number): torch.full((number, 3), float(number)) for number in range(20)}
    assert fingerprints(tensors) == {name: fingerprint(tensor) for name, tensor in tensors.items()}


@given(
    st.lists(st.binary(min_size=8, max_size=8), min_size=1, max_size=20).map(b"".join),
    st.sampled_from([torch.int8, torch.bfloat16, torch.float64]),
)
def test_only_bytes_count(data: bytes, dtype: torch.dtype) -> None:
    """Catches digests that depend on dtype, shape or memory layout instead of bytes alone."""
    plain = tensor_of(data)
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), plain])[3:]  # begins in the middle of a word
    transposed = plain.reshape(-1, 4).T.contiguous().T
    assert not transposed.is_contiguous() or transposed.shape[0] == 1
    known = fingerprint(plain)
    assert fingerprint(plain.view(dtype)) == known
    assert fingerprint(shifted) == known
    assert fingerprint(plain.reshape(2, -1)) == known
    assert fingerprint(transposed) == known


def test_digest_against_python_integers() -> None:
    """Pins the arithmetic: golden texts hold these digits, on every machine and torch version."""
    words = [1, -1, 2**63 - 1, -(2**63), 12345678901234567]
    total, mask = 8 * len(words), 2**64 - 1
    summed = 0
    for index, word in enumerate(words, start=1):
        mixed = ((word & mask) ^ ((word & mask) >> 29)) * (index * 0x9E3779B97F4A7C1 * 2 + 1) & mask
        summed += mixed ^ (mixed >> 32)
    expected = (total * 1000003 + summed) & (2**63 - 1)
    assert fingerprint(torch.tensor(words)) == expected
    assert digest(torch.tensor(words)) == f"{expected:016x}"[-8:]


def test_digest_of_several_depends_on_their_order() -> None:
    """Minimum and maximum exchanged must show in an observation's digest."""
    one, two = torch.ones(3), torch.zeros(3)
    assert len({digest(one, two), digest(two, one), digest(one), digest(two)}) == 4


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.tensor([-128, 127], dtype=torch.int8), 128.0),  # abs() of int8 gives -128
        (torch.tensor([True, False]), 1.0),  # abs() of bool is an error
        (torch.tensor([-0.0]), 0.0),
        (torch.tensor([1.0, -torch.inf]), float("inf")),
        (torch.empty(0, 4), 0.0),
        (torch.tensor([-3.5, 2.0], dtype=torch.bfloat16), 3.5),
    ],
)
def test_absmax(tensor: torch.Tensor, expected: float) -> None:
    """Each is a value that the plain formula gets wrong or stops at."""
    assert absmax(tensor) == expected and str(absmax(tensor)) == str(expected)
    assert summarize(tensor).absmax == expected


def test_absmax_of_nan_is_nan() -> None:
    """A NaN that a comparison skips would hide from the text."""
    assert np.isnan(absmax(torch.tensor([1.0, float("nan"), 2.0])))


def test_weight_parts() -> None:
    """Catches a printer that omits a tensor of a weight, or a digest that ignores the group scales."""
    integers, scale, group_scale = torch.zeros(2, 4), torch.ones(2, 1), torch.ones(2, 2)
    assert WeightQuantization(integers, scale).tensors() == [integers, scale]
    in_groups = WeightQuantization(integers, scale, group_scale).tensors()
    assert [id(tensor) for tensor in in_groups] == [id(integers), id(scale), id(group_scale)]
    assert len(WEIGHT_PARTS) == 3


def test_small_functions() -> None:
    """`observe` must hand on the very tensor; hidden states come first in tuples and mappings."""
    value = torch.ones(2)
    assert observe(value) is value
    assert first_tensor(value) is first_tensor((None, value)) is first_tensor({"a": value}) is value


def test_renamed_attributes_still_work() -> None:
    """Catches a pass written for 0.1 that fails on attributes that have moved."""
    stage = traced()
    with pytest.warns(DeprecationWarning, match=r"Stage\.module"):
        assert stage.live is stage.module
    with pytest.warns(DeprecationWarning):
        assert torch.equal(stage.run_probe(), stage.execution.probe_output().flatten())
    for name in ("calls", "outputs", "probe", "world"):
        with pytest.warns(DeprecationWarning):
            assert getattr(stage, name) is attrgetter(RENAMED[name])(stage)
    with pytest.warns(DeprecationWarning):
        assert stage.run == stage.execution.forward
    assert not hasattr(stage, "nonsense")
