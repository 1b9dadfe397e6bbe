"""assign-precision: choose one scheme per group of linear layers, within what the target engine accepts."""

import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from vlqc.families.qwen2_5_vl import fused_group, stays_float_in_reference
from vlqc.ir.stage import Site, Stage
from vlqc.pipeline.pass_api import Pass, require
from vlqc.targets.rules import supported_schemes, target_supporting
from vlqc.targets.schemes import Scheme
from vlqc.targets.target import parse_target

INT4_ROW_MULTIPLE = 8  # the int4 matmul operator requires a multiple of 8 output features


@dataclass(frozen=True)
class AssignPrecision(Pass):
    """Sets `scheme`, `group_size` and `reason` of every site; sites that share an input get the same scheme.

    scheme: the default scheme of all groups.
    group_size: number of input columns that share a scale in 4-bit weights.
    target: engine or engines whose rules apply.
    scope: `engine` uses 4-bit weights only in layers where the target runs them, `all` in every layer.
    fallback: `reference` leaves the layers that the reference script excludes in float (alias: `seed`), `none` only
        those that the engine cannot run quantized.
    exclude: globs of layers that stay float.
    include: globs of layers that are quantized in spite of the reference exclusions; `exclude` takes precedence.
    """

    name: ClassVar[str] = "assign-precision"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    summary: ClassVar[str] = "choose a scheme per group, within what the target engine accepts"
    before: ClassVar[tuple[str, ...]] = ("quantize-activations", "quantize-weights", "lower-linears")

    scheme: Literal["W8A8", "W8A8_DYNAMIC", "W4A8_DYNAMIC", "FLOAT"] = "W8A8"
    group_size: int = 64
    target: str = "both"
    scope: Literal["engine", "all"] = "engine"
    fallback: Literal["reference", "none"] = field(default="reference", metadata={"aliases": {"seed": "reference"}})
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self.group_size >= 1, "group_size must be 1 or more")
        parse_target(self.target)

    def run(self, stage: Stage) -> bool:
        changed = False
        for members in stage.groups().values():
            decision = self.choose(members)
            group_size = self.group_size if decision.scheme == Scheme.W4A8_DYNAMIC else None
            for site in members:
                before = (site.scheme, site.group_size, site.reason)
                site.scheme, site.group_size, site.reason = decision.scheme, group_size, decision.reason
                changed |= before != (site.scheme, site.group_size, site.reason)
            if decision.note:
                stage.notes.append(decision.note)
        return changed

    def choose(self, members: list[Site]) -> "Decision":
        """Returns the common scheme of sites that share an input, with the reason if it is not the default scheme.

        The group is FLOAT if the engine fuses a member with a layer outside the list: their scales would differ.
        """
        excluded = self._excluded(members)
        if excluded is not None:
            return excluded
        names = {site.name for site in members}
        missing = sorted({other for name in names for other in fused_group(name)} - names)
        if missing:
            reason = f"the engine fuses it with {', '.join(missing)}, which reads another input"
            return Decision(Scheme.FLOAT, reason, f"{layer_pattern(members[0].name)} stays float: {reason}")
        wanted = Scheme(self.scheme)
        choices: list[Scheme] = [wanted, Scheme.W8A8_DYNAMIC] if wanted == Scheme.W4A8_DYNAMIC else [wanted]
        rules = target_supporting(self.target, wanted)
        if self.scope == "engine" and rules is not None:
            choices = [scheme for scheme in choices if all(scheme in supported_schemes(rules, name) for name in names)]
        misfit = self._int4_misfit(members) if Scheme.W4A8_DYNAMIC in choices else ""
        if misfit:
            choices.remove(Scheme.W4A8_DYNAMIC)
        scheme = choices[0] if choices else Scheme.FLOAT
        if misfit:
            return Decision(scheme, misfit, f"{layer_pattern(members[0].name)} is {scheme}: {misfit}")
        if scheme == wanted:
            return Decision(wanted)
        reason = f"{wanted} is not accepted here by {self.target}"
        return Decision(scheme, reason, f"{wanted} only where {self.target} runs it; elsewhere {scheme}")

    def _excluded(self, members: list[Site]) -> "Decision | None":
        """Returns FLOAT if the user's globs or the reference script exclude any member, else None."""
        for site in members:
            for pattern in self.exclude:
                if fnmatchcase(site.name, pattern):
                    others = [layer_pattern(other.name) for other in members if not _matches(other.name, self.exclude)]
                    stay = "stay" if len(others) > 1 else "stays"
                    note = f"{', '.join(others)} {stay} float with {layer_pattern(site.name)}, which --exclude names"
                    return Decision(Scheme.FLOAT, f"excluded by {pattern}", note if others else "")
        if self.fallback == "reference" and not any(_matches(site.name, self.include) for site in members):
            for site in members:
                if stays_float_in_reference(site.name):
                    return Decision(Scheme.FLOAT, "kept in float by the reference exclusions")
        return None

    def _int4_misfit(self, members: list[Site]) -> str:
        """Returns why the weights cannot be stored as 4-bit groups, or an empty string."""
        for site in members:
            outputs, inputs = site.shape
            if inputs % self.group_size:
                return f"its {inputs} inputs are no multiple of the group of {self.group_size}"
            if outputs % INT4_ROW_MULTIPLE:
                return f"its {outputs} outputs are no multiple of {INT4_ROW_MULTIPLE}"
        return ""


@dataclass(frozen=True)
class Decision:
    """scheme: of a group; reason: printed in the IR if it is not the default scheme; note: message for the user."""

    scheme: Scheme
    reason: str = ""
    note: str = ""


def layer_pattern(layer: str) -> str:
    """Replaces block numbers by `*`: model.layers.3.mlp.up_proj -> model.layers.*.mlp.up_proj."""
    return re.sub(r"\.\d+\.", ".*.", layer)


def _matches(layer: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(layer, pattern) for pattern in patterns)
