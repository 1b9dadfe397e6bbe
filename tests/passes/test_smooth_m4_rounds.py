"""smooth-m4: rounds that end, and channels that are dead or nearly so."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from tests.support.random_stage import (
    DEAD,
    HIDDEN,
    NAME,
    SCHEMES,
    Decoder,
    decoder,
    folds_of,
    kill,
    observed,
    site_at,
    staged,
    through,
)
from tests.support.smoothing_cases import PRODUCERS, only, rounds_of, searched
from vlqc.ir.execution import Call
from vlqc.ir.scale_propagation import find_edges
from vlqc.ir.stage import Edge
from vlqc.passes.algorithms import smoothing_search as edge_search
from vlqc.passes.insert_observers import InsertObservers
from vlqc.passes.smooth_m4 import CONVERGED, SmoothM4, closed_form_scale
from vlqc.targets.schemes import Scheme

pytestmark = pytest.mark.usefixtures("float32_runs")  # the same numbers on every processor


# ---- rounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("producer", PRODUCERS)
def test_one_edge_alone_is_done_in_one_round(
    producer: str, alpha: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales that are derived from what they made themselves, and so grow round by round; near-dead channels would."""
    stage = decoder(outliers=True)
    stage.module.get_parameter("input_layernorm.weight")[DEAD] *= 1e-5
    stage.module.get_parameter("post_attention_layernorm.weight")[DEAD] *= 1e-5
    stage.module.get_parameter("mlp.down_proj.weight")[:, 17] *= 1e-5
    for name in ("weight", "bias"):
        stage.module.get_parameter(f"self_attn.v_proj.{name}")[6] *= 1e-5
    only(producer, monkeypatch)
    asked = rounds_of(observed(stage), SmoothM4(alpha=alpha, rounds=10))
    assert [[fold.edge.producer for fold in folds] for folds in asked] == [[producer], []]


@SCHEMES
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_rounds_shrink_and_stop(alpha: float | None, scheme: Scheme) -> None:
    """Edges that push each other back and forth: each round moves less, and an empty one comes before the bound."""
    asked = rounds_of(observed(decoder(outliers=True), scheme), SmoothM4(alpha=alpha, rounds=10))
    moved = [max(float(fold.scale.log().abs().amax()) for fold in folds) for folds in asked if folds]
    assert 2 <= len(moved) <= 3 and asked[-1] == []
    assert all(later < earlier / 2 for earlier, later in itertools.pairwise(moved))
    assert min(moved) > CONVERGED


@pytest.mark.parametrize("rounds", [1, 2])
def test_rounds_are_bounded(rounds: int) -> None:
    """Catches more rounds than `rounds`."""
    asked = rounds_of(observed(decoder(outliers=True)), SmoothM4(alpha=0.5, rounds=rounds))
    assert len(asked) == rounds and all(asked)


def test_scales_belong_to_the_rescaled_neighbors() -> None:
    """Catches missing iteration: at the end every edge has the closed-form scale of its current neighbors."""
    stage = observed(decoder(outliers=True))
    through(stage, SmoothM4(alpha=0.5, rounds=8))
    for producer, task in searched(stage).items():
        left = closed_form_scale(task.input_absmax(), task.weight_absmax(), 0.5, 1024.0)
        assert float(left.log().abs().amax()) <= 1.1 * CONVERGED, producer
    once = observed(decoder(outliers=True))
    through(once, SmoothM4(alpha=0.5, rounds=1))
    task = searched(once)["input_layernorm"]  # v's rows have changed since
    assert (
        float(closed_form_scale(task.input_absmax(), task.weight_absmax(), 0.5, 1024.0).log().abs().amax())
        > 2 * CONVERGED
    )


def test_a_fold_that_fails_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong edge proposed in every round: a note per round, and rounds that never become empty."""
    shape = torch.ones(48, dtype=torch.bool)
    past_silu = Edge("mlp.gate_proj", shape, {"mlp.down_proj": torch.arange(48)})

    def find(module: nn.Module, graph: torch.fx.Graph) -> tuple[Edge, ...]:
        return (past_silu, *(edge for edge in find_edges(module, graph) if edge.producer != "mlp.up_proj"))

    monkeypatch.setattr(edge_search, "find_edges", find)
    stage = observed(decoder(outliers=True))
    gate = (
        stage.module.get_parameter("mlp.gate_proj.bias") if stage.linear(site_at(stage, "mlp.gate_proj")).bias else None
    )
    asked = rounds_of(stage, SmoothM4(alpha=0.5, rounds=8))
    assert gate is None and len(stage.notes) == 1 and f"{NAME}.mlp.gate_proj" in stage.notes[0]
    assert asked[-1] == [] and sum(fold.edge is past_silu for folds in asked for fold in folds) == 1


# ---- dead channels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dead", ["column", "norm", "constant", "value"])
def test_dead_channels_are_not_scaled(dead: str) -> None:
    """A channel without a range or a weight divided by (nearly) nothing, as the reference tool does: x 1e5."""
    stage = decoder(outliers=True)
    kill(stage, dead)
    for fold in folds_of(observed(stage), SmoothM4(alpha=0.9)):
        if fold.edge.producer == ("self_attn.v_proj" if dead == "value" else "input_layernorm"):
            assert float(fold.scale[DEAD]) == pytest.approx(1, abs=2**-8)
            assert fold.scale.max() / fold.scale.min() > 8 or fold.scale.log().abs().max() < 1
    assert all(bool(torch.isfinite(parameter).all()) for parameter in stage.module.parameters())
    assert not stage.notes


@pytest.mark.parametrize("size", [1e-4, 1e-6, 1e-9])
def test_near_dead_norm_weight_does_not_explode(size: float) -> None:
    """The reference's formula lets a dead channel's norm weight grow 1e5 times; ours stays within 1e3, in any round."""
    stage = decoder()
    block = stage.module
    assert isinstance(block, Decoder)
    for call in stage.execution.calls:
        call.args[0][..., DEAD] *= size
    before = block.input_layernorm.weight.clone()
    observed(stage)
    task = searched(stage)["input_layernorm"]
    peak, weight = task.input_absmax().double(), task.weight_absmax().double()
    reference = (peak**0.9 / weight.clamp(min=1e-5) ** 0.1).clamp(min=1e-5)
    if size < 1e-6:
        assert 1 / reference[DEAD] > 9e4  # what the norm weight would be multiplied with
    through(stage, SmoothM4(alpha=0.9, rounds=20))
    growth = (block.input_layernorm.weight / before).abs()
    assert 10 < float(growth[DEAD]) < 1000 and float(growth.max()) == float(growth[DEAD])


def test_near_dead_weights_do_not_explode() -> None:
    """Columns that are nearly zero at alpha 0: their scale would be the inverse of nearly nothing."""
    stage = decoder()
    for part in "qkv":
        stage.module.get_parameter(f"self_attn.{part}_proj.weight")[:, DEAD] *= 1e-8
    before = stage.module.get_parameter("input_layernorm.weight").clone()
    through(observed(stage), SmoothM4(alpha=0.0, rounds=20))
    shrunk = (before / stage.module.get_parameter("input_layernorm.weight")).abs()
    assert 10 < float(shrunk[DEAD]) < 1000


def test_zero_norm_weight_with_a_bias() -> None:
    """A channel that has a range but no weight to divide: wanted in every round, folded in none, called a change."""
    block = WithBias().requires_grad_(False)
    block.norm.weight[DEAD], block.norm.bias[DEAD] = 0.0, 40.0
    rows = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).float()
    stage = through(staged(block, [Call(0, (rows,), {})]), InsertObservers())
    asked = rounds_of(stage, SmoothM4(alpha=0.9, rounds=6))
    assert len(asked) == 2 and asked[1] == []
    assert float(asked[0][0].scale[DEAD]) == 1 and float(block.norm.bias[DEAD]) == 40


class WithBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.linear = nn.Linear(HIDDEN, 8)

    def forward(self, rows: Tensor) -> Tensor:
        projected: Tensor = self.linear(self.norm(rows))
        return projected
