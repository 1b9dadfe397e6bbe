"""folding: a fold that is right changes nothing, and one that is wrong is found out and undone."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.support.random_stage import HIDDEN, WIDE, decoder, in_float64, observed, outputs
from vlqc.errors import InternalError
from vlqc.ir.printer import print_stage
from vlqc.ir.scale_propagation import find_edges
from vlqc.ir.stage import Edge, Stage
from vlqc.ir.tensor_digest import TOLERANCE, max_relative_error
from vlqc.kernels_ref.norm import ShiftedNorm
from vlqc.passes.algorithms import folding
from vlqc.passes.algorithms.folding import Fold, apply_folds, channel_to_column, exact_scale


def random_scale(channels: int, seed: int) -> torch.Tensor:
    """Between 1/16 and 16."""
    return 2 ** (torch.rand(channels, generator=torch.Generator().manual_seed(seed)) * 8 - 4)


def folds(stage: Stage, seed: int) -> list[Fold]:
    """Random scales on every edge that scale propagation finds; 1 where the edge is not usable."""
    edges = find_edges(stage.module, stage.graph)
    return [
        Fold(edge, torch.where(edge.usable, random_scale(len(edge.usable), seed + number), 1.0))
        for number, edge in enumerate(edges)
    ]


def permuted(fold: Fold) -> Fold:
    """The same fold with its columns of the first consumer in another order."""
    target, columns = next(iter(fold.edge.consumers.items()))
    return Fold(replace(fold.edge, consumers={**fold.edge.consumers, target: columns.roll(1)}), fold.scale)


def over_silu() -> Fold:
    """From gate_proj to down_proj, past the nonlinearity between them."""
    identity = torch.arange(WIDE)
    edge = Edge("mlp.gate_proj", torch.ones(WIDE, dtype=torch.bool), {"mlp.down_proj": identity})
    return Fold(edge, random_scale(WIDE, 5))


def forgotten_consumer(stage: Stage) -> Fold:
    """A norm's fold that leaves k_proj out."""
    fold = next(fold for fold in folds(stage, 1) if fold.edge.producer == "input_layernorm")
    consumers = {target: columns for target, columns in fold.edge.consumers.items() if target != "self_attn.k_proj"}
    return Fold(replace(fold.edge, consumers=consumers), fold.scale)


def weights(stage: Stage) -> dict[str, torch.Tensor]:
    return {path: parameter.clone() for path, parameter in stage.module.named_parameters()}


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_right_folds_leave_the_output(seed: int) -> None:
    """A scale divided out that is not multiplied in again, a bias forgotten, a map read the wrong way round."""
    stage = observed(decoder(seed))
    reference, asked = outputs(stage), folds(stage, seed)
    done = apply_folds(stage, asked)
    assert done == asked and len(done) == 4 and stage.notes == []
    change = (outputs(stage) - reference).abs().max() / reference.square().mean().sqrt()
    assert change < 2e-5


def test_every_weight_by_hand() -> None:
    """Catches a scale applied to the wrong weight, which the output alone would not show."""
    stage = observed(decoder())
    before, asked = weights(stage), folds(stage, 3)
    apply_folds(stage, asked)
    by_producer = {fold.edge.producer: fold.scale for fold in asked}
    norm, v = by_producer["input_layernorm"], by_producer["self_attn.v_proj"]
    grouped = torch.cat([v[:8], v[:8], v[8:], v[8:]])  # two query heads of 8 channels read each key-value head
    up = by_producer["mlp.up_proj"]
    after_norm = by_producer["post_attention_layernorm"]
    expected = {
        "input_layernorm.weight": before["input_layernorm.weight"] / norm,
        "self_attn.q_proj.weight": before["self_attn.q_proj.weight"] * norm,
        "self_attn.q_proj.bias": before["self_attn.q_proj.bias"],
        "self_attn.v_proj.weight": before["self_attn.v_proj.weight"] * norm / v[:, None],
        "self_attn.v_proj.bias": before["self_attn.v_proj.bias"] / v,
        "self_attn.o_proj.weight": before["self_attn.o_proj.weight"] * grouped,
        "mlp.gate_proj.weight": before["mlp.gate_proj.weight"] * after_norm,
        "mlp.up_proj.weight": before["mlp.up_proj.weight"] * after_norm / up[:, None],
        "mlp.down_proj.weight": before["mlp.down_proj.weight"] * up,
    }
    after = weights(stage)
    for path, values in expected.items():
        torch.testing.assert_close(after[path], values, rtol=1e-6, atol=0, msg=path)


@pytest.mark.parametrize("which", ["permuted", "over silu", "forgotten consumer"])
def test_wrong_fold_is_undone(which: str) -> None:
    """A mistake of scale propagation, or of the model's author, that would be emitted as a broken model."""
    stage = observed(decoder())
    wrong = {
        "permuted": permuted(folds(stage, 1)[0]),
        "over silu": over_silu(),
        "forgotten consumer": forgotten_consumer(stage),
    }[which]
    text, before, reference = print_stage(stage), weights(stage), outputs(stage)
    assert apply_folds(stage, [wrong]) == []
    producer = stage.checkpoint_name(wrong.edge.producer)
    assert stage.notes == [f"the fold out of {producer} changes the output of {stage.name} and was left out"]
    assert all(torch.equal(parameter, before[path]) for path, parameter in stage.module.named_parameters())
    assert torch.equal(outputs(stage), reference) and print_stage(stage) == text  # the text shows all observations


@pytest.mark.parametrize("place", range(5))
def test_good_folds_survive_a_bad_one(place: int) -> None:
    """One wrong edge taking all others with it, or leaving its traces in the weights they share."""
    bad, alone = observed(decoder()), observed(decoder())
    good = folds(bad, 7)
    mixed = [*good[:place], over_silu(), *good[place:]]
    assert apply_folds(bad, mixed) == good and len(bad.notes) == 1
    apply_folds(alone, good)
    assert print_stage(bad) == print_stage(alone)


def test_all_wrong() -> None:
    """Two wrong folds, neither of which may stay."""
    stage = observed(decoder())
    text = print_stage(stage)
    assert apply_folds(stage, [over_silu(), permuted(folds(stage, 1)[1])]) == []
    assert len(stage.notes) == 2 and print_stage(stage) == text


def test_folds_that_hold_only_separately(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a missing InternalError for folds that keep the output separately but not together."""
    stage, answers = observed(decoder()), iter([1.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    monkeypatch.setattr(folding, "max_relative_error", lambda before, after: next(answers))
    with pytest.raises(InternalError, match="change it together"):
        apply_folds(stage, folds(stage, 1))


def test_nothing_to_fold_runs_nothing() -> None:
    """A proof, and copies of all weights, where there is nothing to prove."""
    stage = decoder()
    stage.execution.probe = None
    assert apply_folds(stage, []) == []


def test_observations_follow() -> None:
    """The wrong consumer's divisor, or one applied twice where several linears read the same node."""
    stage = observed(decoder())
    before = dict(stage.observations)
    asked = folds(stage, 2)
    apply_folds(stage, asked)
    scales = {fold.edge.producer: fold.scale for fold in asked}
    torch.testing.assert_close(
        stage.observations["input_layernorm"].kept, before["input_layernorm"].kept / scales["input_layernorm"]
    )
    torch.testing.assert_close(stage.observations["mul"].maximum(), before["mul"].maximum() / scales["mlp.up_proj"])


def test_columns() -> None:
    """Columns without a channel must be multiplied by 1, not by the last channel's scale (index -1)."""
    edge = Edge("x", torch.ones(3, dtype=torch.bool), {"y": torch.tensor([2, -1, 0, 0])})
    assert Fold(edge, torch.tensor([2.0, 3.0, 5.0])).scale_per_column("y").tolist() == [5, 1, 2, 2]


def test_max_relative_error() -> None:
    """A proof that a NaN, an infinity, or a single wrong element among many passes."""
    before = torch.ones(10000)
    after = before.clone()
    assert max_relative_error(before, after) == 0
    after[77] += 2**-10
    assert max_relative_error(before, after) == 2**-10 > TOLERANCE
    for broken in (float("nan"), float("inf")):
        after[77] = broken
        assert max_relative_error(before, after) == float("inf")
    assert max_relative_error(torch.zeros(3), torch.tensor([0.0, 1e-20, 0.0])) > 1


# ---- exact_scale ---------------------------------------------------------------------------------------------------


class Norm(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_representable_scale_of_a_norm(seed: int, dtype: torch.dtype) -> None:
    """A divided norm weight that is no value of the emitted dtype, or a scale far from the wanted one."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(200, generator=generator) * 4).to(dtype).float()
    wanted = 2 ** (torch.rand(200, generator=generator) * 8)
    scale = exact_scale(Norm(weight), torch.ones(200, dtype=torch.bool), wanted, dtype)
    divided = (weight.double() / scale.double()).float()
    near = divided.to(dtype).float()
    assert ((divided - near).abs() <= 2**-23 * near.abs()).all()
    assert torch.equal(near != 0, weight != 0)
    half_a_step = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    usual = near.abs() > 2.0**-14  # float16 has finer values below, but fewer bits
    assert ((scale / wanted - 1).abs()[usual & (weight != 0)] <= 1.01 * half_a_step).all()


def test_representable_leaves_dead_channels() -> None:
    """0/0 for a weight of zero, a weight that underflows, and channels that the edge cannot use: all keep 1."""
    weight = torch.tensor([0.0, 1e-7, 2.0, 1.0])
    usable = torch.tensor([True, True, False, True])
    scale = exact_scale(Norm(weight), usable, torch.tensor([8.0, 1e6, 4.0, 4.0]), torch.float16)
    assert scale.tolist() == [1, 1, 1, 4]


def test_representable_scale_of_a_linear() -> None:
    """QuantizationPreview where none is needed: a Linear's rows keep scales of their own when they are quantized."""
    wanted = random_scale(HIDDEN, 1)
    usable = torch.arange(HIDDEN) % 2 == 0
    scale = exact_scale(nn.Linear(4, HIDDEN), usable, wanted, torch.bfloat16)
    assert torch.equal(scale, torch.where(usable, wanted, torch.ones(())))


# ---- norms with a bias -----------------------------------------------------------------------------------------------


def with_shifted_norm(stage: Stage) -> torch.Tensor:
    """Gives the first norm a bias by hand, without undoing it; returns it, values of bfloat16."""
    bias = (torch.arange(HIDDEN) / 3 - 4).to(torch.bfloat16).float()
    stage.module.set_submodule(
        "input_layernorm", ShiftedNorm(stage.module.get_submodule("input_layernorm"), bias.clone())
    )
    return bias


@settings(max_examples=6)
@given(seed=st.integers(0, 10**6))
def test_rounding_of_a_norm_bias_is_handed_over(seed: int) -> None:
    """Catches a divided bias whose rounding error is not added to the consumers' biases, against each formula."""
    stage = decoder(seed)
    bias = with_shifted_norm(stage)
    observed(stage)
    before, reference = weights(stage), in_float64(stage)
    fold = next(fold for fold in folds(stage, seed) if fold.edge.producer == "input_layernorm")
    scale = exact_scale(stage.module.get_submodule("input_layernorm"), fold.edge.usable, fold.scale, torch.bfloat16)
    assert len(apply_folds(stage, [Fold(fold.edge, scale)])) == 1 and not stage.notes
    after = weights(stage)
    stored = after["input_layernorm.bias"]
    assert torch.equal(stored, stored.to(torch.bfloat16).float())
    lost = bias.double() / scale.double() - stored.double()
    assert (lost.abs() <= 2.0**-8 * (bias / scale).abs()).all() and lost.abs().max() > 0
    for part in "qkv":
        wanted = before[f"self_attn.{part}_proj.bias"] + after[f"self_attn.{part}_proj.weight"].double() @ lost
        torch.testing.assert_close(after[f"self_attn.{part}_proj.bias"].double(), wanted, rtol=0, atol=1e-5)
    assert (in_float64(stage) - reference).abs().max() < 1e-5 * reference.square().mean().sqrt()


def test_observations_know_what_a_bias_lost() -> None:
    """Catches observations that ignore the rounding of the bias."""
    stage = decoder()
    with_shifted_norm(stage)
    observed(stage)
    apply_folds(stage, [fold for fold in folds(stage, 3) if fold.edge.producer == "input_layernorm"])
    mine = stage.observations["input_layernorm"].kept
    observed(stage)
    torch.testing.assert_close(mine, stage.observations["input_layernorm"].kept, rtol=1e-5, atol=1e-5)


def test_wrong_fold_of_a_shifted_norm_is_undone() -> None:
    """Biases that keep what was handed over although the fold itself was taken back."""
    stage = decoder()
    with_shifted_norm(stage)
    observed(stage)
    right = next(fold for fold in folds(stage, 1) if fold.edge.producer == "input_layernorm")
    before, text = weights(stage), print_stage(stage)
    assert apply_folds(stage, [permuted(right)]) == [] and len(stage.notes) == 1
    assert all(torch.equal(parameter, before[path]) for path, parameter in stage.module.named_parameters())
    assert print_stage(stage) == text


def test_per_column() -> None:
    """The last channel's value for a column that no channel feeds."""
    assert channel_to_column(torch.tensor([2.0, 3.0]), torch.tensor([1, -1, 0]), 0.0).tolist() == [3, 0, 2]


def test_powers_of_two_change_no_bit_of_a_product() -> None:
    """Would catch a router whose rounded scores choose other experts after a fold."""
    generator = torch.Generator().manual_seed(0)
    norm, router = nn.LayerNorm(64), torch.randn(8, 64, generator=generator).to(torch.bfloat16).float()
    norm.weight.data = torch.randn(64, generator=generator).to(torch.bfloat16).float()
    usable = torch.arange(64) % 8 != 0
    scale = exact_scale(norm, usable, random_scale(64, 1), torch.bfloat16, powers_of_two=True)
    assert bool((scale[~usable] == 1).all())
    assert bool((scale != 1).any())
    folded = (norm.weight / scale).to(torch.bfloat16).float(), (router * scale).to(torch.bfloat16).float()
    assert torch.equal(folded[0] * folded[1], norm.weight * router)
