"""Scales of quantized keys and values, chosen by the error of the attention's output.

Per channel of a key-value head there are two candidates: the scale that covers every observed value, and a smaller one
that clips the largest values and rounds the others more finely. The latter minimizes the expected error of the
attention's output to first order, with rounding errors that are independent between tokens and channels. With attention
p_qt and outputs o_q = sum_t p_qt v_t, an error dk of a key in one channel, and dv of a value, change the output by

    p_qt (v_t - o_q) q dk scaling        p_qt dv

so that errors of keys are weighted by sum_q w_q p_qt^2 |v_t - o_q|^2 q^2, and those of values by sum_q w_q p_qt^2.

Attention is then computed with the rounded keys and values on the kept samples: per head with both candidates of the
keys, and per channel with both of the values. What gives the smallest error is taken, so that the measured error is
never larger than without clipping.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlqc.ir.cache_observation import CacheObservation
from vlqc.kernels_ref.kv_cache import round_cache
from vlqc.kernels_ref.quantize import SMALLEST_SCALE, SMALLEST_SCALE_FLOAT16, round_up

CLIP_RATIOS = tuple(1 - step / 20 for step in range(13))  # 1 .. 0.4 of the largest magnitude
DEAD_SCALE = 1.0  # of a channel that is always 0: any scale represents it


@dataclass(frozen=True)
class CacheScales:
    """key, value: float32 [C], values of the stage's dtype; signal, noise: weighted energy of the attention's output
    and of its error; unclipped_noise: the latter with scales that cover every observed value."""

    key: Tensor
    value: Tensor
    signal: float
    noise: float
    unclipped_noise: float

    @property
    def sqnr(self) -> float:
        """Signal-to-noise ratio of the attention's output in dB, infinite without noise."""
        return 10 * math.log10(self.signal / self.noise) if self.signal and self.noise else math.inf


def covering_scale(absmax: Tensor, largest: int, dtype: torch.dtype, ratio: float = 1.0) -> Tensor:
    """absmax float32 [C] -> float32 [C]: the smallest scales of `dtype` that cover `ratio` of it in `largest` steps.

    DEAD_SCALE for channels that are always 0.
    """
    floor = SMALLEST_SCALE_FLOAT16 if dtype is torch.float16 else SMALLEST_SCALE
    scale = round_up((absmax * ratio / largest).clamp(min=floor), dtype).float()
    return torch.where(absmax > 0, scale.clamp(max=torch.finfo(dtype).max), DEAD_SCALE)


def join_scales(parts: Sequence[CacheScales]) -> CacheScales:
    """Those of all heads, in order."""
    return CacheScales(
        torch.cat([part.key for part in parts]),
        torch.cat([part.value for part in parts]),
        sum(part.signal for part in parts),
        sum(part.noise for part in parts),
        sum(part.unclipped_noise for part in parts),
    )


@dataclass(frozen=True)
class _Sample:
    """One kept sample at one key-value head; G heads of the query read it.

    key, value: float32 [T, D]; query: float32 [Q * G, D], scaled; bias: float32 [Q * G, T]; weight: float64 [Q * G].
    """

    key: Tensor
    value: Tensor
    query: Tensor
    bias: Tensor
    weight: Tensor

    def attention(self, key: Tensor) -> Tensor:
        """float32 [Q * G, T]: the weights with which queries read values."""
        return torch.softmax(self.query @ key.T + self.bias, -1)


class _Head:
    """The kept samples at one key-value head. key_absmax, value_absmax: float32 [D]."""

    def __init__(self, observation: CacheObservation, weights: list[Tensor], heads: int, head: int) -> None:
        size = observation.key_absmax.shape[0] // heads
        own = slice(head * size, (head + 1) * size)
        self.size, self.key_absmax, self.value_absmax = size, observation.key_absmax[own], observation.value_absmax[own]
        self.samples = list(self._samples(observation, weights, heads, head))

    def _samples(
        self, observation: CacheObservation, weights: list[Tensor], heads: int, head: int
    ) -> Iterator[_Sample]:
        own = slice(head * self.size, (head + 1) * self.size)
        for kept, weight in zip(observation.kept, weights, strict=True):
            queries = kept.query.reshape(len(kept.query), heads, -1, self.size)[:, head]  # [Q, G, D]
            group = queries.shape[1]
            yield _Sample(
                kept.key[:, own],
                kept.value[:, own],
                queries.flatten(0, 1) * observation.scaling,
                kept.bias.repeat_interleave(group, 0),
                weight.repeat_interleave(group),
            )


@torch.no_grad()
def choose_head_scales(
    observation: CacheObservation, heads: int, head: int, largest: int, dtype: torch.dtype, *, clip: bool = True
) -> CacheScales:
    """Scales of one of `heads` key-value heads, float32 [D]. largest: integer; dtype: of the checkpoint; clip: whether
    scales may clip observed values."""
    part = _Head(observation, observation.query_weights(), heads, head)
    attention = [sample.attention(sample.key) for sample in part.samples]
    outputs = [weights @ sample.value for weights, sample in zip(attention, part.samples, strict=True)]
    signal = sum(
        float(sample.weight @ output.double().square().sum(1))
        for sample, output in zip(part.samples, outputs, strict=True)
    )
    key_weights, value_weights = _error_weights(part, attention, outputs)
    keys = _candidates(part.key_absmax, [sample.key for sample in part.samples], key_weights, largest, dtype)
    values = _candidates(part.value_absmax, [sample.value for sample in part.samples], value_weights, largest, dtype)
    if not clip:
        keys, values = keys[:1], values[:1]
    noise = torch.stack([_noise(part, key, values, outputs) for key in keys])  # [keys, values, D]
    best_value = noise.argmin(1)  # [keys, D]
    totals = noise.amin(1).sum(1)
    best = int(totals.argmin())
    value = torch.stack(values).gather(0, best_value[best][None])[0]
    return CacheScales(keys[best], value, signal, float(totals[best]), float(noise[0, 0].sum()))


def _error_weights(head: _Head, attention: list[Tensor], outputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Per sample the weights of squared errors of keys, float32 [T, D], and of values, float32 [T, 1]."""
    of_keys, of_values = [], []
    for sample, weights, output in zip(head.samples, attention, outputs, strict=True):
        squared = weights.square() * sample.weight.float()[:, None]  # [Q * G, T]
        of_values.append(squared.sum(0)[:, None])
        distance = sample.value.square().sum(1) - 2 * output @ sample.value.T + output.square().sum(1)[:, None]
        of_keys.append((squared * distance.clamp(min=0)).T @ sample.query.square())
    return of_keys, of_values


def _candidates(
    absmax: Tensor, rows: list[Tensor], weights: list[Tensor], largest: int, dtype: torch.dtype
) -> list[Tensor]:
    """The scales [D] that cover all values, then those that minimize the weighted error of each channel.

    rows: per sample float32 [T, D]; weights: of the squared errors, float32 [T, D] or [T, 1].
    """
    scales = torch.stack([covering_scale(absmax, largest, dtype, ratio) for ratio in CLIP_RATIOS])  # [R, D]
    errors = torch.zeros(scales.shape, dtype=torch.float64)
    for number, scale in enumerate(scales):
        for values, weight in zip(rows, weights, strict=True):
            errors[number] += ((_rounded(values, scale) - values).square() * weight).sum(0)
    return [scales[0], scales.gather(0, errors.argmin(0)[None])[0]]


def _noise(head: _Head, key: Tensor, values: list[Tensor], outputs: list[Tensor]) -> Tensor:
    """Weighted energy of the output's error, float64 [values, D], with keys rounded by `key`, for each of `values`."""
    noise = torch.zeros(len(values), head.size, dtype=torch.float64)
    for sample, output in zip(head.samples, outputs, strict=True):
        attention = sample.attention(_rounded(sample.key, key))
        for number, scale in enumerate(values):
            error = attention @ _rounded(sample.value, scale) - output
            noise[number] += sample.weight @ error.double().square()
    return noise


def _rounded(rows: Tensor, scale: Tensor) -> Tensor:
    """[T, D] quantized by scale [D] and back."""
    return round_cache(rows[None], scale, 1)[0]
