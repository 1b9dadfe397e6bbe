"""Samples for the model of `compiled_folder`, and verification with attribution of the error to layers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tools.checkpoints.families import Shape
from vlqc.verify import verify_folder
from vlqc.verify.findings import VerificationResult

IMAGE = 45  # of compiled_folder's model
SMALL = Shape(
    layers=2, hidden=128, intermediate=192, heads=4, value_heads=2, vision_layers=1, vision_hidden=64,
    vision_intermediate=96, vision_heads=2, vocabulary=128,
)  # fmt: skip


def sample(seed: int, *, has_image: bool = True, padding: int = 0, words: int = 6) -> dict[str, Tensor]:
    """One image of 8 x 8 patches (16 image tokens) and text, or text alone, after `padding` padding tokens."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 40, (words,), generator=generator)
    image = torch.tensor([43, *[IMAGE] * 16, 44]) if has_image else torch.tensor([], dtype=torch.long)
    ids = torch.cat([torch.zeros(padding, dtype=torch.long), image, text])[None]
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if has_image:
        inputs["pixel_values"] = torch.randn(64, 1176, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 8, 8]])
    return inputs


SAMPLES = [sample(1), sample(2, has_image=False, words=9), sample(3, padding=3)]


def verify_with_locate(
    folder: Path, source: Path, samples: list[dict[str, Tensor]], **options: Any
) -> VerificationResult:
    return verify_folder(folder, model_path=source, samples=samples, locate=True, **options)


def path_in(model: nn.Module, layer: str) -> str:
    """Module path of a layer, by its checkpoint name, in any transformers version."""
    short = layer.removeprefix("model.") if layer.startswith("model.") else layer
    paths = [path for path, _ in model.named_modules() if path.endswith(f".{short}") or path == layer]
    return next(path for path in paths if ("visual" in path) == layer.startswith("visual."))
