"""propagate-quantized: later stages are calibrated on what this one returns once it is quantized."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlqc.ir.stage import Stage
from vlqc.pipeline.pass_api import Pass


@dataclass(frozen=True)
class PropagateQuantized(Pass):
    """Runs the samples through the lowered stage, so that the outputs it hands on are those of its integers.

    It costs a second run of every stage; without it the outputs are those of the float stage.
    """

    name: ClassVar[str] = "propagate-quantized"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    summary: ClassVar[str] = "hand the outputs of the quantized stage on to later ones, in place of the float stage's"
    after: ClassVar[tuple[str, ...]] = ("insert-observers", "lower-linears")

    def run(self, stage: Stage) -> bool:
        stage.execution.forward()
        return False
