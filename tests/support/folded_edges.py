"""Folding scales into the two sides of an edge, written down once more, and the proof that it changes nothing."""

import copy

import torch
from torch import Tensor, nn

from tests.support import tiny
from vlqc.ir.execution import Call
from vlqc.ir.stage import Edge

INPUT = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CALL = Call(0, (INPUT,), {})


@torch.no_grad()
def folded(module: nn.Module, edge: Edge, scale: Tensor) -> nn.Module:
    """A copy in which the producer's usable channels are divided by scale float64 [C] and the consumers make up."""
    other = copy.deepcopy(module)
    scale = torch.where(edge.usable, scale, torch.ones(()))
    for parameter in other.get_submodule(edge.producer).parameters():
        parameter /= scale.view(-1, *[1] * (parameter.ndim - 1)).to(parameter.dtype)
    for target, channels in edge.consumers.items():
        weight = other.get_submodule(target).weight
        assert channels.shape == (weight.shape[1],) and bool(edge.usable[channels[channels >= 0]].all())
        for column, channel in enumerate(channels.tolist()):
            if channel >= 0:
                weight[:, column] *= scale[channel]
    return other


@torch.no_grad()
def assert_holds(module: nn.Module, edge: Edge, call: Call, seed: int = 0) -> None:
    """Folding random powers of two, which change no mantissa, leaves the float64 outputs as they were."""
    random = torch.Generator().manual_seed(seed)
    scale = 2.0 ** torch.randint(-6, 7, edge.usable.shape, generator=random).double()
    scale[edge.usable.nonzero()[0]] = 64.0  # at least one channel moves
    before = tiny.tensors_of(module(*call.args, **call.kwargs))
    after = tiny.tensors_of(folded(module, edge, scale)(*call.args, **call.kwargs))
    for one, other in zip(before, after, strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=1e-12, atol=1e-12 * float(one.abs().max())), edge
