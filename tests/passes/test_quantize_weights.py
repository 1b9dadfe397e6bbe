"""quantize-weights: against NumPy, and biases that have to fit into int32."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch

from tests.support.exact_stage import text_after
from tests.support.random_stage import (
    DTYPES,
    EVERYWHERE,
    GROUP_SIZE,
    SCHEMES,
    decoder,
    observed,
    quantized,
    site_at,
    through,
)
from vlqc.errors import Fault, UserError
from vlqc.ir.stage import Site, Stage, WeightQuantization
from vlqc.kernels_ref.quant_linear import StaticQuantLinear
from vlqc.passes import quantize_weights
from vlqc.passes.assign_precision import AssignPrecision
from vlqc.passes.insert_observers import InsertObservers
from vlqc.passes.lower_linears import LowerLinears
from vlqc.passes.quantize_activations import QuantizeActivations
from vlqc.passes.quantize_weights import QuantizeWeights, emitted_bias
from vlqc.targets.schemes import Scheme

Method = Literal["auto", "round", "clip", "gptq"]


def test_golden(golden: Callable[[str, str], None]) -> None:
    """Any change of the integers or scales of the exact stage shows here as text."""
    golden("after-quantize-weights.vlqc", text_after("quantize-weights"))


@pytest.mark.parametrize("outliers", [False, True])
def test_against_numpy(outliers: bool) -> None:
    """A scale per tensor, per column or rounded to bfloat16; integers cut instead of rounded; -128 used."""
    stage = through(observed(decoder(outliers=outliers)), QuantizeActivations(), QuantizeWeights(method="round"))
    for site in stage.sites.values():
        assert site.weight is not None
        weight = stage.linear(site).weight.numpy()
        scale = np.abs(weight).max(1, keepdims=True) / np.float32(127)
        assert site.weight.integers.dtype == torch.int8 and site.weight.scale.dtype == torch.float32
        np.testing.assert_array_equal(site.weight.scale, scale)
        np.testing.assert_array_equal(site.weight.integers, np.clip(np.rint(weight / scale), -127, 127))
        assert np.abs(weight - site.weight.integers.numpy() * site.weight.scale.numpy()).max() <= 0.5001 * scale.max()


@pytest.mark.parametrize("method", ["round", "clip", "gptq"])
@pytest.mark.parametrize("scheme", [Scheme.W8A8, Scheme.W4A8_DYNAMIC])
def test_is_an_analysis(method: Method, scheme: Scheme) -> None:
    """A float weight overwritten before it is lowered: passes that come between would see the rounded one."""
    stage = through(observed(decoder(), scheme), QuantizeActivations())
    known = {path: parameter.clone() for path, parameter in stage.module.named_parameters()}
    through(stage, QuantizeWeights(method=method))
    assert all(torch.equal(parameter, known[path]) for path, parameter in stage.module.named_parameters())


def test_float_sites_stay_without() -> None:
    """Integers for a site that is emitted in float, or a quantized site left out."""
    stage = through(decoder(), InsertObservers(), AssignPrecision(), QuantizeActivations(), QuantizeWeights())
    assert [site.target for site in stage.sites.values() if site.weight is None] == ["mlp.down_proj"]
    assert all(site.weight is not None for site in quantized(stage)) and len(quantized(stage)) == 6
    assert QuantizeWeights().run(decoder()) is False  # no scheme is assigned


@pytest.mark.parametrize("method", ["round", "clip", "gptq"])
@pytest.mark.parametrize("bias", [300.0, 257.2])  # 257.2 is no value of bfloat16: it is stored as 258
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bias_of_a_zero_row_fits(bias: float, dtype: torch.dtype, method: Method) -> None:
    """A row of zeros with a bias: its own scale is so fine that the bias, as stored, overflows int32 in its steps."""
    stage = observed(decoder(dtype=dtype))
    for path in ("weight", "bias"):
        stage.module.get_parameter(f"self_attn.v_proj.{path}")[4] = 0 if path == "weight" else bias
    stage.module.get_parameter("self_attn.v_proj.weight")[5] *= 1e-9
    stage.module.get_parameter("self_attn.v_proj.bias")[5] = -bias
    through(stage, QuantizeActivations(), QuantizeWeights(method=method), LowerLinears())
    lowered = stage.module.get_submodule("self_attn.v_proj")
    assert isinstance(lowered, StaticQuantLinear)
    rows = stage.execution.calls[0].args[0]
    stored = torch.tensor(bias).to(dtype).item()
    torch.testing.assert_close(lowered(rows)[..., 4], torch.full(rows.shape[:-1], stored), rtol=1e-6, atol=0)
    torch.testing.assert_close(lowered(rows)[..., 5], torch.full(rows.shape[:-1], -stored), rtol=1e-6, atol=0)


def test_tiny_input_scale_keeps_biases() -> None:
    """An input that was always zero has a tiny scale: every bias counted in its steps would overflow."""
    stage = decoder()
    for call in stage.execution.calls:
        call.args[0].zero_()
    through(observed(stage), QuantizeActivations(), QuantizeWeights(), LowerLinears())
    bias = decoder().module.get_parameter("self_attn.q_proj.bias")
    got = stage.module.get_submodule("self_attn.q_proj")(stage.execution.calls[0].args[0])[0, 0]
    torch.testing.assert_close(got, bias, rtol=1e-4, atol=1e-6)


def test_second_run_tells_the_truth() -> None:
    """Catches a pass that always reports a change, or misses a changed weight."""
    stage = through(observed(decoder()), QuantizeActivations(), QuantizeWeights())
    assert QuantizeWeights().run(stage) is False
    stage.module.get_parameter("mlp.up_proj.weight")[3, 3] += 0.5
    assert QuantizeWeights().run(stage) is True
    assert site_at(stage, "mlp.up_proj").scheme == Scheme.W8A8


# ---- per token and in groups -----------------------------------------------------------------------------------------


@DTYPES
def test_dynamic_scales_are_values_of_the_dtype(dtype: torch.dtype) -> None:
    """Integers that belong to another scale than the stored one: engines read a W8A8_DYNAMIC scale in the dtype."""
    stage = through(observed(decoder(dtype=dtype, outliers=True), Scheme.W8A8_DYNAMIC), QuantizeWeights(method="round"))
    for site in stage.sites.values():
        assert site.weight is not None and site.weight.group_scale is None and site.input is None
        weight, scale = stage.linear(site).weight.double().numpy(), site.weight.scale.double().numpy()
        assert (
            torch.equal(site.weight.scale, site.weight.scale.to(dtype).float())
            and site.weight.scale.dtype == torch.float32
        )
        absmax = np.abs(weight).max(1, keepdims=True)
        assert (scale >= absmax / 127 * (1 - 1e-6)).all() and (scale <= absmax / 127 * (1 + 2.0**-7)).all()
        np.testing.assert_array_equal(site.weight.integers, np.rint(weight / scale))
        assert (np.abs(weight - site.weight.integers.numpy() * scale) <= 0.5001 * scale).all()


@DTYPES
def test_groups_against_their_bound(dtype: torch.dtype) -> None:
    """A scale per row instead of per group, groups along the wrong side, integers beyond 4 bits, more than half a step.

    Steps are bounded from above by what covers a group: its largest weight at 7, so at most a bit more than absmax / 7.
    """
    stage = through(observed(decoder(dtype=dtype, outliers=True), Scheme.W4A8_DYNAMIC), QuantizeWeights(method="round"))
    for site in stage.sites.values():
        assert site.weight is not None and site.weight.group_scale is not None and site.group_size == GROUP_SIZE
        rows, columns = site.shape
        assert site.weight.scale.shape == (rows, 1) and site.weight.group_scale.shape == (rows, columns // GROUP_SIZE)
        for scale in (site.weight.scale, site.weight.group_scale):
            assert (
                scale.dtype == torch.float32 and torch.equal(scale, scale.to(dtype).float()) and float(scale.min()) > 0
            )
        integers = site.weight.integers.numpy().astype(np.float64)
        assert integers.min() >= -8 and integers.max() <= 7 and np.abs(integers).max() >= 7
        weight = stage.linear(site).weight.double().numpy()
        groups = weight.reshape(rows, -1, GROUP_SIZE)
        step = (site.weight.scale.double() * site.weight.group_scale.double()).numpy()
        error = np.abs(groups - integers.reshape(groups.shape) * step[:, :, None])
        assert (error <= 0.5 * step[:, :, None] * (1 + 1e-5)).all()
        assert (step <= np.abs(groups).max(2) / 7 * (1 + 2.0**-6)).all()
        np.testing.assert_array_equal(
            integers, np.clip(np.rint(groups / step[:, :, None]), -8, 7).reshape(weight.shape)
        )


def test_groups_without_a_size() -> None:
    """Catches a pipeline that sets the scheme itself without error that names the site, not a TypeError."""
    stage = through(observed(decoder(), Scheme.W4A8_DYNAMIC))
    site_at(stage, "self_attn.o_proj").group_size = None
    with pytest.raises(UserError, match=r"self_attn\.o_proj has no group size"):
        QuantizeWeights().run(stage)


@pytest.mark.parametrize("scheme", [Scheme.W8A8_DYNAMIC, Scheme.W4A8_DYNAMIC])
def test_second_run_of_other_schemes(scheme: Scheme) -> None:
    """Catches a comparison of integers only: scales of all levels count."""
    stage = through(observed(decoder(), scheme), QuantizeWeights())
    assert QuantizeWeights().run(stage) is False
    for number in range(len(rounded_parts(stage))):
        site = site_at(stage, "mlp.up_proj")
        assert site.weight is not None
        parts = [part.clone() for part in site.weight.tensors()]
        parts[number] += 1
        site.weight = WeightQuantization(*parts)
        assert QuantizeWeights().run(stage) is True and QuantizeWeights().run(stage) is False


def rounded_parts(stage: Stage) -> list[torch.Tensor]:
    weight = site_at(stage, "mlp.up_proj").weight
    assert weight is not None
    return weight.tensors()


def test_bias_as_it_is_stored() -> None:
    """A bias that a pass added is stored nowhere but in quant_bias: rounding it to bfloat16 would only lose."""
    stage = observed(decoder())
    site = site_at(stage, "self_attn.q_proj")
    stage.linear(site).bias.fill_(1.003)
    stored = emitted_bias(stage, site)
    assert stored is not None and torch.equal(stored, torch.ones(32))
    site.added_bias = True
    exact = emitted_bias(stage, site)
    assert exact is not None and torch.equal(exact, torch.full((32,), 1.003))
    assert emitted_bias(stage, site_at(stage, "self_attn.o_proj")) is None


# ---- better than the nearest -----------------------------------------------------------------------------------------


@SCHEMES
@pytest.mark.parametrize("method", ["clip", "gptq"])
@DTYPES
def test_scales_and_integers_of_every_method(scheme: Scheme, method: Method, dtype: torch.dtype) -> None:
    """Scales that engines would round again, integers beyond their bits, or the shapes of another scheme."""
    stage = observed(decoder(dtype=dtype, outliers=True), scheme)
    stage.module.get_parameter("mlp.up_proj.weight")[7] = 0
    through(stage, QuantizeActivations(), QuantizeWeights(method=method))
    for site in stage.sites.values():
        assert site.weight is not None and (site.weight.group_scale is None) == (scheme != Scheme.W4A8_DYNAMIC)
        low, high = (-8, 7) if scheme == Scheme.W4A8_DYNAMIC else (-127, 127)
        assert site.weight.integers.dtype == torch.int8 and site.weight.integers.shape == site.shape
        assert int(site.weight.integers.min()) >= low and int(site.weight.integers.max()) <= high
        for scale in site.weight.tensors()[1:]:
            assert scale.dtype == torch.float32 and bool((scale > 0).all()) and bool(scale.isfinite().all())
            assert scheme == Scheme.W8A8 or torch.equal(scale, scale.to(dtype).float())
        assert site.weight.group_scale is None or float(site.weight.group_scale.max()) <= 17
    empty = site_at(stage, "mlp.up_proj").weight
    assert empty is not None and not bool(empty.integers[7].any())


@SCHEMES
def test_methods_lower_the_error_of_the_outputs(scheme: Scheme) -> None:
    """A method that is named but not run, or one that makes the outputs worse on the rows it was fitted to.

    Behind the norms these random inputs do not go along with each other: there gptq can only leave it at clipping.
    """
    noise, behind_attention = [], []
    for method in ("round", "clip", "gptq"):
        stage = through(observed(decoder(outliers=True, samples=12), scheme), QuantizeActivations())
        through(stage, QuantizeWeights(method=method))
        noise.append(sum(output_noise(stage, site) for site in stage.sites.values()))
        behind_attention.append(output_noise(stage, site_at(stage, "self_attn.o_proj")))
    assert noise[2] < 0.95 * noise[1] < 0.93 * noise[0]
    assert behind_attention[2] < 0.7 * behind_attention[1]


@DTYPES
@pytest.mark.parametrize("method", ["round", "gptq"])
def test_schemes_with_one_form_of_weights_have_the_same_integers(method: Method, dtype: torch.dtype) -> None:
    """Catches weights that depend on how inputs are quantized, where scales are read in the same dtype."""
    stages = [
        through(observed(decoder(dtype=dtype), scheme), QuantizeActivations(), QuantizeWeights(method=method))
        for scheme in (Scheme.W8A8_DYNAMIC, Scheme.W8A8_MIX, Scheme.W8A16)
    ]
    first, *others = [[site.weight for site in stage.sites.values()] for stage in stages]
    for weight, *same in zip(first, *others, strict=True):
        assert weight is not None and torch.equal(weight.scale, weight.scale.to(dtype).float())
        for other in same:
            assert other is not None
            assert all(map(torch.equal, weight.tensors(), other.tensors()))


def output_noise(stage: Stage, site: Site) -> float:
    """What the weight's error adds to the outputs, relative to them, on the observed rows."""
    assert site.weight is not None
    scale = site.weight.scale if site.weight.group_scale is None else site.weight.scale * site.weight.group_scale
    weight, seen = stage.linear(site).weight.double(), stage.observations[site.source]
    stored = site.weight.integers.double() * scale.double().repeat_interleave(site.shape[1] // scale.shape[1], 1)
    rows = seen.kept.double() * seen.row_weight().sqrt()[:, None]
    return float((rows @ (weight - stored).T).square().sum() / (rows @ weight.T).square().sum())


def test_automatic_is_gptq() -> None:
    """A default that quietly rounds to the nearest where statistics are there."""
    stages = [
        through(observed(decoder(), Scheme.W4A8_DYNAMIC), QuantizeWeights(method=method)) for method in ("auto", "gptq")
    ]
    for one, other in zip(*(stage.sites.values() for stage in stages), strict=True):
        assert one.weight is not None and other.weight is not None
        assert all(torch.equal(*pair) for pair in zip(one.weight.tensors(), other.weight.tensors(), strict=True))


@pytest.mark.parametrize("scheme", [Scheme.W8A8_DYNAMIC, Scheme.W4A8_DYNAMIC])
def test_without_observations(scheme: Scheme) -> None:
    """Methods that need statistics in a pipeline without any: a KeyError, or a refusal of those that need none."""
    for method in ("clip", "gptq"):
        stage = through(decoder(), EVERYWHERE[scheme])
        with pytest.raises(UserError, match="put insert-observers before it"):
            QuantizeWeights(method=method).run(stage)
    plain = through(decoder(), EVERYWHERE[scheme], QuantizeWeights(method="round"))
    through(stage, QuantizeWeights())
    for one, other in zip(plain.sites.values(), stage.sites.values(), strict=True):
        assert one.weight is not None and other.weight is not None
        assert all(torch.equal(*pair) for pair in zip(one.weight.tensors(), other.weight.tensors(), strict=True))


@pytest.mark.parametrize("method", ["round", "clip", "gptq"])
@pytest.mark.parametrize("threads", [1, 3])
def test_groups_side_by_side_are_what_they_are_alone(method: Method, threads: int) -> None:
    """Weights that land at another site, or that depend on how many groups are worked on; threads that stay taken."""
    stage = through(observed(decoder()), QuantizeActivations())
    alone = {
        site.target: new
        for source, members in stage.groups().items()
        if (sites := [site for site in members if site.scheme not in (None, Scheme.FLOAT)])
        for site, new in zip(sites, quantize_weights.quantize_site_weights(stage, source, sites, method), strict=True)
    }
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        through(stage, QuantizeWeights(method=method))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for site in quantized(stage):
        assert site.weight is not None
        assert all(map(torch.equal, site.weight.tensors(), alone[site.target].tensors()))


def test_an_error_in_any_group_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error that is lost in another thread, or a thread count that is not restored."""
    stage = through(observed(decoder()), QuantizeActivations())
    real, last = quantize_weights.quantize_site_weights, list(stage.groups())[-2]

    def fails(stage: Stage, source: str, *rest: Any) -> Any:
        if source == last:
            raise UserError(Fault("no"))
        return real(stage, source, *rest)

    monkeypatch.setattr(quantize_weights, "quantize_site_weights", fails)
    threads = torch.get_num_threads()
    with pytest.raises(UserError, match="no"):
        QuantizeWeights().run(stage)
    assert torch.get_num_threads() == threads
