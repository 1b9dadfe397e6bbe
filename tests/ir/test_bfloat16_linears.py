"""Linear layers that multiply in bfloat16 while the stage is observed; afterwards their weights have the same bits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vlqc.frontend.process_group import ProcessGroup
from vlqc.ir.bfloat16_linears import bfloat16_linears, exact_bfloat16, join_bfloat16, split_bfloat16
from vlqc.ir.execution import Call, StageRun


@pytest.fixture(autouse=True)
def with_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the tests run: the arithmetic is the same without them, only slower."""
    monkeypatch.setattr("vlqc.ir.bfloat16_linears.multiplies_bfloat16", lambda device: True)


def linear(exact: bool, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(48, 130, bias=bias).requires_grad_(False)
    if exact:
        layer.weight.copy_(layer.weight.bfloat16())
    return layer


def test_exact_values_only() -> None:
    """Catches a weight that loses bits: folded scales, or a float16 checkpoint's."""
    values = torch.arange(300.0).reshape(100, 3)  # 257 needs nine bits
    assert exact_bfloat16(values) is None and exact_bfloat16(values * torch.pi) is None
    half = exact_bfloat16(values[:80])
    assert half is not None and half.dtype == torch.bfloat16 and torch.equal(half.float(), values[:80])


@pytest.mark.parametrize("bias", [True, False])
def test_products_of_rounded_inputs(bias: bool) -> None:
    """Catches a bias that is left out or rounded, and outputs in another dtype: everything else stays float32."""
    layer, rows = linear(exact=True, bias=bias), torch.randn(2, 5, 48)
    product = rows.bfloat16().double() @ layer.weight.double().T
    with bfloat16_linears(layer):
        output = layer(rows)
    if bias:
        output = output - layer.bias
    assert output.dtype == torch.float32
    assert torch.allclose(output.double(), product, rtol=2**-8, atol=1e-4)


def test_afterwards_all_is_as_it_was() -> None:
    """Catches weights that stay rounded or a Linear that stays fast: proofs would be no proofs."""
    block = nn.Sequential(linear(True), nn.SiLU(), nn.Sequential(nn.Linear(130, 4)))
    before, rows = {name: parameter.clone() for name, parameter in block.named_parameters()}, torch.randn(3, 48)
    parameters, expected = list(block.parameters()), block(rows)
    with pytest.raises(ZeroDivisionError), bfloat16_linears(block):
        assert block[0].weight.dtype == torch.bfloat16 and block[2][0].weight.dtype == torch.float32
        _ = 1 / 0
    assert list(block.parameters()) == parameters
    assert all(
        parameter.dtype == torch.float32 and torch.equal(parameter, before[name])
        for name, parameter in block.named_parameters()
    )
    assert torch.equal(block(rows), expected)


def test_others_multiply_as_ever() -> None:
    """Catches rounding where the checkpoint has more bits, and in modules that are more than a Linear."""

    class Special(nn.Linear):
        pass

    block = nn.ModuleList([linear(False), Special(48, 8)])
    with torch.no_grad():
        block[1].weight.copy_(block[1].weight.bfloat16())
    rows = torch.randn(3, 48)
    expected = [each(rows) for each in block]
    with bfloat16_linears(block):
        assert all(torch.equal(each(rows), one) for each, one in zip(block, expected, strict=True))


def test_without_instructions_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a processor that emulates bfloat16, slower than float32."""
    monkeypatch.setattr("vlqc.ir.bfloat16_linears.multiplies_bfloat16", lambda device: False)
    layer, rows = linear(True), torch.randn(3, 48)
    expected = layer(rows)
    with bfloat16_linears(layer):
        assert layer.weight.dtype == torch.float32 and torch.equal(layer(rows), expected)


# ---- weights with more bits than bfloat16 ----------------------------------------------------------------------------

EDGES = [  # bits of +-0, subnormal values, values half way between two of bfloat16, the largest, infinity, NaN
    *(0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x7FFFFF, 0x3F808000, 0x3F818000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF),
    *(0x7F800000, 0x7FC00000, 0x7FFF7FFF, 0x7FFF8000, 0x7FFFFFFF),
]
PATTERNS = st.integers(0, 2**32 - 1) | st.sampled_from(EDGES + [bits | 1 << 31 for bits in EDGES])


@settings(max_examples=200)
@given(patterns=st.lists(PATTERNS, min_size=1, max_size=300), columns=st.integers(1, 5))
def test_split_restores_every_bit_pattern(patterns: list[int], columns: int) -> None:
    """Catches a remainder of ties, of negative values or of the largest ones that restores other bits."""
    patterns += [0] * (-len(patterns) % columns)
    bits = torch.tensor(patterns).to(torch.int32).reshape(-1, columns)
    weight, values = bits.clone().view(torch.float32), bits.view(torch.float32).double()
    half = split_bfloat16(weight).clone()
    join_bfloat16(weight)
    assert torch.equal(weight.view(torch.int32), bits)
    nearest = values.float().bfloat16().double()  # rounds ties to even, but as near
    compared = values.isfinite() & nearest.isfinite()
    assert torch.equal((half.double() - values).abs()[compared], (nearest - values).abs()[compared])


def test_rounded_weights_multiply_in_the_memory_of_the_weight() -> None:
    """Catches weights that are not rounded or not restored, a second copy, and a write that invalidates caches."""
    layer, rows = linear(exact=False), torch.randn(2, 5, 48)
    before, product = layer.weight.clone(), rows.bfloat16().double() @ layer.weight.bfloat16().double().T
    storage, version = layer.weight.untyped_storage().data_ptr(), layer.weight._version
    with pytest.raises(ZeroDivisionError), bfloat16_linears(layer, round_weights=True):
        assert layer.weight.dtype == torch.bfloat16 and layer.weight.untyped_storage().data_ptr() == storage
        torch.testing.assert_close((layer(rows) - layer.bias).double(), product, rtol=2**-8, atol=1e-4)
        _ = 1 / 0
    assert torch.equal(layer.weight.view(torch.int32), before.view(torch.int32)) and "forward" not in layer.__dict__
    assert (layer.weight.data_ptr(), layer.weight._version) == (storage, version)


def test_only_the_samples_run_rounded() -> None:
    """Catches a StageRun that ignores `rounds_weights`, or a proof that runs with rounded weights."""
    layer, call = linear(exact=False), Call(0, (torch.randn(7, 48),), {})
    exact = layer(*call.args)
    noise = {}
    for rounds_weights in (False, True):
        run = StageRun(layer, ProcessGroup(), [call], call, rounds_weights=rounds_weights)
        run.forward()
        noise[rounds_weights] = float((run.outputs[0] - exact).square().mean() / exact.square().mean())
        assert torch.equal(run.probe_output(), exact)
    assert noise[False] == 0 and 45 < -10 * math.log10(noise[True]) < 60
