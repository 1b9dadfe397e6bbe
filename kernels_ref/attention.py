"""The attention call that graphs, hooks and wrappers of attention modules look for, and its arguments by name."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

ATTENTION = torch.nn.functional.scaled_dot_product_attention
PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")  # those that may be positional


def attention_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call of scaled_dot_product_attention, or of its node in a graph, by parameter name."""
    return dict(zip(PARAMETERS, args, strict=False)) | dict(kwargs)
