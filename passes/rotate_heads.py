"""rotate-heads: rotate the values of attention heads between the layers before and after attention.

Source: QuaRot (arXiv 2404.00456). Attention mixes rows of values and keeps their channels, so a rotation of every head
is absorbed by the value projection and the output projection.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlqc.ir.rotations import Rotatable, RotatableParts, RotationKind
from vlqc.ir.stage import Stage
from vlqc.passes.algorithms.rotation import rotate_stage
from vlqc.passes.rotate_residual import RotateResidual
from vlqc.pipeline.rotation_plan import RotationPass


@dataclass(frozen=True)
class RotateHeads(RotationPass):
    """Rotates the values of all attention heads of a layer alike."""

    name: ClassVar[str] = "rotate-heads"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "rewrite"
    summary: ClassVar[str] = "rotate the values of attention heads, so that their outliers spread over a head"
    before: ClassVar[tuple[str, ...]] = RotateResidual.before
    rotates: ClassVar[RotationKind] = RotationKind.HEADS

    def obstacle(self, rotatable: Rotatable, model: RotatableParts) -> str:
        return rotatable.obstacle

    def run(self, stage: Stage) -> bool:
        return rotate_stage(stage, self.rotates)
