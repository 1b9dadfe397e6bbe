"""smooth-m4: iterative smoothing with closed-form scales on every edge of the stage.

Source: msModelSlim's anti-outlier method m4 and SmoothQuant (arXiv 2211.10438): s = A^alpha / B^(1 - alpha) per
channel, with A the largest magnitude of the input and B the largest weight that multiplies it. alpha = 1 moves the
whole range from activations to weights, alpha = 0 the reverse.

Alpha is chosen per edge by the error model. A fold changes the weights of other edges, so scales are recomputed in
rounds until they converge.
"""

from collections.abc import Iterator, Mapping
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

NEAR_DEAD = 1e-3  # of the largest channel: lower bound of a channel's magnitude
ALPHA_STEPS = 20  # candidates of alpha are 0, 1/20, ..., 1
CONVERGED = 0.02  # iteration ends when no logarithm of a scale changes by more


@dataclass(frozen=True)
class SmoothM4(Pass):
    """Folds closed-form per-channel scales into the producers of all edges, in rounds.

    alpha: of all edges; None chooses it per edge.
    rounds: maximum number of rounds.
    confirm: number of the best alphas that are compared on kept rows.
    bound: largest factor between the scale of a channel and the geometric mean of all channels.
    clip: whether quantize-activations will clip ranges; weights: the method of quantize-weights.
    """

    name: ClassVar[str] = "smooth-m4"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "rewrite"
    summary: ClassVar[str] = "balance activations and weights by closed-form scales, round by round"
    changes_inputs: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("insert-observers",)
    before: ClassVar[tuple[str, ...]] = ("quantize-activations", "quantize-weights", "lower-linears", "quantize-cache")

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
        changed = update_edges(stage)
        alphas = self._choose_alphas(stage)
        total: dict[str, Tensor] = {}  # per producer: product of the scales folded so far
        for _ in range(self.rounds):
            folds = self._folds_of_round(stage, alphas, total)
            applied = folding.apply_folds(stage, folds)
            if not applied:
                break
            changed = True
            for fold in applied:
                total[fold.edge.producer] *= fold.scale
            rejected = {fold.edge.producer for fold in folds} - {fold.edge.producer for fold in applied}
            alphas |= dict.fromkeys(rejected)
        return changed

    def _tasks(self, stage: Stage) -> Iterator[SmoothingTask]:
        return smoothing_tasks(stage, self.name, QuantizationPreview(self.clip, self.weights))

    def _choose_alphas(self, stage: Stage) -> dict[str, float | None]:
        """Alpha per producer, None for edges that are better not smoothed; empty if the user set alpha."""
        tasks = self._tasks(stage) if self.alpha is None else ()
        return dict(stage.execution.process_group.parallel_map(partial(self._choose_alpha, task) for task in tasks))

    def _choose_alpha(self, task: SmoothingTask) -> tuple[str, float | None]:
        alphas = [step / ALPHA_STEPS for step in range(ALPHA_STEPS + 1)]
        inputs, weights = task.input_absmax(), task.weight_absmax()
        scales = [closed_form_scale(inputs, weights, alpha, self.bound) for alpha in alphas]
        best = task.best_candidate(torch.stack([torch.ones(task.channels), *scales]), self.confirm)
        return task.edge.producer, None if best == 0 else alphas[best - 1]

    def _folds_of_round(
        self, stage: Stage, alphas: Mapping[str, float | None], total: dict[str, Tensor]
    ) -> list[folding.Fold]:
        """The folds of one round, without those that changed too little.

        Scales are computed for the edge without its own previous folds, `total`. So dead channels and the bound are
        determined alike in all rounds, and only folds of other edges change the result.
        """
        folds = []
        for task in self._tasks(stage):
            producer = task.edge.producer
            alpha = alphas.get(producer, self.alpha)
            if alpha is None:
                continue
            previous = total.setdefault(producer, torch.ones(task.channels))
            inputs, weights = task.input_absmax() * previous, task.weight_absmax() / previous
            wanted = closed_form_scale(inputs, weights, alpha, self.bound)
            scale = task.exact_scale(wanted / previous, stage.dtype)
            if float(scale.log().abs().amax()) > CONVERGED:
                folds.append(folding.Fold(task.edge, scale))
        return folds


def closed_form_scale(inputs: Tensor, weights: Tensor, alpha: float, bound: float) -> Tensor:
    """SmoothQuant's scale inputs^alpha / weights^(1 - alpha), with geometric mean 1: float32 [C].

    inputs, weights: largest magnitudes per channel, float32 [C]. bound: limit of a scale and of its inverse.

    A common factor of all channels changes no integer, so the mean is free. Dead channels (without input or without
    weight) get 1; magnitudes below NEAR_DEAD of the largest one are raised to it.
    """
    alive = (inputs > 0) & (weights > 0)
    if not bool(alive.any()):
        return torch.ones_like(inputs)
    input_log = inputs.clamp(min=NEAR_DEAD * float(inputs.amax())).double().log()
    weight_log = weights.clamp(min=NEAR_DEAD * float(weights.amax())).double().log()
    logarithm = alpha * input_log - (1 - alpha) * weight_log
    centered = logarithm - logarithm[alive].mean()
    limit = torch.tensor(bound, dtype=torch.float64).log()
    return torch.where(alive, centered.clamp(-limit, limit).exp(), 1.0).float()
