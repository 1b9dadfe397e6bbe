"""assign-precision: which scheme each group of sites gets, decided against the engines' table."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from vlqc.ir.stage import Site, Stage
from vlqc.pipeline.registry import Pass, require
from vlqc.targets.engines import Scheme, fused_group, legal_schemes, parse_target, rules_for, stays_float_in_reference

ROWS_PER_INT4 = 8  # the int4 operator takes outputs in eights


@dataclass(frozen=True)
class AssignPrecision(Pass):
    """Gives every site its scheme, uniformly per group.

    scheme: what groups get that no rule keeps from it; group_size: of 4-bit weights; target: whose rules hold; scope:
    `engine` gives 4-bit weights only where the target runs them, `all` everywhere; fallback: `seed` leaves the
    reference script's exclusions in float, `none` only what an engine refuses; exclude and include: layers that stay
    float, and layers that are quantized in spite of the seed's exclusions (globs; exclude wins).
    """

    name: ClassVar[str] = "assign-precision"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    summary: ClassVar[str] = "choose a scheme per group, within what the target engine accepts"
    before: ClassVar[tuple[str, ...]] = ("quantize-activations", "quantize-weights", "lower-linears")

    scheme: Literal["W8A8", "W8A8_DYNAMIC", "W4A8_DYNAMIC", "FLOAT"] = "W8A8"
    group_size: int = 64
    target: str = "both"
    scope: Literal["engine", "all"] = "engine"
    fallback: Literal["seed", "none"] = "seed"
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
        """Sites that share an input -> their one scheme, why it is not the wanted one, and what to tell the user.

        A member that the engine fuses with linears outside this list makes the group float: scales would differ.
        """
        kept = self._kept_float(members)
        if kept is not None:
            return kept
        names = {site.name for site in members}
        missing = sorted({other for name in names for other in fused_group(name)} - names)
        if missing:
            reason = f"the engine fuses it with {', '.join(missing)}, which reads another input"
            return Decision(Scheme.FLOAT, reason, f"{kind_of(members[0].name)} stays float: {reason}")
        wanted = Scheme(self.scheme)
        choices: list[Scheme] = [wanted, Scheme.W8A8_DYNAMIC] if wanted == Scheme.W4A8_DYNAMIC else [wanted]
        rules = rules_for(self.target, wanted)
        if self.scope == "engine" and rules is not None:
            choices = [scheme for scheme in choices if all(scheme in legal_schemes(rules, name) for name in names)]
        obstacle = self._obstacle_to_groups(members) if Scheme.W4A8_DYNAMIC in choices else ""
        if obstacle:
            choices.remove(Scheme.W4A8_DYNAMIC)
        scheme = choices[0] if choices else Scheme.FLOAT
        if obstacle:
            return Decision(scheme, obstacle, f"{kind_of(members[0].name)} is {scheme}: {obstacle}")
        if scheme == wanted:
            return Decision(wanted)
        reason = f"{wanted} is not accepted here by {self.target}"
        return Decision(scheme, reason, f"{wanted} only where {self.target} runs it; elsewhere {scheme}")

    def _kept_float(self, members: list[Site]) -> "Decision | None":
        """FLOAT by the user's or the seed's word for any member, or None."""
        for site in members:
            for pattern in self.exclude:
                if fnmatchcase(site.name, pattern):
                    others = [kind_of(other.name) for other in members if not _matches(other.name, self.exclude)]
                    stay = "stay" if len(others) > 1 else "stays"
                    note = f"{', '.join(others)} {stay} float with {kind_of(site.name)}, which --exclude names"
                    return Decision(Scheme.FLOAT, f"excluded by {pattern}", note if others else "")
        if self.fallback == "seed" and not any(_matches(site.name, self.include) for site in members):
            for site in members:
                if stays_float_in_reference(site.name):
                    return Decision(Scheme.FLOAT, "kept in float by the seed's exclusions")
        return None

    def _obstacle_to_groups(self, members: list[Site]) -> str:
        """Why 4-bit groups cannot be stored for these sites, or an empty string."""
        for site in members:
            outputs, inputs = site.shape
            if inputs % self.group_size:
                return f"its {inputs} inputs are no multiple of the group of {self.group_size}"
            if outputs % ROWS_PER_INT4:
                return f"its {outputs} outputs are no multiple of {ROWS_PER_INT4}"
        return ""


@dataclass(frozen=True)
class Decision:
    """scheme; reason, shown in the IR where it is not the wanted scheme; note, shown to the user once."""

    scheme: Scheme
    reason: str = ""
    note: str = ""


def kind_of(layer: str) -> str:
    """model.layers.3.mlp.up_proj -> model.layers.*.mlp.up_proj: what is said of one is said of all of its kind."""
    return re.sub(r"\.\d+\.", ".*.", layer)


def _matches(layer: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(layer, pattern) for pattern in patterns)
