"""vlqc.ir.rotatable: the reason why a stream cannot be rotated, in small models with one obstacle each."""

import pytest
import torch
from torch import Tensor, nn

from vlqc.frontend.tracing import trace
from vlqc.ir.execution import Call
from vlqc.ir.rotatable import find_rotatable


class Stream(nn.Module):
    """A residual stream of 8 channels, written by an embedding and a layer, and read by two layers."""

    def __init__(self, obstacle: str) -> None:
        super().__init__()
        self.obstacle = obstacle
        self.embed = nn.Embedding(16, 8)
        self.norm = nn.LayerNorm(8)
        self.middle = nn.Linear(8, 8, bias=obstacle != "no bias")
        self.head = nn.Linear(4 if obstacle == "part" else 8, 16)
        self.act = nn.SiLU()

    def forward(self, ids: Tensor) -> Tensor:
        stream = self.embed(ids)
        stream = stream + self.middle(self.norm(stream))
        if self.obstacle == "function":
            stream = torch.tanh(stream)
        if self.obstacle == "module":
            stream = self.act(stream)
        logits: Tensor = self.head(stream[..., :4] if self.obstacle == "part" else stream)
        return logits


@pytest.mark.parametrize(
    ("obstacle", "named"),
    [("", ""), ("function", "tanh"), ("module", "X.act"), ("part", "X.head"), ("no bias", "X.middle")],
    ids=lambda value: value or "none",
)
def test_the_reason_names_what_is_in_the_way(obstacle: str, named: str) -> None:
    """Catches a stream that is called rotatable, and a reason that names a path instead of the checkpoint's name."""
    model = Stream(obstacle)
    graph = trace(model, Call(0, (torch.zeros(1, 3, dtype=torch.int64),), {}), "model")
    (stream,) = find_rotatable(model, graph, {}, lambda path: f"X.{path}")
    assert bool(stream.obstacle) == bool(obstacle) and named in stream.obstacle
