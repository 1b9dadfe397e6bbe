"""A made-up stage whose attention looks into windows only, and the stages of the real model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.support import tiny
from tests.support.random_stage import staged
from tests.support.stages import materialized_stage
from vlqc.frontend.sequential import SequentialForward
from vlqc.ir.execution import Call
from vlqc.ir.stage import Stage
from vlqc.kernels_ref.attention import attention_arguments
from vlqc.passes.split_window_attention import ATTENTION, SplitWindowAttention

HEADS, DEPTH = 2, 8
HIDDEN = HEADS * DEPTH
WINDOWS = st.lists(st.integers(1, 6), min_size=1, max_size=7)
KINDS = ("bool", "-inf", "lowest")  # how a mask excludes a position


def mask_of(windows: list[int], kind: str = "bool") -> Tensor:
    """[1, S, S], written as transformers 4.49 writes it."""
    rows, start = sum(windows), 0
    forbidden = {"bool": False, "-inf": -torch.inf, "lowest": torch.finfo(torch.float32).min}[kind]
    mask: Tensor = torch.full((1, rows, rows), forbidden)
    for length in windows:
        mask[..., start : start + length, start : start + length] = True if kind == "bool" else 0.0
        start += length
    return mask


def by_hand(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v in float64, over the pairs that are allowed."""
    scores = query.double() @ key.double().mT / query.shape[-1] ** 0.5
    mixed: Tensor = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value.double()
    return mixed


class Attention(nn.Module):
    """As transformers 4.49 has it: heads first, no batch, and a mask that is made from the ends of the windows."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.proj = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, rows: Tensor, windows: Tensor) -> Tensor:
        q, k, v = self.qkv(rows).reshape(len(rows), 3, HEADS, DEPTH).permute(1, 2, 0, 3).unbind(0)
        if self.kind == "causal":
            mask = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
        else:
            mask = mask_of(windows.tolist(), self.kind)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout_p=0.0)
        projected: Tensor = self.proj(attended.transpose(0, 1).reshape(rows.shape))
        return projected


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.attn = Attention(kind)

    def forward(self, hidden_states: Tensor, windows: Tensor) -> Tensor:
        mixed: Tensor = self.attn(self.norm(hidden_states), windows)
        return hidden_states + mixed


def block_stage(*samples: list[int], kind: str = "bool", seed: int = 0) -> Stage:
    """Random weights, one sample per list of window lengths; the first is the probe."""
    torch.manual_seed(seed)
    block = Block(kind).requires_grad_(False).eval()
    calls = [
        Call(n, (torch.randn(sum(lengths), HIDDEN),), {"windows": torch.tensor(lengths)})
        for n, lengths in enumerate(samples)
    ]
    stage = staged(block, calls, name="visual.blocks.0")
    stage.execution.probe = calls[0]
    return stage


class Counter(TorchFunctionMode):
    """Counts the scores of all attention inside: query rows times key rows, per head."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.masks = 0, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is ATTENTION:
            named = attention_arguments(args, kwargs or {})
            query, key = named["query"], named["key"]
            self.scores += query.shape[:-3].numel() * query.shape[-2] * key.shape[-2]
            self.masks += named.get("attn_mask") is not None
        return func(*args, **(kwargs or {}))


def scores_of(stage: Stage) -> int:
    counter = Counter()
    with counter:
        stage.execution.forward()
    return counter.scores


@contextmanager
def real_stages(*samples: dict[str, Tensor]) -> Iterator[Iterator[Stage]]:
    """The stages of the tiny model, one after the other, each run by the caller."""
    model = tiny.float_model()
    read = model.checkpoint.tensor

    def stages(forward: SequentialForward) -> Iterator[Stage]:
        for inputs in forward:
            with materialized_stage(model, inputs, torch.bfloat16, read) as stage:
                yield stage
                inputs.outputs = stage.execution.outputs

    with torch.no_grad(), model.non_stage_weights(read), SequentialForward(model, samples) as forward:
        yield stages(forward)


def split(stage: Stage) -> Stage:
    """The stage after the pass, which must have split something in it."""
    assert SplitWindowAttention().run(stage) and not stage.notes
    return stage
