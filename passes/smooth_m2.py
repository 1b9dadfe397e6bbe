"""smooth-m2: outlier suppression for multimodal models, by a range search on every edge that channel flow finds.

The idea (Outlier Suppression+, arXiv 2304.09145): only channels that reach beyond a range r are scaled down, by just
as much as brings them to r. r is searched. Here the loss is the expected error of the consumers' outputs, in closed
form from statistics of all samples, and the best few candidates are confirmed on real rows.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlqc.engines import Scheme
from vlqc.flow import find_edges
from vlqc.ir import Edge, Observation, Site, Stage
from vlqc.passes import folding
from vlqc.passes.error_model import ROWS_OF_INPUT, balanced, expected_error, measured_error, representative_rows
from vlqc.pipeline import Pass

SMALLEST_RANGE = 1e-3  # of the largest value: below it every channel would be an outlier


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
        stage.edges = find_edges(stage.live, stage.graph)
        folds = []
        for edge in stage.edges:
            scale = self._search(stage, edge)
            producer = stage.live.get_submodule(edge.producer)
            scale = folding.representable(producer, edge.usable, scale, stage.dtype)
            if bool((scale != 1).any()):
                folds.append(folding.Fold(edge, scale))
        folding.apply(stage, folds)
        return True

    def _search(self, stage: Stage, edge: Edge) -> Tensor:
        """float32 [C]: the scale of an edge; 1 where there is nothing to gain."""
        sites = quantized_consumers(stage, edge)
        one = torch.ones(edge.usable.shape[0])
        if not sites:
            return one
        site = sites[0]
        seen, channel = stage.observations[site.source], edge.consumers[site.target]
        weight = representative_rows([stage.linear(member).weight for member in sites])
        low, high = seen.minimum(), seen.maximum()
        scales = range_candidates(*per_channel(low, high, channel, one.shape[0]), self.candidates)  # [R, C]
        columns = torch.where(channel >= 0, scales[:, channel.clamp(min=0)], 1.0)  # [R, K]
        expected = expected_error(low, high, seen.second_moment(), weight, columns)
        best = expected.argsort(stable=True)[: self.confirm].tolist()
        if 0 not in best:
            best.append(0)  # candidate 0 leaves everything as it is
        rows, row_weight = _some_rows(seen)
        measured = [measured_error(rows, row_weight, weight, columns[number], low, high) for number in best]
        return scales[best[measured.index(min(measured))]]


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
    """float32 [count, C]: scales that bring channels beyond r down to r, for falling r; the first one is all ones."""
    largest = float(torch.maximum(high.abs(), low.abs()).amax())
    if largest == 0.0:
        return torch.ones(1, low.shape[0])
    shares = torch.logspace(0, torch.log10(torch.tensor(SMALLEST_RANGE)).item(), count)
    ranges = (shares * largest)[:, None]  # [count, 1]
    return torch.maximum(high / ranges, -low / ranges).clamp(min=1.0)


def _some_rows(seen: Observation) -> tuple[Tensor, Tensor]:
    step = max(1, -(-seen.kept.shape[0] // ROWS_OF_INPUT))
    return seen.kept[::step], balanced(seen.kept_modality[::step])
