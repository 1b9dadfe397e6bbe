"""propagate-quantized: calibrate later stages on the outputs of the quantized stage."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal

from vlqc.ir.stage import Stage
from vlqc.pipeline.pass_api import Pass
from vlqc.targets.schemes import Scheme


@dataclass(frozen=True)
class PropagateQuantized(Pass):
    """Runs the samples through the lowered stage, so that its outputs replace those of the float stage.

    It costs a second forward pass over all samples of every stage.
    """

    name: ClassVar[str] = "propagate-quantized"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    summary: ClassVar[str] = "pass the outputs of the quantized stage to later stages instead of the float stage's"
    after: ClassVar[tuple[str, ...]] = ("insert-observers", "lower-linears")

    def needs_samples(self, schemes: Collection[Scheme]) -> bool:
        return True

    def run(self, stage: Stage) -> bool:
        stage.execution.forward()
        return False
