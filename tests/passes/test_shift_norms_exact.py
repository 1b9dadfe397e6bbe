"""shift-norms: the stage computes the same, also after smoothing."""

import copy

import pytest
import torch

from tests.support.random_stage import DTYPES, in_float64, observed, site_at, through
from tests.support.shifted_stages import NORMS, one_sided, shifted
from vlqc.passes.insert_observers import InsertObservers
from vlqc.passes.shift_norms import ShiftNorms
from vlqc.passes.smooth_m2 import SmoothM2
from vlqc.passes.smooth_m4 import SmoothM4
from vlqc.pipeline.pass_api import Pass

pytestmark = pytest.mark.usefixtures("float32_runs")  # the same numbers on every processor


@DTYPES
def test_bias_by_hand(dtype: torch.dtype) -> None:
    """The wrong sign, half or channel: minus the middle of each range, as a value of the emitted dtype."""
    stage = observed(one_sided(dtype))
    rows = {norm: stage.observations[norm].kept for norm in NORMS}  # all rows: the budget is larger than they are
    biases = {site.target: stage.linear(site).bias for site in stage.sites.values()}
    weights = {site.target: stage.linear(site).weight.double().clone() for site in stage.sites.values()}
    through(stage, ShiftNorms())
    for norm, parts in NORMS.items():
        middle = ((rows[norm].amax(0) + rows[norm].amin(0)) / 2).to(dtype).float()
        assert torch.equal(stage.module.get_parameter(f"{norm}.bias"), -middle) and middle.abs().max() > 3
        for part in parts:
            target = f"mlp.{part}_proj" if part in ("gate", "up") else f"self_attn.{part}_proj"
            known = 0.0 if biases[target] is None else biases[target].double()
            undo = weights[target] @ middle.double()
            torch.testing.assert_close(
                stage.linear(site_at(stage, target)).bias.double(), known + undo, rtol=0, atol=2e-5
            )


@DTYPES
@pytest.mark.parametrize("smooth", [None, SmoothM2(), SmoothM4(), SmoothM4(alpha=0.9)], ids=["", "m2", "m4", "alpha"])
def test_output_is_unchanged(smooth: Pass | None, dtype: torch.dtype) -> None:
    """A shift that is not undone, alone or after scales were folded through it; in float64, where nothing can hide."""
    stage = one_sided(dtype, outliers=True)
    reference = in_float64(stage)
    through(observed(stage), ShiftNorms(), *([smooth] if smooth else []))
    assert shifted(stage) == set(NORMS) and not stage.notes
    # Biases of up to a few hundred are kept in float32.
    assert (in_float64(stage) - reference).abs().max() < 2e-5 * reference.square().mean().sqrt()


@DTYPES
@pytest.mark.parametrize("smooth", [SmoothM2(), SmoothM4()], ids=["m2", "m4"])
def test_norms_stay_representable_under_smoothing(smooth: Pass, dtype: torch.dtype) -> None:
    """Catches a divided norm bias that is rounded only when emitted, without compensation."""
    stage = through(observed(one_sided(dtype, outliers=True)), ShiftNorms())
    unsmoothed = {norm: stage.module.get_parameter(f"{norm}.bias").clone() for norm in NORMS}
    through(stage, smooth)
    for norm in NORMS:
        for part in ("weight", "bias"):
            parameter = stage.module.get_parameter(f"{norm}.{part}")
            assert torch.equal(parameter, parameter.to(dtype).float())
        assert not torch.equal(stage.module.get_parameter(f"{norm}.bias"), unsmoothed[norm])


@pytest.mark.parametrize("smooth", [None, SmoothM2(), SmoothM4()], ids=["", "m2", "m4"])
def test_observations_are_what_a_second_look_would_see(smooth: Pass | None) -> None:
    """Ranges that still hold the shift, or that forget what a smoothed bias lost to rounding: wrong input scales."""
    stage = through(observed(one_sided(outliers=True)), ShiftNorms(), *([smooth] if smooth else []))
    mine = copy.deepcopy(stage.observations)
    InsertObservers().run(stage)
    for source, seen in stage.observations.items():
        size = float(torch.maximum(seen.maximum().abs(), seen.minimum().abs()).amax())
        torch.testing.assert_close(mine[source].kept, seen.kept, rtol=0, atol=2e-5 * size)
        for name, span in seen.ranges.items():
            known = mine[source].ranges[name]
            assert span.rows == known.rows
            for part in ("minimum", "maximum"):
                torch.testing.assert_close(getattr(known, part), getattr(span, part), rtol=0, atol=2e-5 * size)
            torch.testing.assert_close(known.sum, span.sum, rtol=0, atol=2e-5 * size * span.rows)
            torch.testing.assert_close(
                known.sum_of_squares, span.sum_of_squares, rtol=0, atol=1e-4 * size**2 * span.rows
            )
