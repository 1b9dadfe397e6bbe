"""A decoder layer with random weights, grouped queries and a few samples of text tokens, image tokens and padding."""

import copy

import pytest
import torch
from torch import Tensor, nn

from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.frontend.process_group import ProcessGroup
from vlqc.frontend.stage_builder import find_sites
from vlqc.frontend.tracing import trace
from vlqc.ir.execution import Call, StageRun, first_tensor
from vlqc.ir.stage import Site, Stage
from vlqc.passes.algorithms import folding
from vlqc.passes.algorithms.error_model import ConsumerGroup, scheme_noise
from vlqc.passes.assign_precision import AssignPrecision
from vlqc.passes.insert_observers import InsertObservers
from vlqc.passes.lower_linears import LowerLinears
from vlqc.passes.quantize_activations import QuantizeActivations
from vlqc.passes.quantize_weights import QuantizeWeights
from vlqc.pipeline.manager import PassManager
from vlqc.pipeline.pass_api import Pass
from vlqc.targets.schemes import Scheme

NAME = "model.layers.0"
HIDDEN, HEADS, KEY_VALUE_HEADS, WIDE = 32, 4, 2, 48
HEAD = HIDDEN // HEADS
EVERY_LINEAR = AssignPrecision(fallback="none", target="vllm-ascend")
DEAD = 5  # the channel that `kill` kills
GROUP_SIZE = 16  # of 4-bit weights: it divides the inputs of every linear here
EVERYWHERE = {  # every linear in one scheme
    Scheme.W8A8: EVERY_LINEAR,
    Scheme.W8A8_DYNAMIC: AssignPrecision(scheme="W8A8_DYNAMIC", fallback="none", target="vllm-ascend"),
    Scheme.W4A8_DYNAMIC: AssignPrecision(
        scheme="W4A8_DYNAMIC", group_size=GROUP_SIZE, fallback="none", scope="all", target="vllm-ascend"
    ),
    Scheme.W8A8_MIX: AssignPrecision(scheme="W8A8_MIX", fallback="none", target="vllm-ascend"),
    Scheme.W8A16: AssignPrecision(scheme="W8A16", fallback="none", scope="all", target="vllm-ascend"),
}
SCHEMES = pytest.mark.parametrize("scheme", [Scheme.W8A8, Scheme.W8A8_DYNAMIC, Scheme.W4A8_DYNAMIC])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


class RmsNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, rows: Tensor) -> Tensor:
        normalized: Tensor = self.weight * (rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-6))
        return normalized


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HIDDEN)
        self.k_proj = nn.Linear(HIDDEN, KEY_VALUE_HEADS * HEAD)
        self.v_proj = nn.Linear(HIDDEN, KEY_VALUE_HEADS * HEAD)
        self.o_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        def heads(projected: Tensor) -> Tensor:
            return projected.reshape(*projected.shape[:-1], -1, HEAD).transpose(1, 2)  # [1, heads, S, HEAD]

        q, k, v = heads(self.q_proj(rows)), heads(self.k_proj(rows)), heads(self.v_proj(rows))
        k, v = (part.repeat_interleave(HEADS // KEY_VALUE_HEADS, 1) for part in (k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(rows.shape))
        return projected


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, WIDE, bias=False)
        self.up_proj = nn.Linear(HIDDEN, WIDE, bias=False)
        self.down_proj = nn.Linear(WIDE, HIDDEN, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        narrowed: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(rows)) * self.up_proj(rows))
        return narrowed


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(HIDDEN)
        self.self_attn = Attention()
        self.post_attention_layernorm = RmsNorm(HIDDEN)
        self.mlp = Mlp()

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        rows = hidden_states + self.self_attn(self.input_layernorm(hidden_states))
        return (rows + self.mlp(self.post_attention_layernorm(rows)),)


def decoder(seed: int = 0, *, outliers: bool = False, dtype: torch.dtype = torch.bfloat16, samples: int = 3) -> Stage:
    """As passes get it. Weights and inputs are values of dtype.

    outliers: channels of both norms, of v and of up are made 32 to 128 times as large, and their consumers' columns as
    much smaller: the float stage computes the same, its int8 form does not.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    block = Decoder().requires_grad_(False).eval()
    for parameter in block.parameters():
        values = 1 + random(*parameter.shape) / 8 if parameter.ndim == 1 else random(*parameter.shape) / 6
        parameter.copy_(values)
    if outliers:
        plant(block)
    for parameter in block.parameters():
        parameter.copy_(parameter.to(dtype).float())
    calls = []
    for sample in range(samples):
        length = 16 + 4 * sample
        modality = torch.zeros(length, dtype=torch.int8)
        modality[4 : length - 4] = 1
        modality[length - sample :] = -1  # behind the rest, where no other row looks
        calls.append(Call(sample, (random(1, length, HIDDEN).to(dtype).float(),), {}, modality))
    return staged(block, calls, dtype)


def plant(block: Decoder) -> None:
    factors = torch.tensor([32.0, 64.0, 128.0])
    attention, mlp = block.self_attn, block.mlp
    channels = torch.tensor([3, 11, 20])
    for norm, consumers in (
        (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
        (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
    ):
        norm.weight[channels] *= factors
        for group in consumers:
            group.weight[:, channels] /= factors
    mlp.up_proj.weight[channels] *= factors[:, None]
    mlp.down_proj.weight[:, channels] /= factors
    rows = torch.tensor([2, 9, 12])  # of v: key-value head 0, 1, 1
    attention.v_proj.weight[rows] *= factors[:, None]
    attention.v_proj.bias[rows] *= factors
    for row, factor in zip(rows.tolist(), factors.tolist(), strict=True):
        for column in columns_of_value(row):
            attention.o_proj.weight[:, column] /= factor


def kill(stage: Stage, what: str) -> None:
    """Makes channel DEAD of the first norm or of v dead: no weights that read it, none that make it, or no input."""
    attention = stage.module.get_submodule("self_attn")
    if what == "column":
        for part in "qkv":
            attention.get_parameter(f"{part}_proj.weight")[:, DEAD] = 0
    elif what == "norm":
        stage.module.get_parameter("input_layernorm.weight")[DEAD] = 0
    elif what == "constant":
        for call in stage.execution.calls:
            call.args[0][..., DEAD] = 0
    else:
        for name in ("weight", "bias"):
            attention.get_parameter(f"v_proj.{name}")[DEAD] = 0


def columns_of_value(row: int) -> list[int]:
    """Columns of o_proj that read a row of v_proj: in every query head of its key-value head."""
    group = HEADS // KEY_VALUE_HEADS
    return [((row // HEAD) * group + member) * HEAD + row % HEAD for member in range(group)]


def staged(block: nn.Module, calls: list[Call], dtype: torch.dtype = torch.bfloat16, name: str = NAME) -> Stage:
    """Any module as a stage of that name, recorded with the first call."""
    graph = trace(block, calls[0], name)

    def checkpoint_name(target: str) -> str:
        return f"{name}.{target}"

    sites = find_sites(block, graph, checkpoint_name)
    part = "language" if name.startswith("model.") else "vision"
    execution = StageRun(block, ProcessGroup(), calls, calls[-1])
    return Stage(name, part, QWEN2_5_VL, dtype, block, graph, sites, execution, checkpoint_name=checkpoint_name)


def site_at(stage: Stage, target: str) -> Site:
    return stage.sites[stage.checkpoint_name(target)]


def through(stage: Stage, *passes: Pass) -> Stage:
    """The same stage after passes, run as the compiler does: verified, and held to what they say they change."""
    PassManager(passes).run(stage)
    return stage


def integers(stage: Stage, method: str = "histogram", correct_bias: bool = False) -> Stage:
    """What comes after smoothing."""
    quantize = QuantizeActivations(method="minmax" if method == "minmax" else "histogram")
    return through(stage, quantize, QuantizeWeights(), LowerLinears(correct_bias=correct_bias))


def observed(stage: Stage, scheme: Scheme = Scheme.W8A8) -> Stage:
    """Observed, every linear in one scheme."""
    return through(stage, InsertObservers(), EVERYWHERE[scheme])


def outputs(stage: Stage) -> Tensor:
    """float64 [rows, K]: what the stage returns for all rows of all calls but padding."""
    rows = []
    for call in stage.execution.calls:
        output = first_tensor(stage.module(*call.args, **call.kwargs)).double().flatten(0, -2)
        rows.append(output if call.modality is None else output[call.modality >= 0])
    return torch.cat(rows)


def in_float64(stage: Stage) -> Tensor:
    """float64 [rows, K]: what the stage returns for all rows, where rounding cannot hide a change."""
    block = copy.deepcopy(stage.module).double()
    return torch.cat([first_tensor(block(call.args[0].double())).flatten(0, -2) for call in stage.execution.calls])


def group_errors(stage: Stage, like: Stage | None = None) -> dict[str, float]:
    """By node: measured error of the rounded form of all quantized linears that read it, over all kept rows.

    like: the same stage before it was smoothed. Folds into a Linear change the unit of its outputs; errors are then
    counted in the units that they had there.
    """
    errors = {}
    for source, members in stage.groups().items():
        observed, weight = stage.observations[source], weight_of(stage, members)
        if like is not None:
            before = like.observations[source].kept @ weight_of(like, members).T
            weight = weight * (before.norm(dim=0) / (observed.kept @ weight.T).norm(dim=0))[:, None]
        group = ConsumerGroup(
            channel=torch.arange(observed.channels),
            low=observed.minimum(),
            high=observed.maximum(),
            second_moment=observed.second_moment(),
            rows=observed.kept,
            row_weight=observed.row_weight(),
            weight=weight,
            noise=scheme_noise(members[0]),
        )
        errors[source] = group.measured_error(torch.ones(observed.channels))
    return errors


def weight_of(stage: Stage, members: list[Site]) -> Tensor:
    return torch.cat([stage.module.get_parameter(f"{member.target}.weight") for member in members])


def folds_of(stage: Stage, step: Pass) -> list[folding.Fold]:
    """Runs a smoothing pass and returns what it asked to fold, round by round."""
    asked: list[folding.Fold] = []
    original = folding.apply_folds

    def apply(stage: Stage, folds: list[folding.Fold]) -> list[folding.Fold]:
        asked.extend(folds)
        return original(stage, folds)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(folding, "apply_folds", apply)
        through(stage, step)
    return asked


def decibels(stage: Stage, reference: Tensor) -> float:
    """Signal to quantization noise of a stage's outputs against those of the float stage."""
    noise = (outputs(stage) - reference).square().sum()
    return float(10 * torch.log10(reference.square().sum() / noise))


def quantized(stage: Stage) -> list[Site]:
    return [site for site in stage.sites.values() if site.scheme == Scheme.W8A8]
