"""smooth-m2: outlier suppression for multimodal models, by a range search on every edge that channel flow finds.

The idea (Outlier Suppression+, arXiv 2304.09145): only channels that reach beyond a range r are scaled down, by just
as much as brings them to r. r is searched. Here channels below r need not keep a scale of one: given r, the noise that
a channel's own two roundings leave is least where its scale is the fourth root of its mean square over that of the
weights it meets, and the search also finds how far to go there. The loss is the expected error of the consumers'
outputs, in closed form from statistics of all samples, and the best few candidates are confirmed on real rows.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlqc.ir.stage import Stage
from vlqc.passes.algorithms import folding
from vlqc.passes.algorithms.error_model import Rounding, WeightMethod
from vlqc.passes.algorithms.smoothing_search import SearchedEdge, find_stage_edges, searched_edges
from vlqc.pipeline.pass_api import Pass, require

SMALLEST_RANGE = 1e-3  # of the largest value: channels that differ by more are not worth more
FLOORS = (0.0, 0.5, 0.75, 1.0, 1.25)  # exponents of the scales that balance each channel's noise: 0 leaves them at one


@dataclass(frozen=True)
class SmoothM2(Pass):
    """Folds searched scales into the producers.

    candidates: ranges tried per edge and floor; confirm: how many of the best are compared on real rows; clip: whether
    activation ranges will be clipped where that pays; weights: how weights will be rounded.
    """

    name: ClassVar[str] = "smooth-m2"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "rewrite"
    summary: ClassVar[str] = "search per-channel scales that tame outliers and fold them into the producers"
    after: ClassVar[tuple[str, ...]] = ("insert-observers",)
    before: ClassVar[tuple[str, ...]] = ("quantize-activations", "quantize-weights", "lower-linears")

    candidates: int = 20
    confirm: int = 4
    clip: bool = True
    weights: WeightMethod = "auto"

    def __post_init__(self) -> None:
        require(self.candidates >= 1 and self.confirm >= 1, "candidates and confirm must be 1 or more")

    def run(self, stage: Stage) -> bool:
        changed = find_stage_edges(stage)
        edges = {edge.producer: edge for edge in stage.edges or ()}
        found = stage.execution.process_group.parallel_map(
            partial(self._search, it, stage.dtype)
            for it in searched_edges(stage, self.name, Rounding(self.clip, self.weights))
        )
        folds = [folding.Fold(edges[producer], scale) for producer, scale in found if bool((scale != 1).any())]
        return bool(folding.apply(stage, folds)) or changed

    def _search(self, it: SearchedEdge, dtype: torch.dtype) -> tuple[str, Tensor]:
        """An edge's producer, and the scale float32 [C] that serves best."""
        scales = candidates_of(it, self.candidates)  # [R, C]
        best = scales[it.best_of(scales, self.confirm)]
        return it.edge.producer, folding.representable(it.producer, it.edge.usable, best, dtype)


def candidates_of(it: SearchedEdge, count: int) -> Tensor:
    """float32 [R, C]: scales for falling ranges over each floor; the first one changes nothing."""
    peaks, floor = it.largest_input(), it.balance()
    every = [range_candidates(peaks / floor**power, count) * floor**power for power in FLOORS]
    return torch.cat([torch.ones(1, it.channels), *every])


def range_candidates(peaks: Tensor, count: int) -> Tensor:
    """peaks float32 [C], the largest magnitude per channel -> float32 [count, C]: scales for falling ranges r.

    Channels beyond r are brought down to r; the first candidate is all ones. r falls to the range of the smallest
    channel, as below it all channels would only shrink together.
    """
    known = peaks[(peaks > 0) & torch.isfinite(peaks)]  # weights beyond 1e19 have squares that float32 cannot hold
    if not len(known):
        return torch.ones(1, peaks.shape[0])
    largest = float(known.amax())
    smallest = max(SMALLEST_RANGE, float(known.amin()) / largest)
    shares = torch.logspace(0, math.log10(smallest), count, dtype=torch.float64).float()  # alike on all machines
    return (peaks / (shares * largest)[:, None]).clamp(min=1.0)
