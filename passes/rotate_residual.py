"""rotate-residual: rotate residual streams, which spreads their outliers over all channels.

Source: QuaRot (arXiv 2404.00456), without its rotations at run time. A stream is what norms read and several layers
write. Its rotation is absorbed by the layers around it (`ir.rotations`), so that formats and engines do not change.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlqc.formatting import format_bytes
from vlqc.ir.rotations import Rotatable, RotatableParts, RotationKind
from vlqc.ir.stage import Stage
from vlqc.passes.algorithms.rotation import rotate_stage
from vlqc.pipeline.rotation_plan import RotationPass

FLOAT_BYTES = 2  # of a weight of the output head, which is emitted as bfloat16 or float16


@dataclass(frozen=True)
class RotateResidual(RotationPass):
    """Rotates every residual stream whose operations all allow it; tensors outside the stages when they are read.

    untie: also rotate a stream whose output head shares the embedding's weight. The weight of the final norm must be
    folded into the head, which is then stored separately.
    """

    name: ClassVar[str] = "rotate-residual"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "rewrite"
    summary: ClassVar[str] = "rotate residual streams, so that their outliers spread over all channels"
    before: ClassVar[tuple[str, ...]] = (
        "split-window-attention", "insert-observers", "shift-norms", "smooth-m2", "smooth-m4", "quantize-activations",
        "quantize-weights", "lower-linears",
    )  # fmt: skip
    rotates: ClassVar[RotationKind] = RotationKind.RESIDUAL

    untie: bool = False

    def obstacle(self, rotatable: Rotatable, model: RotatableParts) -> str:
        if rotatable.obstacle:
            return rotatable.obstacle
        if model.shares_table(rotatable) and not self.untie:
            more = format_bytes(FLOAT_BYTES * model.head_size)
            shared = f"{model.output_head} shares the weight of {model.embedding}"
            return f"{shared}; --rotate all stores both separately, {more} more"
        return ""

    def run(self, stage: Stage) -> bool:
        return rotate_stage(stage, self.rotates)
