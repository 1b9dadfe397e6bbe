"""smooth-m4: iterative smoothing, with scales in closed form on every edge that channel flow finds.

s = A^alpha / B^(1 - alpha) per channel (SmoothQuant, arXiv 2211.10438), A the largest magnitude of the input and B the
largest weight it meets: alpha shifts the difficulty from activations (1) to weights (0). Alpha is chosen per edge by
the error model. As a fold changes the rows that other edges see as weights, scales are derived anew until they stay.
"""

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

NEAR_DEAD = 1e-3  # of the largest channel: smaller ones are treated as if they were that large
STEPS = 20  # of alpha between 0 and 1
SETTLED = 0.02  # a round that changes no scale by more than this share is the last one


@dataclass(frozen=True)
class SmoothM4(Pass):
    """Folds closed-form scales into the producers, round by round.

    alpha: the same for all edges, or None to choose it per edge; rounds: at most; confirm: how many of the best alphas
    are compared on real rows; bound: no channel's scale lies further from the typical one than this factor; clip:
    whether activation ranges will be clipped where that pays; weights: how weights will be rounded.
    """

    name: ClassVar[str] = "smooth-m4"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "rewrite"
    summary: ClassVar[str] = "balance activations and weights by closed-form scales, round by round"
    after: ClassVar[tuple[str, ...]] = ("insert-observers",)
    before: ClassVar[tuple[str, ...]] = ("quantize-activations", "quantize-weights", "lower-linears")

    alpha: float | None = None
    rounds: int = 4
    confirm: int = 4
    bound: float = 1024.0
    clip: bool = True
    weights: WeightMethod = "auto"

    def __post_init__(self) -> None:
        require(self.alpha is None or 0 <= self.alpha <= 1, "alpha must lie between 0 and 1")
        require(self.rounds >= 1 and self.confirm >= 1, "rounds and confirm must be 1 or more")
        require(self.bound >= 1, "bound must be 1 or more")

    def run(self, stage: Stage) -> bool:
        changed = find_stage_edges(stage)
        edges = searched_edges(stage, self.name, Rounding(self.clip, self.weights)) if self.alpha is None else ()
        # alpha per producer where it is not the same for all; None: better left alone
        chosen = dict(stage.execution.process_group.parallel_map(partial(self._choose, it) for it in edges))
        folded: dict[str, Tensor] = {}  # per producer: the product of its scales so far
        for _ in range(self.rounds):
            folds = []
            for it in searched_edges(stage, self.name, Rounding(self.clip, self.weights)):
                producer = it.edge.producer
                if (alpha := chosen.get(producer, self.alpha)) is None:
                    continue
                # Of the edge as it would be without its own scale: so a channel is as near to dead, and as far from
                # the bound, in the last round as in the first, and nothing but other edges' folds changes the result.
                known = folded.setdefault(producer, torch.ones(it.channels))
                wanted = closed_form(it.largest_input() * known, it.largest_weight() / known, alpha, self.bound)
                scale = folding.representable(it.producer, it.edge.usable, wanted / known, stage.dtype)
                if float((scale.log()).abs().amax()) > SETTLED:
                    folds.append(folding.Fold(it.edge, scale))
            proven = folding.apply(stage, folds)
            for fold in proven:
                folded[fold.edge.producer] *= fold.scale
            held = {fold.edge.producer for fold in proven}
            chosen |= {fold.edge.producer: None for fold in folds if fold.edge.producer not in held}
            if not proven:
                break
            changed = True
        return changed

    def _choose(self, it: SearchedEdge) -> tuple[str, float | None]:
        """An edge's producer, and the alpha that serves it best, or None where leaving it alone does."""
        alphas = [step / STEPS for step in range(STEPS + 1)]
        peaks, weights = it.largest_input(), it.largest_weight()
        scales = [closed_form(peaks, weights, alpha, self.bound) for alpha in alphas]
        best = it.best_of(torch.stack([torch.ones(it.channels), *scales]), self.confirm)
        return it.edge.producer, None if best == 0 else alphas[best - 1]


def closed_form(peaks: Tensor, weights: Tensor, alpha: float, bound: float) -> Tensor:
    """Largest inputs and weights per channel float32 [C] -> scale float32 [C], its geometric mean over channels 1.

    A common factor of all channels changes nothing in the integers, so the mean is free. Dead channels (no input, or
    no weight) keep 1; near-dead ones count as NEAR_DEAD of the largest.
    """
    alive = (peaks > 0) & (weights > 0)
    if not bool(alive.any()):
        return torch.ones_like(peaks)
    input_log = peaks.clamp(min=NEAR_DEAD * float(peaks.amax())).double().log()
    weight_log = weights.clamp(min=NEAR_DEAD * float(weights.amax())).double().log()
    logarithm = alpha * input_log - (1 - alpha) * weight_log
    centred = logarithm - logarithm[alive].mean()
    limit = torch.tensor(bound, dtype=torch.float64).log()
    return torch.where(alive, centred.clamp(-limit, limit).exp(), 1.0).float()
