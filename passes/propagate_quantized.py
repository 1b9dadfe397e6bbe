"""propagate-quantized: calibrate later stages on the outputs of the quantized stage."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlqc.ir.stage import Stage
from vlqc.pipeline.pass_api import Pass


@dataclass(frozen=True)
class PropagateQuantized(Pass):
    """Runs the samples through the lowered stage, so that its outputs replace those of the float stage.

    It costs a second forward pass over all samples of every stage.
    """

    name: ClassVar[str] = "propagate-quantized"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    summary: ClassVar[str] = "pass the outputs of the quantized stage to later stages instead of the float stage's"
    after: ClassVar[tuple[str, ...]] = ("insert-observers", "lower-linears")

    def run(self, stage: Stage) -> bool:
        stage.execution.forward()
        return False
