"""Folding of per-channel scales: divide the producer's channels, multiply the consumers' columns.

Every fold is verified: the stage's output for its probe call must not change beyond float32 rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlqc.errors import InternalError
from vlqc.ir.stage import Edge, Stage
from vlqc.ir.tensor_digest import TOLERANCE, max_relative_error
from vlqc.kernels_ref.norm import ShiftedNorm
from vlqc.passes.algorithms.reversible_scaling import Scaling, scaled

SNAP_TOLERANCE = 2**-22  # relative error that float32 division leaves on a value of a shorter dtype


@dataclass(frozen=True)
class Fold:
    """An edge and its scale float32 [C]: the producer's channels are divided, the consumers' columns multiplied."""

    edge: Edge
    scale: Tensor

    def scale_per_column(self, target: str) -> Tensor:
        """float32 [K]: factor of each input column of a consumer; 1 for columns without a usable channel."""
        return channel_to_column(self.scale, self.edge.consumers[target], 1.0)


def channel_to_column(values: Tensor, channel: Tensor, default: float) -> Tensor:
    """Per producer channel [C] -> per input column [K], by an edge's map; `default` for columns without a channel."""
    return torch.where(channel >= 0, values[channel.clamp(min=0)], default)


def exact_scale(
    producer: nn.Module, usable: Tensor, scale: Tensor, dtype: torch.dtype, *, powers_of_two: bool = False
) -> Tensor:
    """Returns the scale float32 [C] closest to the given one whose fold into the producer is exact in `dtype`.

    A norm's weight is stored in `dtype`, so its divided weight is rounded to `dtype`, and the scale is the quotient of
    old and new weight; the consumers' integers then absorb the difference. The rows of a linear layer have a scale of
    their own once they are quantized, so its scale is returned as it is. Unusable and dead channels get 1.

    powers_of_two: round the scale to one. Folding it then changes no bit of the products of a consumer that stays
    float: a router makes the same choices.
    """
    wanted = torch.where(usable, scale, 1.0)
    if powers_of_two:
        wanted = wanted.log2().round().exp2()
    if isinstance(producer, nn.Linear):
        return wanted
    weight = producer.get_parameter("weight").float().cpu()
    divided = (weight / wanted).to(dtype).float()
    exact = weight / divided
    return torch.where(usable & (weight != 0) & torch.isfinite(exact) & (exact > 0), exact, 1.0)


@torch.no_grad()
def apply_folds(stage: Stage, folds: Sequence[Fold]) -> list[Fold]:
    """Applies folds, verifies the stage's output, and updates the observations. Returns the folds that were applied.

    If the output changes, every fold is tried separately, and those that change the output are left out with a note.
    """
    if not folds:
        return []
    before = stage.execution.probe_output(reuse=True)
    vectors = [(parameter, parameter.clone()) for parameter in _affected_parameters(stage, folds) if parameter.ndim < 2]
    scalings: list[Scaling] = []  # of matrices, whose copies would be large
    bias_errors: dict[str, Tensor] = {}  # per producer: what its bias lost by rounding

    def restore() -> None:
        while scalings:
            scalings.pop().undo()
        for parameter, original in vectors:
            parameter.copy_(original)

    def keeps_output(candidates: Sequence[Fold]) -> bool:
        for fold in candidates:
            bias_errors[fold.edge.producer] = _fold(stage, fold, scalings)
        return max_relative_error(before, stage.execution.probe_output()) <= TOLERANCE

    applied = list(folds)
    if not keeps_output(folds):
        applied = []
        for fold in folds:
            restore()
            if keeps_output([fold]):
                applied.append(fold)
            else:
                producer = stage.checkpoint_name(fold.edge.producer)
                stage.notes.append(f"the fold out of {producer} changes the output of {stage.name} and was left out")
        restore()
        if not keeps_output(applied):
            raise InternalError(f"{stage.name}: folds that keep the output separately change it together")
    for fold in applied:
        _update_observations(stage, fold, bias_errors[fold.edge.producer])
    return applied


def _affected_parameters(stage: Stage, folds: Sequence[Fold]) -> list[nn.Parameter]:
    targets = dict.fromkeys(path for fold in folds for path in (fold.edge.producer, *fold.edge.consumers))
    return [parameter for path in targets for parameter in stage.module.get_submodule(path).parameters(recurse=False)]


@torch.no_grad()
def _fold(stage: Stage, fold: Fold, scalings: list[Scaling]) -> Tensor:
    """Changes the weights; returns float32 [C], what the producer's bias lost by rounding.

    scalings: receives those of matrices, in order.
    """
    producer = stage.module.get_submodule(fold.edge.producer)
    for parameter in producer.parameters(recurse=False):  # weight [C] or [C, K], bias [C]
        scale = fold.scale.to(parameter.device)
        if parameter.ndim == 2:
            scalings.append(scaled(parameter, scale[:, None], divide=True))
        else:
            divided = parameter / scale
            parameter.copy_(divided if isinstance(producer, nn.Linear) else _snap(divided, stage.dtype))
    for target in fold.edge.consumers:
        weight = stage.module.get_submodule(target).get_parameter("weight")
        scalings.append(scaled(weight, fold.scale_per_column(target).to(weight.device)))
    if isinstance(producer, ShiftedNorm):
        return _move_bias_error(stage, fold, producer)
    return torch.zeros_like(fold.scale)


def _move_bias_error(stage: Stage, fold: Fold, norm: ShiftedNorm) -> Tensor:
    """Rounds a norm's bias to the stage's dtype and adds the rounding error, returned [C], to the consumers' biases."""
    stored = norm.bias.to(stage.dtype).float()
    error = norm.bias - stored  # [C]
    norm.bias.copy_(stored)
    for target, channel in fold.edge.consumers.items():
        linear = stage.module.get_submodule(target)
        linear.get_parameter("bias").add_(linear.get_parameter("weight") @ channel_to_column(error, channel, 0.0))
    return error.cpu()


def _snap(divided: Tensor, dtype: torch.dtype) -> Tensor:
    """Replaces values that differ from a value of `dtype` only by float32 rounding by that value."""
    near = divided.to(dtype).float()
    return torch.where((near - divided).abs() <= SNAP_TOLERANCE * divided.abs(), near, divided)


def _update_observations(stage: Stage, fold: Fold, bias_error: Tensor) -> None:
    targets = {stage.site_at(target).source: target for target in fold.edge.consumers}
    for source, target in targets.items():
        if source in stage.observations:
            observation = stage.observations[source].rescaled(fold.scale_per_column(target))
            if bool(bias_error.any()):
                offset = channel_to_column(bias_error, fold.edge.consumers[target], 0.0)
                observation = observation.shifted(offset)
            stage.observations[source] = observation
    for name, site in stage.caches.items():
        if stage.sites[site.value].target == fold.edge.producer and name in stage.cache_observations:
            stage.cache_observations[name] = stage.cache_observations[name].rescaled(fold.scale)
