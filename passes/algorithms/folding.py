"""Folding a per-channel scale: out of a producer, into its consumers, with a proof that the stage computes the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlqc.errors import InternalError
from vlqc.ir.execution import exact_bfloat16
from vlqc.ir.stage import Edge, Stage
from vlqc.ir.tensor_digest import TOLERANCE as TOLERANCE
from vlqc.ir.tensor_digest import difference as difference
from vlqc.kernels_ref.norm import ShiftedNorm


@dataclass(frozen=True)
class Fold:
    """An edge and its scale float32 [C]: the producer's channels are divided, the consumers' columns multiplied."""

    edge: Edge
    scale: Tensor

    def columns(self, target: str) -> Tensor:
        """float32 [K]: by what the columns of a consumer are multiplied; 1 where no usable channel arrives."""
        return per_column(self.scale, self.edge.consumers[target], 1.0)


def per_column(values: Tensor, channel: Tensor, otherwise: float) -> Tensor:
    """Per producer channel [C] -> per input column [K], by an edge's map; `otherwise` where no channel arrives."""
    return torch.where(channel >= 0, values[channel.clamp(min=0)], otherwise)


def representable(producer: nn.Module, usable: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale float32 [C] nearest to the given one that folds without rounding.

    A norm's weight is emitted in `dtype`. Choosing the divided weight among the values of dtype, and the scale as the
    quotient of old and new weight, makes the consumers' integers absorb what rounding would lose. A Linear's rows
    keep their own scale when quantized, so nothing is lost there. Unusable and dead channels get 1.
    """
    wanted = torch.where(usable, scale, 1.0)
    if isinstance(producer, nn.Linear):
        return wanted
    weight = producer.get_parameter("weight").float().cpu()
    divided = (weight / wanted).to(dtype).float()
    exact = weight / divided
    return torch.where(usable & (weight != 0) & torch.isfinite(exact) & (exact > 0), exact, 1.0)


@torch.no_grad()
def apply(stage: Stage, folds: Sequence[Fold]) -> list[Fold]:
    """Folds everything, proves that the stage still computes the same, and corrects the observations.

    The proof compares the stage's output for its probe call. If it fails, every fold is tried alone and those that
    change the output are left out, with a note; the others are returned.
    """
    if not folds:
        return []
    before = stage.execution.probe_output().flatten()
    originals = [(parameter, _copy(parameter)) for parameter in _changed_by(stage, folds)]
    lost: dict[str, Tensor] = {}  # by producer: what its bias lost when it was rounded

    def restore() -> None:
        for parameter, original in originals:
            parameter.copy_(original)

    def holds(some: Sequence[Fold]) -> bool:
        for fold in some:
            lost[fold.edge.producer] = _fold(stage, fold)
        return difference(before, stage.execution.probe_output().flatten()) <= TOLERANCE

    proven = list(folds)
    if not holds(folds):
        proven = []
        for fold in folds:
            restore()
            if holds([fold]):
                proven.append(fold)
            else:
                producer = stage.checkpoint_name(fold.edge.producer)
                stage.notes.append(f"the fold out of {producer} changes the output of {stage.name} and was left out")
        restore()
        if not holds(proven):
            raise InternalError(f"{stage.name}: folds that hold alone do not hold together")
    for fold in proven:
        _correct_observations(stage, fold, lost[fold.edge.producer])
    return proven


def _changed_by(stage: Stage, folds: Sequence[Fold]) -> list[nn.Parameter]:
    """Every parameter that folding changes, once."""
    targets = dict.fromkeys(path for fold in folds for path in (fold.edge.producer, *fold.edge.consumers))
    return [parameter for path in targets for parameter in stage.module.get_submodule(path).parameters(recurse=False)]


def _copy(parameter: Tensor) -> Tensor:
    """The same values, in half the memory where bfloat16 holds them, as it does those of most checkpoints."""
    half = exact_bfloat16(parameter)
    return parameter.clone() if half is None else half


@torch.no_grad()
def _fold(stage: Stage, fold: Fold) -> Tensor:
    """Changes the weights; float32 [C]: what the producer now adds too little, because its bias was rounded."""
    producer = stage.module.get_submodule(fold.edge.producer)
    for parameter in producer.parameters(recurse=False):  # weight [C] or [C, K], bias [C]
        scale = fold.scale.to(parameter.device)
        divided = parameter / (scale if parameter.ndim == 1 else scale[:, None])
        parameter.copy_(divided if isinstance(producer, nn.Linear) else _snapped(divided, stage.dtype))
    for target in fold.edge.consumers:
        weight = stage.module.get_submodule(target).get_parameter("weight")
        weight.mul_(fold.columns(target).to(weight.device))
    if isinstance(producer, ShiftedNorm):
        return _hand_over_rounding(stage, fold, producer)
    return torch.zeros_like(fold.scale)


def _hand_over_rounding(stage: Stage, fold: Fold, norm: ShiftedNorm) -> Tensor:
    """Rounds a norm's bias to the dtype in which it is emitted; the consumers' biases take what that loses, [C]."""
    stored = norm.bias.to(stage.dtype).float()
    lost = norm.bias - stored  # [C]
    norm.bias.copy_(stored)
    for target, channel in fold.edge.consumers.items():
        linear = stage.module.get_submodule(target)
        linear.get_parameter("bias").add_(linear.get_parameter("weight") @ per_column(lost, channel, 0.0))
    return lost.cpu()


def _snapped(divided: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of `dtype` that float32's rounding missed by a bit become what they are; all others stay."""
    near = divided.to(dtype).float()
    return torch.where((near - divided).abs() <= 2**-22 * divided.abs(), near, divided)


def _correct_observations(stage: Stage, fold: Fold, lost: Tensor) -> None:
    targets = {stage.site_at(target).source: target for target in fold.edge.consumers}
    for source, target in targets.items():
        if source in stage.observations:
            seen = stage.observations[source].rescaled(fold.columns(target))
            if bool(lost.any()):
                seen = seen.shifted(per_column(lost, fold.edge.consumers[target], 0.0))
            stage.observations[source] = seen
