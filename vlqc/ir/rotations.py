"""Rotations of a model, and what they do to the parameters of every layer.

Notation: rows x, weights W [N, K], y = x W^T + b. A layer that reads rotated values x R gets W R in each block of
columns; one that writes them gets R^T W in each block of rows, and b R. The weight w of a norm is folded before:
W diag(w), b + W b_norm; the norm's weight becomes 1 and its bias 0. Source: QuaRot (arXiv 2404.00456).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

import torch
from torch import Tensor

from vlqc.kernels_ref.rotation import Rotation

ROWS_PER_PIECE = 256  # of a weight whose columns are multiplied, so that temporaries stay in the cache
ROTATED_PARTS = ("weight", "bias")  # of a layer: the parameters that a rotation can multiply
Read = Callable[[str], Tensor]  # name of a parameter -> its value


class RotationKind(StrEnum):
    """What is rotated."""

    RESIDUAL = "residual stream"
    HEADS = "attention heads"


@dataclass(frozen=True)
class Rotatable:
    """A residual stream, or the heads between two linear layers. All names are checkpoint names.

    name: of the first layer that writes it; size: of the rotation: channels of the stream or of one head.
    writers: layers whose outputs are rotated -> first rows of the blocks of `size` rows; tables: those of them that are
    embeddings, whose columns are rotated. readers: linear layers whose columns are rotated, block by block -> the norm
    before them, or None. norms: that read the stream; their weights are folded into the readers.
    keeps_mean: whether a norm subtracts the mean, so that the rotation must keep it.
    inputs, outputs: (stage, name of an input or position of an output) that are rotated.
    obstacle: why it cannot be rotated; "" if it can be.
    """

    kind: RotationKind
    name: str
    size: int
    writers: Mapping[str, tuple[int, ...]]
    tables: tuple[str, ...]
    readers: Mapping[str, str | None]
    norms: tuple[str, ...] = ()
    keeps_mean: bool = False
    inputs: tuple[tuple[str, str], ...] = ()
    outputs: tuple[tuple[str, int], ...] = ()
    obstacle: str = ""


@dataclass(frozen=True)
class RotatableParts:
    """What can be rotated in a model, in the order of the forward.

    embedding: the token embedding; output_head: the layer that computes the logits; head_size: number of its weights;
    tied: whether both share them.
    """

    parts: tuple[Rotatable, ...]
    embedding: str
    output_head: str
    head_size: int
    tied: bool

    def shares_table(self, rotatable: Rotatable) -> bool:
        """Whether the embedding and the head of a model in which they share a weight are both rotated with it."""
        return self.tied and self.embedding in rotatable.writers and self.output_head in rotatable.readers


@dataclass(frozen=True)
class AppliedRotation:
    """A rotation and what it is applied to. `Rotatable` has the same fields for a whole model.

    writers, readers, norms, tables: see `Rotatable`; inputs: names of inputs of the stage; outputs: positions of its
    outputs; done: whether the parameters are rotated; absmax: of each rotated tensor of the stage, max |tensor| before
    and after the rotation, by checkpoint name.
    """

    kind: RotationKind
    rotation: Rotation
    writers: Mapping[str, tuple[int, ...]]
    readers: Mapping[str, str | None]
    norms: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[int, ...] = ()
    done: bool = False
    absmax: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def of_model(cls, rotatable: Rotatable, seed: int) -> "AppliedRotation":
        """The rotation of everything that `rotatable` names."""
        return cls(
            kind=rotatable.kind,
            rotation=Rotation(rotatable.size, seed, rotatable.name, rotatable.keeps_mean),
            writers=rotatable.writers,
            readers=rotatable.readers,
            norms=rotatable.norms,
            tables=rotatable.tables,
        )

    @property
    def changed_layers(self) -> list[str]:
        """Layers and norms of which it changes a parameter."""
        return list(dict.fromkeys([*self.norms, *self.readers, *self.writers]))

    def changes(self, layer: str) -> bool:
        """Whether it changes a parameter of a layer or norm."""
        return layer in self.writers or layer in self.readers or layer in self.norms

    def rotates(self, layer: str, parameter: str) -> bool:
        """Whether it multiplies a parameter of a layer by R, from either side."""
        if parameter == "weight":
            return layer in self.writers or layer in self.readers
        return parameter == "bias" and layer in self.writers and layer not in self.tables

    def as_done(self, absmax: Mapping[str, tuple[float, float]]) -> "AppliedRotation":
        return replace(self, done=True, absmax=absmax)

    @torch.no_grad()
    def apply_(self, layer: str, weight: Tensor, bias: Tensor | None, norm: Read) -> None:
        """Rotates the parameters of one layer in place: float32 weight [N, ...], bias [N].

        norm: parameters "weight" and "bias" of the norm before the layer; the latter may be missing (KeyError). To be
        called for the readers of a norm before the norm itself.
        """
        if layer in self.norms:
            weight.fill_(1)
            if bias is not None:
                bias.zero_()
            return
        if layer in self.readers:
            self._read_(layer, weight, bias, norm)
        if layer in self.tables:
            self.rotation.rotate_(weight)
        elif layer in self.writers:
            for start in self.writers[layer]:
                block = slice(start, start + self.rotation.size)
                self.rotation.rotate_columns_(weight[block])
                if bias is not None:
                    self.rotation.rotate_(bias[block])

    def _read_(self, layer: str, weight: Tensor, bias: Tensor | None, norm: Read) -> None:
        scale = shift = None
        if self.readers[layer] is not None:
            scale, shift = _tiled(norm("weight"), weight.shape[1]), _optional(norm, "bias")
        if shift is not None and bias is not None:
            bias += weight @ _tiled(shift, weight.shape[1])
        self.rotate_reading_(weight, scale)

    def rotate_reading_(self, weight: Tensor, scale: Tensor | None) -> None:
        """W float32 [N, K] -> W diag(scale) R in each block of columns, in place. scale: float32 [K] or None."""
        for piece in torch.split(weight, ROWS_PER_PIECE):
            if scale is not None:
                piece *= scale
            self.rotation.rotate_(piece.view(len(piece), -1, self.rotation.size))


def _tiled(values: Tensor, columns: int) -> Tensor:
    """Per channel of a norm [C] -> per column [columns] of a layer that reads several of its rows side by side."""
    return values if len(values) == columns else values.repeat(columns // len(values))


def _optional(read: Read, name: str) -> Tensor | None:
    try:
        return read(name)
    except KeyError:
        return None


@dataclass(frozen=True)
class RotationGroup:
    """Rotations of one kind, seed and size. kind: a `RotationKind`; size: channels.

    names: of the layer that writes each residual stream first, or of the layers that compute the values of heads.
    """

    kind: str
    seed: int
    size: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class RotationPlan:
    """All rotations of one model.

    stages: name of a stage -> the parts of the rotations that are in it.
    untied_head: name of the output head if it no longer shares the embedding's weight, else "".
    obstacles: per residual stream that is not rotated, its name and the reason.
    unbalanced_heads: names of layers whose heads are not rotated, as their channels differ too much in magnitude.
    """

    rotations: tuple[AppliedRotation, ...] = ()
    stages: Mapping[str, tuple[AppliedRotation, ...]] = field(default_factory=dict)
    untied_head: str = ""
    obstacles: Mapping[str, str] = field(default_factory=dict)
    unbalanced_heads: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.rotations)

    @property
    def residual(self) -> bool:
        """Whether a residual stream is rotated."""
        return any(rotation.kind == RotationKind.RESIDUAL for rotation in self.rotations)

    def changing(self, layer: str) -> list[AppliedRotation]:
        """The rotations that change a parameter of a layer or norm."""
        return [rotation for rotation in self.rotations if rotation.changes(layer)]

    def groups(self) -> list[RotationGroup]:
        """For vlqc_report.json: one group per kind, seed and size."""
        groups: dict[tuple[str, int, int], list[str]] = {}
        for each in self.rotations:
            key = (str(each.kind), each.rotation.seed, each.rotation.size)
            groups.setdefault(key, []).append(each.rotation.name)
        return [RotationGroup(kind, seed, size, tuple(names)) for (kind, seed, size), names in groups.items()]


def part_of_stage(rotation: AppliedRotation, rotatable: Rotatable, stage: str) -> AppliedRotation | None:
    """What a rotation of a model does in one stage; None if nothing."""
    inside = f"{stage}."
    part = replace(
        rotation,
        writers={layer: starts for layer, starts in rotation.writers.items() if layer.startswith(inside)},
        readers={layer: norm for layer, norm in rotation.readers.items() if layer.startswith(inside)},
        norms=tuple(norm for norm in rotation.norms if norm.startswith(inside)),
        tables=tuple(table for table in rotation.tables if table.startswith(inside)),
        inputs=tuple(name for owner, name in rotatable.inputs if owner == stage),
        outputs=tuple(position for owner, position in rotatable.outputs if owner == stage),
    )
    return part if part.writers or part.readers or part.norms or part.inputs or part.outputs else None


def make_plan(
    chosen: Iterable[tuple[Rotatable, int]],
    stages: Iterable[str],
    *,
    untied_head: str = "",
    obstacles: Mapping[str, str] | None = None,
) -> RotationPlan:
    """chosen: what to rotate, with the seed; stages: names of all stages; others: see `RotationPlan`."""
    rotations = [(rotatable, AppliedRotation.of_model(rotatable, seed)) for rotatable, seed in chosen]
    parts = {
        stage: tuple(
            part for rotatable, rotation in rotations if (part := part_of_stage(rotation, rotatable, stage)) is not None
        )
        for stage in stages
    }
    return RotationPlan(tuple(rotation for _, rotation in rotations), parts, untied_head, dict(obstacles or {}))
