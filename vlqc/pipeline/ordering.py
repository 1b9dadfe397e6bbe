"""Checks the order of the passes in a pipeline."""

from collections.abc import Sequence

from vlqc.errors import Fault, UserError
from vlqc.import_paths import import_path
from vlqc.pipeline.pass_api import Pass
from vlqc.targets.schemes import Scheme

CALIBRATION = "insert-observers"  # forwards the calibration samples through the stage
SENSITIVITY = "measure-sensitivity"  # measures what the precision search minimizes
LOWERING = "lower-linears"
SETS_STAGE_OUTPUTS = (CALIBRATION, "propagate-quantized")  # compute the inputs of the next stage
CHANGES_STAGE_OUTPUTS = ("rotate-residual",)


def check_order(passes: Sequence[Pass], *, precision_search: bool = False) -> None:
    """Checks `Pass.after` and `Pass.before` of every pass, and that the passes every compilation needs are there.

    Args:
        precision_search: whether --fallback auto chooses the schemes, from what SENSITIVITY measures.

    Raises:
        UserError: with every fault.
    """
    faults = [*_duplicate_names(passes), *_order_faults(passes)]
    names = {step.name for step in passes}
    needing = passes_needing_samples(passes)
    if needing and CALIBRATION not in names:
        why = f"it runs the calibration samples through each stage, and {needing[0].name} needs what it observes"
        faults.append(Fault(f"the pipeline lacks {CALIBRATION}", "--pipeline", why, f"start it with {CALIBRATION}"))
    if precision_search and SENSITIVITY not in names:
        why, fix = "--fallback auto uses its result", f"put {SENSITIVITY} before {LOWERING}, or omit --fallback auto"
        faults.append(Fault(f"the pipeline lacks {SENSITIVITY}", "--pipeline", why, fix))
    if faults:
        raise UserError(*faults)


def passes_needing_samples(passes: Sequence[Pass]) -> list[Pass]:
    """Those of a pipeline that need calibration samples, for the schemes that its passes assign."""
    schemes: list[Scheme] = []
    for step in passes:
        if hasattr(step, "choose"):  # one that does not say which schemes it chooses may choose any
            schemes += getattr(step, "schemes", tuple(Scheme))
    return [step for step in passes if step.needs_samples(schemes)]


def passes_for_stage_outputs(passes: Sequence[Pass]) -> list[Pass]:
    """The passes up to the last one that sets the stage's outputs: enough to compute the inputs of the next stage."""
    names = (*SETS_STAGE_OUTPUTS, *CHANGES_STAGE_OUTPUTS)
    last = max((index for index, step in enumerate(passes) if step.name in names), default=-1)
    return list(passes[: last + 1])


def _duplicate_names(passes: Sequence[Pass]) -> list[Fault]:
    faults, classes = [], dict[str, type[Pass]]()
    for step in passes:
        first = classes.setdefault(step.name, type(step))
        if first is not type(step):
            why = f"{import_path(first)} and {import_path(type(step))} have the same `name`"
            faults.append(Fault(f"two passes are named {step.name}", "--pipeline", why, "rename one of them"))
    return faults


def _order_faults(passes: Sequence[Pass]) -> list[Fault]:
    faults = []
    for index, step in enumerate(passes):
        earlier = {other.name for other in passes[:index]}
        for name in step.after:
            if name not in earlier:
                faults.append(Fault(f"{step.name} needs {name} before it", "--pipeline", fix=f"put {name} before it"))
        for name in step.before:
            if name in earlier:
                what, why = f"{step.name} comes after {name}", f"{step.name} must run before {name}"
                faults.append(Fault(what, "--pipeline", why, f"move {step.name} before {name}"))
    return faults
