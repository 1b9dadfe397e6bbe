"""The intermediate representation (IR) of one stage: graph, sites, edges and what passes add to them.

A *stage* is one submodule that is compiled as a unit (a vision block, the merger, a decoder layer). `Stage` joins the
module with its weights, the graph recorded from it, and the results of passes. Inputs and outputs of a run are in
`execution.StageRun`, the text form in `printer`, its contents in `snapshot`, the invariants in `verifier`.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from vlqc.errors import Fault, UserError
from vlqc.families.family import ModelFamily
from vlqc.ir.cache_observation import CacheObservation
from vlqc.ir.execution import StageRun
from vlqc.ir.observation import Observation
from vlqc.ir.rotations import AppliedRotation
from vlqc.kernels_ref.kv_cache import QuantizedCacheAttention
from vlqc.targets.cache_schemes import CacheScheme
from vlqc.targets.schemes import Scheme, SchemeSpec

RENAMED = {  # attributes of Stage in 0.1 -> in 0.2; removed in the next version
    "live": "module",
    "run": "execution.forward",
    "run_probe": "execution.probe_output",
    "probe_rows": "execution.probe_output",
    "calls": "execution.calls",
    "outputs": "execution.outputs",
    "probe": "execution.probe",
    "world": "execution.process_group",
}


@dataclass(frozen=True)
class InputQuantization:
    """Static per-tensor asymmetric int8: q = clamp(rint(x / scale + offset), -128, 127). One for a whole group."""

    scale: float
    offset: float


@dataclass(frozen=True)
class WeightQuantization:
    """Symmetric: weight ~ integers * scale, integers int8 [N, K], scale float32 [N, 1] per output channel.

    With groups of G columns the integers are of 4 bits, and weight ~ integers * scale * group_scale, the last float32
    [N, K/G].
    """

    integers: Tensor
    scale: Tensor
    group_scale: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.integers, self.scale, self.group_scale) if tensor is not None]


@dataclass
class Site:
    """One Linear of a stage and the quantization that passes choose for it.

    name: checkpoint name without `.weight`; target: path in the stage's module tree; source: name of the graph node
    whose value is its input (members of a group share it); shape: (N outputs, K inputs); group_size: columns that share
    a 4-bit weight's scale; added_bias: whether a pass added a bias to a layer without one in the checkpoint.
    """

    name: str
    target: str
    source: str
    shape: tuple[int, int]
    scheme: Scheme | None = None
    group_size: int | None = None
    reason: str = ""
    added_bias: bool = False
    input: InputQuantization | None = None
    weight: WeightQuantization | None = None

    @property
    def spec(self) -> SchemeSpec:
        """The facts of its scheme; those of FLOAT if no scheme is assigned yet."""
        return (self.scheme or Scheme.FLOAT).spec

    @property
    def is_quantized(self) -> bool:
        """Whether it is assigned a scheme that stores integers."""
        return self.spec.is_quantized

    @property
    def gained_bias(self) -> bool:
        """`added_bias` under its name in 0.1; removed in the next version."""
        warnings.warn("Site.gained_bias is renamed to Site.added_bias", DeprecationWarning, stacklevel=2)
        return self.added_bias


@dataclass
class CacheSite:
    """The keys and values of one attention module, which an engine caches, and the quantization chosen for them.

    name: checkpoint name of the attention module; target: its path in the stage's module tree; key, value: checkpoint
    names of the projections, without `.weight`; node: name of the graph node of the attention call; heads: key-value
    heads; head_size: channels of one; scheme: None for a cache in float; reason: why it is in float; sqnr: of the
    attention's output in dB, as measured where the scales were chosen; key_scale, value_scale: float32 [heads *
    head_size], values of the checkpoint's dtype, None in float.
    """

    name: str
    target: str
    key: str
    value: str
    node: str
    heads: int
    head_size: int
    scheme: CacheScheme | None = None
    reason: str = ""
    sqnr: float | None = None
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    @property
    def channels(self) -> int:
        """Length of each scale."""
        return self.heads * self.head_size

    @property
    def is_quantized(self) -> bool:
        """Whether the keys and values are cached as integers."""
        return self.scheme is not None

    def scales(self) -> dict[str, Tensor]:
        """The scales by name, "key_scale" and "value_scale"; empty for a cache in float."""
        named = {"key_scale": self.key_scale, "value_scale": self.value_scale}
        return {name: scale for name, scale in named.items() if scale is not None}


@dataclass(frozen=True)
class Edge:
    """A producer whose per-channel scale its consumers can absorb.

    producer: target of a norm or Linear; usable: bool [C], its foldable channels; consumers: for each Linear target the
    int64 map [K] from input column to producer channel, -1 where the column does not come from a usable channel.
    """

    producer: str
    usable: Tensor
    consumers: Mapping[str, Tensor]


@dataclass(frozen=True)
class Sensitivity:
    """What one group's rounding does to the output of its stage, in every scheme that the group may get.

    source: the node that the group reads; part, sites: of the stage, checkpoint names; assigned: its scheme;
    noise: per scheme the noise-to-signal ratio of the stage's output when only this group is rounded; modules: per
    scheme the module at each target.
    """

    source: str
    part: str
    sites: tuple[str, ...]
    assigned: Scheme
    noise: Mapping[Scheme, float]
    modules: Mapping[Scheme, Mapping[str, nn.Module]]


@dataclass
class Stage:
    """One unit of compilation.

    name: checkpoint prefix; part: of the model, one of `Part`; family: of the model; dtype: of emitted float tensors;
    module: the submodule with float32 weights; graph: recorded once, specialized to the shapes of the traced call,
    nodes carry meta["shape"] and meta["dtype"]; sites: by checkpoint name; execution: inputs and outputs of this run;
    checkpoint_name: path of a module or parameter in the stage -> checkpoint name; observations: by name of the
    observed node; edges: None until they are computed; rotations: of the model, the parts in this stage; sensitivities:
    of quantized groups, where they were measured, not part of the text; caches, cache_observations: of keys and values,
    by name of the attention module, where they were observed.
    """

    name: str
    part: str
    family: ModelFamily
    dtype: torch.dtype
    module: nn.Module
    graph: fx.Graph
    sites: dict[str, Site]
    execution: StageRun
    checkpoint_name: Callable[[str], str] = lambda path: path
    observations: dict[str, Observation] = field(default_factory=dict)
    edges: tuple[Edge, ...] | None = None
    rotations: tuple[AppliedRotation, ...] = ()
    sensitivities: list[Sensitivity] = field(default_factory=list)
    caches: dict[str, CacheSite] = field(default_factory=dict)
    cache_observations: dict[str, CacheObservation] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        """The attributes of `RENAMED`, with a DeprecationWarning; called only for names that do not exist."""
        if name not in RENAMED:
            raise AttributeError(f"'Stage' object has no attribute {name!r}")
        warnings.warn(f"Stage.{name} is renamed to Stage.{RENAMED[name]}", DeprecationWarning, stacklevel=2)
        if name == "run_probe":
            return lambda: self.execution.probe_output().flatten()
        return attrgetter(RENAMED[name])(self)

    def __repr__(self) -> str:
        """One line for notebooks; `print_stage` returns the whole text."""
        return f"<Stage {self.name}: {len(self.graph.nodes)} nodes, {len(self.sites)} sites>"

    def groups(self) -> dict[str, list[Site]]:
        """Sites by the node that they read: a group that an engine fuses shares one input."""
        return group_by_source(self.sites.values())

    def scheme_groups(self) -> list[list[Site]]:
        """Sites that must have one scheme: those that share an input, and all experts of a block."""
        groups: dict[str, list[Site]] = {}
        for source, members in self.groups().items():
            experts = self.family.experts_of(members[0].name)
            groups.setdefault(f"experts of {experts}" if experts else source, []).extend(members)
        return list(groups.values())

    def node(self, name: str) -> fx.Node:
        node: fx.Node = next(node for node in self.graph.nodes if node.name == name)
        return node

    def linear(self, site: Site) -> nn.Linear:
        """The float Linear of a site that is not lowered yet. UserError if it was lowered by an earlier pass."""
        module = self.module.get_submodule(site.target)
        if not isinstance(module, nn.Linear):
            fix = "in --pipeline, put the lowering pass after every pass that reads or changes weights"
            raise UserError(Fault(f"{site.name} has no float weight", self.name, "it is already lowered", fix))
        return module

    def is_lowered(self, site: Site) -> bool:
        return not isinstance(self.module.get_submodule(site.target), nn.Linear)

    def is_lowered_cache(self, site: CacheSite) -> bool:
        """Whether attention reads quantized keys and values."""
        return isinstance(self.module.get_submodule(site.target), QuantizedCacheAttention)

    def site_at(self, target: str) -> Site:
        return next(site for site in self.sites.values() if site.target == target)


def group_by_source(sites: Iterable[Site]) -> dict[str, list[Site]]:
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.source, []).append(site)
    return groups


def observe(value: Tensor) -> Tensor:
    """Identity. A call_function node with this target marks that `value` is observed; no other node reads it."""
    return value
