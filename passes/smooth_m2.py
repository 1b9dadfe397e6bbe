"""smooth-m2: outlier suppression by a range search on every edge of the stage.

Source: msModelSlim's anti-outlier method m2, which follows Outlier Suppression+ (arXiv 2304.09145): only channels whose
magnitude exceeds a range r are scaled down, exactly to r, and r is searched.

Here channels below r may be scaled as well. For a given r, the rounding noise of a channel is smallest where its scale
is the fourth root of its mean square over the energy of the weights it multiplies; the search also varies the exponent
of that scale. The loss is the expected error of the consumers' outputs in closed form, from the statistics of all
samples, and the best few candidates are compared on kept rows.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlqc.ir.stage import Stage
from vlqc.passes.algorithms import folding
from vlqc.passes.algorithms.error_model import QuantizationPreview, WeightMethod
from vlqc.passes.algorithms.smoothing_search import SmoothingTask, smoothing_tasks, update_edges
from vlqc.pipeline.pass_api import Pass, require

MIN_RANGE = 1e-3  # of the largest magnitude: the smallest candidate range
BALANCE_EXPONENTS = (0.0, 0.5, 0.75, 1.0, 1.25)  # of the scales that minimize each channel's noise; 0 disables them


@dataclass(frozen=True)
class SmoothM2(Pass):
    """Folds searched per-channel scales into the producers of all edges.

    candidates: number of ranges per edge and balance exponent.
    confirm: number of the best candidates that are compared on kept rows.
    clip: whether quantize-activations will clip ranges; weights: the method of quantize-weights.
    """

    name: ClassVar[str] = "smooth-m2"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "rewrite"
    summary: ClassVar[str] = "search per-channel scales that reduce outliers and fold them into the producers"
    changes_inputs: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("insert-observers",)
    before: ClassVar[tuple[str, ...]] = ("quantize-activations", "quantize-weights", "lower-linears", "quantize-cache")

    candidates: int = 20
    confirm: int = 4
    clip: bool = True
    weights: WeightMethod = "auto"

    def __post_init__(self) -> None:
        require(self.candidates >= 1 and self.confirm >= 1, "candidates and confirm must be 1 or more")

    def run(self, stage: Stage) -> bool:
        changed = update_edges(stage)
        edges = {edge.producer: edge for edge in stage.edges or ()}
        preview = QuantizationPreview(self.clip, self.weights)
        searches = (partial(self._search, task, stage.dtype) for task in smoothing_tasks(stage, self.name, preview))
        scales = stage.execution.process_group.parallel_map(searches)
        folds = [folding.Fold(edges[producer], scale) for producer, scale in scales if bool((scale != 1).any())]
        return bool(folding.apply_folds(stage, folds)) or changed

    def _search(self, task: SmoothingTask, dtype: torch.dtype) -> tuple[str, Tensor]:
        """Returns the producer of an edge and its best scale float32 [C]."""
        candidates = candidate_scales(task, self.candidates)  # [R, C]
        best = candidates[task.best_candidate(candidates, self.confirm)]
        return task.edge.producer, task.exact_scale(best, dtype)


def candidate_scales(task: SmoothingTask, count: int) -> Tensor:
    """float32 [R, C]: all ones, then `count` ranges for each balance exponent."""
    absmax, balanced = task.input_absmax(), task.balanced_scales()
    scales = [range_scales(absmax / balanced**power, count) * balanced**power for power in BALANCE_EXPONENTS]
    return torch.cat([torch.ones(1, task.channels), *scales])


def range_scales(absmax_per_channel: Tensor, count: int) -> Tensor:
    """float32 [C] -> float32 [count, C]: for `count` falling ranges r, the scales that reduce larger channels to r.

    The first candidate is all ones. r falls to the range of the smallest channel; below it, all channels would only be
    scaled by a common factor.
    """
    known = absmax_per_channel[(absmax_per_channel > 0) & torch.isfinite(absmax_per_channel)]
    if not len(known):  # e.g. weights beyond 1e19, whose squares exceed float32
        return torch.ones(1, absmax_per_channel.shape[0])
    largest = float(known.amax())
    smallest = max(MIN_RANGE, float(known.amin()) / largest)
    shares = torch.logspace(0, math.log10(smallest), count, dtype=torch.float64).float()  # the same on all machines
    return (absmax_per_channel / (shares * largest)[:, None]).clamp(min=1.0)
