"""shift-norms: add a bias to norms that centers the range of every channel; the consumers' biases undo it.

Source: the channel-wise shift of Outlier Suppression+ (arXiv 2304.09145). A channel that is always far from zero needs
a wide range although it hardly varies. Engines apply a norm's bias only before static W8A8 linear layers, and only in
some parts of the model (see `targets.rules.adds_norm_bias`), so only those norms are shifted.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vlqc.ir.stage import Edge, Stage
from vlqc.ir.tensor_digest import TOLERANCE, max_relative_error
from vlqc.kernels_ref.norm import ShiftedNorm
from vlqc.passes.algorithms.folding import channel_to_column
from vlqc.passes.algorithms.observer import require_observation
from vlqc.passes.algorithms.smoothing_search import SmoothingTask, amax_per_channel, smoothing_tasks, update_edges
from vlqc.passes.smooth_m2 import range_scales
from vlqc.pipeline.pass_api import Pass
from vlqc.targets.rules import adds_norm_bias

CANDIDATES = 32  # smoothing ranges under which a shift is evaluated


@dataclass(frozen=True)
class ShiftNorms(Pass):
    """Adds minus the center of each channel's range as a bias to norms before static W8A8 linear layers.

    It runs before smoothing. A norm is shifted only if the expected error of its consumers decreases, with and without
    the shift each under its best smoothing range: a single massive token can move the center away from all others.
    """

    name: ClassVar[str] = "shift-norms"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "rewrite"
    summary: ClassVar[str] = "center the ranges of norm outputs by a norm bias, where engines add it"
    changes_inputs: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("insert-observers", "assign-precision")
    before: ClassVar[tuple[str, ...]] = ("quantize-activations", "quantize-weights", "lower-linears")

    def run(self, stage: Stage) -> bool:
        changed = update_edges(stage)
        if not adds_norm_bias(stage.part):
            return changed
        for task in smoothing_tasks(stage, self.name):
            if can_shift(stage, task.edge):
                center = range_center(stage, task.edge, self.name)
                if smallest_error(shifted_task(stage, task, center)) < smallest_error(task):
                    changed |= shift(stage, task.edge, center)
        return changed


def can_shift(stage: Stage, edge: Edge) -> bool:
    """Whether the producer is a norm without a bias whose channels all feed static W8A8 linear layers."""
    producer = stage.module.get_submodule(edge.producer)
    tensors = [name for name, _ in (*producer.named_parameters(), *producer.named_buffers())]
    is_plain_norm = not isinstance(producer, nn.Linear) and tensors == ["weight"]
    sites = [stage.site_at(target) for target in edge.consumers]
    return is_plain_norm and bool(edge.usable.all()) and all(site.spec.takes_added_bias for site in sites)


def range_center(stage: Stage, edge: Edge, pass_name: str) -> Tensor:
    """(max + min) / 2 of every producer channel over all consumers, float32 [C], rounded to the stage's dtype."""
    highs, lows = [], []
    for target, channel in edge.consumers.items():
        observation = require_observation(stage, stage.site_at(target).source, pass_name)
        highs.append(amax_per_channel(observation.maximum(), channel, edge.usable.shape[0]))
        lows.append(-amax_per_channel(-observation.minimum(), channel, edge.usable.shape[0]))
    center = (torch.stack(highs).amax(0) + torch.stack(lows).amin(0)) / 2
    return center.to(stage.dtype).float()


def shifted_task(stage: Stage, task: SmoothingTask, center: Tensor) -> SmoothingTask:
    """The edge with the statistics that its consumers have after `center` float32 [C] is subtracted."""
    consumers = []
    for source, group in zip(task.sources, task.consumers, strict=True):
        offset = channel_to_column(center, group.channel, 0.0)
        observation = stage.observations[source].shifted(offset)
        consumers.append(
            replace(
                group,
                low=observation.minimum(),
                high=observation.maximum(),
                second_moment=observation.second_moment(),
                rows=group.rows - offset,
            )
        )
    return replace(task, consumers=tuple(consumers))


def smallest_error(task: SmoothingTask) -> float:
    """The expected error of an edge under the best of CANDIDATES smoothing ranges."""
    candidates = range_scales(task.input_absmax(), CANDIDATES)
    return float(
        torch.stack([group.share * group.expected_error(candidates) for group in task.consumers]).sum(0).amin()
    )


@torch.no_grad()
def shift(stage: Stage, edge: Edge, center: Tensor) -> bool:
    """Subtracts `center` float32 [C] after the norm and adds W center to the consumers' biases.

    Returns whether the stage's output for its probe call is unchanged; otherwise everything is restored, with a note.
    """
    norm, before = stage.module.get_submodule(edge.producer), stage.execution.probe_output(reuse=True)
    linears = {target: stage.linear(stage.site_at(target)) for target in edge.consumers}
    offsets = {target: channel_to_column(center, channel, 0.0) for target, channel in edge.consumers.items()}
    biases = {target: linear.bias for target, linear in linears.items()}
    stage.module.set_submodule(edge.producer, ShiftedNorm(norm, -center.to(norm.get_parameter("weight").device)))
    for target, linear in linears.items():
        correction = linear.weight @ offsets[target].to(linear.weight.device)
        bias = biases[target]
        linear.bias = nn.Parameter(correction if bias is None else bias + correction, requires_grad=False)
    if max_relative_error(before, stage.execution.probe_output()) > TOLERANCE:
        stage.module.set_submodule(edge.producer, norm)
        for target, linear in linears.items():
            linear.bias = biases[target]
        stage.notes.append(f"the shift of {stage.checkpoint_name(edge.producer)} changes the output and was left out")
        return False
    for target in edge.consumers:
        stage.site_at(target).added_bias = biases[target] is None
    for source, offset in {stage.site_at(target).source: offset for target, offset in offsets.items()}.items():
        stage.observations[source] = stage.observations[source].shifted(offset)
    return True
