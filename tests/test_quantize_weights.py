"""quantize-weights: against NumPy, and biases that have to fit into int32."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from exact_stage import text_after
from random_stage import decoder, observed, quantized, site, through

from vlqc.engines import Scheme
from vlqc.kernels_ref.linear import StaticQuantLinear
from vlqc.passes.assign_precision import AssignPrecision
from vlqc.passes.insert_observers import InsertObservers
from vlqc.passes.lower_linears import LowerLinears
from vlqc.passes.quantize_activations import QuantizeActivations
from vlqc.passes.quantize_weights import QuantizeWeights


def test_golden(golden: Callable[[str, str], None]) -> None:
    """Any change of the integers or scales of the exact stage shows here as text."""
    golden("after-quantize-weights.vlqc", text_after("quantize-weights"))


@pytest.mark.parametrize("outliers", [False, True])
def test_against_numpy(outliers: bool) -> None:
    """A scale per tensor, per column or rounded to bfloat16; integers cut instead of rounded; -128 used."""
    stage = through(observed(decoder(outliers=outliers)), QuantizeActivations(), QuantizeWeights())
    for it in stage.sites.values():
        assert it.weight is not None
        weight = stage.linear(it).weight.numpy()
        scale = np.abs(weight).max(1, keepdims=True) / np.float32(127)
        assert it.weight.integers.dtype == torch.int8 and it.weight.scale.dtype == torch.float32
        np.testing.assert_array_equal(it.weight.scale, scale)
        np.testing.assert_array_equal(it.weight.integers, np.clip(np.rint(weight / scale), -127, 127))
        assert np.abs(weight - it.weight.integers.numpy() * it.weight.scale.numpy()).max() <= 0.5001 * scale.max()


def test_is_an_analysis() -> None:
    """A float weight overwritten before it is lowered: passes that come between would see the rounded one."""
    stage = through(observed(decoder()), QuantizeActivations())
    known = {path: parameter.clone() for path, parameter in stage.live.named_parameters()}
    through(stage, QuantizeWeights())
    assert all(torch.equal(parameter, known[path]) for path, parameter in stage.live.named_parameters())


def test_float_sites_stay_without() -> None:
    """Integers for a site that is emitted in float, or a quantized site left out."""
    stage = through(decoder(), InsertObservers(), AssignPrecision(), QuantizeActivations(), QuantizeWeights())
    assert [it.target for it in stage.sites.values() if it.weight is None] == ["mlp.down_proj"]
    assert all(it.weight is not None for it in quantized(stage)) and len(quantized(stage)) == 6
    assert QuantizeWeights().run(decoder()) is False  # nobody has decided anything


@pytest.mark.parametrize("bias", [300.0, 257.2])  # 257.2 is no value of bfloat16: it is stored as 258
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bias_of_a_zero_row_fits(bias: float, dtype: torch.dtype) -> None:
    """A row of zeros with a bias: its own scale is so fine that the bias, as stored, overflows int32 in its steps."""
    stage = observed(decoder(dtype=dtype))
    for path in ("weight", "bias"):
        stage.live.get_parameter(f"self_attn.v_proj.{path}")[4] = 0 if path == "weight" else bias
    stage.live.get_parameter("self_attn.v_proj.weight")[5] *= 1e-9
    stage.live.get_parameter("self_attn.v_proj.bias")[5] = -bias
    through(stage, QuantizeActivations(), QuantizeWeights(), LowerLinears())
    lowered = stage.live.get_submodule("self_attn.v_proj")
    assert isinstance(lowered, StaticQuantLinear)
    rows = stage.calls[0].args[0]
    stored = torch.tensor(bias).to(dtype).item()
    torch.testing.assert_close(lowered(rows)[..., 4], torch.full(rows.shape[:-1], stored), rtol=1e-6, atol=0)
    torch.testing.assert_close(lowered(rows)[..., 5], torch.full(rows.shape[:-1], -stored), rtol=1e-6, atol=0)


def test_tiny_input_scale_keeps_biases() -> None:
    """An input that was always zero has a tiny scale: every bias counted in its steps would overflow."""
    stage = decoder()
    for call in stage.calls:
        call.args[0].zero_()
    through(observed(stage), QuantizeActivations(), QuantizeWeights(), LowerLinears())
    bias = decoder().live.get_parameter("self_attn.q_proj.bias")
    got = stage.live.get_submodule("self_attn.q_proj")(stage.calls[0].args[0])[0, 0]
    torch.testing.assert_close(got, bias, rtol=1e-4, atol=1e-6)


def test_second_run_tells_the_truth() -> None:
    """A pass that always claims a change is refused as a lie; one changed weight has to be noticed."""
    stage = through(observed(decoder()), QuantizeActivations(), QuantizeWeights())
    assert QuantizeWeights().run(stage) is False
    stage.live.get_parameter("mlp.up_proj.weight")[3, 3] += 0.5
    assert QuantizeWeights().run(stage) is True
    assert site(stage, "mlp.up_proj").scheme == Scheme.W8A8
