"""The dtype of the float tensors of the result."""

from typing import Literal

import torch

RequestedDtype = Literal["auto", "bfloat16", "float16"]  # values of --dtype
ENGINE_DTYPES = (torch.bfloat16, torch.float16)  # that engines run


def emitted_dtype(stored: torch.dtype, requested: RequestedDtype = "auto") -> torch.dtype:
    """dtype of the float checkpoint, and value of --dtype -> that of the result's float tensors.

    With auto they keep their dtype if engines run it; all others become bfloat16.
    """
    if requested != "auto":
        return torch.float16 if requested == "float16" else torch.bfloat16
    return stored if stored in ENGINE_DTYPES else torch.bfloat16


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float16 -> "float16", as config.json writes it."""
    return str(dtype).removeprefix("torch.")
