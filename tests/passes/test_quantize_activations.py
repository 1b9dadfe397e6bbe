"""quantize-activations: the ranges that the pass chooses, and the inputs that make a range go wrong."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.support.exact_stage import text_after
from tests.support.numpy_ranges import DTYPES, limits, numpy_rounded, observation, rows_of
from tests.support.random_stage import decoder, observed, staged, through
from vlqc.ir.execution import Call
from vlqc.ir.stage import InputQuantization, Stage
from vlqc.kernels_ref.quantize import activation_scale_and_offset
from vlqc.passes.algorithms.range_search import input_rounding_error
from vlqc.passes.assign_precision import AssignPrecision
from vlqc.passes.insert_observers import InsertObservers
from vlqc.passes.quantize_activations import QuantizeActivations
from vlqc.targets.schemes import Scheme

pytestmark = pytest.mark.usefixtures("float32_runs")  # the same numbers on every processor


def test_golden(golden: Callable[[str, str], None]) -> None:
    """Any change of the ranges that the pass chooses for the exact stage shows here as text."""
    golden("after-quantize-activations.vlqc", text_after("quantize-activations"))


# ---- the pass --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_minmax_covers_everything(dtype: torch.dtype) -> None:
    """The mean over samples of their extremes, as in the reference tool, clips every sample above the average."""
    stage = through(observed(decoder(outliers=True, dtype=dtype)), QuantizeActivations(method="minmax"))
    for source, members in stage.groups().items():
        quantization = members[0].input
        assert quantization is not None
        seen, (scale, offset) = stage.observations[source], (quantization.scale, quantization.offset)
        low, high = limits(seen)
        assert (-128 - offset) * scale <= low + scale / 2 and (127 - offset) * scale >= high - scale / 2
        assert 255 * scale <= 1.02 * (max(high, 0) - min(low, 0))  # and is no wider than dtype makes it


@pytest.mark.parametrize("method", ["minmax", "histogram", "automatic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_share_one_representable_scale(method: str, dtype: torch.dtype) -> None:
    """q, k and v with scales of their own; a scale that changes when it is stored; an offset that is not integral."""
    stage = through(observed(decoder(outliers=True, dtype=dtype)), QuantizeActivations(method=method))  # type: ignore[arg-type]
    for members in stage.groups().values():
        (quantization,) = {site.input for site in members}
        assert quantization is not None
        assert float(torch.tensor(quantization.scale, dtype=dtype)) == quantization.scale > 0
        assert quantization.offset.is_integer() and -128 <= quantization.offset <= 127


def test_all_members_of_a_group_have_their_say() -> None:
    """The range judged by the first member only: v's weights on a column that q and k ignore must count."""
    ranges = []
    for loud in (False, True):
        stage = observed(decoder())
        for part in "qkv":
            weight = stage.module.get_parameter(f"self_attn.{part}_proj.weight")
            weight[:, 3] = 100.0 if loud and part == "v" else 0.0
        seen = stage.observations["input_layernorm"]
        seen.kept[:, 3] *= 30
        for span in seen.ranges.values():
            span.minimum[3] *= 30
            span.maximum[3] *= 30
        through(stage, QuantizeActivations())
        quantization = stage.sites["model.layers.0.self_attn.q_proj"].input
        assert quantization is not None
        ranges.append(quantization.scale * 255)
    assert ranges[1] > 5 * ranges[0]


@pytest.mark.parametrize("method", ["minmax", "histogram", "automatic"])
@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (2.0, 3.0), (-3.0, -2.0)])
def test_one_sided_and_zero_inputs(low: float, high: float, method: str) -> None:
    """A range that does not hold zero exactly (padding would turn into a bias), or a scale of zero."""
    stage = observed(decoder())
    for source, seen in stage.observations.items():
        rows = torch.linspace(low, high, 6)[:, None].repeat(1, seen.channels)
        stage.observations[source] = observation(rows)
    through(stage, QuantizeActivations(method=method))  # type: ignore[arg-type]
    for site in stage.sites.values():
        assert site.input is not None and math.isfinite(site.input.scale) and site.input.scale > 0
        assert site.input.offset == (127 if high < 0 else -128)
        if high > low:  # 6 values: clipped to one of them, or covered
            reached = 255 * site.input.scale
            assert 0.5 < reached / max(abs(low), abs(high)) < 1.02


def test_float_sites_stay_without() -> None:
    """Catches input parameters on a float site."""
    stage = through(decoder(), InsertObservers(), AssignPrecision(), QuantizeActivations())
    assert {site.target for site in stage.sites.values() if site.input is None} == {"mlp.down_proj"}
    undecided = through(decoder(), InsertObservers())
    assert QuantizeActivations().run(undecided) is False
    assert all(site.input is None for site in undecided.sites.values())


# ---- automatic -------------------------------------------------------------------------------------------------------


def test_output_error_against_numpy() -> None:
    """An error of the input, of one modality, or of another grid: x W^T in float64 with x rounded as engines round."""
    text, image = rows_of(3, "normal"), 10 * rows_of(4, "normal")[:7]
    observed = observation(text, image)
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(5))
    for low, high in ((-12.0, 12.0), (-3.0, 2.0)):
        grid = InputQuantization(*activation_scale_and_offset(low, high, torch.bfloat16))
        share = np.concatenate([np.full(64, 0.5 / 64), np.full(7, 0.5 / 7)])
        values = torch.cat([text, image]).double().numpy()
        error = (numpy_rounded(values, low, high, torch.bfloat16) - values) @ weight.double().numpy().T
        expected = float(((error**2).sum(1) * share).sum())
        assert input_rounding_error(observed, weight, grid) == pytest.approx(expected, rel=0.02)


def of_weight(weight: torch.Tensor) -> Stage:
    """A stage that is one static linear."""
    block = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)).requires_grad_(False)
    block.get_parameter("0.weight").copy_(weight)
    stage = through(staged(block, [Call(0, (torch.ones(2, weight.shape[1]),), {})]), InsertObservers())
    for site in stage.sites.values():
        site.scheme = Scheme.W8A8
    return stage


def wide_row() -> torch.Tensor:
    """float32 [512, 512] within 1, but for four values of 1.25 in one row."""
    rows = torch.rand(512, 512, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows[100, :4] = 1.25
    return rows


@pytest.mark.parametrize("signs", [[1.0, 1.0, 1.0, 1.0], [1.0, -1.0, 1.0, -1.0]])
def test_automatic_takes_the_smaller_measured_error(signs: list[float]) -> None:
    """Always the one method, or the worse of the two: four clipped values add up in an output, or cancel each other.

    The histogram sees the same mass in both cases and clips; only the outputs themselves can tell.
    """
    observed, weight = observation(wide_row()), torch.ones(8, 512)
    weight[:, :4] = torch.tensor(signs)
    stage = of_weight(weight)
    (source,) = stage.observations
    stage.observations[source] = observed
    chosen = {}
    for method in ("minmax", "histogram", "automatic"):
        through(stage, QuantizeActivations(method=method))
        (site,) = stage.sites.values()
        assert site.input is not None
        chosen[method] = site.input
    assert chosen["histogram"].scale < 0.97 * chosen["minmax"].scale
    better = "minmax" if len(set(signs)) == 1 else "histogram"
    assert chosen["automatic"] == chosen[better]
    errors = {method: input_rounding_error(observed, weight, grid) for method, grid in chosen.items()}
    assert errors["automatic"] == min(errors.values()) < 0.95 * max(errors.values())


@pytest.mark.parametrize("outliers", [False, True])
def test_automatic_is_never_worse_than_either(outliers: bool) -> None:
    """Catches errors computed with another group's rows or weights."""
    stages = {
        method: through(observed(decoder(outliers=outliers)), QuantizeActivations(method=method))
        for method in ("minmax", "histogram", "automatic")
    }
    for source, members in stages["automatic"].groups().items():
        weight = torch.cat([stages["automatic"].linear(site).weight for site in members])
        errors = {}
        for method, stage in stages.items():
            (quantization,) = {site.input for site in stage.groups()[source]}
            assert quantization is not None
            errors[method] = input_rounding_error(stage.observations[source], weight, quantization)
        assert errors["automatic"] == min(errors.values())


@pytest.mark.parametrize("scheme", [Scheme.W8A8_DYNAMIC, Scheme.W4A8_DYNAMIC])
def test_per_token_sites_get_no_static_range(scheme: Scheme) -> None:
    """An input scale on a site whose scale is found at run time: it would be lowered and emitted as static."""
    stage = observed(decoder(), scheme)
    assert QuantizeActivations().run(stage) is False
    assert all(site.input is None for site in stage.sites.values())


def test_second_run_changes_nothing() -> None:
    """Catches a pass that always reports a change, or misses a change of the method."""
    stage = through(observed(decoder(outliers=True)), QuantizeActivations())
    assert QuantizeActivations().run(stage) is False
    assert QuantizeActivations(method="minmax").run(stage) is True


def test_minmax_is_the_formula() -> None:
    """A range taken from kept rows only, or from one modality: all rows of both, through the one formula."""
    stage = through(decoder(), InsertObservers(tokens=2), AssignPrecision(), QuantizeActivations(method="minmax"))
    full = through(decoder(), InsertObservers())
    site = stage.sites["model.layers.0.self_attn.o_proj"]
    rows = full.observations[site.source].kept
    expected = InputQuantization(*activation_scale_and_offset(rows.min().item(), rows.max().item(), torch.bfloat16))
    assert site.scheme == Scheme.W8A8 and site.input == expected
