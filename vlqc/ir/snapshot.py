"""What the text of a stage says of it: the graph, and a summary of every tensor instead of its values.

`snapshot` takes one from a stage; `parser` reads one from text. Both print to the same text.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from vlqc.ir.memory import release_pages
from vlqc.ir.observation import MODALITIES, Observation
from vlqc.ir.rotations import AppliedRotation
from vlqc.ir.stage import CacheSite, Edge, Site, Stage, group_by_source
from vlqc.ir.tensor_cache import TensorCache
from vlqc.ir.tensor_digest import absmax, digest, fingerprint

WEIGHT_PARTS = ("weight", "scale", "group_scale")  # names in the text of the tensors of a WeightQuantization
SCALES = ("key_scale", "value_scale")  # names in the text of the scales of a cache
_FINGERPRINT = TensorCache(fingerprint)  # observations stay the same over many passes


@dataclass(frozen=True)
class TensorSummary:
    """Summary of a tensor that shows any change of it: dtype, shape, largest magnitude, digest of all values."""

    dtype: str
    shape: tuple[int, ...]
    absmax: float
    digest: str


@dataclass(frozen=True)
class MapSummary:
    """Summary of the channels of an edge or of the columns of a consumer: how many of them take part."""

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


@dataclass(frozen=True)
class CacheSummary:
    """scales: of a quantized cache, by the names of `CacheSite.scales`; observation: None if nothing was observed."""

    scales: Mapping[str, TensorSummary] = field(default_factory=dict)
    observation: "CacheObservationSummary | None" = None


@dataclass(frozen=True)
class CacheObservationSummary:
    """rows: per modality; key_absmax, value_absmax: over all channels; kept, queries: number of kept tokens and
    queries."""

    rows: Mapping[str, int]
    key_absmax: float
    value_absmax: float
    kept: int
    queries: int
    digest: str


@dataclass
class StageSnapshot:
    """A stage without tensors.

    graph: targets of call_module nodes are paths that `checkpoint_name` translates, in a parsed snapshot checkpoint
    names; constants of get_attr nodes have meta["summary"] or meta["constant"]; sites: by checkpoint name; weights: per
    site the summaries of its quantized weight, in the order of WEIGHT_PARTS; caches, cache_summaries: by name of the
    attention module; tensors: parameters and buffers by checkpoint name; edges: None if they were not computed;
    rotations: planned and done ones; observations: by node name.
    """

    name: str
    part: str
    dtype: torch.dtype
    graph: fx.Graph
    sites: dict[str, Site] = field(default_factory=dict)
    weights: dict[str, list[TensorSummary]] = field(default_factory=dict)
    caches: dict[str, CacheSite] = field(default_factory=dict)
    cache_summaries: dict[str, CacheSummary] = field(default_factory=dict)
    tensors: dict[str, TensorSummary] = field(default_factory=dict)
    edges: tuple[EdgeSummary, ...] | None = None
    rotations: tuple[AppliedRotation, ...] = ()
    observations: dict[str, ObservationSummary] = field(default_factory=dict)
    checkpoint_name: Callable[[str], str] = lambda name: name

    def __repr__(self) -> str:
        """One line for notebooks; `print_stage` returns the whole text."""
        return f"<StageSnapshot {self.name}: {len(self.graph.nodes)} nodes, {len(self.sites)} sites>"

    def groups(self) -> dict[str, list[Site]]:
        """Sites by the node that they read."""
        return group_by_source(self.sites.values())


def snapshot(stage: Stage, *, tensors: bool = True) -> StageSnapshot:
    """Summaries of a stage; graph and sites are shared with it. tensors=False leaves out its parameters and buffers."""
    quantized = {site.name: site.weight for site in stage.sites.values() if site.weight is not None}
    named = [*stage.module.named_parameters(), *stage.module.named_buffers()] if tensors else []
    return StageSnapshot(
        name=stage.name,
        part=stage.part,
        dtype=stage.dtype,
        graph=stage.graph,
        sites=stage.sites,
        weights={name: [summarize(tensor) for tensor in weight.tensors()] for name, weight in quantized.items()},
        caches=stage.caches,
        cache_summaries={name: _summarize_cache(stage, site) for name, site in stage.caches.items()},
        tensors=_named((stage.checkpoint_name(path), tensor) for path, tensor in named),
        edges=None if stage.edges is None else tuple(_summarize_edge(stage, edge) for edge in stage.edges),
        rotations=stage.rotations,
        observations={name: _summarize_observation(value) for name, value in stage.observations.items()},
        checkpoint_name=stage.checkpoint_name,
    )


def summarize(tensor: Tensor) -> TensorSummary:
    dtype = str(tensor.dtype).removeprefix("torch.")
    summary = TensorSummary(dtype, tuple(tensor.shape), absmax(tensor), digest(tensor))
    release_pages(tensor)
    return summary


def _named(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, TensorSummary]:
    return {name: summarize(tensor) for name, tensor in tensors}


def _summarize_edge(stage: Stage, edge: Edge) -> EdgeSummary:
    usable = MapSummary(int(edge.usable.sum()), edge.usable.numel(), digest(edge.usable))
    consumers = {
        stage.checkpoint_name(target): MapSummary(int((columns >= 0).sum()), columns.numel(), digest(columns))
        for target, columns in edge.consumers.items()
    }
    return EdgeSummary(stage.checkpoint_name(edge.producer), usable, consumers)


def _summarize_cache(stage: Stage, site: CacheSite) -> CacheSummary:
    scales = {name: summarize(scale) for name, scale in site.scales().items()}
    observation = stage.cache_observations.get(site.name)
    if observation is None:
        return CacheSummary(scales)
    summary = CacheObservationSummary(
        rows={name: observation.rows[name] for name in MODALITIES if name in observation.rows},
        key_absmax=absmax(observation.key_absmax),
        value_absmax=absmax(observation.value_absmax),
        kept=observation.kept_rows,
        queries=observation.kept_queries,
        digest=digest(*observation.tensors(), fingerprint_of=_FINGERPRINT),
    )
    return CacheSummary(scales, summary)


def _summarize_observation(observation: Observation) -> ObservationSummary:
    ranges = [(name, observation.ranges[name]) for name in MODALITIES if name in observation.ranges]
    rows = {name: span.rows for name, span in ranges}
    statistics = [part for _, span in ranges for part in (span.minimum, span.maximum, span.sum, span.sum_of_squares)]
    minimum = min((float(span.minimum.min()) for _, span in ranges), default=None)
    maximum = max((float(span.maximum.max()) for _, span in ranges), default=None)
    kept = (observation.kept, observation.kept_modality, observation.energy())
    return ObservationSummary(
        channels=observation.channels,
        rows=rows,
        minimum=minimum,
        maximum=maximum,
        kept=observation.kept.shape[0],
        digest=digest(*statistics, *kept, fingerprint_of=_FINGERPRINT),
    )
