"""lower-linears: modules of integers in the places of the Linears, within the error bounds of the arithmetic."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.exact_stage import text_after
from tests.support.random_stage import decibels, decoder, integers, observed, outputs, quantized, site_at, through
from vlqc.errors import UserError
from vlqc.ir.stage import Site, Stage
from vlqc.ir.verifier import check
from vlqc.kernels_ref.matmul import CORRECTION_STEP
from vlqc.kernels_ref.quant_linear import DynamicQuantLinear, GroupQuantLinear, StaticQuantLinear
from vlqc.passes.assign_precision import AssignPrecision
from vlqc.passes.insert_observers import InsertObservers
from vlqc.passes.lower_linears import LowerLinears
from vlqc.passes.quantize_activations import QuantizeActivations
from vlqc.passes.quantize_weights import QuantizeWeights
from vlqc.targets.schemes import Scheme


def linear_at(stage: Stage, target: str) -> nn.Linear:
    module = stage.module.get_submodule(target)
    assert isinstance(module, nn.Linear)
    return module


def test_golden(golden: Callable[[str, str], None]) -> None:
    """Any change of the tensors that the exact stage is lowered to shows here as text."""
    golden("after-lower-linears.vlqc", text_after("lower-linears"))


def test_quantized_linears_are_swapped_and_others_stay() -> None:
    """A Linear that stays where integers should run, or a float site that is lost; in the tree and in the graph."""
    stage = through(decoder(), InsertObservers(), AssignPrecision(), QuantizeActivations(), QuantizeWeights())
    down = linear_at(stage, "mlp.down_proj")
    through(stage, LowerLinears())
    assert stage.module.get_submodule("mlp.down_proj") is down
    lowered = {path for path, module in stage.module.named_modules() if isinstance(module, StaticQuantLinear)}
    assert lowered == {site.target for site in quantized(stage)} and len(lowered) == 6
    called = {str(node.target) for node in stage.graph.nodes if node.op == "call_module"}
    assert lowered < called and check(stage) == []
    assert not any(path.startswith("self_attn.q_proj") for path, _ in stage.module.named_parameters())


def test_stage_runs_the_integers() -> None:
    """A swap that the stage's forward does not see: other integers must give other outputs."""
    stage = integers(observed(decoder()))
    before = outputs(stage)
    module = stage.module.get_submodule("mlp.up_proj")
    assert isinstance(module, StaticQuantLinear)
    module.weight[0, 0] += 5
    assert not torch.equal(outputs(stage), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_tensors(dtype: torch.dtype) -> None:
    """Catches deq_scale and quant_bias that differ from their definition, in float64 from the stored tensors."""
    stage = observed(decoder(dtype=dtype, outliers=True))
    biases = {site.name: stage.linear(site).bias for site in stage.sites.values()}
    integers(stage, correct_bias=False)
    for site in stage.sites.values():
        module = stage.module.get_submodule(site.target)
        assert isinstance(module, StaticQuantLinear) and site.weight is not None and site.input is not None
        assert torch.equal(module.weight, site.weight.integers) and torch.equal(module.weight_scale, site.weight.scale)
        assert (module.input_scale.item(), module.input_offset.item()) == (site.input.scale, site.input.offset)
        deq_scale = (site.weight.scale.double() * site.input.scale).float().flatten()
        stored = module.deq_scale if dtype == torch.bfloat16 else module.deq_scale.to(torch.int32).view(torch.float32)
        torch.testing.assert_close(stored, deq_scale, rtol=2e-7, atol=0)
        bias = biases[site.name]
        shift = site.input.offset * site.weight.integers.double().sum(1)
        steps = (0 if bias is None else bias.double() / stored.double()) - shift
        assert torch.equal(module.quant_bias.double(), steps.round())


def test_bias_is_used_as_it_is_stored() -> None:
    """Catches quant_bias computed from the unrounded bias: it cannot be recomputed from the emitted folder."""
    stage = observed(decoder())
    stage.module.get_parameter("self_attn.q_proj.bias").fill_(1.003)  # stored in bfloat16 as 1
    integers(stage, correct_bias=False)
    module = stage.module.get_submodule("self_attn.q_proj")
    assert isinstance(module, StaticQuantLinear) and module.bias is not None
    assert torch.equal(module.bias, torch.ones(32))
    expected = (1 / module.deq_scale.double() - module.input_offset.double() * module.weight.double().sum(1)).round()
    assert torch.equal(module.quant_bias.double(), expected)


def test_mean_error_is_taken_off() -> None:
    """A correction of the wrong sign or size, or one that is no whole number of CORRECTION_STEPs: against NumPy.

    The mean error is that of the outputs over the kept rows, text and image counting the same; what is left of it is
    half a correction step and half a step of the bias' own rounding at most.
    """
    plain, corrected = (integers(observed(decoder(outliers=True)), correct_bias=on) for on in (False, True))
    moved = 0
    for site in corrected.sites.values():
        before, after = (stage.module.get_submodule(site.target) for stage in (plain, corrected))
        assert isinstance(before, StaticQuantLinear) and isinstance(after, StaticQuantLinear) and site.input is not None
        taken = (before.quant_bias - after.quant_bias).double().numpy()
        assert not (taken % CORRECTION_STEP).any()
        most = np.linalg.norm(after.weight.double().numpy(), axis=1)
        assert (np.abs(taken) <= most).all()
        seen, weight = corrected.observations[site.source], floats()[site.name]
        x, kind = seen.kept.double().numpy(), seen.kept_modality.numpy()
        grid = np.clip(np.rint(x / site.input.scale + site.input.offset), -128, 127)
        rounded = (grid - site.input.offset) * site.input.scale
        stored = after.weight.double().numpy() * after.weight_scale.double().numpy()
        error = rounded @ stored.T - x @ weight.T
        mean = np.mean([error[kind == which].mean(0) for which in np.unique(kind)], axis=0) / after.deq_scale.numpy()
        free = np.abs(mean) < most - CORRECTION_STEP
        assert np.abs(mean - taken)[free].max() < CORRECTION_STEP / 2 + 0.5
        moved += int((taken != 0).sum())
    assert moved > 0


def floats() -> dict[str, npt.NDArray[np.float64]]:
    """Weights of the decoder that `test_mean_error_is_taken_off` lowers."""
    stage = decoder(outliers=True)
    return {site.name: stage.linear(site).weight.detach().double().numpy() for site in stage.sites.values()}


@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), outliers=st.booleans())
def test_output_is_within_the_analytic_bound(seed: int, outliers: bool) -> None:
    """Any lost term: |y - y_float| <= half a step of x, of w, of both together, and of the bias."""
    stage = observed(decoder(seed, outliers=outliers))
    floats = {site.target: linear_at(stage, site.target) for site in stage.sites.values()}
    integers(stage, "minmax")
    for site in stage.sites.values():
        x = stage.observations[site.source].kept
        assert site.input is not None and site.weight is not None
        weight, step_x, step_w = floats[site.target].weight, site.input.scale, site.weight.scale  # step_w [N, 1]
        # Half a step of rounding; at the ends of the range the offset's rounding adds up to another half.
        bound = step_x * weight.abs().sum(1) + x.abs().sum(1, keepdim=True) * step_w.T / 2
        bound = bound + weight.shape[1] * step_x * step_w.T / 2 + step_x * step_w.T / 2
        error = (stage.module.get_submodule(site.target)(x) - floats[site.target](x)).abs()
        assert bool((error <= bound * 1.0001 + 1e-5).all()), site.name
        assert error.max() > 0


@pytest.mark.parametrize("missing", ["weight", "input"])
def test_undecided_sites_are_an_error(missing: str) -> None:
    """A site promised as W8A8 and left in float without a word: the folder's description would be wrong."""
    stage = through(observed(decoder()), QuantizeActivations(), QuantizeWeights())
    site = site_at(stage, "mlp.up_proj")
    setattr(site, missing, None)
    with pytest.raises(UserError, match=r"mlp\.up_proj cannot be lowered"):
        LowerLinears().run(stage)
    assert isinstance(stage.module.get_submodule("self_attn.q_proj"), nn.Linear)  # nothing is half done


def test_nothing_decided_changes_nothing() -> None:
    """Catches a pass that reports a change for float sites, or lowers them."""
    assert LowerLinears().run(decoder()) is False
    stage = through(decoder(), InsertObservers(), AssignPrecision(scheme="FLOAT"))
    assert LowerLinears().run(stage) is False
    assert {site.scheme for site in stage.sites.values()} == {Scheme.FLOAT}


def test_inputs_of_any_shape() -> None:
    """A module that flattens its input and forgets the shape: blocks hand it [rows, K] and [1, rows, K]."""
    stage = integers(observed(decoder()))
    module = stage.module.get_submodule("mlp.gate_proj")
    rows: Tensor = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    assert module(rows).shape == (1, 6, 48)
    assert torch.equal(module(rows)[0], module(rows[0]))


# ---- per token and in groups -----------------------------------------------------------------------------------------

KINDS = {Scheme.W8A8_DYNAMIC: DynamicQuantLinear, Scheme.W4A8_DYNAMIC: GroupQuantLinear}


def dequantized(site: Site) -> Tensor:
    """The dequantized weight, float64 [N, K]."""
    assert site.weight is not None
    worth = site.weight.integers.double() * site.weight.scale.double()
    if site.weight.group_scale is None:
        return worth
    return worth * site.weight.group_scale.double().repeat_interleave(site.group_size or 0, dim=1)


@pytest.mark.parametrize("scheme", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_schemes_run_their_integers(scheme: Scheme, dtype: torch.dtype) -> None:
    """The wrong module, a bias lost or not as stored, integers or scales of another site; against float64 by hand."""
    stage = observed(decoder(dtype=dtype, outliers=True), scheme)
    biases = {site.target: linear_at(stage, site.target).bias for site in stage.sites.values()}
    through(stage, QuantizeActivations(), QuantizeWeights(), LowerLinears())
    assert check(stage) == []
    for site in stage.sites.values():
        module = stage.module.get_submodule(site.target)
        assert type(module) is KINDS[scheme] and site.weight is not None
        assert set(module.state_dict()) >= {"weight", "weight_scale", "weight_offset"}
        assert "input_scale" not in module.state_dict() and "quant_bias" not in module.state_dict()
        x = stage.observations[site.source].kept.double()
        step = x.abs().amax(1, keepdim=True) / 127
        y = (x / step).round() * step @ dequantized(site).T
        bias = biases[site.target]
        assert (module.bias is None) == (bias is None)
        if bias is not None:
            assert torch.equal(module.get_buffer("bias"), bias.to(dtype).float())
            y = y + bias.to(dtype).double()
        got = module(x.float()).double()
        assert ((got - y).abs() > 1e-4 * y.square().mean().sqrt()).float().mean() < 0.01  # a tie rounded the other way


@pytest.mark.parametrize(("scheme", "least"), [(Scheme.W8A8_DYNAMIC, 30.0), (Scheme.W4A8_DYNAMIC, 15.0)])
def test_other_schemes_come_close(scheme: Scheme, least: float) -> None:
    """A lost term: 8 bits per token reach 38 dB on this stage, 4-bit groups 18, and nonsense about 0."""
    reference = outputs(decoder())
    assert decibels(integers(observed(decoder(), scheme)), reference) > least


def test_gained_bias_is_not_stored() -> None:
    """Catches an added bias that is emitted as a tensor of its own: it is part of quant_bias only."""
    stage = observed(decoder())
    site = site_at(stage, "mlp.up_proj")
    linear = linear_at(stage, "mlp.up_proj")
    rows = stage.observations[site.source].kept
    linear.bias = nn.Parameter(torch.linspace(-40, 40, 48), requires_grad=False)
    site.added_bias, expected = True, linear(rows)
    integers(stage)
    module = stage.module.get_submodule("mlp.up_proj")
    assert isinstance(module, StaticQuantLinear) and module.bias is None and "bias" not in module.state_dict()
    assert (module(rows) - expected).abs().max() < 0.2 < float(expected.abs().max())
    known = stage.module.get_submodule("self_attn.q_proj")
    assert isinstance(known, StaticQuantLinear) and known.bias is not None


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (Scheme.W8A8_DYNAMIC, Scheme.W4A8_DYNAMIC),
        (Scheme.W4A8_DYNAMIC, Scheme.W8A8_DYNAMIC),
        (Scheme.W8A8_DYNAMIC, Scheme.W8A8),
    ],
)
def test_scheme_changed_after_rounding(given: Scheme, wanted: Scheme) -> None:
    """Another scheme assigned between rounding and lowering: the module must be the scheme's, or nothing at all."""
    stage = through(observed(decoder(), given), QuantizeActivations(), QuantizeWeights())
    for site in stage.sites.values():
        site.scheme = wanted
    with pytest.raises(UserError, match="cannot be lowered"):
        LowerLinears().run(stage)


def test_scheme_decides_not_what_is_there() -> None:
    """A static module under the name W8A8_DYNAMIC, because an input scale of an earlier assignment was left."""
    stage = through(observed(decoder()), QuantizeActivations(), QuantizeWeights())
    for site in stage.sites.values():
        site.scheme = Scheme.W8A8_DYNAMIC
    LowerLinears().run(stage)
    assert type(stage.module.get_submodule("mlp.up_proj")) is DynamicQuantLinear
