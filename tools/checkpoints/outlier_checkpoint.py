"""Writes a Qwen2.5-VL checkpoint with random weights, whose activations are as hard to quantize as in large models.

It has, in both towers unless stated otherwise:

- a few channels of every norm weight that are 5 to 24 times larger, with the consumers' columns divided by that factor
  to the power of 0.8 to 1.2, so that smoothing cannot undo them exactly, as in `plant_outliers.py`;
- a few large value and up rows, which are not compensated elsewhere;
- residual channels of constant sign;
- one massive token of the language model: `<bos>` has 400 in one residual channel, like the first token of large
  models;
- with `--dead SHARE`, zero channels: that share of every norm, of the value rows and of the up rows.

The processor and tokenizer of the folder are those of `tools/demo/tiny_vl`.

    python -m tools.checkpoints.outlier_checkpoint TARGET [--seed 0] [--dtype bfloat16] [--tied] [--dead 0] ...
"""

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SIDE_FILES = (
    "chat_template.json",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
MASSIVE_TOKEN, MASSIVE_VALUE = 1, 400.0  # <bos> of tools/demo/tiny_vl, the first token of every sequence
VISION_START, VISION_END, IMAGE, VIDEO, VISION_PAD = 3, 4, 5, 6, 7
FIRST_WORD = 8
MERGE, PATCH_VALUES = 2, 3 * 2 * 14 * 14
GRIDS = ((8, 8), (8, 12), (12, 10), (16, 12))  # patches down and across of the images of `random_samples`, in turn

OUTLIER_SHARE = 0.02  # of the channels of every norm
OUTLIER_FACTORS = (5.0, 24.0)
COMPENSATION_POWERS = (0.8, 1.2)
LARGE_ROWS, LARGE_FACTORS = 0.01, (4.0, 8.0)  # share of the value and up rows
BRANCH_GAIN = 0.75  # of linear layers that write to the residual stream
SIGNED_SHARE, SIGNED_VALUE = 0.01, 3.0  # residual channels of constant sign, in standard deviations of the residual


@dataclass(frozen=True)
class Shape:
    """Sizes of the checkpoint. hidden / heads must be a multiple of 16 (vision: 4), vocabulary at least 64."""

    layers: int = 2
    hidden: int = 512
    intermediate: int = 768
    heads: int = 8
    value_heads: int = 2
    vision_layers: int = 2  # the last block has full attention, the others are windowed
    vision_hidden: int = 256
    vision_intermediate: int = 340
    vision_heads: int = 4
    vocabulary: int = 512


def config_of(shape: Shape, dtype: str, tied: bool) -> dict[str, Any]:
    """The flat config.json that transformers 4.49 writes and 5.x reads."""
    head = shape.hidden // shape.heads
    if shape.hidden % (16 * shape.heads) or shape.vision_hidden % (4 * shape.vision_heads):
        raise ValueError(f"hidden / heads must be a multiple of 16 (language) and 4 (vision): {shape}")
    if shape.heads % shape.value_heads or shape.vocabulary < 64:
        raise ValueError(f"value_heads must divide heads, and the vocabulary must be at least 64: {shape}")
    sections = [head // 8, head // 16 * 3, head // 16 * 3]  # of head / 2: time, height, width
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": MASSIVE_TOKEN,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "image_token_id": IMAGE,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 32768,
        "max_window_layers": shape.layers,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.value_heads,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": sections, "type": "mrope"},
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "transformers_version": "4.49.0",
        "use_cache": True,
        "use_sliding_window": False,
        "video_token_id": VIDEO,
        "vision_config": {
            "depth": shape.vision_layers,
            "fullatt_block_indexes": [shape.vision_layers - 1],
            "hidden_act": "silu",
            "hidden_size": shape.vision_hidden,
            "in_channels": 3,
            "in_chans": 3,
            "intermediate_size": shape.vision_intermediate,
            "model_type": "qwen2_5_vl",
            "num_heads": shape.vision_heads,
            "out_hidden_size": shape.hidden,
            "patch_size": 14,
            "spatial_merge_size": MERGE,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
        },
        "vision_end_token_id": VISION_END,
        "vision_start_token_id": VISION_START,
        "vision_token_id": VISION_PAD,
        "vocab_size": shape.vocabulary,
    }


class CheckpointBuilder:
    """Creates the tensors of one checkpoint, all from one seeded generator."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}

    def normal(self, *size: int) -> Tensor:
        """Standard normal numbers, float32."""
        return torch.randn(size, generator=self.generator)

    def uniform(self, bounds: tuple[float, float], count: int) -> Tensor:
        """`count` uniform numbers between the bounds."""
        return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(count, generator=self.generator)

    def random_channels(self, channels: int, share: float) -> Tensor:
        """Indices of a share of the channels, at least two."""
        return torch.randperm(channels, generator=self.generator)[: max(2, round(share * channels))]

    def linear(self, name: str, rows: int, columns: int, bias: float | None = None, gain: float = 1.0) -> None:
        """A linear layer with this gain; bias: standard deviation of its bias, None for no bias."""
        self.tensors[f"{name}.weight"] = gain * self.normal(rows, columns) / math.sqrt(columns)
        if bias is not None:
            self.tensors[f"{name}.bias"] = bias * self.normal(rows)

    def norm(self, name: str, signed: Tensor, consumers: list[str], repeat: int = 1) -> None:
        """A norm weight with outlier channels, including those of constant sign.

        They are mostly compensated in the consumers' columns, which read the channels `repeat` times.
        """
        channels = len(signed)
        weight = 1 + 0.1 * self.normal(channels)
        chosen = torch.tensor(
            sorted({*self.random_channels(channels, OUTLIER_SHARE).tolist(), *signed.nonzero()[:, 0].tolist()})
        )
        factors = self.uniform(OUTLIER_FACTORS, len(chosen))
        weight[chosen] *= factors
        self.tensors[f"{name}.weight"] = weight
        compensation = torch.ones(channels)
        compensation[chosen] = factors ** self.uniform(COMPENSATION_POWERS, len(chosen))
        for consumer in consumers:
            self.tensors[f"{consumer}.weight"] /= compensation.repeat(repeat)

    def enlarge_rows(self, name: str, first_row: int, rows: int) -> None:
        """Enlarges a few of the rows first_row .. first_row + rows - 1 of a linear layer."""
        chosen = self.random_channels(rows, LARGE_ROWS)
        self.tensors[f"{name}.weight"][first_row + chosen] *= self.uniform(LARGE_FACTORS, len(chosen))[:, None]

    def zero_channels(self, share: float) -> None:
        """Zeroes a share of the channels of every norm but the last, and of the value and up rows of every layer.

        These are the last draws, so that all other values do not depend on the share.
        """
        for name in list(self.tensors) if share else ():
            tensor, stem = self.tensors[name], name.removesuffix(".weight").removesuffix(".bias")
            if name == "model.norm.weight":
                continue
            if name.endswith(".weight") and (tensor.ndim == 1 or stem.endswith(("attn.qkv", "v_proj", "up_proj"))):
                first = 2 * len(tensor) // 3 if stem.endswith("attn.qkv") else 0  # values are the last third
                dead = first + self.random_channels(len(tensor) - first, share)
                for part in {f"{stem}.weight", f"{stem}.bias"} & self.tensors.keys():
                    self.tensors[part][dead] = 0.0

    def residual_offset(self, channels: int) -> Tensor:
        """Offset of the residual stream [channels]: zero except for a few channels of constant sign."""
        offset = torch.zeros(channels)
        chosen = self.random_channels(channels, SIGNED_SHARE)
        offset[chosen] = SIGNED_VALUE * (1 - 2 * torch.randint(2, (len(chosen),), generator=self.generator).float())
        return offset

    def vision(self, shape: Shape) -> None:
        """The vision tower and the merger."""
        signed = self.residual_offset(shape.vision_hidden)
        hidden, middle, merged = shape.vision_hidden, shape.vision_intermediate, shape.vision_hidden * MERGE**2
        patch = self.normal(hidden, PATCH_VALUES) / math.sqrt(PATCH_VALUES)
        self.tensors["visual.patch_embed.proj.weight"] = patch.reshape(hidden, 3, 2, 14, 14)
        for index in range(shape.vision_layers):
            block = f"visual.blocks.{index}"
            qkv, gate, up = f"{block}.attn.qkv", f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj"
            self.linear(qkv, 3 * hidden, hidden, bias=0.1)
            self.enlarge_rows(qkv, 2 * hidden, hidden)
            self.linear(f"{block}.attn.proj", hidden, hidden, bias=0.1, gain=BRANCH_GAIN)
            self.linear(gate, middle, hidden, bias=0.1)
            self.linear(up, middle, hidden, bias=0.1)
            self.enlarge_rows(up, 0, middle)
            self.linear(f"{block}.mlp.down_proj", hidden, middle, bias=0.1, gain=BRANCH_GAIN)
            if index == 0:  # the patch embedding has no bias
                self.tensors[f"{block}.attn.proj.bias"] += signed
            self.norm(f"{block}.norm1", signed, [qkv])
            self.norm(f"{block}.norm2", signed, [gate, up])
        self.linear("visual.merger.mlp.0", merged, merged, bias=0.1)
        self.linear("visual.merger.mlp.2", shape.hidden, merged, bias=0.1)
        self.norm("visual.merger.ln_q", signed, ["visual.merger.mlp.0"], repeat=MERGE**2)

    def text(self, shape: Shape, tied: bool) -> None:
        """The language model."""
        hidden, middle, values = shape.hidden, shape.intermediate, shape.hidden // shape.heads * shape.value_heads
        offset = self.residual_offset(hidden)
        massive = int(torch.randint(hidden, (1,), generator=self.generator))
        embedding = self.normal(shape.vocabulary, hidden) + offset
        embedding[MASSIVE_TOKEN, massive] = MASSIVE_VALUE
        self.tensors["model.embed_tokens.weight"] = embedding
        self.tensors["visual.merger.mlp.2.bias"] += offset  # image tokens have the same residual stream
        for index in range(shape.layers):
            layer = f"model.layers.{index}"
            query, key, value, out = (f"{layer}.self_attn.{name}_proj" for name in "qkvo")
            gate, up = f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"
            self.linear(query, hidden, hidden, bias=0.1)
            self.linear(key, values, hidden, bias=0.1)
            self.linear(value, values, hidden, bias=0.1)
            self.enlarge_rows(value, 0, values)
            self.linear(out, hidden, hidden, gain=BRANCH_GAIN)
            self.linear(gate, middle, hidden)
            self.linear(up, middle, hidden)
            self.enlarge_rows(up, 0, middle)
            self.linear(f"{layer}.mlp.down_proj", hidden, middle, gain=BRANCH_GAIN)
            self.norm(f"{layer}.input_layernorm", offset, [query, key, value])
            self.norm(f"{layer}.post_attention_layernorm", offset, [gate, up])
        final = 1 + 0.1 * self.normal(hidden)
        final[massive] = 1 / MASSIVE_VALUE  # otherwise the massive channel would dominate the logits
        self.tensors["model.norm.weight"] = final
        if not tied:
            self.linear("lm_head", shape.vocabulary, hidden)


def make(
    target: str | Path,
    seed: int = 0,
    dtype: str = "bfloat16",
    tied: bool = False,
    shape: Shape | None = None,
    dead: float = 0.0,
) -> dict[str, Any]:
    """Writes the checkpoint folder `target` and returns its config; the same arguments give the same bytes.

    dtype: "bfloat16", "float16" or "float32"; dead: share of zero channels. Raises ValueError for invalid sizes.
    """
    shape = shape or Shape()
    config = config_of(shape, dtype, tied)
    builder = CheckpointBuilder(seed)
    builder.vision(shape)
    builder.text(shape, tied)
    builder.zero_channels(dead)
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    tensors = {name: builder.tensors[name].to(getattr(torch, dtype)).contiguous() for name in sorted(builder.tensors)}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    generation = {"bos_token_id": MASSIVE_TOKEN, "eos_token_id": 2, "pad_token_id": 0, "transformers_version": "4.49.0"}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (target / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in SIDE_FILES:
        shutil.copyfile(Path(__file__).parents[1] / "demo" / "tiny_vl" / name, target / name)
    return config


def random_samples(
    config: dict[str, Any], count: int, seed: int = 0, grids: Sequence[tuple[int, int]] = GRIDS
) -> list[dict[str, Tensor]]:
    """`count` model inputs of one random image each, between random words; the first token is `<bos>`.

    input_ids and attention_mask int64 [1, length], pixel_values float32 [patches, 1176] (standard normal),
    image_grid_thw int64 [1, 3]. Image sizes rotate through `grids` (patches down, patches across). transformers 5 also
    requires `mm_token_type_ids`: see `tiny_task.with_token_types`.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index in range(count):
        down, across = grids[index % len(grids)]
        before, after = torch.randint(4, 25, (2,), generator=generator).tolist()
        words = torch.randint(FIRST_WORD, config["vocab_size"], (before + after,), generator=generator).tolist()
        image = [VISION_START, *[IMAGE] * (down * across // MERGE**2), VISION_END]
        input_ids = torch.tensor([[MASSIVE_TOKEN, *words[:before], *image, *words[before:]]])
        samples.append(
            {
                "input_ids": input_ids,
                "attention_mask": torch.ones_like(input_ids),
                "pixel_values": torch.randn(down * across, PATCH_VALUES, generator=generator),
                "image_grid_thw": torch.tensor([[1, down, across]]),
            }
        )
    return samples


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Write a random Qwen2.5-VL checkpoint with activation outliers.")
    parser.add_argument("target", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tied", action="store_true", help="tie lm_head to the embedding")
    parser.add_argument("--dead", type=float, default=0.0, help="share of channels that are zero")
    for field in fields(Shape):
        parser.add_argument("--" + field.name.replace("_", "-"), type=int, default=field.default)
    options = parser.parse_args()
    shape = Shape(**{field.name: getattr(options, field.name) for field in fields(Shape)})
    make(options.target, options.seed, options.dtype, options.tied, shape, options.dead)
    print(options.target)


if __name__ == "__main__":
    main()
