"""Statistics of the keys and values at one attention call, and samples from which its output can be computed.

Notation: T kept tokens and Q kept queries of one sample, C = key-value heads * head size channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vlqc.ir.observation import row_weights


@dataclass(frozen=True)
class KeptAttention:
    """Attention of some queries of one sample over some of its tokens, in the order of the sample.

    key, value: float32 [T, C]; query: float32 [Q, heads of the queries * head size]; bias: float32 [Q, T], added to the
    scores, -inf where a query does not attend; modality: int8 [Q], index into `MODALITIES`; energy: float32 [Q], mean
    square of the stage's output for the token of the query; key_elsewhere, value_elsewhere: float32 [C], the largest
    magnitudes in all other observed samples, 0 without any.
    """

    key: Tensor
    value: Tensor
    query: Tensor
    bias: Tensor
    modality: Tensor
    energy: Tensor
    key_elsewhere: Tensor
    value_elsewhere: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        return dict(vars(self))


@dataclass(frozen=True)
class CacheObservation:
    """Exact ranges over all tokens at one attention call, padding aside, and a bounded selection of attention.

    scaling: factor of the scores; key_absmax, value_absmax: float32 [C], for keys what a rotary embedding can make of
    the observed ones at any position; rows: number of tokens per modality name; kept: of the selected samples, in
    order; balance: weight modalities equally, regardless of how many tokens each has;
    samples: number of samples observed.
    """

    scaling: float
    key_absmax: Tensor
    value_absmax: Tensor
    rows: Mapping[str, int] = field(default_factory=dict)
    kept: tuple[KeptAttention, ...] = ()
    balance: bool = True
    samples: int = 0

    @property
    def kept_rows(self) -> int:
        """Number of tokens whose keys and values are kept."""
        return sum(len(sample.key) for sample in self.kept)

    @property
    def kept_queries(self) -> int:
        return sum(len(sample.query) for sample in self.kept)

    def tensors(self) -> list[Tensor]:
        """Everything that it holds."""
        return [self.key_absmax, self.value_absmax, *(part for kept in self.kept for part in kept.tensors().values())]

    def query_weights(self) -> list[Tensor]:
        """Weight of an error in each kept query, float64 [Q] per kept sample, with sum 1; see `row_weights`."""
        sizes = [len(sample.query) for sample in self.kept]
        modality = torch.cat([sample.modality for sample in self.kept])
        energy = torch.cat([sample.energy for sample in self.kept])
        return list(torch.split(row_weights(modality, energy, balance=self.balance), sizes))

    def rescaled(self, divisor: Tensor) -> "CacheObservation":
        """The observation after every value is divided by `divisor` float32 [C] > 0, as by a fold."""
        kept = tuple(
            replace(sample, value=sample.value / divisor, value_elsewhere=sample.value_elsewhere / divisor)
            for sample in self.kept
        )
        return replace(self, value_absmax=self.value_absmax / divisor, kept=kept)
