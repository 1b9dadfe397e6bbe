"""What no smoothing pass may do to a stage, also where there is nothing to do, and in unusual stages."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support.random_stage import (
    HIDDEN,
    KEY_VALUE_HEADS,
    SCHEMES,
    columns_of_value,
    decoder,
    folds_of,
    group_errors,
    in_float64,
    observed,
    site_at,
    through,
)
from tests.support.smoothing_cases import BOTH, Forked, of_random_weights
from vlqc.ir.printer import print_stage
from vlqc.passes.assign_precision import AssignPrecision
from vlqc.passes.insert_observers import InsertObservers
from vlqc.pipeline.pass_api import Pass
from vlqc.targets.schemes import Scheme

pytestmark = pytest.mark.usefixtures("float32_runs")  # the same numbers on every processor


# ---- the stage stays the same ----------------------------------------------------------------------------------------


@BOTH
@SCHEMES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_is_unchanged(smooth: Pass, scheme: Scheme, dtype: torch.dtype) -> None:
    """A scale that leaves a producer and does not arrive, in float64 where rounding cannot hide it."""
    stage = decoder(outliers=True, dtype=dtype)
    reference = in_float64(stage)
    through(observed(stage, scheme), smooth)
    assert not stage.notes and len(stage.edges or ()) == 4
    difference = (in_float64(stage) - reference).abs().max() / reference.square().mean().sqrt()
    assert difference < 2e-6


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_weights_fold_without_rounding(smooth: Pass, dtype: torch.dtype) -> None:
    """A norm weight that changes when it is emitted: the consumers' integers would not fit it any more."""
    original, stage = decoder(outliers=True, dtype=dtype), decoder(outliers=True, dtype=dtype)
    through(observed(stage), smooth)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        before, after = (one.module.get_submodule(norm).get_parameter("weight") for one in (original, stage))
        assert torch.equal(after, after.to(dtype).float()) and (before / after).abs().max() > 16
    pairs = [(one.module, "post_attention_layernorm.weight", "mlp.gate_proj.weight") for one in (original, stage)]
    products = [live.get_parameter(norm).double() * live.get_parameter(group).double() for live, norm, group in pairs]
    assert ((products[0] - products[1]).abs() <= 4e-7 * products[0].abs()).all()


@BOTH
def test_grouped_queries_share_scales(smooth: Pass) -> None:
    """The map of v to o_proj by hand: a column of another channel, or two columns of one channel scaled apart."""
    original, stage = decoder(outliers=True), observed(decoder(outliers=True))
    (fold,) = (fold for fold in folds_of(stage, smooth) if fold.edge.producer == "self_attn.v_proj")
    assert fold.scale.max() / fold.scale.min() > 16
    before, after = (one.module.get_submodule("self_attn.o_proj").get_parameter("weight") for one in (original, stage))
    biases = [one.module.get_submodule("self_attn.v_proj").get_parameter("bias") for one in (original, stage)]
    for row in range(KEY_VALUE_HEADS * HIDDEN // 4):
        for column in columns_of_value(row):
            assert torch.equal(after[:, column], before[:, column] * fold.scale[row])
        assert torch.equal(biases[1][row], biases[0][row] / fold.scale[row])


@BOTH
@pytest.mark.parametrize("outliers", [False, True])
def test_observations_are_what_a_second_look_would_see(smooth: Pass, outliers: bool) -> None:
    """Statistics of the stage as it was: later passes would give it the input scales of the outliers that are gone."""
    stage = through(observed(decoder(outliers=outliers)), smooth)
    again = copy.deepcopy(stage.observations)
    InsertObservers().run(stage)
    for source, seen in stage.observations.items():
        for name, span in seen.ranges.items():
            mine = again[source].ranges[name]
            assert span.rows == mine.rows
            size = torch.maximum(span.maximum.abs(), span.minimum.abs()).clamp(min=1e-9)
            for part in ("minimum", "maximum"):
                assert ((getattr(span, part) - getattr(mine, part)).abs() <= 2e-5 * size).all()
            np.testing.assert_allclose(mine.sum_of_squares, span.sum_of_squares, rtol=1e-4)
            np.testing.assert_allclose(mine.sum, span.sum, atol=1e-4 * float(size.max()) * span.rows)
        torch.testing.assert_close(seen.kept, again[source].kept, rtol=1e-4, atol=1e-4)
        assert torch.equal(seen.kept_modality, again[source].kept_modality)


# ---- when there is nothing to do -------------------------------------------------------------------------------------


@BOTH
def test_float_consumers_are_left_alone(smooth: Pass) -> None:
    """Weights moved about for nothing: linears that stay float have no error to lower."""
    stage = through(decoder(outliers=True), InsertObservers(), AssignPrecision(scheme="FLOAT"))
    # A float32 checkpoint: norm weights that are no values of bfloat16 would otherwise be taken for something to fold.
    stage.module.get_submodule("input_layernorm").get_parameter("weight").mul_(1.0001)
    known = {path: parameter.clone() for path, parameter in stage.module.named_parameters()}
    through(stage, smooth)
    assert all(torch.equal(parameter, known[path]) for path, parameter in stage.module.named_parameters())
    assert len(stage.edges or ()) == 4


@BOTH
def test_only_quantized_consumers_count(smooth: Pass) -> None:
    """Catches a fold into up_proj although down_proj stays float in the reference."""
    stage = through(decoder(outliers=True), InsertObservers(), AssignPrecision())
    targets = ("mlp.up_proj", "self_attn.o_proj", "mlp.down_proj")
    before = [stage.linear(site_at(stage, target)).weight.clone() for target in targets]
    through(stage, smooth)
    after = [stage.linear(site_at(stage, target)).weight for target in targets]
    assert [torch.equal(old, new) for old, new in zip(before, after, strict=True)] == [False, False, True]


@BOTH
def test_second_run_tells_the_truth(smooth: Pass) -> None:
    """Catches a second smoothing pass that reports a change it did not make."""
    stage = through(observed(decoder(outliers=True)), smooth)
    for _ in range(4):  # until nothing is left to gain
        text = print_stage(stage)
        changed = smooth.run(stage)
        assert changed == (print_stage(stage) != text)
        if not changed:
            break
    stage = through(decoder(), InsertObservers(), AssignPrecision(scheme="FLOAT"), smooth)
    assert smooth.run(stage) is False


@BOTH
def test_all_zero_input(smooth: Pass) -> None:
    """Catches a division by zero where every sample is zero at a norm (a padded image)."""
    stage = decoder()
    for call in stage.execution.calls:
        call.args[0].zero_()
    before = {path: parameter.clone() for path, parameter in stage.module.named_parameters()}
    through(observed(stage), smooth)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in stage.module.parameters())
    assert torch.equal(stage.module.get_parameter("input_layernorm.weight"), before["input_layernorm.weight"])


# ---- unusual stages --------------------------------------------------------------------------------------------------


class Bilinear(nn.Module):
    """Both factors of a product are linear, so that both could absorb a scale of the same consumer."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.right = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, 8, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        lowered: Tensor = self.down(self.left(rows) * self.right(rows))
        return lowered


@BOTH
def test_consumers_at_two_nodes(smooth: Pass) -> None:
    """Consumers of one producer with inputs of different width: each has statistics and a map of its own."""
    block = Forked()
    stage = of_random_weights(block)
    block.norm.weight[7] *= 64
    block.direct.weight[:, 7] /= 64
    block.paired.weight[:, [7, HIDDEN + 7]] /= 64
    InsertObservers().run(stage)
    before = group_errors(stage)
    through(stage, smooth)
    after = group_errors(stage)
    assert len(after) == 2 and all(after[source] < before[source] / 20 for source in before)
    assert not stage.notes


@BOTH
def test_one_input_is_scaled_once(smooth: Pass) -> None:
    """Two producers that both absorb a scale found for the same input: together they would scale it twice."""
    stage = of_random_weights(Bilinear())
    stage.linear(site_at(stage, "left")).weight[4] *= 64
    stage.linear(site_at(stage, "down")).weight[:, 4] /= 64
    InsertObservers().run(stage)
    before = group_errors(stage)["mul"]
    through(stage, smooth)
    assert len(stage.edges or ()) == 2 and group_errors(stage)["mul"] < before / 20
    span = stage.observations["mul"]
    assert float((span.maximum() - span.minimum()).max() / (span.maximum() - span.minimum()).min()) < 10
