"""The search for the best per-channel smoothing scale of an edge, and everything that it needs to know of the edge.

Notation: C channels of the producer, K input columns of a consumer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from vlqc.ir.memory import release_pages
from vlqc.ir.scale_propagation import find_edges
from vlqc.ir.stage import Edge, Site, Stage
from vlqc.passes.algorithms.compensation import uncompensated_share
from vlqc.passes.algorithms.error_model import (
    MAX_INPUT_ROWS,
    MAX_WEIGHT_ROWS,
    ROUND_TO_NEAREST,
    ConsumerGroup,
    QuantizationPreview,
    representative_rows,
    scheme_noise,
)
from vlqc.passes.algorithms.folding import exact_scale
from vlqc.passes.algorithms.observer import require_observation

COMPENSATING = ("gptq", "auto")  # weight methods
MIN_GAIN = 0.03  # of the error without a scale; ratios of two predicted errors deviate by 0.14 dB (rms) from real ones
MIN_ROWS = 16  # of inputs and of weights, per group of an edge with many, such as that of a norm before experts


@dataclass(frozen=True)
class RowLimits:
    """Largest number of rows of the inputs, and of the weights, of one group of consumers in a search."""

    inputs: int
    weights: int


@dataclass(frozen=True)
class SmoothingTask:
    """An edge whose scale is searched.

    producer: module of the norm or linear layer; sources: the nodes that the consumers read; consumers: one group of
    quantized consumers per source; has_float_consumer: whether a layer that stays float reads the producer, too.
    """

    edge: Edge
    producer: nn.Module
    sources: tuple[str, ...]
    consumers: tuple[ConsumerGroup, ...]
    has_float_consumer: bool = False

    def exact_scale(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """float32 [C]: see `folding.exact_scale`."""
        return exact_scale(self.producer, self.edge.usable, scale, dtype, powers_of_two=self.has_float_consumer)

    @property
    def channels(self) -> int:
        return self.edge.usable.shape[0]

    def input_absmax(self) -> Tensor:
        """float32 [C]: largest magnitude of each producer channel at the consumers' inputs."""
        peaks = [
            amax_per_channel(torch.maximum(group.high, -group.low), group.channel, self.channels)
            for group in self.consumers
        ]
        return torch.stack(peaks).amax(0).clamp(min=0.0)

    def weight_absmax(self) -> Tensor:
        """float32 [C]: largest weight that multiplies each producer channel."""
        peaks = [amax_per_channel(group.weight.abs().amax(0), group.channel, self.channels) for group in self.consumers]
        return torch.stack(peaks).amax(0)

    def balanced_scales(self) -> Tensor:
        """float32 [C]: scales that minimize the sum of each channel's two rounding noises, with geometric mean 1.

        The input's noise is proportional to s^2 times the energy of its weights, the weight's noise to the input's mean
        square over s^2; the minimum is at s = (mean square / energy)^(1/4). Dead channels get 1.
        """
        moment, energy = torch.zeros(2, self.channels, dtype=torch.float64)
        for group in self.consumers:
            mapped = group.channel >= 0
            moment.index_add_(0, group.channel[mapped], group.second_moment[mapped].double())
            energy.index_add_(0, group.channel[mapped], group.energy_per_column[mapped].double())
        alive = (moment > 0) & (energy > 0)
        if not bool(alive.any()):
            return torch.ones(self.channels)
        root = torch.where(alive, (moment / energy).pow(0.25), 1.0)
        return torch.where(alive, root / root[alive].log().mean().exp(), 1.0).float()

    def best_candidate(self, candidates: Tensor, confirm: int) -> int:
        """Returns the index of the best of the scales float32 [R, C]; the first one should be all ones.

        All candidates are ranked by the expected error. The best `confirm` of them and the first are compared by the
        error measured on rows, and the first one is kept unless another is better by MIN_GAIN. Channels that are not
        usable are evaluated with scale 1, as they would be folded.
        """
        candidates = torch.where(self.edge.usable, candidates, 1.0)
        expected = torch.stack([group.share * group.expected_error(candidates) for group in self.consumers]).sum(0)
        best = expected.argsort(stable=True)[:confirm].tolist()
        if 0 not in best:
            best.append(0)
        measured = [
            sum(group.share * group.measured_error(candidates[number]) for group in self.consumers) for number in best
        ]
        number = best[measured.index(min(measured))]
        return int(number) if min(measured) < (1 - MIN_GAIN) * measured[best.index(0)] else 0


def update_edges(stage: Stage) -> bool:
    """Sets `stage.edges`; returns whether the text of the stage changed."""
    previous, stage.edges = stage.edges, find_edges(stage.module, stage.graph)
    return previous is None or [_as_lists(edge) for edge in previous] != [_as_lists(edge) for edge in stage.edges]


def smoothing_tasks(
    stage: Stage, pass_name: str, preview: QuantizationPreview = ROUND_TO_NEAREST
) -> Iterator[SmoothingTask]:
    """Yields a task, with current statistics, for every edge of the stage that has quantized consumers.

    pass_name: named in errors; preview: what later passes will do.

    Two producers of one input (of a bilinear gate) would both be smoothed for the same outliers, so only the first one
    is yielded.
    """
    taken = set[str]()
    unreached = {source for source, observation in stage.observations.items() if observation.is_empty}
    for edge in stage.edges or ():
        sites = [site for site in quantized_consumers(stage, edge) if site.source not in unreached]
        sources = tuple(dict.fromkeys(site.source for site in sites))
        if not sites or taken.intersection(sources):
            continue
        taken.update(sources)
        limits = (max(MIN_ROWS, limit // len(sources)) for limit in (MAX_INPUT_ROWS, MAX_WEIGHT_ROWS))
        readers = [[site for site in sites if site.source == source] for source in sources]
        group = partial(_consumer_group, stage, edge, pass_name, preview, RowLimits(*limits))
        consumers = [group(members) for members in readers]
        if preview.weights in COMPENSATING:
            shares = _uncompensated_shares(stage, readers, consumers)
            consumers = [replace(each, uncompensated=share) for each, share in zip(consumers, shares, strict=True)]
        rows = [stage.observations[source].rows for source in sources]
        consumers = [replace(each, share=count / max(rows)) for each, count in zip(consumers, rows, strict=True)]
        producer, has_float = stage.module.get_submodule(edge.producer), has_float_consumer(stage, edge)
        yield SmoothingTask(edge, producer, sources, tuple(consumers), has_float)


def quantized_consumers(stage: Stage, edge: Edge) -> list[Site]:
    """The consumers that will be quantized: all of them, if no scheme is assigned yet."""
    sites = [stage.site_at(target) for target in edge.consumers]
    return [site for site in sites if site.scheme is None or site.is_quantized]


def has_float_consumer(stage: Stage, edge: Edge) -> bool:
    """Whether a consumer stays float; False if no scheme is assigned yet."""
    return len(quantized_consumers(stage, edge)) < len(edge.consumers)


def amax_per_channel(absmax_per_column: Tensor, channel: Tensor, channels: int) -> Tensor:
    """Per input column float32 [K] -> per producer channel [C]: maximum over the columns of a channel, 0 if none."""
    mapped = channel >= 0
    zero = torch.zeros(channels)
    return zero.scatter_reduce(0, channel[mapped], absmax_per_column[mapped], "amax", include_self=False)


def _consumer_group(
    stage: Stage, edge: Edge, pass_name: str, preview: QuantizationPreview, limits: RowLimits, sites: list[Site]
) -> ConsumerGroup:
    """sites: consumers that read the same node."""
    observation = require_observation(stage, sites[0].source, pass_name)
    index = observation.representative(limits.inputs)
    weights = [stage.linear(site).weight for site in sites]
    selected = representative_rows(weights, limits.weights)
    release_pages(*weights)
    return ConsumerGroup(
        channel=edge.consumers[sites[0].target],
        low=observation.minimum(),
        high=observation.maximum(),
        second_moment=observation.second_moment(),
        rows=observation.kept[index],
        row_weight=observation.row_weight(index),
        weight=selected,
        noise=scheme_noise(sites[0], preview),
    )


def _uncompensated_shares(
    stage: Stage, readers: Sequence[list[Site]], groups: Sequence[ConsumerGroup]
) -> list[Callable[[], Tensor]]:
    """Per group of sites that read the same node, a function that returns `uncompensated_share`.

    Groups with the same columns, such as experts after one norm, share that of the group with the most rows.
    """
    columns = [group.channel.numpy().tobytes() for group in groups]
    rows = [stage.observations[sites[0].source].rows for sites in readers]
    most_rows = {columns[number]: number for number in sorted(range(len(rows)), key=lambda number: rows[number])}

    @cache
    def share(number: int) -> Tensor:
        group, observation = groups[number], stage.observations[readers[number][0].source]
        return uncompensated_share(observation, group.energy_per_column, group.noise.group_size)

    return [partial(share, most_rows[key]) for key in columns]


def _as_lists(edge: Edge) -> tuple[str, list[bool], dict[str, list[int]]]:
    return edge.producer, edge.usable.tolist(), {target: columns.tolist() for target, columns in edge.consumers.items()}
