"""What every smoothing pass does with an edge: who reads it, what is known of them, which candidate serves best."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlqc.ir.scale_propagation import find_edges
from vlqc.ir.stage import Edge, Site, Stage
from vlqc.passes.algorithms.error_model import (
    PLAIN,
    ROWS_OF_INPUT,
    Reader,
    Rounding,
    arithmetic_of,
    representative_rows,
)
from vlqc.passes.insert_observers import observed
from vlqc.targets.schemes import Scheme


@dataclass(frozen=True)
class SearchedEdge:
    """An edge with quantized consumers: its producer's module, and per node that they read what a search needs."""

    edge: Edge
    producer: nn.Module
    sources: tuple[str, ...]
    readers: tuple[Reader, ...]

    @property
    def channels(self) -> int:
        return self.edge.usable.shape[0]

    def largest_input(self) -> Tensor:
        """float32 [C]: the largest magnitude that each producer channel reaches at any reader."""
        peaks = [per_channel(torch.maximum(it.high, -it.low), it.channel, self.channels) for it in self.readers]
        return torch.stack(peaks).amax(0).clamp(min=0.0)

    def largest_weight(self) -> Tensor:
        """float32 [C]: the largest weight that each producer channel meets."""
        peaks = [per_channel(it.weight.abs().amax(0), it.channel, self.channels) for it in self.readers]
        return torch.stack(peaks).amax(0)

    def balance(self) -> Tensor:
        """float32 [C]: scales with which each channel's two roundings leave the least noise, their geometric mean 1.

        An activation's noise grows with the scale's square times the energy of the weights it meets, a weight's falls
        with it times the activation's mean square: (mean square / energy)^(1/4). Dead channels keep 1.
        """
        moment, energy = torch.zeros(2, self.channels, dtype=torch.float64)
        for it in self.readers:
            feeds = it.channel >= 0
            moment.index_add_(0, it.channel[feeds], it.second_moment[feeds].double())
            energy.index_add_(0, it.channel[feeds], it.energy_per_column[feeds].double())
        alive = (moment > 0) & (energy > 0)
        if not bool(alive.any()):
            return torch.ones(self.channels)
        root = torch.where(alive, (moment / energy).pow(0.25), 1.0)
        return torch.where(alive, root / root[alive].log().mean().exp(), 1.0).float()

    def best_of(self, candidates: Tensor, confirm: int) -> int:
        """Which of the scales float32 [R, C] serves best; the first one should change nothing, and is always confirmed.

        All are judged by the expected error, the best `confirm` of them by the error measured on real rows; each as it
        would be folded, where channels that are not usable keep 1.
        """
        candidates = torch.where(self.edge.usable, candidates, 1.0)
        expected = torch.stack([reader.expected_error(candidates) for reader in self.readers]).sum(0)
        best = expected.argsort(stable=True)[:confirm].tolist()
        if 0 not in best:
            best.append(0)
        measured = [sum(reader.measured_error(candidates[number]) for reader in self.readers) for number in best]
        return int(best[measured.index(min(measured))])


def find_stage_edges(stage: Stage) -> bool:
    """Fills stage.edges; whether the text of the stage changes by that."""
    known, stage.edges = stage.edges, find_edges(stage.module, stage.graph)
    return known is None or [_facts(edge) for edge in known] != [_facts(edge) for edge in stage.edges]


def searched_edges(stage: Stage, reader: str, rounding: Rounding = PLAIN) -> Iterator[SearchedEdge]:
    """The stage's edges that have quantized consumers, with what is known of them now; `reader` names the asking pass.

    Two producers of one input (a bilinear gate) would both be searched for the same outliers: only the first is given.
    """
    taken = set[str]()
    for edge in stage.edges or ():
        sites = quantized_consumers(stage, edge)
        sources = tuple(dict.fromkeys(site.source for site in sites))
        if not sites or taken.intersection(sources):
            continue
        taken.update(sources)
        readers = tuple(
            _reader(stage, edge, [site for site in sites if site.source == source], reader, rounding)
            for source in sources
        )
        yield SearchedEdge(edge, stage.module.get_submodule(edge.producer), sources, readers)


def quantized_consumers(stage: Stage, edge: Edge) -> list[Site]:
    """The consumers that are to be quantized; before a precision is assigned, all of them."""
    sites = [stage.site_at(target) for target in edge.consumers]
    return [site for site in sites if site.scheme != Scheme.FLOAT]


def per_channel(peak_per_column: Tensor, channel: Tensor, channels: int) -> Tensor:
    """Per column float32 [K] -> per producer channel [C]: the largest of all columns that a channel feeds, else 0."""
    feeds = channel >= 0
    zero = torch.zeros(channels)
    return zero.scatter_reduce(0, channel[feeds], peak_per_column[feeds], "amax", include_self=False)


def _reader(stage: Stage, edge: Edge, sites: list[Site], asking: str, rounding: Rounding) -> Reader:
    seen = observed(stage, sites[0].source, asking)
    index = seen.representative(ROWS_OF_INPUT)
    return Reader(
        channel=edge.consumers[sites[0].target],
        low=seen.minimum(),
        high=seen.maximum(),
        second_moment=seen.second_moment(),
        rows=seen.kept[index],
        row_weight=seen.row_weight(index),
        weight=representative_rows([stage.linear(site).weight for site in sites]),
        arithmetic=arithmetic_of(sites[0], rounding),
    )


def _facts(edge: Edge) -> tuple[str, list[bool], dict[str, list[int]]]:
    return edge.producer, edge.usable.tolist(), {target: columns.tolist() for target, columns in edge.consumers.items()}
