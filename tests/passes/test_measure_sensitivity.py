"""measure-sensitivity: each group's noise in every scheme, against stages in which only that group is quantized."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support.random_stage import GROUP_SIZE, NAME, decoder, outputs, site_at, through
from vlqc.errors import UserError
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.ir.stage import Stage
from vlqc.ir.tensor_digest import fingerprint
from vlqc.passes.assign_precision import AssignPrecision
from vlqc.passes.insert_observers import InsertObservers
from vlqc.passes.lower_linears import LowerLinears
from vlqc.passes.measure_sensitivity import MeasureSensitivity, noise_to_signal
from vlqc.passes.quantize_activations import QuantizeActivations
from vlqc.passes.quantize_weights import QuantizeWeights
from vlqc.passes.shift_norms import ShiftNorms
from vlqc.pipeline.ordering import check_order
from vlqc.pipeline.pass_api import Pass
from vlqc.pipeline.registry import parse_pipeline
from vlqc.targets.rules import supported_schemes
from vlqc.targets.schemes import Scheme

STATIC, DYNAMIC, INT4, FLOAT = Scheme.W8A8, Scheme.W8A8_DYNAMIC, Scheme.W4A8_DYNAMIC, Scheme.FLOAT
MIX, WEIGHTS_ONLY = Scheme.W8A8_MIX, Scheme.W8A16
FREE = "vllm-ascend"


def measured(scheme: Scheme, target: str = FREE, *between: Pass, group_size: int = 64, **options: object) -> Stage:
    """A decoder layer with outliers, its groups in one scheme where the target runs that, and measured.

    group_size: of other schemes; 64 is too large for 4-bit weights of this layer.
    """
    assign = AssignPrecision(str(scheme), GROUP_SIZE, target, fallback="none", **options)  # type: ignore[arg-type]
    integers = QuantizeActivations(), QuantizeWeights()
    measure = MeasureSensitivity(target=target, group_size=group_size)
    return through(decoder(outliers=True), InsertObservers(), assign, *between, *integers, measure)


def only(group: tuple[str, ...], scheme: Scheme) -> Stage:
    """A layer with one group quantized in a scheme and lowered."""
    others = tuple(name for name in decoder().sites if name not in group)
    assign = AssignPrecision(str(scheme), GROUP_SIZE, FREE, fallback="none", exclude=others)  # type: ignore[arg-type]
    stage = through(decoder(outliers=True), InsertObservers(), assign)
    return through(stage, QuantizeActivations(), QuantizeWeights(), LowerLinears())


def rows(stage: Stage) -> Tensor:
    """float64 [rows, K]: what the stage returns for the probe, without padding; the probe is its last call."""
    stage.execution.calls = stage.execution.calls[-1:]
    return outputs(stage)


def relative(other: Tensor, reference: Tensor) -> float:
    """The mean over tokens of the noise's power relative to the token's own, by NumPy."""
    one, two = np.asarray(other), np.asarray(reference)
    return float(np.mean(np.sum((one - two) ** 2, axis=1) / np.sum(two**2, axis=1)))


@pytest.mark.parametrize("assigned", [STATIC, DYNAMIC, INT4])
def test_noise_of_one_group_at_a_time(assigned: Scheme) -> None:
    """Catches noise of another group, of another scheme, of padding, or relative to the wrong thing."""
    stage = measured(assigned)
    reference = rows(decoder(outliers=True))
    assert len(stage.sensitivities) == 4
    for sensitivity in stage.sensitivities:
        assert sensitivity.assigned == stage.sites[sensitivity.sites[0]].scheme
        for scheme in set(sensitivity.noise) - {FLOAT}:
            alone = only(sensitivity.sites, scheme)
            assert {name for name, one in alone.sites.items() if one.scheme == scheme} == set(sensitivity.sites)
            assert sensitivity.noise[scheme] == pytest.approx(relative(rows(alone), reference), rel=1e-3)


def test_a_float_is_rounded_too() -> None:
    """Catches a promise of no noise: smoothed weights are emitted in 16 bits."""
    stage = through(decoder(outliers=True, dtype=torch.bfloat16), InsertObservers())
    for target in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        stage.module.get_parameter(f"{target}.weight").mul_(1.0009)  # no value of bfloat16 any more
    stage = through(
        stage,
        AssignPrecision(target=FREE),
        QuantizeActivations(),
        QuantizeWeights(),
        MeasureSensitivity(target=FREE),
    )
    attention = next(
        sensitivity for sensitivity in stage.sensitivities if f"{NAME}.self_attn.q_proj" in sensitivity.sites
    )
    output = next(sensitivity for sensitivity in stage.sensitivities if f"{NAME}.self_attn.o_proj" in sensitivity.sites)
    assert 0 < attention.noise[FLOAT] < attention.noise[STATIC] / 10
    assert output.noise[FLOAT] == 0  # its weight is one of bfloat16 as it stands


@pytest.mark.parametrize(
    ("assigned", "target", "with_bias", "without_bias"),
    [
        (STATIC, "vllm-ascend", [DYNAMIC], [INT4, DYNAMIC, WEIGHTS_ONLY]),
        (STATIC, "vllm-ascend@0.10.2rc2", [], []),
        (STATIC, "vllm-ascend@0.27", [DYNAMIC], [DYNAMIC, WEIGHTS_ONLY]),
        (STATIC, "mindie", [], []),
        (STATIC, "both", [], []),
        (DYNAMIC, "vllm-ascend", [STATIC], [INT4, STATIC, WEIGHTS_ONLY]),
        (DYNAMIC, "mindie", [], []),
        (MIX, "vllm-ascend", [STATIC, DYNAMIC], [INT4, STATIC, DYNAMIC, WEIGHTS_ONLY]),
        (WEIGHTS_ONLY, "vllm-ascend", [], [INT4, STATIC, DYNAMIC]),
        (INT4, "vllm-ascend", [STATIC], [STATIC, DYNAMIC, WEIGHTS_ONLY]),
    ],
)
def test_only_what_the_target_runs(
    assigned: Scheme, target: str, with_bias: list[Scheme], without_bias: list[Scheme]
) -> None:
    """Catches a candidate that the engine does not run in this layer, or not together with the others, and one that is
    left out because another scheme was asked for."""
    for sensitivity in measured(assigned, target, group_size=GROUP_SIZE).sensitivities:
        has_bias = "q_proj" in sensitivity.sites[0]
        expected = [sensitivity.assigned, *(with_bias if has_bias else without_bias), FLOAT]
        assert list(sensitivity.noise) == list(sensitivity.modules) == expected
        assert sensitivity.assigned == (DYNAMIC if has_bias and assigned == INT4 else assigned)
        assert all(
            scheme in supported_schemes(target, QWEN2_5_VL, name)
            for name in sensitivity.sites
            for scheme in sensitivity.noise
        )
        assert {member for name in sensitivity.sites for member in QWEN2_5_VL.fused_group(name)} == set(
            sensitivity.sites
        )


def test_float16_has_no_dynamic_scheme() -> None:
    """Catches a choice that the engine runs in bfloat16 only."""
    stage = through(
        decoder(dtype=torch.float16), InsertObservers(), AssignPrecision(target=FREE), QuantizeActivations()
    )
    stage = through(stage, QuantizeWeights(), MeasureSensitivity(target=FREE))
    candidates = [list(sensitivity.noise) for sensitivity in stage.sensitivities]
    assert candidates == [[STATIC, FLOAT], *[[STATIC, WEIGHTS_ONLY, FLOAT]] * 2]


def test_a_shifted_norm_keeps_its_readers_static() -> None:
    """Catches an alternative to static W8A8 after a norm bias, which engines would then silently drop."""
    shifted = measured(STATIC, FREE, ShiftNorms())
    biased = {name for name, _ in shifted.module.named_buffers() if name.endswith("norm.bias")}
    biased |= {name for name, _ in shifted.module.named_parameters() if name.endswith("norm.bias")}
    assert biased, "nothing was shifted: this test is about nothing"
    for sensitivity in shifted.sensitivities:
        behind = any(sensitivity.source in name.replace(".", "_") for name in biased)
        assert list(sensitivity.noise) == ([STATIC] if behind else [STATIC, DYNAMIC, WEIGHTS_ONLY, FLOAT])


def test_excluded_groups_are_left_alone() -> None:
    """Catches a search over groups that the user excluded."""
    stage = measured(STATIC, FREE, exclude=("*.down_proj",))
    assert all("down_proj" not in name for sensitivity in stage.sensitivities for name in sensitivity.sites)
    assert len(stage.sensitivities) == 3


def test_nothing_is_changed() -> None:
    """Catches a module left swapped, a weight or a decision changed, float Linears that are copies."""
    stage = decoder(outliers=True)
    through(stage, InsertObservers(), AssignPrecision(target=FREE), QuantizeActivations(), QuantizeWeights())
    modules, facts = dict(stage.module.named_modules()), [replace(site) for site in stage.sites.values()]
    prints = {name: fingerprint(tensor) for name, tensor in stage.module.named_parameters()}
    assert MeasureSensitivity(target=FREE).run(stage) is False
    assert dict(stage.module.named_modules()) == modules and list(stage.sites.values()) == facts
    assert prints == {name: fingerprint(tensor) for name, tensor in stage.module.named_parameters()}
    for sensitivity in stage.sensitivities:
        assert sensitivity.modules[FLOAT] == {
            stage.sites[name].target: stage.linear(stage.sites[name]) for name in sensitivity.sites
        }
        assert all(not isinstance(module, nn.Linear) for module in sensitivity.modules[sensitivity.assigned].values())


def test_the_modules_are_those_that_lowering_makes() -> None:
    """Catches a module kept for the emitter that differs from what the scheme means elsewhere."""
    stage = measured(STATIC)
    for sensitivity in stage.sensitivities:
        for scheme in (STATIC, DYNAMIC):
            alone = only(sensitivity.sites, scheme)
            for name in sensitivity.sites:
                target = stage.sites[name].target
                expected = dict(alone.module.get_submodule(target).named_buffers())
                kept = dict(sensitivity.modules[scheme][target].named_buffers())
                assert expected.keys() == kept.keys()
                assert all(torch.equal(expected[part], kept[part]) for part in expected)


def test_a_large_token_does_not_hide_the_others() -> None:
    """Catches noise relative to the whole output, in which one massive token's energy would drown all other tokens."""
    reference = torch.ones(4, 8)
    reference[0] *= 1000
    other = reference.clone()
    other[1, 0] += 0.4  # of one ordinary token: 0.16 / 8 of its power
    assert noise_to_signal(reference, other) == pytest.approx(0.16 / 8 / 4, rel=1e-5)
    reference[3] = other[3] = 0.0
    other[3, 0] += 1e-3  # an empty token: not infinitely wrong
    assert noise_to_signal(reference, other) == pytest.approx(0.16 / 8 / 4, rel=1e-3)


def test_before_lowering() -> None:
    """Catches an order in which there are no float weights any more, found in the middle of the first stage."""
    begin = "insert-observers,assign-precision,quantize-activations,quantize-weights,"
    check_order(parse_pipeline(begin + "measure-sensitivity,lower-linears"), precision_search=True)
    with pytest.raises(UserError, match="comes after lower-linears"):
        check_order(parse_pipeline(begin + "lower-linears,measure-sensitivity"))
    with pytest.raises(UserError, match="lacks measure-sensitivity"):
        check_order(parse_pipeline(begin + "lower-linears"), precision_search=True)
    assert site_at(decoder(), "mlp.down_proj").scheme is None
