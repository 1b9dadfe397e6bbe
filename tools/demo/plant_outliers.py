"""Adds activation outliers to a Qwen2.5-VL checkpoint without changing its function.

On every edge from a producer of channels to the linear layers that consume them, in both towers, a few of the
producer's strong channels are multiplied by alpha, and the consumers' columns divided by alpha. If alpha is a power of
two, no mantissa changes, so the function of float32 and bfloat16 checkpoints stays the same, while their activations
become hard to quantize with one scale per tensor. Edges are listed by name: tests compare scale propagation with this
list.

    python -m tools.demo.plant_outliers SOURCE TARGET [--alpha 128] [--share 0.02] [--seed 0]
"""

import argparse
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
POOL = 1.5  # `count` channels are drawn from the 1.5 * count strongest


@dataclass(frozen=True)
class Edge:
    """Channels of a producer and the linear layers that consume them.

    Channel c is element or row `first_row + c` of the producer's parameters and the columns `columns[c]` of every
    consumer.
    """

    producer: tuple[str, ...]  # parameter names
    first_row: int
    consumers: tuple[str, ...]  # names of weights [N, K]
    columns: tuple[tuple[int, ...], ...]
    writers: tuple[str, ...] = ()  # for a norm: weights that write to its residual stream

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.columns)


def one_column_each(channels: int) -> tuple[tuple[int, ...], ...]:
    """Channel c is column c."""
    return tuple((channel,) for channel in range(channels))


def vision_edges(vision: dict[str, int]) -> list[Edge]:
    """Edges of the vision tower and the merger, from the `vision_config` of config.json."""
    hidden, middle, merge = vision["hidden_size"], vision["intermediate_size"], vision.get("spatial_merge_size", 2)
    edges = []
    writers = ["visual.patch_embed.proj.weight"]
    for index in range(vision["depth"]):
        block = f"visual.blocks.{index}"
        qkv, gate, up = f"{block}.attn.qkv", f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj"
        edges += [
            Edge((f"{block}.norm1.weight",), 0, (f"{qkv}.weight",), one_column_each(hidden), tuple(writers)),
            Edge((f"{qkv}.weight", f"{qkv}.bias"), 2 * hidden, (f"{block}.attn.proj.weight",), one_column_each(hidden)),
        ]
        writers.append(f"{block}.attn.proj.weight")
        edges += [
            Edge(
                (f"{block}.norm2.weight",),
                0,
                (f"{gate}.weight", f"{up}.weight"),
                one_column_each(hidden),
                tuple(writers),
            ),
            Edge((f"{up}.weight", f"{up}.bias"), 0, (f"{block}.mlp.down_proj.weight",), one_column_each(middle)),
        ]
        writers.append(f"{block}.mlp.down_proj.weight")
    # The merger concatenates merge x merge patches: each norm channel is read once per patch.
    columns = tuple(tuple(channel + patch * hidden for patch in range(merge**2)) for channel in range(hidden))
    edges.append(Edge(("visual.merger.ln_q.weight",), 0, ("visual.merger.mlp.0.weight",), columns, tuple(writers)))
    return edges


def text_edges(text: dict[str, int]) -> list[Edge]:
    """Edges of the language model, from the (flat or nested) text part of config.json."""
    hidden, middle = text["hidden_size"], text["intermediate_size"]
    heads, value_heads = text["num_attention_heads"], text["num_key_value_heads"]
    head, repeat = hidden // heads, heads // value_heads
    # Grouped-query attention: value head g is read by query heads g * repeat .. g * repeat + repeat - 1.
    value_columns = tuple(
        tuple((group * repeat + copy) * head + channel for copy in range(repeat))
        for group in range(value_heads)
        for channel in range(head)
    )
    edges = []
    writers = ["model.embed_tokens.weight"]
    for index in range(text["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        query, key, value = (f"{layer}.self_attn.{name}_proj" for name in "qkv")
        gate, up = f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"
        edges += [
            Edge(
                (f"{layer}.input_layernorm.weight",),
                0,
                (f"{query}.weight", f"{key}.weight", f"{value}.weight"),
                one_column_each(hidden),
                tuple(writers),
            ),
            Edge((f"{value}.weight", f"{value}.bias"), 0, (f"{layer}.self_attn.o_proj.weight",), value_columns),
        ]
        writers.append(f"{layer}.self_attn.o_proj.weight")
        edges += [
            Edge(
                (f"{layer}.post_attention_layernorm.weight",),
                0,
                (f"{gate}.weight", f"{up}.weight"),
                one_column_each(hidden),
                tuple(writers),
            ),
            Edge((f"{up}.weight",), 0, (f"{layer}.mlp.down_proj.weight",), one_column_each(middle)),
        ]
        writers.append(f"{layer}.mlp.down_proj.weight")
    return edges


def edges_of(config: dict[str, object]) -> list[Edge]:
    """Every foldable edge of a Qwen2.5-VL with this config.json, in the order of the forward pass."""
    text, vision = config.get("text_config", config), config["vision_config"]
    assert isinstance(text, dict) and isinstance(vision, dict)
    return vision_edges(vision) + text_edges(text)


def strength(tensors: dict[str, Tensor], edge: Edge) -> Tensor:
    """Relative magnitude of each channel, estimated from weights alone, float32 [channels]."""
    produced: Tensor = tensors[edge.producer[0]][edge.first_row : edge.first_row + edge.channels].float()
    if produced.ndim == 2:  # a linear layer: norm of the row
        return produced.square().sum(1).sqrt()
    power = torch.zeros(edge.channels)
    for name in edge.writers:
        weight = tensors[name].float().flatten(1)
        power += (weight if "embed_tokens" not in name else weight.T).square().sum(1)
    return produced.abs() * power.sqrt()


def scale_edge(tensors: dict[str, Tensor], edge: Edge, channels: list[int], alpha: float) -> None:
    """Multiplies producer channels by alpha and divides consumer columns by alpha, in place."""
    rows = [edge.first_row + channel for channel in channels]
    columns = [column for channel in channels for column in edge.columns[channel]]
    for name in edge.producer:
        tensors[name][rows] *= alpha
    for name in edge.consumers:
        tensors[name][:, columns] /= alpha


def plant(
    source: str | Path, target: str | Path, alpha: float = 128.0, share: float = 0.02, seed: int = 0
) -> dict[str, list[int]]:
    """Copies the checkpoint folder `source` to `target` (missing or empty) with outliers on every edge.

    share: of each edge's channels, rounded up, drawn with `seed` from the strongest. Returns the channels by the name
    of the producer's first parameter. Requires a single `model.safetensors` with the names of the original checkpoints
    (`visual.*`, `model.layers.*`). Raises ValueError if a scaled tensor is not finite.
    """
    source, target = Path(source), Path(target)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    with safe_open(source / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[str, list[int]] = {}
    edges = edges_of(config)
    strengths = [strength(tensors, edge) for edge in edges]  # all before the first change
    for edge, strong in zip(edges, strengths, strict=True):
        count = math.ceil(share * edge.channels)
        pool = strong.argsort(descending=True, stable=True)[: int(POOL * count)]
        channels = sorted(pool[torch.randperm(len(pool), generator=generator)[:count]].tolist())
        scale_edge(tensors, edge, channels, alpha)
        chosen[edge.producer[0]] = channels
        overflowed = [name for name in (*edge.producer, *edge.consumers) if not tensors[name].isfinite().all()]
        if overflowed:
            raise ValueError(f"alpha {alpha} is too large for the dtype of {', '.join(overflowed)}")
    target.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(WEIGHTS))
    save_file(tensors, target / WEIGHTS, metadata=metadata)
    return chosen


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Add activation outliers without changing the model's function.")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--alpha", type=float, default=128.0, help="factor; a power of two keeps the function exact")
    parser.add_argument("--share", type=float, default=0.02, help="share of the channels of every producer")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chosen = plant(options.source, options.target, options.alpha, options.share, options.seed)
    print(f"{sum(map(len, chosen.values()))} channels on {len(chosen)} edges times {options.alpha:g}: {options.target}")


if __name__ == "__main__":
    main()
