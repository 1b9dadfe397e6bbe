"""Adapters in the format of PEFT, and their effect computed with NumPy from the definition."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

ADAPTER_PREFIX = "base_model.model."


def write_adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """Writes an adapter; names of tensors without PEFT's prefix. config: replaces keys of adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    defaults = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 6,
        "bias": "none",
        "base_model_name_or_path": "elsewhere/model",
    }
    (folder / "adapter_config.json").write_text(json.dumps({**defaults, **config}))
    save_file({ADAPTER_PREFIX + name: tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def low_rank(path: str, outputs: int, inputs: int, rank: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """A and B of a linear layer."""
    return {
        f"{path}.lora_A.weight": random(rank, inputs, seed=seed + 1),
        f"{path}.lora_B.weight": random(outputs, rank, seed=seed + 2),
    }


def rounded(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    """float64 -> float32 -> dtype."""
    return torch.from_numpy(values.astype(np.float32)).to(dtype)


def double(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()
