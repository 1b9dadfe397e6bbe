"""Writes checkpoints with the real shapes of Qwen2.5-VL, Qwen3-VL and Qwen3-VL-MoE, and random bf16 weights.

    python -m tools.bench.scale_checkpoint TARGET --size 7B [--layers 2] [--vision_layers 2]

A few channels of every norm are 5 to 24 times larger, so that activations have outliers. Weights repeat every 16
million values, which affects neither time nor memory.
"""

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.checkpoints.families import (
    FAMILIES,
    IMAGE,
    MERGE,
    VISION_END,
    VISION_START,
    Shape,
    config_of,
    patch_values,
    tensor_sizes,
    vocabulary,
)


@dataclass(frozen=True)
class Size:
    """A published model."""

    family: str
    shape: Shape
    tied: bool = False


QWEN3_8B = Shape(36, 4096, 12288, 32, 8, 27, 1152, 4304, 16, 151936, head=128, positions=2304, deepstack=(8, 16, 24))
QWEN3_32B = replace(QWEN3_8B, layers=64, hidden=5120, intermediate=25600, heads=64)
QWEN3_30B_A3B = replace(
    QWEN3_8B,
    layers=48,
    hidden=2048,
    intermediate=6144,
    value_heads=4,
    experts=128,
    used_experts=8,
    expert_intermediate=768,
)
SIZES = {
    "3B": Size("qwen2_5_vl", Shape(36, 2048, 11008, 16, 2, 32, 1280, 3420, 16, 151936), tied=True),
    "7B": Size("qwen2_5_vl", Shape(28, 3584, 18944, 28, 4, 32, 1280, 3420, 16, 152064)),
    "32B": Size("qwen2_5_vl", Shape(64, 5120, 27648, 40, 8, 32, 1280, 3456, 16, 152064)),
    "72B": Size("qwen2_5_vl", Shape(80, 8192, 29568, 64, 8, 32, 1280, 3456, 16, 152064)),
    "qwen3-vl-8b": Size("qwen3_vl", QWEN3_8B),
    "qwen3-vl-32b": Size("qwen3_vl", QWEN3_32B),
    "qwen3-vl-30b-a3b": Size("qwen3_vl_moe", QWEN3_30B_A3B),
}
SHARD_BYTES = 4 * 2**30
POOL = (1 << 24) + 43  # a prime, so that rows do not repeat within a matrix
BYTES = 2  # of a bf16 weight
FULL_EVERY = 8  # vision blocks of Qwen2.5-VL: every eighth has full attention


@dataclass(frozen=True)
class Case:
    """A model size and the number of layers to run."""

    size: str
    layers: int
    vision_layers: int

    @classmethod
    def of(cls, size: str, layers: int | None = None, vision_layers: int | None = None) -> "Case":
        """None: all layers of the size. Raises ValueError for other numbers of layers."""
        full = SIZES[size].shape
        case = cls(
            size,
            full.layers if layers is None else layers,
            full.vision_layers if vision_layers is None else vision_layers,
        )
        if not (1 <= case.layers <= full.layers and 1 <= case.vision_layers <= full.vision_layers):
            raise ValueError(f"{size} has {full.layers} layers and {full.vision_layers} vision layers")
        return case

    @property
    def family(self) -> str:
        return SIZES[self.size].family

    @property
    def vision_prefix(self) -> str:
        """Of the names of the vision tower's tensors and stages."""
        vision = FAMILIES[self.family].vision
        assert vision is not None
        return vision.prefix

    @property
    def text_prefix(self) -> str:
        """Of the names of the language model's tensors and stages."""
        return FAMILIES[self.family].text

    @property
    def full(self) -> Shape:
        return SIZES[self.size].shape

    @property
    def shape(self) -> Shape:
        """With fewer vision blocks, their last ones are followed by the mergers of their own."""
        deepstack = self.full.deepstack
        if self.vision_layers < self.full.vision_layers or len(deepstack) > self.layers:
            count = min(len(deepstack), self.vision_layers, self.layers)
            deepstack = tuple(range(self.vision_layers - count, self.vision_layers))
        return replace(self.full, layers=self.layers, vision_layers=self.vision_layers, deepstack=deepstack)

    @property
    def tied(self) -> bool:
        return SIZES[self.size].tied

    @property
    def full_attention_blocks(self) -> list[int]:
        """Numbers of the vision blocks with full attention, at least one."""
        if self.family != "qwen2_5_vl":
            return list(range(self.vision_layers))
        return list(range(FULL_EVERY - 1, self.vision_layers, FULL_EVERY)) or [self.vision_layers - 1]

    @property
    def config(self) -> dict[str, Any]:
        config = config_of(self.shape, "bfloat16", self.tied, self.family)
        if self.family == "qwen2_5_vl":
            config["vision_config"]["fullatt_block_indexes"] = self.full_attention_blocks
        return config


def tensor_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the checkpoint."""
    return tensor_sizes(case.family, case.shape, case.tied)


def checkpoint_bytes(case: Case) -> int:
    return BYTES * sum(math.prod(shape) for shape in tensor_shapes(case).values())


class Numbers:
    """Random bf16 values from one pool."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self._pool = {0: torch.randn(POOL, generator=self.generator).bfloat16()}

    def pool(self, exponent: int) -> Tensor:
        """The pool times 2^exponent."""
        if exponent not in self._pool:
            self._pool[exponent] = (self._pool[0].float() * 2.0**exponent).bfloat16()
        return self._pool[exponent]

    def matrix(self, count: int, inputs: int, gain: float) -> Iterator[Tensor]:
        """`count` normal values in pieces, with a standard deviation of about gain / sqrt(inputs)."""
        pool = self.pool(round(math.log2(gain / math.sqrt(inputs))))
        start = int(torch.randint(POOL, (1,), generator=self.generator))
        while count:
            piece = pool[start : start + count]
            yield piece
            count, start = count - piece.numel(), 0

    def norm(self, count: int) -> Tensor:
        weight = 1 + 0.1 * torch.randn(count, generator=self.generator)
        outliers = torch.randperm(count, generator=self.generator)[: max(1, count // 100)]
        weight[outliers] *= 5 + 19 * torch.rand(len(outliers), generator=self.generator)
        return weight.bfloat16()

    def of(self, name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
        """The values of a tensor, in pieces."""
        if len(shape) == 1:
            is_norm = name.endswith(".weight") and ("norm" in name or "ln_q" in name)
            yield self.norm(shape[0]) if is_norm else self.pool(-4)[: shape[0]]
            return
        writes_residual = name.removesuffix(".weight").endswith(("o_proj", "down_proj", "attn.proj", "mlp.linear_fc2"))
        if "embed_tokens" in name:
            inputs = 1
        elif ".experts." in name:  # experts x inputs x outputs
            inputs = shape[1]
        else:
            inputs = math.prod(shape[1:])
        yield from self.matrix(math.prod(shape), inputs, 0.25 if writes_residual else 1.0)


def make(target: Path, case: Case, seed: int = 0, *, values: bool = True) -> int:
    """Writes the checkpoint folder; the same arguments give the same bytes. Returns the bytes of its weights.

    values: False for zeros in sparse files, which take no space on the disk.
    """
    target.mkdir(parents=True, exist_ok=True)
    numbers, shapes = Numbers(seed) if values else None, tensor_shapes(case)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        filled = BYTES * sum(math.prod(each) for each in shards[-1].values())
        if shards[-1] and filled + BYTES * math.prod(shape) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    weight_map = {}
    for number, content in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(content, file)
        _write_shard(target / file, content, numbers)
    index = {"metadata": {"total_size": checkpoint_bytes(case)}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    (target / "config.json").write_text(json.dumps(case.config, indent=2), encoding="utf-8")
    return checkpoint_bytes(case)


def _write_shard(path: Path, content: Mapping[str, tuple[int, ...]], numbers: Numbers | None) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in content.items():
        begin, end = end, end + BYTES * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb") as file:
        start = file.write(len(text).to_bytes(8, "little") + text)
        if numbers is None:
            file.truncate(start + end)
            return
        for name, shape in content.items():
            for piece in numbers.of(name, shape):
                file.write(piece.view(torch.int16).numpy().data)


def samples_of(config: dict[str, Any], count: int, tokens: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """`count` model inputs of `tokens` tokens each, most of them of one random image between words."""
    generator = torch.Generator().manual_seed(seed)
    side = max(1, math.isqrt(int(tokens * 0.95)) // 4 * 4)  # in tokens; windows are 4 x 4
    image = [VISION_START, *[IMAGE] * side**2, VISION_END]
    samples = []
    for _ in range(count):
        words = torch.randint(8, vocabulary(config), (tokens - len(image) - 1,), generator=generator).tolist()
        ids = torch.tensor([[1, *words[: len(words) // 2], *image, *words[len(words) // 2 :]]])
        samples.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "pixel_values": torch.randn(side**2 * MERGE**2, patch_values(config), generator=generator),
                "image_grid_thw": torch.tensor([[1, side * MERGE, side * MERGE]]),
            }
        )
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a random checkpoint with the shapes of a published model.")
    parser.add_argument("target", type=Path)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vision_layers", type=int)
    options = parser.parse_args()
    make(options.target, Case.of(options.size, options.layers, options.vision_layers))
    print(options.target)


if __name__ == "__main__":
    main()
