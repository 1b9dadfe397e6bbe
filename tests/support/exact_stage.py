"""The small stage with noise that needs no rounding, so that its text after any pass is equal on every machine."""

import pytest
import torch
from torch import Tensor, nn

from tests.support.small_stage import PREFIX, Attention
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.frontend.process_group import ProcessGroup
from vlqc.frontend.stage_builder import find_sites
from vlqc.frontend.tracing import trace
from vlqc.ir.execution import Call, StageRun
from vlqc.ir.printer import print_stage
from vlqc.ir.rotations import AppliedRotation, RotationKind
from vlqc.ir.stage import Stage
from vlqc.kernels_ref.rotation import Rotation
from vlqc.passes.assign_precision import AssignPrecision
from vlqc.passes.insert_observers import InsertObservers
from vlqc.passes.lower_linears import LowerLinears
from vlqc.passes.propagate_quantized import PropagateQuantized
from vlqc.passes.quantize_activations import QuantizeActivations
from vlqc.passes.quantize_weights import QuantizeWeights
from vlqc.passes.rotate_heads import RotateHeads
from vlqc.passes.rotate_residual import RotateResidual
from vlqc.passes.shift_norms import ShiftNorms
from vlqc.passes.smooth_m2 import SmoothM2
from vlqc.passes.smooth_m4 import SmoothM4
from vlqc.pipeline.manager import PassManager
from vlqc.pipeline.pass_api import Pass

PASSES: tuple[Pass, ...] = (
    InsertObservers(tokens=8),
    AssignPrecision(),
    SmoothM2(candidates=8),
    QuantizeActivations(),
    QuantizeWeights(method="round"),  # the other methods factorize matrices
    LowerLinears(),
    PropagateQuantized(),
)
INSTEAD: dict[str, Pass] = {"smooth-m4": SmoothM4(), "shift-norms": ShiftNorms()}  # in the place of smooth-m2
ROTATIONS: tuple[Pass, ...] = (RotateResidual(), RotateHeads())
LANGUAGE = "model.layers.0."


class Scaled(nn.Module):
    """As much of a norm as passes know of one."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, 1.0, 16.0, 0.75]))
        self.bias = nn.Parameter(torch.tensor([0.25, 0.0, 4.0, -0.5])) if bias else None

    def forward(self, rows: Tensor) -> Tensor:
        scaled = rows * self.weight
        return scaled if self.bias is None else scaled + self.bias


class GatedMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(4, 6, bias=False)
        self.up_proj = nn.Linear(4, 6, bias=False)
        self.down_proj = nn.Linear(6, 4)

    def forward(self, rows: Tensor) -> Tensor:
        lowered: Tensor = self.down_proj(nn.functional.relu(self.gate_proj(rows)) * self.up_proj(rows))
        return lowered


class ExactBlock(nn.Module):
    """Each token attends to itself alone, so that softmax is 1; weights are powers of two or sums of two."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.norm1 = Scaled(bias)
        self.attn = Attention()
        self.norm2 = Scaled(bias)
        self.mlp = GatedMlp()

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        rows = hidden_states + self.attn(self.norm1(hidden_states))
        return (rows + self.mlp(self.norm2(rows)),)


def sparse(shape: tuple[int, ...], start: int) -> Tensor:
    """Of the values -1/2, 0, 1/4, 1/2 and 1, in a fixed order without a short period."""
    count = torch.arange(start, start + torch.Size(shape).numel())
    return torch.tensor([0.5, 0.0, -0.5, 0.25, 0.0, 1.0, 0.0])[count * count * 5 % 11 % 7].reshape(shape)


def exact_stage(prefix: str = PREFIX) -> Stage:
    """As passes get it: three samples of a text and an image token each; norms of a language stage have no bias."""
    language = prefix == LANGUAGE
    block = ExactBlock(bias=not language).requires_grad_(False).eval()
    for number, (path, linear) in enumerate(linears(block).items()):
        linear.weight.copy_(sparse(tuple(linear.weight.shape), 3 * number))
        linear.weight[:, 0] += 0.25  # no row is all zeros
        if path in ("attn.qkv", "mlp.gate_proj", "mlp.up_proj"):
            linear.weight[:, 2] /= 16  # as much smaller as the norm's channel is larger
        if linear.bias is not None:
            linear.bias.copy_(sparse(tuple(linear.bias.shape), 5 * number))
    rows = sparse((3, 2, 4), 1) + torch.arange(3.0)[:, None, None] / 8 - 0.25
    calls = [Call(sample, (rows[sample],), {}, torch.tensor([0, 1], dtype=torch.int8)) for sample in range(3)]
    name, part = prefix.rstrip("."), "language" if language else "vision"

    def in_checkpoint(target: str) -> str:
        return prefix + target

    graph = trace(block, calls[0], name)
    sites = find_sites(block, graph, in_checkpoint)
    execution = StageRun(block, ProcessGroup(), calls, calls[0])
    return Stage(name, part, QWEN2_5_VL, torch.bfloat16, block, graph, sites, execution, checkpoint_name=in_checkpoint)


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {path: child for path, child in block.named_modules() if isinstance(child, nn.Linear)}


def text_after(name: str) -> str:
    """The text of the exact stage after all passes up to the one of this name."""
    passes = [INSTEAD[name] if step.name == "smooth-m2" and name in INSTEAD else step for step in PASSES]
    stage = exact_stage(LANGUAGE if name == "shift-norms" else PREFIX)
    with pytest.MonkeyPatch.context() as monkeypatch:
        # Some processors would multiply rounded inputs, and the text would depend on the machine.
        monkeypatch.setattr("vlqc.ir.bfloat16_linears.multiplies_bfloat16", lambda device: False)
        PassManager(passes[: [step.name for step in passes].index(name) + 1]).run(stage)
    return print_stage(stage)


def planned_stage() -> Stage:
    """The exact stage with two rotations that are planned: of its residual stream, and of its two heads."""
    stage = exact_stage(LANGUAGE)
    qkv, proj, gate, up, down = stage.sites
    norms = (f"{LANGUAGE}norm1", f"{LANGUAGE}norm2")
    stage.rotations = (
        AppliedRotation(
            kind=RotationKind.RESIDUAL,
            rotation=Rotation(4, 0, "model.embed_tokens"),
            writers={proj: (0,), down: (0,)},
            readers={qkv: norms[0], gate: norms[1], up: norms[1]},
            norms=norms,
            inputs=("hidden_states",),
            outputs=(0,),
        ),
        AppliedRotation(
            kind=RotationKind.HEADS, rotation=Rotation(2, 0, qkv), writers={qkv: (8, 10)}, readers={proj: None}
        ),
    )
    return stage


def text_after_rotation(count: int) -> str:
    """The text of the exact stage after the first passes of `ROTATIONS`."""
    stage = planned_stage()
    PassManager(ROTATIONS[:count]).run(stage)
    return print_stage(stage)
