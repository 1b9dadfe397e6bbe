"""Observers of keys and values: exact ranges of all tokens, and a bounded selection of tokens and queries.

Whole samples are kept as long as they fit, because the output of attention depends on all tokens before a query. What
is kept depends only on the shapes of the samples, never on values or on which process runs a sample.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vlqc.errors import Fault, UserError
from vlqc.ir.cache_observation import CacheObservation, KeptAttention
from vlqc.ir.execution import Call, SampleShape
from vlqc.ir.observation import MODALITIES, modality_of_rows, of_images
from vlqc.ir.stage import CacheSite
from vlqc.passes.algorithms.observer import check_magnitude, sample_quota, split_evenly, spread_positions

MIN_SAMPLES = 4  # a single long sample does not take the whole budget
QUERIES = 256  # of all kept samples: bounds the time of computing attention again


@dataclass(frozen=True)
class Kept:
    """What is kept of one sample: at most `rows` tokens, and queries per modality index."""

    rows: int
    queries: Mapping[int, int]


@dataclass(frozen=True)
class SampleCache:
    """Statistics of one sample at one attention call; an observation of one sample. index: positions of its queries."""

    sample: int
    statistics: CacheObservation
    index: Tensor


def plan_kept(shapes: Sequence[SampleShape], budget: int) -> dict[int, Kept]:
    """What to keep of which samples, by sample index, at most `budget` tokens in all.

    Samples with the same modalities are a class. Classes take turns, and in each the samples are evenly spread.
    """
    most = max(1, budget // min(MIN_SAMPLES, max(1, len(shapes))))
    chosen, used = list[SampleShape](), 0
    for shape in _alternating(shapes):
        rows = min(sum(shape.rows_per_modality), most)
        if rows and used + rows <= budget:
            chosen.append(shape)
            used += rows
    kept = [0] * len(MODALITIES)
    plan = {}
    for shape, keep in zip(chosen, split_evenly(QUERIES, len(chosen)), strict=True):
        quota = sample_quota(shape.rows_per_modality, keep, kept)
        for modality, rows in quota.items():
            kept[modality] += min(rows, shape.rows_per_modality[modality])
        plan[shape.sample] = Kept(most, quota)
    return plan


def _alternating(shapes: Sequence[SampleShape]) -> list[SampleShape]:
    """The samples in an order of which every beginning is evenly spread over all samples and their classes."""
    classes: dict[tuple[bool, ...], list[SampleShape]] = {}
    for shape in shapes:
        classes.setdefault(tuple(rows > 0 for rows in shape.rows_per_modality), []).append(shape)
    spread = [[members[position] for position in _bisecting(len(members))] for members in classes.values()]
    return [shape for turn in itertools.zip_longest(*spread) for shape in turn if shape is not None]


def _bisecting(count: int) -> list[int]:
    """0 .. count - 1 so that every beginning is evenly spread: by the bits of the position in reverse order."""
    bits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda position: f"{position:0{bits}b}"[::-1])


@dataclass
class CacheObserver:
    """Records the arguments of the attention call of one cache site, sample by sample.

    plan: of `plan_kept`; balance: as in `CacheObservation`; partners: of the keys, see `rotary_partners`.
    """

    site: CacheSite
    plan: Mapping[int, Kept]
    balance: bool
    partners: Tensor
    samples: list[SampleCache] = field(default_factory=list)

    def __call__(self, arguments: Mapping[str, Any], call: Call) -> None:
        """UserError for values that are not finite, and for attention that is not that of a decoder layer."""
        if self.samples and self.samples[-1].sample == call.sample:
            raise self._fault("it computes attention more than once", call)
        key, value = (self._per_token(arguments[name], name, call) for name in ("key", "value"))  # [rows, C]
        query = arguments["query"]
        rows = query.shape[-2] * (query.shape[0] if query.ndim == 4 else 1)
        if len(key) != rows or len(value) != rows:
            raise self._fault(f"{rows} queries attend to {len(key)} tokens", call)
        modality = modality_of_rows(call.modality, rows)
        modality = of_images(rows) if modality is None else modality.cpu()
        tokens = (modality >= 0).nonzero().flatten()
        statistics = CacheObservation(
            scaling=float(arguments.get("scale") or query.shape[-1] ** -0.5),
            key_absmax=_absmax(_reach(key, self.partners), tokens),
            value_absmax=_absmax(value, tokens),
            rows={name: int((modality == number).sum()) for number, name in enumerate(MODALITIES)},
            balance=self.balance,
            samples=1,
        )
        index = torch.empty(0, dtype=torch.int64)
        if (plan := self.plan.get(call.sample)) is not None:
            tokens = tokens[spread_positions(len(tokens), plan.rows)]
            index = _chosen_queries(tokens, modality, plan.queries)
            kept = KeptAttention(
                key[tokens.to(key.device)].cpu(),
                value[tokens.to(value.device)].cpu(),
                _flat(query)[index.to(query.device)].float().cpu(),
                attention_bias(arguments, index, tokens),
                modality[index],
                torch.ones(len(index)),
                torch.zeros(key.shape[1]),
                torch.zeros(key.shape[1]),
            )
            statistics = replace(statistics, kept=(kept,))
        self.samples.append(SampleCache(call.sample, statistics, index))

    def _per_token(self, tensor: Tensor, what: str, call: Call) -> Tensor:
        """[B, heads, S, D] or [heads, S, D] -> float32 [B * S, C], without the copies for the heads of the query."""
        check_magnitude(tensor, f"the {what} of {self.site.name}", self.site.name, call.sample)
        group = tensor.shape[-3] // self.site.heads
        return _flat(tensor[..., ::group, :, :]).float()

    def _fault(self, why: str, call: Call) -> UserError:
        what, fix = f"the keys and values of {self.site.name} cannot be observed", "compile without a quantized cache"
        return UserError(Fault(what, f"sample {call.sample}", why, fix))

    def samples_with_energy(self, energies: Mapping[int, Tensor]) -> list[SampleCache]:
        """The samples with the energies of their queries; energies: per sample index the `row_energy` of the output."""
        return [
            replace(sample, statistics=replace(sample.statistics, kept=tuple(self._with_energy(sample, energies))))
            for sample in self.samples
        ]

    @staticmethod
    def _with_energy(sample: SampleCache, energies: Mapping[int, Tensor]) -> list[KeptAttention]:
        energy = energies[sample.sample]
        return [replace(kept, energy=energy[sample.index]) for kept in sample.statistics.kept]


def _absmax(rows: Tensor, tokens: Tensor) -> Tensor:
    """float32 [C] on the CPU: per channel of rows [B * S, C] at these positions; 0 without any."""
    chosen = rows[tokens.to(rows.device)]
    return chosen.abs().amax(0).cpu() if len(chosen) else torch.zeros(rows.shape[1])


def _reach(key: Tensor, partners: Tensor) -> Tensor:
    """float32 [rows, C]: the largest magnitude that each channel of the keys has when the token is at any position.

    A rotary embedding rotates a channel and its partner, int64 [C], by an angle that grows with the position, for some
    pairs over thousands of tokens: a range that one channel does not reach at the observed positions, it does later.
    """
    partners = partners.to(key.device)
    alone = partners == torch.arange(len(partners), device=key.device)
    return torch.where(alone, key.abs(), torch.hypot(key, key[:, partners]))


def _flat(tensor: Tensor) -> Tensor:
    """[B, heads, S, D] or [heads, S, D] -> [B * S, heads * D]."""
    return tensor.detach().movedim(-3, -2).flatten(-2).reshape(-1, tensor.shape[-3] * tensor.shape[-1])


def _chosen_queries(tokens: Tensor, modality: Tensor, quota: Mapping[int, int]) -> Tensor:
    """Ascending positions int64 [Q] among the kept tokens: evenly spread per modality, always including the last one,
    which attends to most tokens."""
    chosen = [torch.empty(0, dtype=torch.int64)]
    for number, count in quota.items():
        members = tokens[modality[tokens] == number]
        chosen.append(members[len(members) - 1 - spread_positions(len(members), count)])
    return torch.cat(chosen).sort().values


def attention_bias(arguments: Mapping[str, Any], queries: Tensor, tokens: Tensor) -> Tensor:
    """What an attention call adds to the scores, float32 [Q, T]: -inf where a query does not attend.

    arguments: of the call, by name, with queries [B, heads, S, D] or [heads, S, D]; a mask is that of all heads.
    queries, tokens: int64, positions among B * S.
    """
    length = arguments["query"].shape[-2]
    same = queries[:, None] // length == tokens[None, :] // length  # [Q, T]: of the same batch entry
    bias = torch.zeros(len(queries), len(tokens))
    mask = arguments.get("attn_mask")
    if isinstance(mask, Tensor):
        mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)  # [B or 1, heads or 1, S or 1, S]
        entry = (queries // length).clamp(max=mask.shape[0] - 1)
        row = (queries % length).clamp(max=mask.shape[-2] - 1)  # one row for all queries
        selected = mask[:, 0][
            entry[:, None].to(mask.device), row[:, None].to(mask.device), (tokens % length).to(mask.device)
        ]
        if selected.dtype == torch.bool:
            bias[~selected.cpu()] = -torch.inf
        else:
            lowest = torch.finfo(selected.dtype).min
            bias = torch.where(selected <= lowest, -torch.inf, selected.float()).cpu()
    elif arguments.get("is_causal"):
        bias[tokens[None, :] > queries[:, None]] = -torch.inf
    bias[~same] = -torch.inf
    return bias


def merge_caches(samples: Sequence[SampleCache]) -> CacheObservation:
    """Merges samples, in order. Raises ValueError without any."""
    parts = [sample.statistics for sample in samples]
    rows = {name: sum(part.rows[name] for part in parts) for name in MODALITIES}
    keys, key_absmax = _without_each([part.key_absmax for part in parts])
    values, value_absmax = _without_each([part.value_absmax for part in parts])
    kept = tuple(
        replace(each, key_elsewhere=key, value_elsewhere=value)
        for part, key, value in zip(parts, keys, values, strict=True)
        for each in part.kept
    )
    return CacheObservation(
        parts[0].scaling,
        key_absmax,
        value_absmax,
        {name: count for name, count in rows.items() if count},
        kept,
        parts[0].balance,
        len(parts),
    )


def _without_each(absmax: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Per sample float32 [C] -> per sample the maximum over all others, 0 without any, and the maximum over all."""
    stacked = torch.stack([*absmax, torch.zeros_like(absmax[0])])
    first, second = stacked.topk(2, 0).values
    return [torch.where(own == first, second, first) for own in absmax], first
