"""Small checkpoint folders in every layout."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vlqc.errors import UserError
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.checkpoint.files import INDEX

TENSORS = {
    "lm_head.weight": torch.arange(20, dtype=torch.float32).reshape(5, 4),
    "model.embed_tokens.weight": torch.arange(40, dtype=torch.bfloat16).reshape(10, 4) / 8,
    "model.layers.0.self_attn.q_proj.bias": torch.tensor([0.5, -2.0, 3.0], dtype=torch.float16),
    "model.layers.0.self_attn.q_proj.weight": torch.arange(12.0).reshape(3, 4).to(torch.bfloat16),
    "visual.blocks.0.attn.qkv.weight": torch.full((6, 2), -0.125),
    "visual.patch_embed.proj.weight": torch.randn(4, 3, 2, 2, 2, generator=torch.Generator().manual_seed(0)),
}
NEW_NAMES = {
    "lm_head.weight": "lm_head.weight",
    "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.bias": "model.language_model.layers.0.self_attn.q_proj.bias",
    "model.layers.0.self_attn.q_proj.weight": "model.language_model.layers.0.self_attn.q_proj.weight",
    "visual.blocks.0.attn.qkv.weight": "model.visual.blocks.0.attn.qkv.weight",
    "visual.patch_embed.proj.weight": "model.visual.patch_embed.proj.weight",
}


def one_file(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors")


def indexed(folder: Path, tensors: dict[str, Tensor]) -> None:
    weight_map = {name: f"model-{number % 3 + 1:05}-of-00003.safetensors" for number, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def many_without_index(folder: Path, tensors: dict[str, Tensor]) -> None:
    for number, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, folder / f"part{number}.safetensors")


def indexed_beside_a_stale_file(folder: Path, tensors: dict[str, Tensor]) -> None:
    indexed(folder, tensors)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "model.safetensors")


LAYOUTS = [one_file, indexed, many_without_index, indexed_beside_a_stale_file]


def write(folder: Path, tensors: dict[str, Tensor] = TENSORS, layout: Callable[..., None] = one_file) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    layout(folder, tensors)
    return folder


def fault_of(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        Checkpoint(folder)
    return str(caught.value)
