"""Quantized keys and values: integers against NumPy, and attention on them against NumPy, head by head."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.cache_stages import HEADS, KV_HEADS, SIZE, Array, numpy_attention
from vlqc.kernels_ref.kv_cache import QuantizedCacheAttention, dequantize_cache, quantize_cache

ROWS = 9
RANDOM = torch.Generator().manual_seed(3)
KEY_SCALE, VALUE_SCALE = (torch.rand(KV_HEADS * SIZE, generator=RANDOM) / 64 + 2**-7 for _ in range(2))


class Attention(nn.Module):
    def __init__(self, repeat: bool) -> None:
        super().__init__()
        self.k_proj, self.repeat = nn.Linear(2, 2), repeat

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if self.repeat:
            key, value = (part.repeat_interleave(HEADS // KV_HEADS, -3) for part in (key, value))
        return nn.functional.scaled_dot_product_attention(
            query, key, value=value, is_causal=True, enable_gqa=not self.repeat
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_integers_against_numpy(dtype: type[np.float32]) -> None:
    """A quotient in place of the product with the reciprocal, another dtype, rounding half away, another clamp, or a
    scale of the wrong head or channel."""
    x = (np.random.default_rng(0).standard_normal((1, KV_HEADS, ROWS, SIZE)) * 2).astype(dtype)
    x[0, 0, 0, :4] = KEY_SCALE[:4].numpy() * np.array([0.5, 1.5, -1000, 1000])
    scale = KEY_SCALE.numpy().astype(dtype).reshape(KV_HEADS, 1, SIZE)
    expected = np.clip(np.rint(x * (dtype(1) / scale)), -128, 127)
    integers = quantize_cache(torch.from_numpy(x), KEY_SCALE, KV_HEADS)
    assert integers.dtype == torch.int8 and np.array_equal(integers.numpy(), expected)
    assert expected.min() == -128 and expected.max() == 127
    restored = dequantize_cache(integers, KEY_SCALE, KV_HEADS, torch.float32)
    assert np.array_equal(restored.numpy(), expected.astype(np.float32) * KEY_SCALE.numpy().reshape(KV_HEADS, 1, SIZE))


def test_repeated_heads_have_the_scales_of_their_key_value_head() -> None:
    """Heads of the query in the order 0, 1, 0, 1 in place of 0, 0, 1, 1."""
    x = torch.randn(1, KV_HEADS, ROWS, SIZE, generator=RANDOM)
    once = quantize_cache(x, KEY_SCALE, KV_HEADS).repeat_interleave(2, 1)
    assert torch.equal(quantize_cache(x.repeat_interleave(2, 1), KEY_SCALE, KV_HEADS), once)
    with pytest.raises(ValueError, match="3 heads"):
        quantize_cache(x[:, [0, 1, 1]], KEY_SCALE, KV_HEADS)


def rounded(rows: Array, which: str) -> Array:
    """Keys or values [S, D] of one head, quantized and back, in float32 up to the end."""
    part, head = which.split()
    scale = {"key": KEY_SCALE, "value": VALUE_SCALE}[part].reshape(KV_HEADS, SIZE)[int(head)].numpy()
    return (np.clip(np.rint(rows.astype(np.float32) * (1 / scale)), -128, 127) * scale).astype(np.float64)


@pytest.mark.parametrize("repeat", [True, False])
@pytest.mark.parametrize("batch", [1, None])
def test_attention_against_numpy(repeat: bool, batch: int | None) -> None:
    """Keys or values that stay in float, exchanged scales, or grouped queries with the scales of other heads."""
    query, key, value = (torch.randn(1, heads, ROWS, SIZE, generator=RANDOM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    expected = numpy_attention(query, key, value, rounded)
    plain = numpy_attention(query, key, value, lambda rows, _: rows)
    module = QuantizedCacheAttention(Attention(repeat), KEY_SCALE, VALUE_SCALE, KV_HEADS)
    inputs = [part if batch else part[0] for part in (query, key, value)]
    output = module(*inputs).reshape(HEADS, ROWS, SIZE).movedim(0, 1).flatten(1).numpy()
    assert np.abs(output - expected).max() < 1e-5 < np.abs(plain - expected).max()


def test_wrapper_keeps_all_names() -> None:
    """A wrapper that adds a level to the names of weights, adds tensors to a folder, or hides attributes."""
    attention = Attention(repeat=True)
    wrapper = QuantizedCacheAttention(attention, KEY_SCALE, VALUE_SCALE, KV_HEADS)
    assert list(wrapper.state_dict()) == ["k_proj.weight", "k_proj.bias"]
    assert wrapper.get_submodule("k_proj") is attention.k_proj and wrapper.repeat is True
    wrapper.set_submodule("k_proj", replacement := nn.Linear(2, 2))
    assert attention.k_proj is replacement


@pytest.mark.parametrize("bad", [torch.zeros(16), torch.full((16,), torch.inf), torch.ones(15), torch.ones(2, 8)])
def test_scales_that_cannot_be_used(bad: torch.Tensor) -> None:
    """Division by zero, or a shape that broadcasts to another meaning."""
    with pytest.raises(ValueError, match="value_scale must"):
        QuantizedCacheAttention(Attention(repeat=True), KEY_SCALE, bad, KV_HEADS)


def test_another_implementation_of_attention_is_refused() -> None:
    """Attention that reads float keys and values after `set_attn_implementation("eager")`, without a word about it."""
    module = QuantizedCacheAttention(nn.Softmax(-1), KEY_SCALE, VALUE_SCALE, KV_HEADS)
    with pytest.raises(RuntimeError, match='attn_implementation="sdpa"'):
        module(torch.zeros(2, 2))
