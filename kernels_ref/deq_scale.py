"""The two stored forms of `deq_scale`, the factor per output channel that dequantizes int32 sums."""

import torch

FLOAT32_BITS = 0xFFFFFFFF
TRUNCATED_BITS = 0xFFFFE000  # 19 bits: sign, exponent and the 10 high mantissa bits; the hardware drops the 13 low ones


def encode_deq_scale(deq_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """deq_scale float32 [N], dtype of the checkpoint -> float32 [N] for bfloat16, int64 [N] for float16.

    The int64 contains the bits of the float32, zero-extended. Raises ValueError for any other dtype.
    Source: the deq_scale operand of quant_matmul in MindIE and vLLM Ascend.
    """
    if deq_scale.dtype != torch.float32:
        raise ValueError(f"deq_scale must be float32 before it is encoded, got {deq_scale.dtype}")
    if dtype == torch.bfloat16:
        return deq_scale.clone()
    if dtype == torch.float16:
        return deq_scale.view(torch.int32).to(torch.int64) & FLOAT32_BITS
    raise ValueError(f"deq_scale has a stored form for bfloat16 and float16 only, not for {dtype}")


def decode_deq_scale(encoded: torch.Tensor, truncate: bool = False) -> torch.Tensor:
    """float32 or int64 [N] as stored -> float32 [N].

    truncate: return the value that the hardware uses of the int64 form, its 19 high bits, up to 0.1 % smaller. The
    float32 form is used in full. The high halves of the int64 are ignored, as on the hardware. Raises ValueError for
    other dtypes.
    """
    if encoded.dtype == torch.float32:
        return encoded
    if encoded.dtype != torch.int64:
        raise ValueError(f"a stored deq_scale is float32 or int64, got {encoded.dtype}")
    bits = encoded & (TRUNCATED_BITS if truncate else FLOAT32_BITS)
    return (bits - ((bits >> 31) << 32)).to(torch.int32).view(torch.float32)  # the same bits as a signed int32
