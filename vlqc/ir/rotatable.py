"""What can be rotated in a model: residual streams through all stages, and the heads of attention layers."""

from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import fx, nn

from vlqc.ir.rotation_analysis import SHARED, Basis, GraphBases, Obstacle, find_bases
from vlqc.ir.rotations import Rotatable, RotationKind


def find_rotatable(
    model: nn.Module,
    graph: fx.Graph,
    stages: Mapping[str, GraphBases],
    name: Callable[[str], str],
    shared: Collection[str] = (),
) -> tuple[Rotatable, ...]:
    """Everything that can be rotated, and streams that cannot, in the order of the forward.

    graph: of the model between its stages; stages: path -> bases of the stage; name: path of a module -> checkpoint
    name; shared: paths of modules that share a parameter with others.
    """
    bases = find_bases(model, graph, stages).bases
    for basis in bases:
        if targets := [target for target in (*basis.writers, *basis.readers, *basis.norms) if target in shared]:
            basis.fix(Obstacle(SHARED, targets[0]))
    return tuple(rotatable for basis in bases for rotatable in _of_basis(model, basis, name))


def _of_basis(model: nn.Module, basis: Basis, name: Callable[[str], str]) -> Iterator[Rotatable]:
    if basis.is_stream():
        yield Rotatable(
            kind=RotationKind.RESIDUAL,
            name=name(basis.writers[0]),
            size=basis.size,
            writers={name(target): (0,) for target in basis.writers},
            tables=tuple(name(target) for target in basis.tables),
            readers={name(target): norm and name(norm) for target, (_, norm) in basis.readers.items()},
            norms=tuple(map(name, basis.norms)),
            keeps_mean=basis.keeps_mean,
            inputs=tuple((name(stage), argument) for stage, argument in basis.inputs),
            outputs=tuple((name(stage), position) for stage, position in basis.outputs),
            obstacle=obstacle.text(name) if (obstacle := basis.obstacle or _missing_bias(model, basis)) else "",
        )
    elif (heads := _heads(basis)) is not None:
        starts, size = heads
        yield Rotatable(
            kind=RotationKind.HEADS,
            name=name(basis.writers[0]),
            size=size,
            writers={name(basis.writers[0]): starts},
            tables=(),
            readers={name(target): None for target in basis.readers},
        )


def _missing_bias(model: nn.Module, basis: Basis) -> Obstacle | None:
    """A reader without a bias, into which the bias of the norm before it would be folded; None if there is none."""
    for target, (_, norm) in basis.readers.items():
        has_shift = norm is not None and getattr(model.get_submodule(norm), "bias", None) is not None
        if has_shift and model.get_submodule(target).bias is None:
            return Obstacle("a layer has no bias into which that of the norm before it could fold", target)
    return None


def _heads(basis: Basis) -> tuple[tuple[int, ...], int] | None:
    """First rows and size of the heads that can be rotated; None if the basis is not of heads."""
    if basis.heads is None or len(basis.writers) != 1 or basis.tables or not basis.readers:
        return None
    starts, size = basis.heads
    channels = torch.cat([torch.arange(start, start + size) for start in starts])
    if len(torch.unique(channels)) < len(channels) or bool(basis.fixed[channels].any()):
        return None
    heads = channels.sort().values.view(-1, size)
    for columns, norm in basis.readers.values():
        expected = heads.repeat_interleave(len(columns) // heads.numel(), 0)  # query heads of a value head
        if norm is not None or not torch.equal(columns, expected.flatten()):
            return None
    return tuple(sorted(starts)), size
