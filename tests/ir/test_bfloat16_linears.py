"""Linears that multiply in bfloat16 while the stage is observed: only where it loses nothing, and only then."""

import pytest
import torch
from torch import nn

from vlqc.ir.execution import bfloat16_linears, exact_bfloat16


@pytest.fixture(autouse=True)
def with_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the tests run: the arithmetic is the same without them, only slower."""
    monkeypatch.setattr("vlqc.ir.execution.multiplies_bfloat16", lambda device: True)


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
    monkeypatch.setattr("vlqc.ir.execution.multiplies_bfloat16", lambda device: False)
    layer, rows = linear(True), torch.randn(3, 48)
    expected = layer(rows)
    with bfloat16_linears(layer):
        assert layer.weight.dtype == torch.float32 and torch.equal(layer(rows), expected)
