"""A stage small enough to read: a block with fused qkv, gate and up; two tokens of 4 channels; exact binary weights."""

import torch
from torch import Tensor, nn

from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.frontend.process_group import ProcessGroup
from vlqc.frontend.tracing import trace
from vlqc.ir.execution import Call, StageRun
from vlqc.ir.observation import ChannelRange, Observation
from vlqc.ir.scale_propagation import find_edges
from vlqc.ir.stage import InputQuantization, Site, Stage, WeightQuantization, observe
from vlqc.targets.schemes import Scheme

PREFIX = "visual.blocks.0."
GROUPS = {"norm1": ["attn.qkv"], "reshape_1": ["attn.proj"], "norm2": ["mlp.gate", "mlp.up"], "mul": ["mlp.down"]}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.proj = nn.Linear(4, 4)

    def forward(self, rows: Tensor) -> Tensor:
        q, k, v = self.qkv(rows).reshape(2, 3, 2, 2).permute(1, 2, 0, 3).unbind(0)
        mask = torch.zeros(1, 2, 2, dtype=torch.bool)
        mask[..., :1, :1] = True
        mask[..., 1:, 1:] = True
        attended = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        projected: Tensor = self.proj(attended.transpose(0, 1).reshape(2, 4))
        return projected


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 6, bias=False)
        self.up = nn.Linear(4, 6, bias=False)
        self.down = nn.Linear(6, 4)

    def forward(self, rows: Tensor) -> Tensor:
        lowered: Tensor = self.down(nn.functional.silu(self.gate(rows)) * self.up(rows))
        return lowered


class Block(nn.Module):
    position: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(4)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(4)
        self.mlp = Mlp()
        self.register_buffer("position", torch.tensor([[0.5, -0.5, 0.25, 1.0], [1.0, 0.0, -0.25, 0.5]]))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        rows = hidden_states + self.position
        rows = rows + self.attn(self.norm1(rows))
        return (rows + self.mlp(self.norm2(rows)),)


def exact(shape: tuple[int, ...], start: int) -> Tensor:
    """float32 values that are multiples of 1/64, the same on every machine."""
    count = torch.arange(start, start + torch.Size(shape).numel())
    return (((count * 37 + 11) % 101 - 50) / 64).reshape(shape)


def traced() -> Stage:
    """As passes get it: recorded, its sites found, nothing decided."""
    block = Block().requires_grad_(False).eval()
    for number, parameter in enumerate(block.parameters()):
        parameter.copy_(exact(tuple(parameter.shape), 1000 * number) + (1 if parameter.ndim == 1 else 0))
    calls: list[Call] = [Call(sample, (exact((2, 4), sample),), {}) for sample in range(3)]
    sites = {}
    for source, targets in GROUPS.items():
        for target in targets:
            rows, columns = block.get_parameter(f"{target}.weight").shape
            sites[PREFIX + target] = Site(PREFIX + target, target, source, (rows, columns))
    graph = trace(block, calls[0], "visual.blocks.0")
    return Stage(
        "visual.blocks.0",
        "vision",
        QWEN2_5_VL,
        torch.bfloat16,
        block,
        graph,
        sites,
        StageRun(block, ProcessGroup(), calls, calls[0]),
        checkpoint_name=lambda target: PREFIX + target,
    )


def observation(channels: int) -> Observation:
    """Of two text rows and one image row, all kept: +-1, 0 .. channels-1."""
    text = torch.ones(2, channels) * torch.tensor([[1.0], [-1.0]])
    image = torch.arange(float(channels))[None]
    ranges = {
        name: ChannelRange(len(rows), rows.amin(0), rows.amax(0), rows.double().sum(0), rows.double().square().sum(0))
        for name, rows in (("text", text), ("image", image))
    }
    return Observation(channels, ranges, torch.cat([text, image]), torch.tensor([0, 0, 1], dtype=torch.int8))


def decided() -> Stage:
    """With everything that passes add: observers, edges, schemes, input and weight quantization, outputs."""
    stage = traced()
    stage.edges = find_edges(stage.module, stage.graph)
    for source, targets in GROUPS.items():
        node = stage.node(source)
        with stage.graph.inserting_after(node):
            stage.graph.call_function(observe, (node,)).meta.update(node.meta)
        stage.observations[source] = observation(6 if source == "mul" else 4)
        for target in targets:
            site = stage.sites[PREFIX + target]
            if target == "mlp.down":
                site.scheme, site.reason = Scheme.FLOAT, 'kept "float" by request'
                continue
            site.scheme = Scheme.W8A8
            site.input = InputQuantization(0.03125, -3.0)
            weight = stage.linear(site).weight
            site.weight = WeightQuantization((weight * 64).to(torch.int8), torch.full((weight.shape[0], 1), 1 / 64))
    stage.execution.forward()
    return stage


class Lowered(nn.Module):
    """Stands for whatever replaces a Linear."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, linear: nn.Linear, site: Site) -> None:
        super().__init__()
        if site.weight is None:
            raise ValueError(site.name)
        self.register_buffer("weight", site.weight.integers)
        self.register_buffer("weight_scale", site.weight.scale)
        self.bias = linear.bias

    def forward(self, rows: Tensor) -> Tensor:
        return nn.functional.linear(rows, self.weight * self.weight_scale, self.bias)


def lowered() -> Stage:
    """After lowering: quantized sites are no Linear any more."""
    stage = decided()
    for site in stage.sites.values():
        if site.weight is not None:
            stage.module.set_submodule(site.target, Lowered(stage.linear(site), site))
    return stage
