"""smooth-m2: outlier suppression for multimodal models, by a range search on every edge that channel flow finds.

The idea (Outlier Suppression+, arXiv 2304.09145): only channels that reach beyond a range r are scaled down, by just
as much as brings them to r. r is searched. Here the loss is the expected error of the consumers' outputs, in closed
form from statistics of all samples, and the best few candidates are confirmed on real rows.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlqc.ir import Stage
from vlqc.passes import folding
from vlqc.passes.edge_search import find_stage_edges, searched_edges
from vlqc.pipeline import Pass, require

SMALLEST_RANGE = 1e-3  # of the largest value: channels that differ by more are not worth more


@dataclass(frozen=True)
class SmoothM2(Pass):
    """Folds searched scales into the producers.

    candidates: ranges tried per edge; confirm: how many of the best are compared on real rows.
    """

    name: ClassVar[str] = "smooth-m2"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "rewrite"
    summary: ClassVar[str] = "search per-channel scales that tame outliers and fold them into the producers"
    after: ClassVar[tuple[str, ...]] = ("insert-observers",)
    before: ClassVar[tuple[str, ...]] = ("quantize-activations", "quantize-weights", "lower-linears")

    candidates: int = 96
    confirm: int = 4

    def __post_init__(self) -> None:
        require(self.candidates >= 1 and self.confirm >= 1, "candidates and confirm must be 1 or more")

    def run(self, stage: Stage) -> bool:
        changed = find_stage_edges(stage)
        folds = []
        for it in searched_edges(stage, self.name):
            scales = range_candidates(it.largest_input(), self.candidates)  # [R, C]
            best = scales[it.best_of(scales, self.confirm)]
            scale = folding.representable(it.producer, it.edge.usable, best, stage.dtype)
            if bool((scale != 1).any()):
                folds.append(folding.Fold(it.edge, scale))
        return bool(folding.apply(stage, folds)) or changed


def range_candidates(peaks: Tensor, count: int) -> Tensor:
    """peaks float32 [C], the largest magnitude per channel -> float32 [count, C]: scales for falling ranges r.

    Channels beyond r are brought down to r; the first candidate is all ones. r falls to the range of the smallest
    channel, as below it all channels would only shrink together.
    """
    largest = float(peaks.amax())
    if largest == 0.0:
        return torch.ones(1, peaks.shape[0])
    smallest = max(SMALLEST_RANGE, float(peaks[peaks > 0].amin()) / largest)
    shares = torch.logspace(0, math.log10(smallest), count, dtype=torch.float64).float()  # alike on all machines
    return (peaks / (shares * largest)[:, None]).clamp(min=1.0)
