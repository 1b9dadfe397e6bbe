"""The passes that rotate, and their plan: what they rotate is decided for a whole model before its first stage."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from vlqc.errors import Fault, UserError
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.model_structure import rotatable_parts
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.ir.rotations import Rotatable, RotatableParts, RotationKind, RotationPlan, make_plan
from vlqc.pipeline.pass_api import Pass, require

MOST_UNBALANCED = 64.0  # ratio of the largest to the smallest quotient of a channel's values and weights
MOST_SEEDS = 10**18  # the text of a stage has numbers of up to 18 digits


@dataclass(frozen=True)
class RotationPass(Pass):
    """Rotates values of one kind.

    seed: of the signs of the rotations.
    """

    rotates: ClassVar[RotationKind]

    seed: int = 0

    def __post_init__(self) -> None:
        require(0 <= self.seed < MOST_SEEDS, "seed must be 0 or more, with at most 18 digits")

    @abstractmethod
    def obstacle(self, rotatable: Rotatable, model: RotatableParts) -> str:
        """Why this pass does not rotate values of its kind; "" if it does."""


def rotate_model(model: StreamedModel, passes: Sequence[Pass]) -> RotationPlan:
    """Plans what the passes of a pipeline rotate. From now on, the tensors outside stages are read rotated."""
    plan = _plan(model, [step for step in passes if isinstance(step, RotationPass)])
    model.rotate(plan, stages=False)
    return plan


def _require_one_of_each(passes: Sequence[RotationPass]) -> None:
    """UserError for two passes that rotate the same values."""
    names = [step.name for step in passes]
    if repeated := [name for name in names if names.count(name) > 1]:
        why = "values are rotated once"
        raise UserError(Fault(f"{repeated[0]} occurs {len(repeated)} times", "--pipeline", why, "keep one of them"))


def _is_unbalanced(checkpoint: Checkpoint, rotatable: Rotatable) -> bool:
    """Whether heads have channels whose values are large where the weights that read them are small.

    A rotation mixes the channels of a head, so that the rounding error of the largest values is multiplied by the
    largest weights. Smoothing balances such channels as long as they are not mixed.
    """
    ((writer, starts),) = rotatable.writers.items()
    values = checkpoint.estimate(f"{writer}.weight").float().norm(dim=1)  # per output
    heads = torch.stack([values[start : start + rotatable.size] for start in starts])  # [heads, channels]
    for reader in rotatable.readers:
        weights = checkpoint.estimate(f"{reader}.weight").float().square().sum(0)  # per input
        energy = weights.view(len(starts), -1, rotatable.size).mean(1)  # heads that share values are neighbors
        quotients = (heads / energy.sqrt())[(heads > 0) & (energy > 0)]
        if len(quotients) and float(quotients.amax() / quotients.amin()) > MOST_UNBALANCED:
            return True
    return False


def _plan(model: StreamedModel, passes: Sequence[RotationPass]) -> RotationPlan:
    if not passes:
        return RotationPlan()
    _require_one_of_each(passes)
    parts, chosen, obstacles = rotatable_parts(model), dict[str, tuple[Rotatable, int]](), dict[str, str]()
    unbalanced: list[str] = []
    for step in passes:
        for rotatable in parts.parts:
            # A norm over the outputs of one layer, such as that of a single key head, is no residual stream.
            is_read = rotatable.readers or len(rotatable.writers) > 1
            if rotatable.kind == step.rotates and rotatable.name not in chosen and is_read:
                if obstacle := step.obstacle(rotatable, parts):
                    obstacles[rotatable.name] = obstacle
                elif rotatable.kind == RotationKind.HEADS and _is_unbalanced(model.checkpoint, rotatable):
                    unbalanced.append(rotatable.name)
                else:
                    chosen[rotatable.name] = rotatable, step.seed
    obstacles = {name: obstacle for name, obstacle in obstacles.items() if name not in chosen}
    untied = any(parts.shares_table(rotatable) for rotatable, _ in chosen.values())
    head = parts.output_head if untied else ""
    plan = make_plan(chosen.values(), list(model.stages), untied_head=head, obstacles=obstacles)
    return replace(plan, unbalanced_heads=tuple(unbalanced))
