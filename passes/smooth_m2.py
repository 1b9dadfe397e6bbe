"""smooth-m2: outlier suppression for multimodal models, by a range search on every edge that channel flow finds.

The idea (Outlier Suppression+, arXiv 2304.09145): only channels that reach beyond a range r are scaled down, by just
as much as brings them to r. r is searched. Here the loss is the expected error of the consumers' outputs, in closed
form from statistics of all samples, and the best few candidates are confirmed on real rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlqc.engines import Scheme
from vlqc.flow import find_edges
from vlqc.ir import Edge, Site, Stage
from vlqc.passes import folding
from vlqc.passes.error_model import (
    balanced,
    expected_error,
    measured_error,
    representative_inputs,
    representative_rows,
)
from vlqc.passes.insert_observers import observed
from vlqc.pipeline import Pass

SMALLEST_RANGE = 1e-3  # of the largest value: channels that differ by more are not worth more


@dataclass(frozen=True)
class SmoothM2(Pass):
    """Folds searched scales into the producers.

    candidates: ranges tried per edge; confirm: how many of the best are compared on real rows.
    """

    name: ClassVar[str] = "smooth-m2"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "rewrite"
    summary: ClassVar[str] = "search per-channel scales that tame outliers and fold them into the producers"

    candidates: int = 96
    confirm: int = 4

    def run(self, stage: Stage) -> bool:
        known, stage.edges = stage.edges, find_edges(stage.live, stage.graph)
        folds, rescaled = [], set[str]()
        for edge in stage.edges:
            sites = quantized_consumers(stage, edge)
            sources = list(dict.fromkeys(site.source for site in sites))
            if not sites or rescaled.intersection(sources):  # scaled twice, it would go by what is no longer so
                continue
            readers = [self._reader(stage, edge, [it for it in sites if it.source == source]) for source in sources]
            producer = stage.live.get_submodule(edge.producer)
            scale = folding.representable(producer, edge.usable, self._search(readers), stage.dtype)
            if bool((scale != 1).any()):
                folds.append(folding.Fold(edge, scale))
                rescaled.update(sources)
        proven = folding.apply(stage, folds)
        return bool(proven) or known is None or _facts(known) != _facts(stage.edges)

    def _reader(self, stage: Stage, edge: Edge, sites: list[Site]) -> "Reader":
        seen = observed(stage, sites[0].source, self.name)
        index = representative_inputs(seen.kept_modality)
        return Reader(
            channel=edge.consumers[sites[0].target],
            channels=edge.usable.shape[0],
            low=seen.minimum(),
            high=seen.maximum(),
            second_moment=seen.second_moment(),
            rows=seen.kept[index],
            row_weight=balanced(seen.kept_modality[index]),
            weight=representative_rows([stage.linear(site).weight for site in sites]),
        )

    def _search(self, readers: "list[Reader]") -> Tensor:
        """float32 [C]: the best scale of an edge; 1 where there is nothing to gain."""
        lows, highs = zip(*(per_channel(it.low, it.high, it.channel, it.channels) for it in readers), strict=True)
        scales = range_candidates(torch.stack(lows).amin(0), torch.stack(highs).amax(0), self.candidates)  # [R, C]
        expected = torch.stack([reader.expected_error(scales) for reader in readers]).sum(0)
        best = expected.argsort(stable=True)[: self.confirm].tolist()
        if 0 not in best:
            best.append(0)  # candidate 0 leaves everything as it is
        measured = [sum(reader.measured_error(scales[number]) for reader in readers) for number in best]
        return scales[best[measured.index(min(measured))]]


@dataclass(frozen=True)
class Reader:
    """Consumers that read the same node, as a search sees them; channel: int64 [K], see ir.Edge.consumers."""

    channel: Tensor
    channels: int
    low: Tensor  # [K]
    high: Tensor  # [K]
    second_moment: Tensor  # [K]
    rows: Tensor  # [T, K]
    row_weight: Tensor  # [T]
    weight: Tensor  # [N, K]

    def columns(self, scales: Tensor) -> Tensor:
        """[..., C] -> [..., K]"""
        return torch.where(self.channel >= 0, scales[..., self.channel.clamp(min=0)], 1.0)

    def expected_error(self, scales: Tensor) -> Tensor:
        return expected_error(self.low, self.high, self.second_moment, self.weight, self.columns(scales))

    def measured_error(self, scale: Tensor) -> float:
        return measured_error(self.rows, self.row_weight, self.weight, self.columns(scale), self.low, self.high)


def quantized_consumers(stage: Stage, edge: Edge) -> list[Site]:
    """The consumers that are to be quantized; before a precision is assigned, all of them."""
    sites = [stage.site_at(target) for target in edge.consumers]
    return [site for site in sites if site.scheme != Scheme.FLOAT]


def per_channel(low: Tensor, high: Tensor, channel: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Ranges per column [K] -> per producer channel [C]: the extremes of all columns that a channel feeds."""
    feeds = channel >= 0
    index = channel[feeds]
    lowest = torch.zeros(channels).scatter_reduce(0, index, low[feeds], "amin", include_self=False)
    highest = torch.zeros(channels).scatter_reduce(0, index, high[feeds], "amax", include_self=False)
    return lowest, highest


def range_candidates(low: Tensor, high: Tensor, count: int) -> Tensor:
    """float32 [count, C]: scales that bring channels beyond r down to r, for falling r; the first one is all ones.

    r falls to the range of the smallest channel, as below it all channels would only shrink together.
    """
    peaks = torch.maximum(high, -low).clamp(min=0.0)
    largest = float(peaks.amax())
    if largest == 0.0:
        return torch.ones(1, low.shape[0])
    smallest = max(SMALLEST_RANGE, float(peaks[peaks > 0].amin()) / largest)
    shares = torch.logspace(0, math.log10(smallest), count, dtype=torch.float64).float()  # alike on all machines
    return (peaks / (shares * largest)[:, None]).clamp(min=1.0)


def _facts(edges: Sequence[Edge]) -> list[tuple[str, list[bool], dict[str, list[int]]]]:
    return [
        (edge.producer, edge.usable.tolist(), {target: columns.tolist() for target, columns in edge.consumers.items()})
        for edge in edges
    ]
