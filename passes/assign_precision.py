"""assign-precision: which scheme each group of sites gets, decided against the engines' table."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlqc.engines import Scheme, fused_group, legal_schemes, stays_float_by_seed
from vlqc.ir import Site, Stage
from vlqc.pipeline import Pass


@dataclass(frozen=True)
class AssignPrecision(Pass):
    """Gives every site its scheme, uniformly per group.

    scheme: what groups get that no rule keeps in float; fallback: `seed` leaves the reference script's exclusions in
    float, `none` only what an engine refuses; target: whose rules hold.
    """

    name: ClassVar[str] = "assign-precision"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    summary: ClassVar[str] = "choose a scheme per group, within what the target engine accepts"

    scheme: Literal["W8A8", "FLOAT"] = "W8A8"
    fallback: Literal["seed", "none"] = "seed"
    target: Literal["vllm-ascend", "mindie", "both"] = "both"

    def run(self, stage: Stage) -> bool:
        changed = False
        for members in stage.groups().values():
            scheme, reason = choose(members, Scheme(self.scheme), self.fallback == "seed", self.target)
            for site in members:
                changed |= (site.scheme, site.reason) != (scheme, reason)
                site.scheme, site.reason = scheme, reason
        return changed


def choose(members: list[Site], wanted: Scheme, seed: bool, target: str) -> tuple[Scheme, str]:
    """Sites that share an input -> their one scheme and, where it is not the wanted one, the reason.

    A member that the engine fuses with linears outside this list makes the group float: they would get other scales.
    """
    names = {site.name for site in members}
    for site in members:
        if seed and stays_float_by_seed(site.name):
            return Scheme.FLOAT, "kept in float by the seed's exclusions"
        if wanted not in legal_schemes(target, site.name):
            return Scheme.FLOAT, f"{wanted} is not accepted here by {target}"
        if missing := sorted(set(fused_group(site.name)) - names):
            return Scheme.FLOAT, f"the engine fuses it with {', '.join(missing)}, which reads another input"
    return wanted, ""
