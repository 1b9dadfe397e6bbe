"""Keys and values of an attention call, quantized to int8 and back, as ONNX nodes."""

import torch
from torch import Tensor

from vlqc.kernels_ref.kv_cache import scale_per_head
from vlqc.reporting.onnx.builder import Builder
from vlqc.reporting.onnx.functions import Value


def export_rounded_cache(builder: Builder, x: Value, scale: Tensor, kv_heads: int, name: str, output: str) -> Value:
    """x [..., heads, S, D] -> the same shape, rounded with one scale per channel of every key-value head.

    scale: float32 [kv_heads * D]; name: of its tensor in the checkpoint; output: prefix of the names of values.
    QuantizeLinear has one scale per index of one axis, so that heads and channels become one axis before it.
    """
    dims = len(x.shape)
    *_, heads, rows, size = x.shape
    to_tokens = [*range(dims - 3), dims - 2, dims - 3, dims - 1]  # its own inverse
    tokens = builder.op("Transpose", x.name, output=f"{output}_tokens", perm=to_tokens)
    flat = builder.op("Reshape", tokens, builder.numbers(-1, heads * size), output=f"{output}_rows")
    per_head = scale_per_head(scale.float(), kv_heads, heads).flatten()  # [heads * D]
    scales = builder.tensor(per_head, name)
    zeros = builder.tensor(torch.zeros(heads * size, dtype=torch.int8), name.replace("scale", "offset"))
    quantized = builder.op("QuantizeLinear", flat, scales, zeros, output=f"{output}_q", axis=1)
    rounded = builder.op("DequantizeLinear", quantized, scales, zeros, output=f"{output}_rounded", axis=1)
    split = builder.op(
        "Reshape", rounded, builder.numbers(*x.shape[:-3], rows, heads, size), output=f"{output}_rounded_tokens"
    )
    return Value(builder.op("Transpose", split, output=f"{output}_cached", perm=to_tokens), x.shape, x.dtype)
