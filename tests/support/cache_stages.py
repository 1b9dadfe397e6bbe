"""Decoder layers with rotary embeddings and grouped queries, for tests of quantized keys and values."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tests.support.random_stage import RmsNorm, staged
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.frontend.process_group import ProcessGroup
from vlqc.frontend.stage_builder import find_sites
from vlqc.frontend.tracing import trace
from vlqc.ir.execution import Call, StageRun
from vlqc.ir.stage import Stage

HEADS, KV_HEADS, SIZE = 4, 2, 8
HIDDEN = HEADS * SIZE
PREFIX = "model.layers.0."
Array = npt.NDArray[np.float64]


class Attention(nn.Module):
    """Rotary embedding, keys and values repeated or `enable_gqa`; norms of queries and keys if `normed`."""

    def __init__(self, *, normed: bool, repeat: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HIDDEN)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * SIZE)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * SIZE)
        self.o_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.repeat, self.normed = repeat, normed
        if normed:
            self.q_norm, self.k_norm = RmsNorm(SIZE), RmsNorm(SIZE)

    def forward(self, rows: Tensor) -> Tensor:
        def heads(projected: Tensor) -> Tensor:
            return projected.reshape(*projected.shape[:-1], -1, SIZE)

        q, k, v = heads(self.q_proj(rows)), heads(self.k_proj(rows)), heads(self.v_proj(rows))
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = rotate(q.transpose(1, 2)), rotate(k.transpose(1, 2)), v.transpose(1, 2)
        if self.repeat:
            k, v = (part.repeat_interleave(HEADS // KV_HEADS, 1) for part in (k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not self.repeat)
        projected: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(rows.shape))
        return projected


def rotate(heads: Tensor) -> Tensor:
    """Rotary embedding of [1, heads, S, SIZE]."""
    angles = torch.arange(heads.shape[2])[:, None] / 4.0 ** torch.arange(SIZE // 2)
    angles = torch.cat([angles, angles], -1)
    first, second = heads[..., : SIZE // 2], heads[..., SIZE // 2 :]
    return heads * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


class Layer(nn.Module):
    def __init__(self, *, normed: bool = False, repeat: bool = True) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(HIDDEN)
        self.self_attn = Attention(normed=normed, repeat=repeat)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        return (hidden_states + self.self_attn(self.input_layernorm(hidden_states)),)


def layer(
    *, normed: bool = False, repeat: bool = True, key_bias: float = 0.0, samples: int = 3, length: int = 12
) -> Stage:
    """A decoder layer with random weights; every sample has text and image tokens, and padding behind them."""
    generator = torch.Generator().manual_seed(0)
    block = Layer(normed=normed, repeat=repeat).requires_grad_(False).eval()
    for parameter in block.parameters():
        values = torch.randn(parameter.shape, generator=generator) / (8 if parameter.ndim == 1 else 4)
        parameter.copy_(values + 1 if parameter.ndim == 1 else values)
    block.self_attn.k_proj.bias += key_bias
    calls = []
    for sample in range(samples):
        modality = torch.tensor([0, 0, 1, 1, 1], dtype=torch.int8).repeat(length)[: length + sample]
        modality[length + sample - 1 :] = -1
        rows = torch.randn(1, length + sample, HIDDEN, generator=generator)
        rows[:, -1] *= 100  # padding, which must not count
        calls.append(Call(sample, (rows,), {}, modality))
    return staged(block, calls, torch.bfloat16)


def numpy_attention(query: Tensor, key: Tensor, value: Tensor, change: Callable[[Array, str], Array]) -> Array:
    """Causal attention [S, heads * D] in float64, one head and query at a time.

    query: [1, heads, S, D]; key, value: [1, kv heads, S, D]; change: of keys and values [S, D] of one head, called with
    "key 0" for keys of head 0.
    """
    q, k, v = (part[0].double().numpy() for part in (query, key, value))
    group, rows = q.shape[0] // k.shape[0], q.shape[1]
    output = np.zeros((rows, q.shape[0], q.shape[2]))
    for head in range(q.shape[0]):
        keys, values = (
            change(k[head // group], f"key {head // group}"),
            change(v[head // group], f"value {head // group}"),
        )
        for row in range(rows):
            scores = keys[: row + 1] @ q[head, row] / np.sqrt(q.shape[2])
            weights = np.exp(scores - scores.max())
            output[row, head] = weights / weights.sum() @ values[: row + 1]
    return output.reshape(rows, -1)


class ExactAttention(nn.Module):
    """Each token attends to itself alone, so that softmax is 1; one key-value head for two heads of queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4, bias=False)
        self.k_proj = nn.Linear(4, 2)
        self.v_proj = nn.Linear(4, 2)
        self.o_proj = nn.Linear(4, 4, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        def heads(projected: Tensor) -> Tensor:
            return projected.reshape(1, rows.shape[1], -1, 2).transpose(1, 2)

        k, v = (heads(part(rows)).expand(1, 2, -1, 2) for part in (self.k_proj, self.v_proj))
        mask = torch.eye(rows.shape[1], dtype=torch.bool)
        mixed = nn.functional.scaled_dot_product_attention(heads(self.q_proj(rows)), k, v, mask)
        projected: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(rows.shape))
        return projected


class ExactLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = ExactAttention()

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        return (hidden_states + self.self_attn(hidden_states),)


def exact_layer() -> Stage:
    """Weights and inputs are multiples of 1/8, so that its text after any pass is equal on every machine."""
    block = ExactLayer().requires_grad_(False).eval()

    def values(shape: tuple[int, ...], start: int) -> Tensor:
        count = torch.arange(start, start + torch.Size(shape).numel())
        return ((count * 7 % 13 - 6) / 8).reshape(shape)

    for number, parameter in enumerate(block.parameters()):
        parameter.copy_(values(tuple(parameter.shape), 5 * number))
    modality = torch.tensor([0, 1, 1], dtype=torch.int8)
    calls = [Call(sample, (values((1, 3, 4), 4 * sample),), {}, modality) for sample in range(2)]
    graph = trace(block, calls[0], PREFIX.rstrip("."))
    sites = find_sites(block, graph, PREFIX.__add__)
    execution = StageRun(block, ProcessGroup(), calls, calls[0])
    return Stage(
        PREFIX.rstrip("."), "language", QWEN2_5_VL, torch.bfloat16, block, graph, sites, execution,
        checkpoint_name=PREFIX.__add__,
    )  # fmt: skip
