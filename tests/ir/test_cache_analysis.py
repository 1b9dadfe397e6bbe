"""Which keys and values of a decoder layer are found, by what the graph computes."""

import pytest
import torch
from torch import Tensor, nn

from tests.support import tiny
from tests.support.cache_stages import HIDDEN, KV_HEADS, SIZE, Layer, layer
from tests.support.random_stage import staged
from vlqc.ir.cache_analysis import find_caches
from vlqc.ir.execution import Call

NAME = "model.layers.0.self_attn"


def opposite(heads: int, size: int) -> list[int]:
    """The channel with which a rotary embedding in two halves rotates each channel."""
    return [head * size + (channel + size // 2) % size for head in range(heads) for channel in range(size)]


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("repeat", [False, True])
def test_heads_before_they_are_repeated(normed: bool, repeat: bool) -> None:
    """The heads of the query taken for those of the cache; a rotary embedding or a norm of keys not passed."""
    found = find_caches(layer(normed=normed, repeat=repeat))
    (site,) = found.caches.values()
    assert found.obstacles == () and (site.name, site.target) == (NAME, "self_attn")
    assert (site.key, site.value) == (f"{NAME}.k_proj", f"{NAME}.v_proj")
    assert (site.heads, site.head_size, site.channels) == (KV_HEADS, SIZE, HIDDEN // 2)
    assert site.node == "scaled_dot_product_attention"
    assert found.partners[NAME].tolist() == opposite(KV_HEADS, SIZE)


@pytest.mark.every_transformers
def test_multimodal_rotary_embedding_of_transformers() -> None:
    """The attention of a decoder layer as transformers writes it, in every version; that of a vision block found."""
    for name, recorded in tiny.recorded_stages().items():
        found = find_caches(staged(recorded.module, [recorded.call], name=name))
        assert not found.obstacles and list(found.caches) == ([f"{name}.self_attn"] if "layers" in name else [])
        for site in found.caches.values():
            assert (site.heads, site.head_size) == (2, 32)
            assert found.partners[site.name].tolist() == opposite(2, 32)


class Changed(Layer):
    """A layer whose attention computes something else."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.change = change
        self.self_attn.forward = self.attend  # type: ignore[method-assign]

    def attend(self, rows: Tensor) -> Tensor:
        def heads(projected: Tensor) -> Tensor:
            return projected.reshape(1, rows.shape[1], -1, SIZE).transpose(1, 2)

        parts = self.self_attn
        q, k, v = heads(parts.q_proj(rows)), heads(parts.k_proj(rows)), heads(parts.v_proj(rows))
        group = q.shape[1] // KV_HEADS
        if self.change == "order of heads":
            k, v = k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1)
        else:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        if self.change == "exchanged":
            k, v = v, k
        if self.change == "mixed channels":
            v = v.flip(-1)
        if self.change == "mixed heads":
            k = k + k.flip(1)
        if self.change == "activation":
            k = torch.tanh(k)
        if self.change == "eager":
            mixed = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        else:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        if self.change == "twice":
            mixed = nn.functional.scaled_dot_product_attention(q + mixed, k, v, is_causal=True)
        output: Tensor = parts.o_proj(mixed.transpose(1, 2).reshape(rows.shape))
        return output


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("none", ""),
        ("order of heads", "what happens to the keys"),
        ("exchanged", "the keys come from model.layers.*.self_attn.v_proj"),
        ("mixed channels", "what happens to the values"),
        ("mixed heads", "what happens to the keys"),
        ("activation", "what happens to the keys"),
        ("eager", "not computed by scaled_dot_product_attention"),
        ("twice", "computes attention twice"),
    ],
)
def test_attention_that_engines_do_not_compute_so(change: str, reason: str) -> None:
    """Scales of one channel applied to another one by the engine, which has its own order of heads and channels."""
    call = Call(0, (torch.randn(1, 5, HIDDEN),), {}, torch.zeros(5, dtype=torch.int8))
    found = find_caches(staged(Changed(change).requires_grad_(False), [call]))
    assert bool(found.caches) == (not reason) and all(reason in obstacle for obstacle in found.obstacles)
    assert bool(found.obstacles) == bool(reason)
    assert all(" of model.layers.*" in obstacle for obstacle in found.obstacles)  # one note for all layers
