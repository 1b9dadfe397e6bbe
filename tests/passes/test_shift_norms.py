"""shift-norms: which norms get a bias, and what it is for."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.support.exact_stage import text_after
from tests.support.random_stage import (
    DTYPES,
    HIDDEN,
    NAME,
    decibels,
    in_float64,
    integers,
    observed,
    outputs,
    site_at,
    staged,
    through,
)
from tests.support.shifted_stages import NORMS, one_sided, shifted
from vlqc.ir.execution import Call
from vlqc.ir.printer import print_stage
from vlqc.ir.stage import Stage
from vlqc.kernels_ref.quant_linear import StaticQuantLinear
from vlqc.passes.assign_precision import AssignPrecision
from vlqc.passes.insert_observers import InsertObservers
from vlqc.passes.lower_linears import LowerLinears
from vlqc.passes.quantize_activations import QuantizeActivations
from vlqc.passes.quantize_weights import QuantizeWeights
from vlqc.passes.shift_norms import ShiftNorms
from vlqc.passes.smooth_m4 import SmoothM4
from vlqc.targets.schemes import Scheme

pytestmark = pytest.mark.usefixtures("float32_runs")  # the same numbers on every processor


def test_golden(golden: Callable[[str, str], None]) -> None:
    """Any change of what is shifted on the exact stage, or by how much, shows here as text."""
    golden("after-shift-norms.vlqc", text_after("shift-norms"))


# ---- which norms -----------------------------------------------------------------------------------------------------


def test_both_norms_of_a_static_layer() -> None:
    """A norm overlooked: with every linear static W8A8, both have only such consumers."""
    stage = through(observed(one_sided()), ShiftNorms())
    assert shifted(stage) == set(NORMS) and not stage.notes
    assert {site.target for site in stage.sites.values() if site.added_bias} == {"mlp.gate_proj", "mlp.up_proj"}


@pytest.mark.parametrize("scheme", [Scheme.FLOAT, Scheme.W8A8_DYNAMIC, Scheme.W4A8_DYNAMIC, None])
def test_one_other_consumer_keeps_the_norm(scheme: Scheme | None) -> None:
    """Catches shifts before other schemes than static W8A8, where engines silently drop the norm's bias."""
    stage = observed(one_sided())
    group_size = 16 if scheme == Scheme.W4A8_DYNAMIC else None
    for part in "qkv":
        site_at(stage, f"self_attn.{part}_proj").scheme = scheme
        site_at(stage, f"self_attn.{part}_proj").group_size = group_size
    through(stage, ShiftNorms())
    assert shifted(stage) == {"post_attention_layernorm"}
    for part in ("gate", "up"):
        site_at(stage, f"mlp.{part}_proj").scheme = scheme
    again = observed(one_sided())
    for site in again.sites.values():
        site.scheme = scheme
    before = {path: parameter.clone() for path, parameter in again.module.named_parameters()}
    assert ShiftNorms().run(again) is True  # edges were found
    assert ShiftNorms().run(again) is False and shifted(again) == set()
    assert all(torch.equal(parameter, before[path]) for path, parameter in again.module.named_parameters())


@pytest.mark.parametrize("name", ["visual.blocks.0", "visual.merger"])
def test_vision_is_never_shifted(name: str) -> None:
    """Catches shifts in the vision tower: engines load norm biases in the language model only."""
    language = one_sided()
    stage = staged(language.module, list(language.execution.calls), name=name)
    through(stage, InsertObservers())
    for site in stage.sites.values():
        site.scheme = Scheme.W8A8
    through(stage, ShiftNorms())
    assert stage.part == "vision" and shifted(stage) == set() and len(stage.edges or ()) == 4


class Norm(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))
        self.bias = nn.Parameter(torch.ones(HIDDEN)) if kind == "bias" else None
        if kind == "buffer":
            self.register_buffer("running", torch.ones(HIDDEN))

    def forward(self, rows: Tensor) -> Tensor:
        scaled = rows * self.weight
        return scaled if self.bias is None else scaled + self.bias


class Block(nn.Module):
    """One norm before a linear, with a second group, a factor, or strange columns in between."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = Norm(kind)
        self.linear = nn.Linear(HIDDEN + (4 if kind == "beside" else 0), 8, bias=False)
        self.register_buffer("factor", torch.full((HIDDEN,), 0.5))

    def forward(self, rows: Tensor) -> Tensor:
        normed = self.norm(rows)
        if self.kind == "factor":
            normed = normed * self.get_buffer("factor")
        if self.kind == "beside":
            normed = torch.cat([normed, rows[:, :4].cos()], -1)
        projected: Tensor = self.linear(normed)
        if self.kind == "residual":
            projected = projected + normed[:, :8]
        return projected


def block_stage(kind: str) -> Stage:
    generator = torch.Generator().manual_seed(0)
    block = Block(kind).requires_grad_(False)
    block.linear.weight.copy_(torch.randn(block.linear.weight.shape, generator=generator))
    rows = torch.randn(20, HIDDEN, generator=generator) + 5
    stage = through(staged(block, [Call(0, (rows,), {})]), InsertObservers())
    site_at(stage, "linear").scheme = Scheme.W8A8
    return stage


@pytest.mark.parametrize("kind", ["bias", "buffer", "residual"])
def test_other_norms_are_left_alone(kind: str) -> None:
    """Catches shifts of norms that have a bias, other state, or a consumer that is not quantized."""
    stage = block_stage(kind)
    reference = outputs(stage)
    through(stage, ShiftNorms())
    assert shifted(stage) == set() and not stage.notes and torch.equal(outputs(stage), reference)


class Forked(nn.Module):
    """One norm, read as it is and two rows at a time: two nodes, so two groups, which may differ in their scheme."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm("plain")
        self.direct = nn.Linear(HIDDEN, 8, bias=False)
        self.paired = nn.Linear(2 * HIDDEN, 8)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.norm(rows)
        return self.direct(normed), self.paired(normed.reshape(-1, 2 * HIDDEN))


@pytest.mark.parametrize("scheme", [Scheme.W8A8, Scheme.W8A8_DYNAMIC, Scheme.FLOAT])
def test_consumers_at_two_nodes(scheme: Scheme) -> None:
    """Catches a shift where only one of two groups is static."""
    block = Forked().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for linear in (block.direct, block.paired):
        linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator))
    rows = torch.randn(20, HIDDEN, generator=generator) + 5
    stage = through(staged(block, [Call(0, (rows,), {})]), InsertObservers())
    site_at(stage, "direct").scheme, site_at(stage, "paired").scheme = Scheme.W8A8, scheme
    expected, ranges = block(rows), dict(stage.observations)
    through(stage, ShiftNorms())
    assert shifted(stage) == ({"norm"} if scheme == Scheme.W8A8 else set())
    assert site_at(stage, "direct").added_bias == (scheme == Scheme.W8A8) and not site_at(stage, "paired").added_bias
    for before, after in zip(expected, block(rows), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    for source, seen in stage.observations.items():
        middle = float((seen.maximum() + seen.minimum()).abs().mean())
        assert middle < 1 if scheme == Scheme.W8A8 else seen is ranges[source]


def test_columns_beside_the_norm_are_not_shifted() -> None:
    """A column that another tensor feeds (-1 in the map) shifted by the last channel's middle."""
    stage = block_stage("beside")
    reference, before = in_float64(stage), stage.observations["cat"]
    through(stage, ShiftNorms())
    assert shifted(stage) == {"norm"} and not stage.notes
    assert (in_float64(stage) - reference).abs().max() < 1e-5 * reference.square().mean().sqrt()
    assert torch.equal(stage.observations["cat"].kept[:, HIDDEN:], before.kept[:, HIDDEN:])
    assert float(stage.observations["cat"].kept[:, :HIDDEN].mean().abs()) < 1


def test_a_failing_proof_puts_everything_back() -> None:
    """Catches a shift that is not undone where a factor between norm and consumer multiplies it as well."""
    stage = block_stage("factor")
    norm, reference = stage.module.get_submodule("norm"), outputs(stage)
    observations = dict(stage.observations)
    before = {path: parameter.clone() for path, parameter in stage.module.named_parameters()}
    through(stage, ShiftNorms())
    (note,) = stage.notes
    assert f"{NAME}.norm " in note
    assert stage.module.get_submodule("norm") is norm and stage.linear(site_at(stage, "linear")).bias is None
    assert {path for path, _ in stage.module.named_parameters()} == set(before)
    assert all(torch.equal(parameter, before[path]) for path, parameter in stage.module.named_parameters())
    assert torch.equal(outputs(stage), reference) and not site_at(stage, "linear").added_bias
    assert all(stage.observations[source] is seen for source, seen in observations.items())
    text = print_stage(stage)
    assert ShiftNorms().run(stage) is False and print_stage(stage) == text


def test_second_run_changes_nothing() -> None:
    """A norm shifted twice: the second bias would replace the first one."""
    stage = through(observed(one_sided()), ShiftNorms())
    text = print_stage(stage)
    assert ShiftNorms().run(stage) is False and print_stage(stage) == text


# ---- what it is for --------------------------------------------------------------------------------------------------


def test_ranges_are_centered_and_smaller() -> None:
    """A shift that helps nothing: the widest range shrinks, and the stage's int8 form comes closer to the float one."""
    before = through(observed(one_sided()), QuantizeActivations(method="minmax"))
    after = through(observed(one_sided()), ShiftNorms(), QuantizeActivations(method="minmax"))
    for norm in NORMS:
        seen = after.observations[norm]
        bias = after.module.get_parameter(f"{norm}.bias")  # half a bit of bfloat16 is what its rounding may miss
        assert ((seen.maximum() + seen.minimum()).abs() <= 2**-7 * bias.abs() + 1e-5).all()
    scales = []
    for stage in (before, after):
        quantization = site_at(stage, "self_attn.q_proj").input
        assert quantization is not None
        scales.append(quantization.scale)
    assert scales[1] < 0.7 * scales[0]
    reference = outputs(one_sided())
    without = decibels(integers(observed(one_sided()), "minmax"), reference)
    assert decibels(integers(through(observed(one_sided()), ShiftNorms()), "minmax"), reference) > without + 0.5


@DTYPES
def test_emitted_modules(dtype: torch.dtype) -> None:
    """Catches an added bias that is stored as a tensor, lost, or rounded although it is not stored."""
    stage = through(observed(one_sided(dtype)), ShiftNorms(), SmoothM4())
    exact = {site.target: stage.linear(site).bias.double().clone() for site in stage.sites.values() if site.added_bias}
    stored = stage.linear(site_at(stage, "self_attn.q_proj")).bias.to(dtype).float()
    through(stage, QuantizeActivations(), QuantizeWeights(), LowerLinears(correct_bias=False))
    assert set(exact) == {"mlp.gate_proj", "mlp.up_proj"}
    for target, bias in exact.items():
        module, site = stage.module.get_submodule(target), site_at(stage, target)
        assert isinstance(module, StaticQuantLinear) and site.input is not None
        assert module.bias is None and f"{target}.bias" not in stage.module.state_dict()
        step = module.weight_scale.double().flatten() * site.input.scale
        recovered = (module.quant_bias.double() + site.input.offset * module.weight.double().sum(1)) * step
        assert ((recovered - bias).abs() <= 0.51 * step + 1e-6 * bias.abs()).all()
        assert not torch.equal(bias.float(), bias.to(dtype).float())
    q_proj = stage.module.get_submodule("self_attn.q_proj")
    assert isinstance(q_proj, StaticQuantLinear) and q_proj.bias is not None and torch.equal(q_proj.bias, stored)
    assert {"input_layernorm.weight", "input_layernorm.bias"} <= set(stage.module.state_dict())


def test_seed_exclusions_do_not_stand_in_the_way() -> None:
    """Catches norms that are not shifted because down_proj, which reads no norm, stays float."""
    stage = through(one_sided(), InsertObservers(), AssignPrecision(), ShiftNorms())
    assert shifted(stage) == set(NORMS)
