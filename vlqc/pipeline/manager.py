"""Runs passes over a stage and checks after each one what it changed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vlqc.errors import InternalError, VlqcError, third_party_fix
from vlqc.import_paths import import_path
from vlqc.ir.memory import release_unused_memory
from vlqc.ir.printer import print_stage
from vlqc.ir.stage import Stage
from vlqc.ir.tensor_cache import TensorVersion
from vlqc.ir.tensor_digest import TOLERANCE, fingerprints, max_relative_error
from vlqc.ir.verifier import check
from vlqc.pipeline.pass_api import Pass


@dataclass
class PassManager:
    """Runs passes over a stage, in order.

    After each pass it verifies the stage, checks that the pass reported its changes truthfully (`Pass.run`), that an
    analysis changed no tensor, and that a third-party rewrite did not change the output of the stage.

    Attributes:
        verify: False skips all checks.
        before: callback (stage, pass), called before each pass.
        after: callback (stage, index of the pass, pass), called after each pass and its checks.
        seconds: name of each pass -> its run time so far, without the checks.
    """

    passes: Sequence[Pass]
    verify: bool = True
    after: Callable[[Stage, int, Pass], None] = lambda stage, index, step: None
    before: Callable[[Stage, Pass], None] = lambda stage, step: None
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, stage: Stage) -> None:
        """Modifies the stage in place. Raises InternalError if a check fails."""
        state = _State.of(stage) if self.verify else None
        for index, step in enumerate(self.passes):
            self.before(stage, step)
            checks_output = self.verify and _must_keep_output(stage, step)
            output = _probe_output(stage) if checks_output else None
            started = time.perf_counter()
            changed = _run(step, stage)
            self.seconds[step.name] = self.seconds.get(step.name, 0.0) + time.perf_counter() - started
            if state is not None:
                _check_valid(stage, step)
                state = _check_changes(stage, step, changed, state)
            if output is not None:
                _check_output(stage, step, output)
            self.after(stage, index, step)
            release_unused_memory()


@dataclass(frozen=True)
class _State:
    """A stage at one time: the digest of each parameter and buffer, and the text of everything else."""

    digests: dict[str, int]
    text: str
    versions: dict[str, TensorVersion] = field(compare=False)

    @classmethod
    def of(cls, stage: Stage, earlier: "_State | None" = None) -> "_State":
        """earlier: a state whose digests are reused for tensors that PyTorch's version counter shows unmodified.

        Third-party rewrites may write through `Tensor.data`, which it does not count.
        """
        tensors = {**dict(stage.module.named_parameters()), **dict(stage.module.named_buffers())}
        reused = {}
        if earlier is not None:
            unmodified = [
                name for name in tensors if name in earlier.versions and earlier.versions[name].matches(tensors[name])
            ]
            reused = {name: earlier.digests[name] for name in unmodified}
        computed = fingerprints({name: tensor for name, tensor in tensors.items() if name not in reused})
        versions = {name: TensorVersion.of(tensor) for name, tensor in tensors.items()}
        return cls(reused | computed, print_stage(stage, tensors=False), versions)


def _run(step: Pass, stage: Stage) -> bool:
    """Runs the pass; an exception of a third-party pass gets a note with the stage and the import path of the pass."""
    try:
        changed = step.run(stage)
    except Exception as error:
        if not isinstance(error, VlqcError) and not _is_builtin(step):
            error.add_note(f"on stage {stage.name}: {third_party_fix(import_path(type(step)))}")
        raise
    if not _is_builtin(step):
        stage.execution.forget_probe_output()  # it may have written through Tensor.data
    return changed


def _check_valid(stage: Stage, step: Pass) -> None:
    if faults := check(stage):
        lines = "\n  ".join(faults)
        raise _pass_error(step, f"{stage.name} is not valid after {step.name}:\n  {lines}\n{print_stage(stage)}")


def _check_changes(stage: Stage, step: Pass, changed: bool, before: _State) -> _State:
    """Compares the stage with its state before the pass. Returns the state after it."""
    if not isinstance(changed, bool):
        raise _pass_error(step, f"{step.name}: run returned {changed!r} on {stage.name}; it must return True or False")
    after = _State.of(stage, before if step.kind == "analysis" or _is_builtin(step) else None)
    if step.kind == "analysis" and after.digests != before.digests:
        names = sorted({*after.digests, *before.digests})
        modified = ", ".join(name for name in names if after.digests.get(name) != before.digests.get(name))
        raise _pass_error(step, f"{step.name} is an analysis but changed {modified} of {stage.name}")
    if changed != (after != before):
        what = "returned True but changed nothing" if changed else "returned False but changed something"
        raise _pass_error(step, f"{step.name} {what} on {stage.name}")
    return after


def _must_keep_output(stage: Stage, step: Pass) -> bool:
    """Whether the output before and after the pass is compared: third-party rewrites of stages in float.

    The built-in rewrites check each fold themselves and undo those that change the output.
    """
    has_probe = stage.execution.probe is not None
    return not _is_builtin(step) and step.kind == "rewrite" and has_probe and _is_float(stage)


def _check_output(stage: Stage, step: Pass, before: Tensor) -> None:
    """before: float32 [numel], the output for the probe. A pass that lowers linear layers may change the output."""
    if not _is_float(stage):
        return
    after = _probe_output(stage)
    error = max_relative_error(before, after) if after.shape == before.shape else float("inf")
    if error > TOLERANCE:
        raise _pass_error(
            step,
            f"{step.name} is a rewrite but changed the output of {stage.name} for the probe: "
            f"relative error {error:.1e}, tolerance {TOLERANCE:.0e}",
        )


def _probe_output(stage: Stage) -> Tensor:
    return stage.execution.probe_output(reuse=True).flatten()


def _is_float(stage: Stage) -> bool:
    return not any(stage.is_lowered(site) for site in stage.sites.values())


def _is_builtin(step: Pass) -> bool:
    return type(step).__module__.partition(".")[0] == "vlqc"


def _pass_error(step: Pass, message: str) -> InternalError:
    fix = () if _is_builtin(step) else (third_party_fix(import_path(type(step))),)
    return InternalError(message, *fix)
