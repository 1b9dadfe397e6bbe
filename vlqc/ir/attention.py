"""Attention without its score matrix, where a model asks for it in a form that PyTorch computes the long way round.

transformers 4.49 calls the vision tower's attention with three-dimensional queries. For those PyTorch has no fused
kernel: it writes out all scores, heads * S * S numbers in float32, tens of gigabytes for a picture of three megapixels.
The same call with a batch dimension of one takes the fused kernel, which never holds them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ATTENTION = torch.nn.functional.scaled_dot_product_attention


class FusedAttention(TorchFunctionMode):
    """Inside, three-dimensional attention [heads, S, D] runs as four-dimensional [1, heads, S, D]: the same numbers up
    to the rounding of sums."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is ATTENTION and isinstance(args[0] if args else given["query"], Tensor):
            query = args[0] if args else given["query"]
            if query.ndim == 3:
                args, given = tuple(_batched(it) for it in args), {name: _batched(it) for name, it in given.items()}
                return func(*args, **given).squeeze(0)
        return func(*args, **given)


def _batched(value: Any) -> Any:
    """A tensor [heads, S, ...] -> [1, heads, S, ...]; a mask [S, S] already serves every head; all else as it is."""
    return value.unsqueeze(0) if isinstance(value, Tensor) and value.ndim == 3 else value
