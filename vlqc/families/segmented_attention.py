"""Attention of a vision tower, segment by segment, where transformers up to 4.52 builds a mask of all pairs of patches.

`cu_seqlens` int [segments + 1] bounds the segments of rows that attend to each other: images, frames or windows. Those
versions write a mask [1, S, S], which has 6 GiB for two images of eight megapixels; later ones split the rows, as here.
Short inputs run the model's own forward, so that graphs are those of the installed version.
"""

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn

MASKED_CLASSES = ("Qwen2_5_VLVisionSdpaAttention", "VisionSdpaAttention")
MASKED_ROWS = 4096  # up to so many rows the mask, of 16 MiB at most, is built


def segment_attention(model: nn.Module) -> None:
    """Changes the class of all attention modules with a dense mask, in place. None in later versions."""
    for module in model.modules():
        if type(module).__name__ in MASKED_CLASSES:
            module.__class__ = _segmented(type(module))  # type: ignore[arg-type]  # a class is hashable


@functools.cache
def _segmented(whole: type[nn.Module]) -> type[nn.Module]:
    """A subclass of the same name."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        rotary_pos_emb: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        if hidden_states.shape[0] <= MASKED_ROWS or position_embeddings is None:
            return whole.forward(self, hidden_states, cu_seqlens, rotary_pos_emb, position_embeddings)
        rotate = sys.modules[whole.__module__].apply_rotary_pos_emb_vision
        return attend(self, hidden_states, cu_seqlens, position_embeddings, rotate)

    body = {"forward": forward, "__module__": whole.__module__, "__qualname__": whole.__qualname__}
    return type(whole.__name__, (whole,), body)


def attend(self: Any, hidden_states: Tensor, cu_seqlens: Tensor, positions: tuple[Tensor, Tensor], rotate: Any) -> Any:
    """The output [S, C] of an attention module with `qkv`, `proj` and `num_heads`.

    hidden_states: [S, C]; positions: cosines and sines [S, D]; rotate: rotary embedding of queries and keys.
    """
    rows = hidden_states.shape[0]
    query, key, value = self.qkv(hidden_states).reshape(rows, 3, self.num_heads, -1).unbind(1)  # [S, heads, D]
    query, key = rotate(query, key, *positions)
    lengths = cu_seqlens.diff().tolist()
    heads = (each.transpose(0, 1).unsqueeze(0) for each in (query, key, value))  # [1, heads, S, D]
    parts = [torch.split(each, lengths, dim=2) for each in heads]
    attended = [nn.functional.scaled_dot_product_attention(*part) for part in zip(*parts, strict=True)]
    return self.proj(torch.cat(attended, dim=2).squeeze(0).transpose(0, 1).reshape(rows, -1))
