"""Scales of keys and values: representable, chosen on samples held out, and their error against NumPy."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.cache_stages import HEADS, KV_HEADS, SIZE, Array, layer, numpy_attention
from tests.support.random_stage import through
from vlqc.ir.cache_observation import CacheObservation, KeptAttention
from vlqc.passes.algorithms.cache_observer import SampleCache, merge_caches
from vlqc.passes.algorithms.cache_scales import (
    RATIOS,
    CacheScales,
    best_ratio,
    choose_head_scales,
    covering_scale,
    join_scales,
)
from vlqc.passes.insert_observers import InsertObservers

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
ROWS = 24


def scales_of(
    observation: CacheObservation, dtype: torch.dtype = torch.bfloat16, *, search: bool = True
) -> CacheScales:
    heads = range(KV_HEADS)
    return join_scales([choose_head_scales(observation, KV_HEADS, head, 127, dtype, search=search) for head in heads])


def rounding(key: Tensor, value: Tensor) -> Callable[[Array, str], Array]:
    """Rounds keys or values [S, D] of one head with the scales float32 [C], as `numpy_attention` calls it."""

    def rounded(rows: Array, which: str) -> Array:
        part, head = which.split()
        scale = (key if part == "key" else value).reshape(KV_HEADS, SIZE)[int(head)].numpy()
        return np.clip(np.rint(rows.astype(np.float32) * (1 / scale)), -128, 127).astype(np.float64) * scale

    return rounded


def random_observation(seed: int, outlier: float = 1.0, bias: float = 0.0, samples: int = 4) -> CacheObservation:
    """Of samples whose tokens are all kept, alternately of text and of images; in each, one token is `outlier` times as
    large."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for sample in range(samples):
        rows = [torch.randn(ROWS, heads * SIZE, generator=generator) for heads in (KV_HEADS, KV_HEADS, HEADS)]
        rows[0][3] *= outlier
        rows[1][3] *= outlier
        rows[0][:, 5] += bias
        causal = torch.full((ROWS, ROWS), -torch.inf).triu(1)
        modality = torch.full((ROWS,), sample % 2, dtype=torch.int8)
        none = torch.zeros(KV_HEADS * SIZE)
        kept = KeptAttention(*rows, causal, modality, torch.ones(ROWS), none, none)
        absmax = (part.abs().amax(0) for part in rows[:2])
        one = CacheObservation(SIZE**-0.5, *absmax, {"text": ROWS, "image": 0, "video": 0}, (kept,))
        parts.append(SampleCache(sample, one, torch.arange(ROWS)))
    return merge_caches(parts)


def with_value(observation: CacheObservation, channel: int, factors: list[float]) -> CacheObservation:
    """The largest value of a channel in each sample, at a token that no query reads, is that factor times its others'
    largest."""
    rows = {"text": ROWS, "image": 0, "video": 0}
    parts = []
    for number, (kept, factor) in enumerate(zip(observation.kept, factors, strict=True)):
        value, bias = kept.value.clone(), kept.bias.clone()
        value[3, channel] = factor * float(kept.value[:, channel].abs().max())
        bias[:, 3] = -torch.inf
        kept = replace(kept, value=value, bias=bias)
        absmax = (part.abs().amax(0) for part in (kept.key, value))
        one = CacheObservation(observation.scaling, *absmax, rows, (kept,))
        parts.append(SampleCache(number, one, torch.arange(ROWS)))
    return merge_caches(parts)


@DTYPES
def test_scales_are_positive_and_representable(dtype: torch.dtype) -> None:
    """A scale that changes when it is stored, or that is 0 for a channel that is always 0."""
    observation = random_observation(0)
    for kept in observation.kept:
        kept.key[:, 0] = kept.key_elsewhere[0] = 0.0
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


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 1000), outlier=st.sampled_from([1.0, 4.0, 30.0]), bias=st.sampled_from([0.0, 50.0]))
def test_never_worse_than_covering_where_held_out(seed: int, outlier: float, bias: float) -> None:
    """A choice by another error than the one on samples that do not count for the ranges."""
    scales = scales_of(random_observation(seed, outlier, bias))
    assert 0 < scales.held_out <= scales.covering_held_out


def test_held_out_error_against_numpy() -> None:
    """Ranges of a sample that include its own values, or an error of other scales than those that cover the others."""
    observation = random_observation(4)
    parts = [choose_head_scales(observation, KV_HEADS, head, 127, torch.bfloat16) for head in range(KV_HEADS)]
    expected = 0.0
    for number, kept in enumerate(observation.kept):
        others = [each for other, each in enumerate(observation.kept) if other != number]
        scale = {
            name: covering_scale(torch.cat([getattr(each, name) for each in others]).abs().amax(0), 127, torch.bfloat16)
            for name in ("key", "value")
        }
        heads = [part.reshape(1, ROWS, -1, SIZE).transpose(1, 2) for part in (kept.query, kept.key, kept.value)]
        exact = numpy_attention(heads[0], heads[1], heads[2], lambda rows, _: rows)
        rounded = numpy_attention(heads[0], heads[1], heads[2], rounding(scale["key"], scale["value"]))
        expected += ((rounded - exact) ** 2).sum() / (ROWS * len(observation.kept))
    assert abs(sum(part.covering_held_out for part in parts) / expected - 1) < 1e-2


def test_a_range_of_one_sample_is_extended() -> None:
    """Scales that cover the observed values only, where the values of every sample exceed those of all others."""
    observation = random_observation(5)
    kept = [replace(part, value=part.value * (1 + number / 2)) for number, part in enumerate(observation.kept)]
    observation = with_value(replace(observation, kept=tuple(kept)), 0, [1.0] * 4)
    scales = scales_of(observation)
    covering = scales_of(observation, search=False)
    assert scales.held_out < 0.9 * scales.covering_held_out and covering.held_out == covering.covering_held_out == 0
    assert bool((scales.value > 1.03 * covering.value).any()) and bool((scales.value >= covering.value).all())


def test_values_that_no_query_reads_are_clipped() -> None:
    """A search that never clips: one value per channel, 1.35 times the others, takes a quarter of the integers."""
    observation = random_observation(6)
    same = [replace(observation.kept[0], modality=kept.modality) for kept in observation.kept]
    observation = replace(observation, kept=tuple(same))
    for channel in range(KV_HEADS * SIZE):
        observation = with_value(observation, channel, [1.35] * 4)
    scales, covering = scales_of(observation), scales_of(observation, search=False)
    assert bool((scales.value < 0.95 * covering.value).all())
    assert scales.held_out < 0.9 * scales.covering_held_out and scales.noise < covering.noise


def test_few_samples_are_covered() -> None:
    """A choice by ranges of one or two samples, which are much smaller than those of all."""
    for samples in (1, 3):
        observation = random_observation(7, samples=samples)
        scales = scales_of(observation)
        assert torch.equal(scales.key, covering_scale(observation.key_absmax, 127, torch.bfloat16))
        assert torch.equal(scales.value, covering_scale(observation.value_absmax, 127, torch.bfloat16))


@pytest.mark.parametrize("part", ["a half", "a modality"])
def test_every_half_and_modality_must_improve(part: str) -> None:
    """A ratio that is better in total, by one part of the samples alone."""
    noise = torch.zeros(len(RATIOS), 8, 3, dtype=torch.float64)
    noise[:, :, :2] = 1.0
    noise[5, :, :2] = 0.9
    assert best_ratio(noise) == 5
    noise[2] = 0.0
    chosen = (slice(None), 1) if part == "a modality" else ([1, 2, 5, 6], slice(0, 2))
    noise[2][chosen] = 1.01
    assert noise[2].sum() < noise[5].sum() and best_ratio(noise) == 5
    noise[5, :, :2] = 0.98  # less than the margin
    assert best_ratio(noise) == RATIOS.index(1.0)


@pytest.mark.parametrize("bias", [0.0, 60.0])
def test_error_against_numpy(bias: float) -> None:
    """SQNR of another quantity than the attention's output with both rounded, or weights that do not sum to 1."""
    observation = random_observation(2, 3.0, bias, samples=1)
    scales, (kept,) = scales_of(observation), observation.kept
    heads = [part.reshape(1, ROWS, -1, SIZE).transpose(1, 2) for part in (kept.query, kept.key, kept.value)]
    expected = numpy_attention(heads[0], heads[1], heads[2], lambda rows, _: rows)
    actual = numpy_attention(heads[0], heads[1], heads[2], rounding(scales.key, scales.value))
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
    assert CacheScales(ones, ones, 1.0, 0.0).sqnr == CacheScales(ones, ones, 0.0, 0.0).sqnr == math.inf
