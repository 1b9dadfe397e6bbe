"""What the text of a stage says of tensors, edges and observations, and what a stage parsed from text has of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from vlqc.ir.tensor_digest import absmax, digest


@dataclass(frozen=True)
class TensorSummary:
    """What the text says of a tensor: enough to see that it changed."""

    dtype: str
    shape: tuple[int, ...]
    absmax: float
    digest: str


@dataclass(frozen=True)
class MapSummary:
    """What the text says of the channels or columns of an edge: how many of them take part."""

    used: int
    total: int
    digest: str


@dataclass(frozen=True)
class EdgeSummary:
    producer: str
    usable: MapSummary
    consumers: Mapping[str, MapSummary]


@dataclass(frozen=True)
class ObservationSummary:
    """rows: per modality; minimum, maximum: over all channels, None without rows; kept: number of kept rows."""

    channels: int
    rows: Mapping[str, int]
    minimum: float | None
    maximum: float | None
    kept: int
    digest: str


@dataclass
class Summaries:
    """What a parsed stage knows of tensors that its text only summarizes.

    weights: per site name the integers, scale and, if any, group_scale of its quantized weight; edges: None where none
    were computed; observations: per node name.
    """

    weights: dict[str, list[TensorSummary]] = field(default_factory=dict)
    edges: tuple[EdgeSummary, ...] | None = None
    observations: dict[str, ObservationSummary] = field(default_factory=dict)


def summarize(tensor: Tensor) -> TensorSummary:
    return TensorSummary(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), absmax(tensor), digest(tensor))
