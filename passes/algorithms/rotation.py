"""Rotation of the weights of a stage, and the plan of all rotations of a model."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from vlqc.errors import Fault, UserError
from vlqc.ir.execution import Call, input_tensors
from vlqc.ir.memory import release_pages
from vlqc.ir.rotations import AppliedRotation, Rotatable, RotatableParts, RotationKind, RotationPlan, make_plan
from vlqc.ir.stage import Stage
from vlqc.ir.tensor_digest import TOLERANCE, max_relative_error
from vlqc.pipeline.pass_api import Pass, require


@dataclass(frozen=True)
class RotationPass(Pass):
    """Rotates values of one kind. What it rotates is decided for the whole model before the first stage.

    seed: of the signs of the rotations.
    """

    rotates: ClassVar[RotationKind]

    seed: int = 0

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed must be 0 or more")

    @abstractmethod
    def obstacle(self, rotatable: Rotatable, model: RotatableParts) -> str:
        """Why this pass does not rotate values of its kind; "" if it does."""

    def run(self, stage: Stage) -> bool:
        return rotate_stage(stage, self.rotates)


def plan_rotations(
    passes: Sequence[Pass], rotatable_parts: Callable[[], RotatableParts], stages: Sequence[str]
) -> RotationPlan:
    """What the passes of a pipeline rotate in a model.

    rotatable_parts: returns those of the model, called only if a pass rotates; stages: names of all stages.
    """
    rotating = [step for step in passes if isinstance(step, RotationPass)]
    if not rotating:
        return RotationPlan()
    model, chosen, obstacles = rotatable_parts(), dict[str, tuple[Rotatable, int]](), dict[str, str]()
    for step in rotating:
        for rotatable in model.parts:
            if rotatable.kind == step.rotates and rotatable.name not in chosen:
                if obstacle := step.obstacle(rotatable, model):
                    obstacles[rotatable.name] = obstacle
                else:
                    chosen[rotatable.name] = rotatable, step.seed
    untied = any(model.shares_table(rotatable) for rotatable, _ in chosen.values())
    return make_plan(chosen.values(), stages, untied_head=model.output_head if untied else "", obstacles=obstacles)


@torch.no_grad()
def rotate_stage(stage: Stage, kind: RotationKind) -> bool:
    """Rotates the parameters of a stage by its rotations of one kind. Returns whether there are any.

    The inputs of the stage are rotated already. Proof: the outputs before, on inputs that are rotated back, and then
    rotated, equal the outputs afterwards. UserError if they do not.
    """
    planned = [rotation for rotation in stage.rotations if rotation.kind == kind and not rotation.done]
    if not planned:
        return False
    expected = _rotated_output(stage.execution.probe_output(_rotated_back(stage, planned), reuse=True), planned)
    for rotation in planned:
        _rotate_parameters(stage, rotation)
    stage.rotations = tuple(replace(each, done=each.done or each.kind == kind) for each in stage.rotations)
    error = max_relative_error(expected.flatten(), stage.execution.probe_output(reuse=True).flatten())
    if not error <= TOLERANCE:
        why = f"relative error {error:.1e}, tolerance {TOLERANCE:.0e}"
        what = f"a rotation changes the output of {stage.name}"
        raise UserError(Fault(what, f"rotation of the {kind}s", why, "compile with --rotate none"))
    return True


def _rotated_back(stage: Stage, planned: Sequence[AppliedRotation]) -> Call | None:
    """The probe with unrotated inputs; None if no input is rotated by these rotations."""
    probe = stage.execution.probe
    if probe is None or not any(rotation.inputs for rotation in planned):
        return None
    tensors = dict(input_tensors(stage.module, probe.args, probe.kwargs))
    unrotated = {
        id(tensors[name]): rotation.rotation.unrotate(tensors[name]) for rotation in planned for name in rotation.inputs
    }

    def replaced(value: Any) -> Any:
        return unrotated.get(id(value), value) if isinstance(value, Tensor) else value

    args, kwargs = tree_map(replaced, (probe.args, probe.kwargs))
    return replace(probe, args=args, kwargs=kwargs)


def _rotated_output(output: Tensor, planned: Sequence[AppliedRotation]) -> Tensor:
    """output: float32 [rows, K], the first of the stage."""
    for rotation in planned:
        if 0 in rotation.outputs:
            output = rotation.rotation.rotate(output)
    return output


def _rotate_parameters(stage: Stage, rotation: AppliedRotation) -> None:
    modules = {stage.checkpoint_name(path): module for path, module in stage.module.named_modules() if path}
    changed = [(layer, module) for layer, module in modules.items() if rotation.changes(layer)]
    for layer, module in sorted(changed, key=lambda item: item[0] in rotation.norms):  # norms last: they are read
        norm = rotation.readers.get(layer)
        _apply(rotation, layer, module, modules.get(norm) if norm is not None else None)


def _apply(rotation: AppliedRotation, layer: str, module: nn.Module, norm: nn.Module | None) -> None:
    parameters = dict(module.named_parameters(recurse=False))
    norm_parameters = {} if norm is None else dict(norm.named_parameters(recurse=False))
    rotation.apply_(layer, parameters["weight"], parameters.get("bias"), norm_parameters.__getitem__)
    release_pages(*parameters.values())
