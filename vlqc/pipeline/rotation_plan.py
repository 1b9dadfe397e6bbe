"""The passes that rotate, and their plan: what they rotate is decided for a whole model before its first stage."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from vlqc.errors import Fault, UserError
from vlqc.frontend.model_structure import rotatable_parts
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.ir.rotations import Rotatable, RotatableParts, RotationKind, RotationPlan, make_plan
from vlqc.pipeline.pass_api import Pass, require

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


def _plan(model: StreamedModel, passes: Sequence[RotationPass]) -> RotationPlan:
    if not passes:
        return RotationPlan()
    _require_one_of_each(passes)
    parts, chosen, obstacles = rotatable_parts(model), dict[str, tuple[Rotatable, int]](), dict[str, str]()
    for step in passes:
        for rotatable in parts.parts:
            if rotatable.kind == step.rotates and rotatable.name not in chosen:
                if obstacle := step.obstacle(rotatable, parts):
                    obstacles[rotatable.name] = obstacle
                else:
                    chosen[rotatable.name] = rotatable, step.seed
    obstacles = {name: obstacle for name, obstacle in obstacles.items() if name not in chosen}
    untied = any(parts.shares_table(rotatable) for rotatable, _ in chosen.values())
    head = parts.output_head if untied else ""
    return make_plan(chosen.values(), list(model.stages), untied_head=head, obstacles=obstacles)
