"""Schemes, producers and unusual stages that tests of smoothing go through, and what a pass does in its rounds."""

import pytest
import torch
from torch import Tensor, nn

from tests.support.random_stage import HIDDEN, Decoder, staged, through
from vlqc.ir.execution import Call
from vlqc.ir.scale_propagation import find_edges
from vlqc.ir.stage import Edge, Stage
from vlqc.passes.algorithms import folding
from vlqc.passes.algorithms import smoothing_search as edge_search
from vlqc.passes.algorithms.folding import Fold
from vlqc.passes.algorithms.smoothing_search import SmoothingTask, smoothing_tasks, update_edges
from vlqc.passes.insert_observers import InsertObservers
from vlqc.passes.smooth_m2 import SmoothM2
from vlqc.passes.smooth_m4 import SmoothM4
from vlqc.targets.schemes import Scheme

BOTH = pytest.mark.parametrize("smooth", [SmoothM2(), SmoothM4()], ids=["m2", "m4"])
PRODUCERS = ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"]


class Forked(nn.Module):
    """One norm read by a linear directly, and by another one two rows at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Decoder().input_layernorm
        self.direct = nn.Linear(HIDDEN, 8, bias=False)
        self.paired = nn.Linear(2 * HIDDEN, 8, bias=False)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.norm(rows)
        return self.direct(normed), self.paired(normed.reshape(-1, 2 * HIDDEN))


def of_random_weights(block: nn.Module) -> Stage:
    generator = torch.Generator().manual_seed(3)
    for parameter in block.requires_grad_(False).parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator).to(torch.bfloat16).float())
    calls = [Call(sample, (torch.randn(12, HIDDEN, generator=generator),), {}) for sample in range(2)]
    stage = through(staged(block, calls), InsertObservers())
    for site in stage.sites.values():
        site.scheme = Scheme.W8A8
    return stage


def rounds_of(stage: Stage, step: SmoothM4) -> list[list[Fold]]:
    """What the pass asked to fold, per round; the last round is empty if nothing was left."""
    asked: list[list[Fold]] = []
    original = folding.apply_folds

    def apply(stage: Stage, folds: list[Fold]) -> list[Fold]:
        asked.append(list(folds))
        return original(stage, folds)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(folding, "apply_folds", apply)
        through(stage, step)
    return asked


def searched(stage: Stage) -> dict[str, SmoothingTask]:
    update_edges(stage)
    return {task.edge.producer: task for task in smoothing_tasks(stage, "a test")}


def only(producer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scale propagation finds this one edge only."""

    def find(module: nn.Module, graph: torch.fx.Graph) -> tuple[Edge, ...]:
        return tuple(edge for edge in find_edges(module, graph) if edge.producer == producer)

    monkeypatch.setattr(edge_search, "find_edges", find)
