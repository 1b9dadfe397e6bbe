"""Scales of quantized keys and values in a folder of `compiled_folder`, and attention on them with NumPy."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.compiled_folder import FolderContent
from tests.support.tensors import Array, rounded, stored

CHANNELS = 64  # of the keys: 2 heads of 32, in a wide model
HEAD = 32


def attention(layer: int) -> str:
    return f"model.layers.{layer}.self_attn"


def scales(layer: int, member: str, channels: int = CHANNELS) -> Array:
    """float32 [channels], values of bfloat16."""
    random = np.random.default_rng([layer, ord(member)])
    return rounded(random.uniform(0.08, 0.16, channels), "BF16")


def add_cache(content: FolderContent, *layers: int, size: int = CHANNELS) -> FolderContent:
    """Adds what a folder of a wide model with a quantized cache in these decoder layers has besides. size: channels of
    the keys, if the model is another."""
    for layer in layers:
        for member in "kv":
            values = {"scale": scales(layer, member, size), "offset": np.zeros(size)}
            for suffix, value in values.items():
                name = f"{attention(layer)}.{member}_proj.kv_cache_{suffix}"
                content.tensors[name], content.description[name] = stored(value, "F32"), "C8"
    content.description["kv_cache_type"] = "C8"
    return content


@contextmanager
def rounding_attention(monkeypatch: pytest.MonkeyPatch, *layers: int | None) -> Iterator[list[tuple[int, ...]]]:
    """Context in which the attention calls of decoder layers, in turn those of `layers`, read rounded keys and values
    (None: float ones). Yields the shapes of their keys."""
    original, shapes = torch.nn.functional.scaled_dot_product_attention, list[tuple[int, ...]]()

    def rounding(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if key.shape[1] in (2, 4) and key.shape[-1] == HEAD:
            layer = layers[len(shapes) % len(layers)]
            shapes.append(tuple(key.shape))
            if layer is not None:
                key, value = _rounded(key, scales(layer, "k")), _rounded(value, scales(layer, "v"))
        return original(query, key, value, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", rounding)
        yield shapes


def _rounded(x: Tensor, scale: Array) -> Tensor:
    """[1, heads, S, HEAD], where heads may be repeated."""
    values = x.numpy()
    per_head = np.repeat(scale.reshape(-1, 1, HEAD), values.shape[1] * HEAD // CHANNELS, axis=0).astype(np.float32)
    steps = values * (np.float32(1) / per_head)
    return torch.from_numpy(np.clip(np.rint(steps), -128, 127) * per_head)
