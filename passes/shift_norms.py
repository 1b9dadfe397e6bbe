"""shift-norms: a bias behind a norm moves every channel's range to the middle, and the consumers' biases undo it.

The idea is Outlier Suppression+'s shift (arXiv 2304.09145): a channel that is always far from zero needs a wide range
although it hardly varies. Engines add a norm's bias only in front of static W8A8 linears, and look for it only behind
norms of the language model, so these are the only ones that are shifted.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vlqc.ir.stage import Edge, Stage
from vlqc.kernels_ref.norm import ShiftedNorm
from vlqc.passes.algorithms import folding
from vlqc.passes.algorithms.smoothing_search import SearchedEdge, find_stage_edges, per_channel, searched_edges
from vlqc.passes.insert_observers import observed
from vlqc.passes.smooth_m2 import range_candidates
from vlqc.pipeline.pass_api import Pass
from vlqc.targets.schemes import Scheme

CANDIDATES = 32  # ranges under which a shift is judged: it has to help beside smoothing, not instead of it


@dataclass(frozen=True)
class ShiftNorms(Pass):
    """Gives the norms in front of static W8A8 linears a bias: minus the middle of each channel's range.

    It comes before smoothing, which then has less to do. A norm is shifted only where the expected error of its
    readers, each way under its best smoothing range, falls: one massive token can move a middle away from all others.
    """

    name: ClassVar[str] = "shift-norms"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "rewrite"
    summary: ClassVar[str] = "move the ranges of norm outputs to their middle, by a norm bias, where engines add it"
    after: ClassVar[tuple[str, ...]] = ("insert-observers", "assign-precision")
    before: ClassVar[tuple[str, ...]] = ("quantize-activations", "quantize-weights", "lower-linears")

    def run(self, stage: Stage) -> bool:
        changed = find_stage_edges(stage)
        for it in searched_edges(stage, self.name):
            if stage.part == "language" and may_shift(stage, it.edge):
                middle = self._middle(stage, it.edge)
                if smallest_error(moved(stage, it, middle)) < smallest_error(it):
                    changed |= shift(stage, it.edge, middle)
        return changed

    def _middle(self, stage: Stage, edge: Edge) -> Tensor:
        """float32 [C]: (max + min) / 2 of every channel over all readers, in the emitted dtype."""
        highs, lows = [], []
        for target, channel in edge.consumers.items():
            seen = observed(stage, stage.site_at(target).source, self.name)
            highs.append(per_channel(seen.maximum(), channel, edge.usable.shape[0]))
            lows.append(-per_channel(-seen.minimum(), channel, edge.usable.shape[0]))
        middle = (torch.stack(highs).amax(0) + torch.stack(lows).amin(0)) / 2
        return middle.to(stage.dtype).float()


def moved(stage: Stage, it: SearchedEdge, middle: Tensor) -> SearchedEdge:
    """The edge as its readers would see it after `middle` float32 [C] was subtracted."""
    readers = []
    for source, reader in zip(it.sources, it.readers, strict=True):
        seen = stage.observations[source].shifted(folding.per_column(middle, reader.channel, 0.0))
        away = folding.per_column(middle, reader.channel, 0.0)
        readers.append(
            replace(
                reader,
                low=seen.minimum(),
                high=seen.maximum(),
                second_moment=seen.second_moment(),
                rows=reader.rows - away,
            )
        )
    return replace(it, readers=tuple(readers))


def smallest_error(it: SearchedEdge) -> float:
    """The expected error of an edge under the best range that smoothing may choose for it."""
    candidates = range_candidates(it.largest_input(), CANDIDATES)
    return float(torch.stack([reader.expected_error(candidates) for reader in it.readers]).sum(0).amin())


def may_shift(stage: Stage, edge: Edge) -> bool:
    """Whether the producer is a norm without a bias, all of whose channels go to static W8A8 linears only."""
    producer = stage.module.get_submodule(edge.producer)
    own = [name for name, _ in (*producer.named_parameters(), *producer.named_buffers())]
    is_plain_norm = not isinstance(producer, nn.Linear) and own == ["weight"]
    sites = [stage.site_at(target) for target in edge.consumers]
    return is_plain_norm and bool(edge.usable.all()) and all(site.scheme == Scheme.W8A8 for site in sites)


@torch.no_grad()
def shift(stage: Stage, edge: Edge, middle: Tensor) -> bool:
    """Subtracts `middle` float32 [C] behind the norm, adds W middle to the consumers' biases, and proves it.

    Whether it was done: where the proof fails everything is put back, with a note.
    """
    norm, before = stage.module.get_submodule(edge.producer), stage.execution.probe_output().flatten()
    linears = {target: stage.linear(stage.site_at(target)) for target in edge.consumers}
    by_column = {target: folding.per_column(middle, channel, 0.0) for target, channel in edge.consumers.items()}
    biases = {target: linear.bias for target, linear in linears.items()}
    stage.module.set_submodule(edge.producer, ShiftedNorm(norm, -middle.to(norm.get_parameter("weight").device)))
    for target, linear in linears.items():
        undo = linear.weight @ by_column[target].to(linear.weight.device)
        known = biases[target]
        linear.bias = nn.Parameter(undo if known is None else known + undo, requires_grad=False)
    if folding.difference(before, stage.execution.probe_output().flatten()) > folding.TOLERANCE:
        stage.module.set_submodule(edge.producer, norm)
        for target, linear in linears.items():
            linear.bias = biases[target]
        stage.notes.append(f"the shift of {stage.checkpoint_name(edge.producer)} changes the output and was left out")
        return False
    for target in edge.consumers:
        stage.site_at(target).added_bias = biases[target] is None
    by_source = {stage.site_at(target).source: columns for target, columns in by_column.items()}
    for source, columns in by_source.items():
        stage.observations[source] = stage.observations[source].shifted(columns)
    return True
