"""Keys and values of attention as integers with a scale per channel of every key-value head, and attention on them.

Engines store keys, after the rotary embedding, and values of a decoder layer in a cache. Quantized, channel c of
key-value head h is q = clamp(rint(x * (1 / scale[h, c])), -128, 127) for every token, and attention reads
q * scale[h, c]. The offset that engines add before rounding is 0, as they do not subtract it in decoding.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from vlqc.kernels_ref.attention import ATTENTION, attention_arguments

INT8_MIN, INT8_MAX = -128, 127


def scale_per_head(scale: torch.Tensor, kv_heads: int, heads: int) -> torch.Tensor:
    """scale [kv_heads * D] -> [heads, 1, D], where `heads` is a multiple: head h reads key-value head h // group.

    Raises ValueError for other numbers of heads.
    """
    if heads % kv_heads or scale.numel() % kv_heads:
        raise ValueError(f"{heads} heads and {scale.numel()} scales for {kv_heads} key-value heads")
    per_head = scale.reshape(kv_heads, 1, -1)  # [kv_heads, 1, D]
    return per_head.repeat_interleave(heads // kv_heads, 0)


def quantize_cache(x: torch.Tensor, scale: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """x [..., heads, S, D] float, scale [kv_heads * D] > 0 -> int8 [..., heads, S, D].

    heads: kv_heads, or a multiple if the heads are repeated for the heads of the query. `scale`, its reciprocal and the
    product have x's dtype, as on the device. Source: `kv_c8.py` of vLLM Ascend.
    """
    scale = scale_per_head(scale.to(x.device, x.dtype), kv_heads, x.shape[-3])
    return (x * scale.reciprocal()).round_().clamp_(INT8_MIN, INT8_MAX).to(torch.int8)


def dequantize_cache(quantized: torch.Tensor, scale: torch.Tensor, kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """int8 [..., heads, S, D], scale [kv_heads * D] -> dtype [..., heads, S, D] = quantized * scale in float32."""
    scale = scale_per_head(scale.to(quantized.device, torch.float32), kv_heads, quantized.shape[-3])
    return quantized.to(torch.float32).mul_(scale).to(dtype)


def round_cache(x: torch.Tensor, scale: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """x [..., heads, S, D] quantized and back, in x's dtype."""
    return dequantize_cache(quantize_cache(x, scale, kv_heads), scale, kv_heads, x.dtype)


class RoundCache(TorchFunctionMode):
    """Mode in which every call of scaled_dot_product_attention reads rounded keys and values.

    key_scale, value_scale: float [kv_heads * D]; kv_heads: by default their length over that of a key or value; calls:
    how many there were.
    """

    def __init__(self, key_scale: torch.Tensor, value_scale: torch.Tensor, kv_heads: int | None = None) -> None:
        super().__init__()
        self.scales, self.kv_heads = {"key": key_scale, "value": value_scale}, kv_heads
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not ATTENTION:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        arguments = attention_arguments(args, kwargs or {})
        rounded = {
            name: round_cache(arguments[name], scale, self.kv_heads or scale.numel() // arguments[name].shape[-1])
            for name, scale in self.scales.items()
        }
        return ATTENTION(**(arguments | rounded))


class QuantizedCacheAttention(torch.nn.Module):
    """Wraps the attention module of a decoder layer, whose attention then reads quantized keys and values.

    All keys and values are quantized in every call. Engines use those of the current call as they are until they are
    read from the cache: in decoding, in the chunks of a long prompt after the first, and after a cached prefix.

    It has the parameters, buffers and children of the wrapped module under the same names. The scales, float32
    [kv_heads * D], are attributes without being parameters or buffers.
    """

    key_scale: torch.Tensor
    value_scale: torch.Tensor
    kv_heads: int | None
    float_attention: torch.nn.Module

    def __init__(
        self,
        float_attention: torch.nn.Module,
        key_scale: torch.Tensor,
        value_scale: torch.Tensor,
        kv_heads: int | None = None,
    ) -> None:
        """Does not copy its arguments. kv_heads: see `RoundCache`. Raises ValueError for scales that are not positive
        vectors for `kv_heads`."""
        super().__init__()
        for name, scale in (("key_scale", key_scale), ("value_scale", value_scale)):
            heads = kv_heads or 1
            if scale.dim() != 1 or not scale.numel() or scale.numel() % heads or not scale.is_floating_point():
                shape = f"{scale.dtype} {list(scale.shape)}"
                raise ValueError(f"{name} must be float with a multiple of {heads} elements, got {shape}")
            if not bool((scale > 0).all()) or not bool(scale.isfinite().all()):
                raise ValueError(f"{name} must be positive and finite")
        names = ("_parameters", "_buffers", "_modules", "training")
        shared = {name: float_attention.__dict__[name] for name in names}
        # not as a child and buffers, which would add a level to all names and tensors to the state_dict
        self.__dict__.update(
            shared, float_attention=float_attention, key_scale=key_scale, value_scale=value_scale, kv_heads=kv_heads
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["float_attention"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As of the wrapped module. Raises RuntimeError if that does not call scaled_dot_product_attention: it would
        read keys and values in float."""
        with RoundCache(self.key_scale, self.value_scale, self.kv_heads) as mode:
            output = self.float_attention(*args, **kwargs)
        if not mode.calls:
            raise RuntimeError(
                f"{type(self.float_attention).__name__} does not call scaled_dot_product_attention, where its keys and "
                'values are quantized: use attn_implementation="sdpa", or load with quantized_cache=False'
            )
        return output
