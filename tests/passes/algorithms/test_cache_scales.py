"""Scales of keys and values: representable, never worse than without clipping, and their error against NumPy."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.cache_stages import HEADS, KV_HEADS, SIZE, layer, numpy_attention
from tests.support.random_stage import through
from vlqc.ir.cache_observation import CacheObservation, KeptAttention
from vlqc.passes.algorithms.cache_scales import CacheScales, choose_head_scales, covering_scale, join_scales
from vlqc.passes.insert_observers import InsertObservers

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
ROWS = 24


def scales_of(observation: CacheObservation, dtype: torch.dtype = torch.bfloat16) -> CacheScales:
    return join_scales([choose_head_scales(observation, KV_HEADS, head, 127, dtype) for head in range(KV_HEADS)])


def random_observation(seed: int, outlier: float = 1.0, bias: float = 0.0) -> CacheObservation:
    """Of one sample whose tokens are all kept; one token is `outlier` times as large."""
    generator = torch.Generator().manual_seed(seed)
    key, value, query = (torch.randn(ROWS, heads * SIZE, generator=generator) for heads in (KV_HEADS, KV_HEADS, HEADS))
    key[3] *= outlier
    value[3] *= outlier
    key[:, 5] += bias
    causal = torch.full((ROWS, ROWS), -torch.inf).triu(1)
    kept = KeptAttention(key, value, query, causal, torch.zeros(ROWS, dtype=torch.int8), torch.ones(ROWS))
    return CacheObservation(SIZE**-0.5, key.abs().amax(0), value.abs().amax(0), {"text": ROWS}, (kept,))


@DTYPES
def test_scales_are_positive_and_representable(dtype: torch.dtype) -> None:
    """A scale that changes when it is stored, or that is 0 for a channel that is always 0."""
    observation = random_observation(0)
    absmax = observation.key_absmax.clone()
    absmax[:3] = torch.tensor([0.0, 1e-30, 1e30])
    scales = scales_of(replace(observation, key_absmax=absmax), dtype)
    for scale in (scales.key, scales.value):
        assert scale.dtype == torch.float32 and torch.equal(scale.to(dtype).float(), scale)
        assert bool((scale > 0).all()) and bool(scale.to(dtype).reciprocal().isfinite().all())
    assert scales.key[0] == 1.0


@DTYPES
def test_covering_scales_clip_nothing(dtype: torch.dtype) -> None:
    """A scale rounded down, with which the largest value is beyond 127."""
    absmax = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 100 + 1e-3
    scale = covering_scale(absmax, 127, dtype)
    assert bool((127 * scale >= absmax).all()) and bool((127 * scale <= absmax * 1.01).all())


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), outlier=st.sampled_from([1.0, 4.0, 30.0]), bias=st.sampled_from([0.0, 50.0]))
def test_never_worse_than_without_clipping(seed: int, outlier: float, bias: float) -> None:
    """A clip chosen by an approximation that is not compared with the measured error."""
    scales = scales_of(random_observation(seed, outlier, bias))
    assert 0 < scales.noise <= scales.unclipped_noise


def test_clipping_helps_where_one_token_is_large() -> None:
    """A search that always returns the covering scales."""
    observation = random_observation(1, outlier=1.0)
    (kept,) = observation.kept
    kept.value[3, 2] = 2.5 * float(observation.value_absmax[2])
    kept.bias[:, 3] = -torch.inf  # no query reads that token
    largest = kept.value.abs().amax(0)
    scales = scales_of(replace(observation, value_absmax=largest))
    assert scales.value[2] < covering_scale(largest, 127, torch.bfloat16)[2]


@pytest.mark.parametrize("bias", [0.0, 60.0])
def test_error_against_numpy(bias: float) -> None:
    """SQNR of another quantity than the attention's output with both rounded, or weights that do not sum to 1."""
    observation = random_observation(2, 3.0, bias)
    scales, (kept,) = scales_of(observation), observation.kept

    def rounded(rows: np.ndarray, which: str) -> np.ndarray:
        part, head = which.split()
        scale = (scales.key if part == "key" else scales.value).reshape(KV_HEADS, SIZE)[int(head)].numpy()
        return np.clip(np.rint(rows.astype(np.float32) * (1 / scale)), -128, 127).astype(np.float64) * scale

    heads = [part.reshape(1, ROWS, -1, SIZE).transpose(1, 2) for part in (kept.query, kept.key, kept.value)]
    expected = numpy_attention(heads[0], heads[1], heads[2], lambda rows, _: rows)
    actual = numpy_attention(heads[0], heads[1], heads[2], rounded)
    signal, noise = (expected**2).sum(1).mean(), ((actual - expected) ** 2).sum(1).mean()
    assert abs(scales.signal / signal - 1) < 1e-4 and abs(scales.noise / noise - 1) < 1e-2
    assert abs(scales.sqnr - 10 * math.log10(signal / noise)) < 0.05


def test_large_key_biases_cost_more() -> None:
    """SQNR that does not fall where the range of a channel is spent on its mean."""
    plain, biased = (
        scales_of(next(iter(through(layer(key_bias=bias), InsertObservers(caches=True)).cache_observations.values())))
        for bias in (0.0, 300.0)
    )
    assert plain.sqnr > 35 and biased.sqnr < plain.sqnr - 15


def test_no_error_is_infinite() -> None:
    """A logarithm of 0 for attention that is exact, or whose values are all 0."""
    ones = torch.ones(1)
    assert CacheScales(ones, ones, 1.0, 0.0, 0.0).sqnr == CacheScales(ones, ones, 0.0, 0.0, 0.0).sqnr == math.inf
