"""The base class of all passes. Imports neither torch nor the rest of vlqc."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from vlqc.ir.stage import Stage
    from vlqc.targets.schemes import Scheme


@dataclass(frozen=True)
class Pass:
    """One transformation of one stage. Subclasses are frozen dataclasses whose fields are the options of the pass.

    Attributes:
        name: kebab-case name in pipeline texts.
        kind: an "analysis" measures and decides and leaves every tensor as it is; a "rewrite" changes weights, modules
            or the graph.
        summary: one line for `vlqc passes`.
        after: names of passes that must run before this one.
        before: names of passes that must not run before this one.
        changes_inputs: whether linear layers read other values afterwards, so that adapters trained on the float model
            do not fit. Rotations say so themselves.
    """

    name: ClassVar[str]
    kind: ClassVar[Literal["analysis", "rewrite"]]
    summary: ClassVar[str]
    after: ClassVar[tuple[str, ...]] = ()
    before: ClassVar[tuple[str, ...]] = ()
    changes_inputs: ClassVar[bool] = False

    def needs_samples(self, schemes: "Collection[Scheme]") -> bool:
        """Whether the pass reads calibration samples, or what was observed of them, when layers have these schemes.

        By default, whether it runs after insert-observers. A pipeline of passes that need none compiles a checkpoint
        from its weights alone. Any pass may run the probe, which is then a sample of random numbers.
        """
        return "insert-observers" in self.after

    def run(self, stage: "Stage") -> bool:
        """Modifies `stage` in place.

        Returns whether it changed a weight, a module, or anything that the text of the stage shows; notes,
        sensitivities and outputs do not count.
        """
        raise TypeError(f"{type(self).__name__} does not implement run(stage) -> bool")


def require(condition: bool, message: str) -> None:
    """Raises ValueError(message) unless the condition holds.

    For `__post_init__` of a pass: `parse_pipeline` reports the ValueError as a fault of the pipeline text.
    """
    if not condition:
        raise ValueError(message)
