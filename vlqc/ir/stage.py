"""The intermediate representation: a stage, its sites, what was observed at them, and what is to become of them.

A *stage* is one submodule of the model that is compiled as a unit (a vision block, the merger, a decoder layer). It
joins the real module, the graph recorded from it, and the facts that passes add. Everything a pass reads or writes is
in this file; how it looks as text is in `printer`, what must hold of it in `invariants`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from vlqc.errors import Fault, UserError
from vlqc.frontend.process_group import ProcessGroup
from vlqc.ir.attention import FusedAttention
from vlqc.ir.bfloat16_linears import bfloat16_linears
from vlqc.ir.bfloat16_linears import exact_bfloat16 as exact_bfloat16
from vlqc.ir.memory import release_unused_memory
from vlqc.ir.observation import FAINT as FAINT
from vlqc.ir.observation import MODALITIES as MODALITIES
from vlqc.ir.observation import ChannelRange as ChannelRange
from vlqc.ir.observation import Observation as Observation
from vlqc.ir.observation import noise_to_signal as noise_to_signal
from vlqc.ir.observation import row_weights as row_weights
from vlqc.ir.summaries import EdgeSummary as EdgeSummary
from vlqc.ir.summaries import MapSummary as MapSummary
from vlqc.ir.summaries import ObservationSummary as ObservationSummary
from vlqc.ir.summaries import Summaries as Summaries
from vlqc.ir.summaries import TensorSummary as TensorSummary
from vlqc.ir.summaries import summarize as summarize
from vlqc.ir.tensor_digest import TOLERANCE as TOLERANCE
from vlqc.ir.tensor_digest import absmax as absmax
from vlqc.ir.tensor_digest import difference as difference
from vlqc.ir.tensor_digest import digest as digest
from vlqc.ir.tensor_digest import fingerprint as fingerprint
from vlqc.ir.tensor_digest import is_finite as is_finite
from vlqc.targets.schemes import Scheme

WEIGHT_PARTS = ("weight", "scale", "group_scale")  # what the text calls the tensors of a WeightQuantization


@dataclass(frozen=True)
class Call:
    """The arguments with which one sample enters a stage, and which of its rows are what.

    modality: int8 [rows], an index into `MODALITIES` per token row of the stage's inputs, or -1 for padding;
    None where every row is an image token.
    """

    sample: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    modality: Tensor | None = None


@dataclass(frozen=True)
class SampleShape:
    """What every process knows of a call, wherever its sample is: rows of the stage's input, and of each modality."""

    sample: int
    rows: int
    of_modality: tuple[int, ...]

    @classmethod
    def of(cls, call: Call) -> "SampleShape":
        rows = first_tensor((*call.args, *call.kwargs.values())).shape[-2]
        if call.modality is None:
            return cls(call.sample, rows, tuple(rows * (name == "image") for name in MODALITIES))
        counts = (int((call.modality == number).sum()) for number in range(len(MODALITIES)))
        return cls(call.sample, rows, tuple(counts))


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
        return [it for it in (self.integers, self.scale, self.group_scale) if it is not None]


@dataclass
class Site:
    """One Linear of a stage: what it is, and, as passes decide it, what it becomes.

    name: checkpoint name without `.weight`; target: path in the stage's module tree; source: name of the graph node
    whose value is its input (members of a group share it); shape: (N outputs, K inputs); group_size: columns that share
    a 4-bit weight's scale; added_bias: whether a pass gave it a bias that the checkpoint's layer does not have.
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
    """One compiled unit.

    name: checkpoint prefix; part: vision, merger or language; dtype: in which float tensors are emitted;
    module: the submodule with real float32 weights, or None if the stage was parsed from text;
    graph: recorded once, specialised to the shapes of the traced call; nodes carry meta["shape"] and meta["dtype"];
    calls: how each sample of this process enters; outputs: what each returned, filled by `run`; visits: of all samples
    of all processes of the world, in their order; probe: the call that proofs run on, on all processes the same; extra:
    the probe where it is none of the calls: `run` runs it behind them, into probe_outputs, and nobody observes it;
    checkpoint_name: parameter or module path in the stage -> checkpoint name;
    sensitivities: of quantized groups, where they were measured; no part of the text;
    on_sample, settle: called by `run` after each sample: with how many are done, and with all that was in use;
    tensors, summaries: only of a stage parsed from text, in place of its weights, `Site.weight`, edges, observations.
    """

    name: str
    part: str
    dtype: torch.dtype
    module: nn.Module | None
    graph: fx.Graph
    sites: dict[str, Site]
    calls: Sequence[Call] = ()
    probe: Call | None = None
    extra: Call | None = None
    outputs: list[Any] = field(default_factory=list)
    probe_outputs: list[Any] = field(default_factory=list)
    observations: dict[str, Observation] = field(default_factory=dict)
    edges: tuple[Edge, ...] | None = None
    tensors: dict[str, TensorSummary] = field(default_factory=dict)
    summaries: Summaries = field(default_factory=Summaries)
    checkpoint_name: Callable[[str], str] = lambda target: target
    sensitivities: list[Sensitivity] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    on_sample: Callable[[int], None] = lambda done: None
    settle: Callable[..., None] = lambda *held: None
    process_group: ProcessGroup = field(default_factory=ProcessGroup)
    sample_shapes: Sequence[SampleShape] | None = None

    def __repr__(self) -> str:
        """One line: a notebook ends a cell with it; `print_stage` says the rest."""
        return f"<Stage {self.name}: {len(self.graph.nodes)} nodes, {len(self.sites)} sites>"

    @property
    def live(self) -> nn.Module:
        """The module of a stage that was traced, not parsed."""
        if self.module is None:
            raise ValueError(f"stage {self.name} was parsed from text and has no weights")
        return self.module

    def all_sample_shapes(self) -> Sequence[SampleShape]:
        return [SampleShape.of(call) for call in self.calls] if self.sample_shapes is None else self.sample_shapes

    def groups(self) -> dict[str, list[Site]]:
        """Sites by the node they read: an engine's fused group shares one input."""
        groups: dict[str, list[Site]] = {}
        for site in self.sites.values():
            groups.setdefault(site.source, []).append(site)
        return groups

    def node(self, name: str) -> fx.Node:
        found: fx.Node = next(node for node in self.graph.nodes if node.name == name)
        return found

    def linear(self, site: Site) -> nn.Linear:
        """The float Linear of a site that is not lowered yet."""
        module = self.live.get_submodule(site.target)
        if not isinstance(module, nn.Linear):
            fix = "in the pipeline, lower linears after every pass that works on weights"
            raise UserError(Fault(f"{site.name} has no float weight any more", self.name, "it was lowered before", fix))
        return module

    def is_lowered(self, site: Site) -> bool:
        return not isinstance(self.live.get_submodule(site.target), nn.Linear)

    def site_at(self, target: str) -> Site:
        return next(site for site in self.sites.values() if site.target == target)

    @torch.no_grad()
    def run(self, watch: "Mapping[str, Callable[[Tensor, Call], None]] | None" = None) -> None:
        """Runs every sample through the stage once and keeps the outputs; `watch` sees inputs of modules by target.

        Unlike proofs, which run in float32, it multiplies by bfloat16 weights in bfloat16, where that is faster.
        """
        self.outputs = []
        with bfloat16_linears(self.live):
            for done, call in enumerate(self.calls):
                with watching(self.live, watch or {}, call), FusedAttention():
                    self.outputs.append(self.live(*call.args, **call.kwargs))
                self.settle(call.args, call.kwargs, self.outputs[-1])
                release_unused_memory()
                self.on_sample(done + 1)
            if self.extra is not None:
                with FusedAttention():
                    self.probe_outputs = [self.live(*self.extra.args, **self.extra.kwargs)]
        release_unused_memory()

    def answers(self) -> list[Any]:
        """What all that stand before the stage are to go on with: the outputs, behind them that of an extra probe."""
        return [*self.outputs, *self.probe_outputs]

    def run_probe(self) -> Tensor:
        """float32: the stage's first output tensor for the probe call, flattened."""
        return self.probe_rows().flatten()

    @torch.no_grad()
    def probe_rows(self) -> Tensor:
        """float32 [rows, K]: the stage's first output tensor for the probe call."""
        if self.probe is None:
            raise ValueError(f"stage {self.name} has no probe call")
        with FusedAttention():
            output = first_tensor(self.live(*self.probe.args, **self.probe.kwargs))
        return output.float().reshape(-1, output.shape[-1]).cpu()


@contextmanager
def watching(root: nn.Module, watch: Mapping[str, Callable[[Tensor, Call], None]], call: Call) -> Iterator[None]:
    """Inside, each named module shows its first argument to its watcher before it runs."""

    def show(watcher: Callable[[Tensor, Call], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            watcher(args[0], call)

        return hook

    handles = [root.get_submodule(target).register_forward_pre_hook(show(watcher)) for target, watcher in watch.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(output: Any) -> Tensor:
    """The hidden states in what a block returns: the tensor itself, or the first of a tuple or a mapping's values."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    return next(value for value in values if isinstance(value, Tensor))


def observe(value: Tensor) -> Tensor:
    """Marks in the graph that `value` is observed: returns it; the node is used by no other."""
    return value
