"""Rotation of the weights of a stage, with its proof."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from vlqc.errors import Fault, UserError
from vlqc.ir.execution import Call, input_tensors
from vlqc.ir.memory import release_pages
from vlqc.ir.rotations import AppliedRotation, RotationKind
from vlqc.ir.stage import Stage
from vlqc.ir.tensor_digest import TOLERANCE, absmax, is_finite, max_relative_error


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
    stage.rotations = tuple(
        rotation.as_done(_rotate_parameters(stage, rotation)) if rotation in planned else rotation
        for rotation in stage.rotations
    )
    error = max_relative_error(expected.flatten(), stage.execution.probe_output(reuse=True).flatten())
    if not error <= TOLERANCE and is_finite(expected):  # an overflow is reported where samples are observed
        why = f"relative error {error:.1e}, tolerance {TOLERANCE:.0e}"
        what = f"a rotation changes the output of {stage.name}"
        raise UserError(Fault(what, f"rotation of the {kind}", why, "compile with --rotate none"))
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


def _rotate_parameters(stage: Stage, rotation: AppliedRotation) -> dict[str, tuple[float, float]]:
    """Returns `AppliedRotation.absmax`."""
    modules = {stage.checkpoint_name(path): module for path, module in stage.module.named_modules() if path}
    changed = [(layer, module) for layer, module in modules.items() if rotation.changes(layer)]
    changes = dict[str, tuple[float, float]]()
    for layer, module in sorted(changed, key=lambda item: item[0] in rotation.norms):  # norms last: they are read
        norm = rotation.readers.get(layer)
        changes |= _apply(rotation, layer, module, modules.get(norm) if norm is not None else None)
    return changes


def _apply(
    rotation: AppliedRotation, layer: str, module: nn.Module, norm: nn.Module | None
) -> dict[str, tuple[float, float]]:
    """Rotates the parameters of one layer. Returns max |tensor| of the rotated ones, by name, before and after."""
    parameters = dict(module.named_parameters(recurse=False))
    norm_parameters = {} if norm is None else dict(norm.named_parameters(recurse=False))
    rotated = {name: tensor for name, tensor in parameters.items() if rotation.rotates(layer, name)}
    before = {name: absmax(tensor) for name, tensor in rotated.items()}
    rotation.apply_(layer, parameters["weight"], parameters.get("bias"), norm_parameters.__getitem__)
    changes = {f"{layer}.{name}": (before[name], absmax(tensor)) for name, tensor in rotated.items()}
    release_pages(*parameters.values())
    return changes
