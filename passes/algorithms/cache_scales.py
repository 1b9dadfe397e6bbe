"""Scales of quantized keys and values, chosen by the error of the attention's output on samples held out.

The scales of a key-value head cover the largest observed magnitude of each channel, or less (the largest values are
clipped), or more: in a few calibration samples the largest magnitude is smaller than in others. Which is best is not
visible on the samples that the ranges come from, where covering them exactly clips nothing. So every kept sample is
held out once: attention is computed with its keys and values rounded to scales from the ranges of all other samples,
for each of `RATIOS`. Per head first one ratio of the keys is chosen, then one of the values.

Another ratio than 1 is only taken if it reduces the error by `MARGIN`, and in each half of the samples and in each
modality: the error of few samples is dominated by few tokens. A ratio changes the range of a channel by a part of its
spread, half of the difference between its largest and smallest value, as a channel with a large bias varies little
around it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlqc.ir.cache_observation import CacheObservation
from vlqc.ir.observation import MODALITIES
from vlqc.kernels_ref.kv_cache import round_cache
from vlqc.kernels_ref.quantize import SMALLEST_SCALE, SMALLEST_SCALE_FLOAT16, round_up

RATIOS = (0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.35)  # of the range that is covered to the observed one
EXACT = RATIOS.index(1.0)
MARGIN = 0.03
MIN_SAMPLES = 4  # with fewer, ranges of the others are much smaller than those of all
DEAD_SCALE = 1.0  # of a channel that is always 0: any scale represents it


@dataclass(frozen=True)
class CacheScales:
    """key, value: float32 [C], values of the stage's dtype; signal, noise: weighted energy of the attention's output
    and of its error; held_out, covering_held_out: of its error in samples whose values do not count for the ranges, at
    the chosen ratios and at those of 1, both 0 without a search."""

    key: Tensor
    value: Tensor
    signal: float
    noise: float
    held_out: float = 0.0
    covering_held_out: float = 0.0

    @property
    def sqnr(self) -> float:
        """Signal-to-noise ratio of the attention's output in dB, infinite without noise."""
        return 10 * math.log10(self.signal / self.noise) if self.signal and self.noise else math.inf


def covering_scale(absmax: Tensor, largest: int, dtype: torch.dtype) -> Tensor:
    """absmax float32 [C] -> float32 [C]: the smallest scales of `dtype` that cover it in `largest` steps.

    DEAD_SCALE for channels that are always 0.
    """
    floor = SMALLEST_SCALE_FLOAT16 if dtype is torch.float16 else SMALLEST_SCALE
    scale = round_up((absmax / largest).clamp(min=floor), dtype).float()
    return torch.where(absmax > 0, scale.clamp(max=torch.finfo(dtype).max), DEAD_SCALE)


def join_scales(parts: Sequence[CacheScales]) -> CacheScales:
    """Those of all heads, in order."""
    return CacheScales(
        torch.cat([part.key for part in parts]),
        torch.cat([part.value for part in parts]),
        sum(part.signal for part in parts),
        sum(part.noise for part in parts),
        sum(part.held_out for part in parts),
        sum(part.covering_held_out for part in parts),
    )


@dataclass(frozen=True)
class _Sample:
    """One kept sample at one key-value head; G heads of the query read it.

    key, value: float32 [T, D]; key_elsewhere, value_elsewhere: float32 [D]; query: float32 [Q * G, D], scaled; bias:
    float32 [Q * G, T]; modality: int64 [Q * G]; weight: float64 [Q * G].
    """

    key: Tensor
    value: Tensor
    key_elsewhere: Tensor
    value_elsewhere: Tensor
    query: Tensor
    bias: Tensor
    modality: Tensor
    weight: Tensor

    def attention(self, key: Tensor) -> Tensor:
        """float32 [Q * G, T]: the weights with which queries read values."""
        return torch.softmax(self.query @ key.T + self.bias, -1)

    def noise(self, attention: Tensor, value: Tensor, output: Tensor) -> Tensor:
        """Weighted energy of the error of attention [Q * G, T] @ value [T, D], float64 per modality."""
        per_query = self.weight * (attention @ value - output).double().square().sum(1)
        return torch.zeros(len(MODALITIES), dtype=torch.float64).index_add_(0, self.modality, per_query)


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
                kept.key_elsewhere[own],
                kept.value_elsewhere[own],
                queries.flatten(0, 1) * observation.scaling,
                kept.bias.repeat_interleave(group, 0),
                kept.modality.long().repeat_interleave(group),
                weight.repeat_interleave(group),
            )


@dataclass(frozen=True)
class _Range:
    """Largest magnitude and spread of the channels of a head, float32 [D], and the integers that represent them."""

    absmax: Tensor
    spread: Tensor
    largest: int
    dtype: torch.dtype

    def scale(self, ratio: float) -> Tensor:
        """float32 [D]; at a ratio of 1 that of `covering_scale`."""
        return covering_scale(self.absmax + (ratio - 1) * self.spread, self.largest, self.dtype)


@torch.no_grad()
def choose_head_scales(
    observation: CacheObservation, heads: int, head: int, largest: int, dtype: torch.dtype, *, search: bool = True
) -> CacheScales:
    """Scales of one of `heads` key-value heads, float32 [D]. largest: integer; dtype: of the checkpoint; search:
    whether to choose ratios, for which MIN_SAMPLES samples must be kept; otherwise the scales cover what was observed.
    """
    part = _Head(observation, observation.query_weights(), heads, head)
    outputs = [sample.attention(sample.key) @ sample.value for sample in part.samples]
    ratios, held_out = [EXACT, EXACT], [0.0, 0.0]
    if search and len(part.samples) >= MIN_SAMPLES:
        ratios, held_out = _search(part, outputs, largest, dtype)
    key_spread = _spread([sample.key for sample in part.samples], part.size)
    value_spread = _spread([sample.value for sample in part.samples], part.size)
    key = _Range(part.key_absmax, key_spread, largest, dtype).scale(RATIOS[ratios[0]])
    value = _Range(part.value_absmax, value_spread, largest, dtype).scale(RATIOS[ratios[1]])
    signal = noise = 0.0
    for sample, output in zip(part.samples, outputs, strict=True):
        signal += float(sample.weight @ output.double().square().sum(1))
        attention = sample.attention(_rounded(sample.key, key))
        noise += float(sample.noise(attention, _rounded(sample.value, value), output).sum())
    return CacheScales(key, value, signal, noise, *held_out)


def _search(head: _Head, outputs: list[Tensor], largest: int, dtype: torch.dtype) -> tuple[list[int], list[float]]:
    """Indices of the ratios of keys and values, and the energies `held_out` and `covering_held_out`."""
    samples = head.samples
    key_spreads = _spreads_elsewhere([sample.key for sample in samples])
    value_spreads = _spreads_elsewhere([sample.value for sample in samples])
    of_keys, of_values, attentions = [], [], []
    for sample, output, spread, value_spread in zip(samples, outputs, key_spreads, value_spreads, strict=True):
        key = _Range(sample.key_elsewhere, spread, largest, dtype)
        covered = _rounded(sample.value, _Range(sample.value_elsewhere, value_spread, largest, dtype).scale(1.0))
        attention = [sample.attention(_rounded(sample.key, key.scale(ratio))) for ratio in RATIOS]
        of_keys.append(torch.stack([sample.noise(each, covered, output) for each in attention]))
        attentions.append(attention)
    best_key = best_ratio(torch.stack(of_keys, 1))
    for sample, output, spread, attention in zip(samples, outputs, value_spreads, attentions, strict=True):
        value = _Range(sample.value_elsewhere, spread, largest, dtype)
        rounded = (_rounded(sample.value, value.scale(ratio)) for ratio in RATIOS)
        of_values.append(torch.stack([sample.noise(attention[best_key], each, output) for each in rounded]))
    best_value = best_ratio(torch.stack(of_values, 1))
    held_out = sum(float(noise[best_value].sum()) for noise in of_values)
    return [best_key, best_value], [held_out, sum(float(noise[EXACT].sum()) for noise in of_keys)]


def best_ratio(noise: Tensor) -> int:
    """noise float64 [ratios, samples, modalities] -> index of the ratio that is taken."""
    turn = (torch.arange(noise.shape[1]) + 1) // 2 % 2  # 0 1 1 0 0 1 1 ...: both halves of samples in any order
    halves = [noise[:, turn == half].sum((1, 2)) for half in (0, 1)]
    total = noise.sum((1, 2))
    taken = total < (1 - MARGIN) * total[EXACT]
    for part in (*halves, *noise.sum(1).unbind(1)):
        taken &= part <= part[EXACT]
    return int(torch.where(taken, total, torch.inf).argmin()) if bool(taken.any()) else EXACT


def _spread(rows: Sequence[Tensor], size: int) -> Tensor:
    """Per sample float32 [T, D] -> [D]: half of the difference of the largest and the smallest value of a channel."""
    if not rows:
        return torch.zeros(size)
    joined = torch.cat(list(rows))
    return (joined.amax(0) - joined.amin(0)) / 2


def _spreads_elsewhere(rows: Sequence[Tensor]) -> list[Tensor]:
    """Per sample float32 [T, D] -> per sample the spread [D] in all others."""
    largest, smallest = torch.stack([each.amax(0) for each in rows]), torch.stack([each.amin(0) for each in rows])
    others = [[other for other in range(len(rows)) if other != each] for each in range(len(rows))]
    return [(largest[each].amax(0) - smallest[each].amin(0)) / 2 for each in others]


def _rounded(rows: Tensor, scale: Tensor) -> Tensor:
    """[T, D] quantized by scale [D] and back."""
    return round_cache(rows[None], scale, 1)[0]
