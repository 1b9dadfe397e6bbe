"""Writes a checkpoint with random weights, whose activations are as hard to quantize as in large models.

For every family of `families.py`. It has, in both towers unless stated otherwise:

- a few channels of every norm (weight, and bias of a LayerNorm) that are 5 to 40 times larger, with the consumers'
  columns divided by that factor to the power of 0.8 to 1.2, so that smoothing cannot undo them exactly, unlike those of
  `plant_outliers.py`;
- a few large value and up rows, which are not compensated elsewhere; no up rows where a GELU follows;
- residual channels of constant sign;
- one massive token of the language model: `<bos>` has 400 in one residual channel, like the first token of large
  models;
- with experts: weights that are similar in all experts of a layer, and a last expert that no token is sent to;
- with `--dead SHARE`, zero channels: that share of every norm, of the value rows and of the up rows.

The processor and tokenizer of the folder are those of `tools/demo/tiny_vl`, with the patches of the family.

    python -m tools.checkpoints.outlier_checkpoint TARGET [--family qwen2_5_vl] [--seed 0] [--dtype bfloat16] [--tied]
        [--dead 0] ...
"""

import argparse
import json
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tools.checkpoints.families import (
    BEGIN,
    BRANCH_GAIN,
    COLORS,
    FAMILIES,
    FRAMES,
    IMAGE,
    MERGE,
    TEXT,
    VISION,
    VISION_END,
    VISION_START,
    Embedding,
    Entry,
    Experts,
    Family,
    FinalNorm,
    Linear,
    Norm,
    PatchEmbedding,
    Router,
    Shape,
    Values,
    config_of,
    patch_values,
    text_entries,
    vision_entries,
    vocabulary,
)

TINY = Path(__file__).parents[1] / "demo" / "tiny_vl"
MASSIVE_VALUE = 400.0
FIRST_WORD = 8
GRIDS = ((8, 8), (8, 12), (12, 10), (16, 12))  # patches down and across of the images of `random_samples`, in turn

OUTLIER_SHARE = 0.02  # of the channels of every norm
COMPENSATION_POWERS = (0.8, 1.2)
LARGE_SHARE, LARGE_FACTORS = 0.01, (4.0, 8.0)  # of the value and up rows
BIAS = 0.1  # standard deviation
SIGNED_SHARE, SIGNED_VALUE = 0.01, 3.0  # residual channels of constant sign, in standard deviations of the residual
EXPERT_DIFFERENCE = 0.15  # of an expert's weights that is not common to all: bounds the error of another choice
# With experts there are more channels of constant sign: their sum, which makes the score of the last expert, is then
# large compared with its deviation among tokens.
SIGNED_SHARE_EXPERTS = 0.03
NEVER_CHOSEN = -4.0  # weight of the last expert's score


class CheckpointBuilder:
    """Creates the tensors of one checkpoint, all from one seeded generator."""

    def __init__(self, seed: int, outlier_factors: tuple[float, float]) -> None:
        self.outlier_factors = outlier_factors
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}
        self.offset = torch.zeros(0)  # of the residual stream of the current tower
        self.massive = 0  # channel of the massive value

    def normal(self, *size: int) -> Tensor:
        """Standard normal numbers, float32."""
        return torch.randn(size, generator=self.generator)

    def uniform(self, bounds: tuple[float, float], count: int) -> Tensor:
        """`count` uniform numbers between the bounds."""
        return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(count, generator=self.generator)

    def random_channels(self, channels: int, share: float) -> Tensor:
        """Indices of a share of the channels, at least two."""
        return torch.randperm(channels, generator=self.generator)[: max(2, round(share * channels))]

    def residual_offset(self, channels: int, share: float = SIGNED_SHARE) -> Tensor:
        """Offset of the residual stream [channels]: zero except for a few channels of constant sign."""
        offset = torch.zeros(channels)
        chosen = self.random_channels(channels, share)
        offset[chosen] = SIGNED_VALUE * (1 - 2 * torch.randint(2, (len(chosen),), generator=self.generator).float())
        return offset

    def vision(self, family: Family, shape: Shape) -> None:
        """The vision tower and the mergers."""
        self.offset = self.residual_offset(shape.vision_hidden)
        self.add(vision_entries(family, shape))

    def text(self, family: Family, shape: Shape, tied: bool) -> None:
        """The language model, after the vision tower: image tokens get the same offset of the residual stream."""
        self.offset = self.residual_offset(shape.hidden, SIGNED_SHARE_EXPERTS if shape.experts else SIGNED_SHARE)
        self.massive = int(torch.randint(shape.hidden, (1,), generator=self.generator))
        self.add(text_entries(family, shape, tied))
        for entry in vision_entries(family, shape):
            if isinstance(entry, Linear) and entry.stream == TEXT:
                self.tensors[f"{entry.name}.bias"] += self.offset

    def add(self, entries: Iterable[Entry]) -> None:
        """The tensors of these entries, in their order."""
        for entry in entries:
            match entry:
                case Linear():
                    self.linear(entry)
                case Norm():
                    self.norm(entry)
                case PatchEmbedding():
                    self.patch_embedding(entry)
                case Embedding():
                    embedding = self.normal(entry.tokens, entry.channels) + self.offset
                    embedding[BEGIN, self.massive] = MASSIVE_VALUE
                    self.tensors[f"{entry.name}.weight"] = embedding
                case Values():
                    self.tensors[f"{entry.name}.weight"] = entry.mean + entry.deviation * self.normal(*entry.size)
                case FinalNorm():
                    weight = 1 + 0.1 * self.normal(entry.channels)
                    weight[self.massive] = 1 / MASSIVE_VALUE  # otherwise that channel would dominate the logits
                    self.tensors[f"{entry.name}.weight"] = weight
                case Router():
                    self.router(entry)
                case Experts():
                    self.experts(entry)

    def linear(self, entry: Linear) -> None:
        """A linear layer, with a few large rows."""
        weight = entry.gain * self.normal(entry.rows, entry.columns) / math.sqrt(entry.columns)
        self.tensors[f"{entry.name}.weight"] = weight
        if entry.has_bias:
            self.tensors[f"{entry.name}.bias"] = BIAS * self.normal(entry.rows)
        if entry.stream == VISION:
            self.tensors[f"{entry.name}.bias"] += self.offset
        if entry.large:
            first, rows = entry.large
            chosen = self.random_channels(rows, LARGE_SHARE)
            weight[first + chosen] *= self.uniform(LARGE_FACTORS, len(chosen))[:, None]

    def patch_embedding(self, entry: PatchEmbedding) -> None:
        """The first weight of the vision tower, in the shape of a convolution."""
        values = COLORS * FRAMES * entry.patch**2
        weight = self.normal(entry.rows, values) / math.sqrt(values)
        self.tensors[f"{entry.name}.weight"] = weight.reshape(entry.rows, COLORS, FRAMES, entry.patch, entry.patch)
        if entry.has_bias:
            self.tensors[f"{entry.name}.bias"] = BIAS * self.normal(entry.rows) + self.offset

    def norm(self, entry: Norm) -> None:
        """A norm with outlier channels, including those of constant sign.

        They are mostly compensated in the consumers' columns, which read the channels `repeat` times.
        """
        signed = self.offset.repeat(entry.channels // len(self.offset))
        weight = 1 + 0.1 * self.normal(entry.channels)
        bias = BIAS * self.normal(entry.channels) if entry.has_bias else None
        chosen = torch.tensor(
            sorted({*self.random_channels(entry.channels, OUTLIER_SHARE).tolist(), *signed.nonzero()[:, 0].tolist()})
        )
        factors = self.uniform(self.outlier_factors, len(chosen))
        weight[chosen] *= factors
        self.tensors[f"{entry.name}.weight"] = weight
        if bias is not None:
            bias[chosen] *= factors
            self.tensors[f"{entry.name}.bias"] = bias
        compensation = torch.ones(entry.channels)
        compensation[chosen] = factors ** self.uniform(COMPENSATION_POWERS, len(chosen))
        for consumer in entry.consumers:
            if f"{consumer}.gate_up_proj" in self.tensors:  # experts: inputs x outputs
                self.tensors[f"{consumer}.gate_up_proj"] /= compensation[:, None]
            else:
                self.tensors[f"{consumer}.weight"] /= compensation.repeat(entry.repeat)

    def router(self, entry: Router) -> None:
        """Scores of a standard deviation of about two; the last one is negative for every token."""
        weight = 2 * self.normal(entry.experts, entry.channels) / math.sqrt(entry.channels)
        weight[-1] = NEVER_CHOSEN * self.offset.sign()
        weight[-1, self.massive] = NEVER_CHOSEN / 4  # `<bos>` has little else
        self.tensors[f"{entry.name}.weight"] = weight

    def experts(self, entry: Experts) -> None:
        """Experts that differ by EXPERT_DIFFERENCE, with the same few large outputs of every up projection."""
        channels, middle = entry.channels, entry.middle

        def weights(inputs: int, outputs: int) -> Tensor:
            common, own = self.normal(inputs, outputs), self.normal(entry.experts, inputs, outputs)
            return (math.sqrt(1 - EXPERT_DIFFERENCE**2) * common + EXPERT_DIFFERENCE * own) / math.sqrt(inputs)

        gate_up = weights(channels, 2 * middle)
        chosen = middle + self.random_channels(middle, LARGE_SHARE)
        gate_up[..., chosen] *= self.uniform(LARGE_FACTORS, len(chosen))
        self.tensors[f"{entry.name}.gate_up_proj"] = gate_up
        self.tensors[f"{entry.name}.down_proj"] = BRANCH_GAIN * weights(middle, channels)

    def zero_channels(self, share: float, final_norm: str) -> None:
        """Zeroes a share of the channels of every norm but the last, and of the value and up rows of every layer.

        These are the last draws, so that all other values do not depend on the share.
        """
        for name in list(self.tensors) if share else ():
            tensor, stem = self.tensors[name], name.removesuffix(".weight").removesuffix(".bias")
            if stem == final_norm:
                continue
            if name.endswith(".weight") and (tensor.ndim == 1 or stem.endswith(("attn.qkv", "v_proj", "up_proj"))):
                first = 2 * len(tensor) // 3 if stem.endswith("attn.qkv") else 0  # values are the last third
                dead = first + self.random_channels(len(tensor) - first, share)
                for part in {f"{stem}.weight", f"{stem}.bias"} & self.tensors.keys():
                    self.tensors[part][dead] = 0.0


def side_files(family: Family) -> dict[str, Any]:
    """File name -> content of the tokenizer's settings, and of the image processor's and chat template with images."""
    names = ("tokenizer_config.json", *(("chat_template.json", "preprocessor_config.json") if family.vision else ()))
    contents = {name: json.loads((TINY / name).read_text(encoding="utf-8")) for name in names}
    if not family.vision:
        del contents["tokenizer_config.json"]["processor_class"]
        return contents
    processor = family.architecture.removesuffix("ForConditionalGeneration").removesuffix("Moe") + "Processor"
    contents["tokenizer_config.json"]["processor_class"] = processor
    settings = contents["preprocessor_config.json"] | {"processor_class": processor} | family.vision.image_settings
    contents["preprocessor_config.json"] = {name: value for name, value in settings.items() if value is not None}
    return contents


def make(
    target: str | Path,
    seed: int = 0,
    dtype: str = "bfloat16",
    tied: bool = False,
    shape: Shape | None = None,
    dead: float = 0.0,
    family: str = "qwen2_5_vl",
) -> dict[str, Any]:
    """Writes the checkpoint folder `target` and returns its config; the same arguments give the same bytes.

    dtype: "bfloat16", "float16" or "float32"; dead: share of zero channels; shape: of the family if None. Raises
    ValueError for invalid sizes.
    """
    row = FAMILIES[family]
    shape = shape or row.shape
    config = config_of(shape, dtype, tied, family)
    builder = CheckpointBuilder(seed, row.outlier_factors)
    if row.vision:
        builder.vision(row, shape)
    builder.text(row, shape, tied)
    builder.zero_channels(dead, final_norm=f"{row.text}.norm")
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    tensors = {name: builder.tensors[name].to(getattr(torch, dtype)).contiguous() for name in sorted(builder.tensors)}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    generation = {"bos_token_id": BEGIN, "eos_token_id": 2, "pad_token_id": 0, "transformers_version": row.version}
    for name, content in {"config.json": config, "generation_config.json": generation, **side_files(row)}.items():
        (target / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "special_tokens_map.json"):
        shutil.copyfile(TINY / name, target / name)
    return config


def random_samples(
    config: dict[str, Any], count: int, seed: int = 0, grids: Sequence[tuple[int, int]] = GRIDS
) -> list[dict[str, Tensor]]:
    """`count` model inputs of one random image each, between random words; the first token is `<bos>`.

    input_ids and attention_mask int64 [1, length], pixel_values float32 [patches, C*T*p*p] (standard normal),
    image_grid_thw int64 [1, 3]. Image sizes rotate through `grids` (patches down, patches across). For a language model
    the image tokens are words, and there are no other inputs. transformers 5 also requires `mm_token_type_ids`: see
    `tiny_task.with_token_types`.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens, values = vocabulary(config), patch_values(config)
    samples = []
    for index in range(count):
        down, across = grids[index % len(grids)]
        before, after = torch.randint(4, 25, (2,), generator=generator).tolist()
        image_tokens = down * across // MERGE**2
        if not values:
            after += image_tokens
        words = torch.randint(FIRST_WORD, tokens, (before + after,), generator=generator).tolist()
        image = [VISION_START, *[IMAGE] * image_tokens, VISION_END] if values else []
        input_ids = torch.tensor([[BEGIN, *words[:before], *image, *words[before:]]])
        sample = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if values:
            sample["pixel_values"] = torch.randn(down * across, values, generator=generator)
            sample["image_grid_thw"] = torch.tensor([[1, down, across]])
        samples.append(sample)
    return samples


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Write a random checkpoint with activation outliers.")
    parser.add_argument("target", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="qwen2_5_vl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tied", action="store_true", help="tie lm_head to the embedding")
    parser.add_argument("--dead", type=float, default=0.0, help="share of channels that are zero")
    for field in fields(Shape):
        kind = _numbers if field.name == "deepstack" else int
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, help="default: of the family")
    options = parser.parse_args()
    sizes = {field.name: getattr(options, field.name) for field in fields(Shape)}
    shape = replace(FAMILIES[options.family].shape, **{name: size for name, size in sizes.items() if size is not None})
    if options.deepstack is None:
        fitting = [block for block in shape.deepstack if block < shape.vision_layers]
        shape = replace(shape, deepstack=tuple(fitting[: shape.layers]))
    try:
        config_of(shape, options.dtype, options.tied, options.family)
    except ValueError as error:
        parser.error(str(error))
    make(options.target, options.seed, options.dtype, options.tied, shape, options.dead, options.family)
    print(options.target)


if __name__ == "__main__":
    main()
