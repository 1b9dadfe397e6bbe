"""What a pass is, and who runs passes: what one says that it did is compared with what is there."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vlqc.errors import InternalError, VlqcError, third_party_fix
from vlqc.ir.memory import release_unused_memory
from vlqc.ir.printer import print_stage
from vlqc.ir.stage import Stage
from vlqc.ir.tensor_cache import Mark
from vlqc.ir.tensor_digest import TOLERANCE, difference, fingerprints
from vlqc.ir.verifier import check
from vlqc.pipeline.pass_api import Pass
from vlqc.pipeline.plugins import import_path


@dataclass
class PassManager:
    """Runs passes over a stage; after each: verifies the stage, holds the pass to its word, times it, shows it.

    after: called with (stage, number of the pass from 0, pass) once the checks have passed (dumps hang here).
    """

    passes: Sequence[Pass]
    verify: bool = True
    after: Callable[[Stage, int, Pass], None] = lambda stage, number, done: None
    before: Callable[[Stage, Pass], None] = lambda stage, coming: None
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, stage: Stage) -> None:
        """Raises InternalError if a pass leaves an invalid stage, or lies about what it changed."""
        known = self._evidence(stage)
        for number, step in enumerate(self.passes):
            self.before(stage, step)
            promised = self._output_to_keep(stage, step)
            started = time.perf_counter()
            changed = _run(step, stage)
            self.seconds[step.name] = self.seconds.get(step.name, 0.0) + time.perf_counter() - started
            if self.verify:
                if faults := check(stage):
                    listed = "\n  ".join(faults)
                    said = f"{stage.name} is not valid after {step.name}:\n  {listed}\n{print_stage(stage)}"
                    raise _broken(step, said)
                known = self._hold_to_word(stage, step, changed, known)
                _hold_to_output(stage, step, promised)
            self.after(stage, number, step)
            release_unused_memory()

    def _evidence(self, stage: Stage, trusted: "_Evidence | None" = None) -> "_Evidence":
        """trusted: of before an analysis: tensors that PyTorch knows to be untouched since keep their digests."""
        if not self.verify:
            return _Evidence({}, "", {})
        tensors = {**dict(stage.module.named_parameters()), **dict(stage.module.named_buffers())}
        marks = {name: Mark.of(it) for name, it in tensors.items()}
        known = (
            {}
            if trusted is None
            else {it: trusted.weights[it] for it in tensors if trusted.stands_for(it, tensors[it])}
        )
        weights = known | fingerprints({name: it for name, it in tensors.items() if name not in known})
        return _Evidence(weights, print_stage(stage, tensors=False), marks)

    def _hold_to_word(self, stage: Stage, step: Pass, changed: bool, known: "_Evidence") -> "_Evidence":
        """Returns the evidence after the pass, which is the evidence before the next one."""
        if not isinstance(changed, bool):
            raise _broken(step, f"{step.name}: run returned {changed!r}, in {stage.name}; return True or False")
        now = self._evidence(stage, known if step.kind == "analysis" else None)
        if step.kind == "analysis" and now.weights != known.weights:
            names = sorted({*now.weights, *known.weights})
            touched = [name for name in names if now.weights.get(name) != known.weights.get(name)]
            raise _broken(step, f"{step.name} is an analysis but changed {', '.join(touched)} of {stage.name}")
        if changed != (now != known):
            says = "changed something but says it did not" if not changed else "says it changed something but did not"
            raise _broken(step, f"{step.name} {says}, in {stage.name}")
        return now

    def _output_to_keep(self, stage: Stage, step: Pass) -> Tensor | None:
        """float32 [rows * K], what the stage returns for its probe: of stages in float, before a stranger's rewrite.

        vlqc's own rewrites prove themselves, fold by fold, and undo what does not hold.
        """
        wanted = self.verify and not _is_own(step) and step.kind == "rewrite"
        return (
            stage.execution.probe_output().flatten()
            if wanted and stage.execution.probe is not None and _is_float(stage)
            else None
        )


def _hold_to_output(stage: Stage, step: Pass, before: Tensor | None) -> None:
    """InternalError if a rewrite changed what the stage computes; one that lowers linears is there to do so."""
    if before is None or not _is_float(stage):
        return
    after = stage.execution.probe_output().flatten()
    found = difference(before, after) if after.shape == before.shape else float("inf")
    if found > TOLERANCE:
        raise _broken(
            step,
            f"{step.name} is a rewrite but changed what {stage.name} computes: its output for the probe deviates by "
            f"{found:.1e}, {TOLERANCE:.0e} is rounding",
        )


def _is_float(stage: Stage) -> bool:
    return not any(stage.is_lowered(site) for site in stage.sites.values())


def _run(step: Pass, stage: Stage) -> bool:
    """A pass that breaks says where: its own traceback names neither the stage nor who wrote it."""
    try:
        return step.run(stage)
    except Exception as error:
        if not isinstance(error, VlqcError) and not _is_own(step):
            error.add_note(f"on stage {stage.name}: {third_party_fix(import_path(type(step)))}")
        raise


def _broken(step: Pass, promise: str) -> InternalError:
    return InternalError(promise) if _is_own(step) else InternalError(promise, third_party_fix(import_path(type(step))))


def _is_own(step: Pass) -> bool:
    return type(step).__module__.partition(".")[0] == "vlqc"


@dataclass(frozen=True)
class _Evidence:
    """Digests of all weights, the text of everything else; per weight: which tensor, where, changed how often."""

    weights: dict[str, int]
    text: str
    marks: dict[str, Mark] = field(compare=False)

    def stands_for(self, name: str, tensor: Tensor) -> bool:
        """Whether the tensor of this name was the same one, and nothing was written to it since."""
        return name in self.marks and self.marks[name].is_of(tensor)
