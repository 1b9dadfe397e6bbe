"""assign-precision: choose one scheme per group of linear layers, within what the target engine accepts."""

import warnings
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from vlqc.families.family import ModelFamily
from vlqc.ir.stage import Site, Stage
from vlqc.pipeline.pass_api import Pass, require
from vlqc.targets.precision import Decision, choose_scheme
from vlqc.targets.schemes import DEFAULT_SCHEME, Scheme, floats
from vlqc.targets.target import parse_target


@dataclass(frozen=True)
class AssignPrecision(Pass):
    """Sets `scheme`, `group_size` and `reason` of every site; sites that share an input get the same scheme, as do all
    experts of a block.

    scheme: the default scheme of all groups.
    group_size: number of input columns that share a scale in 4-bit weights.
    target: engine or engines whose rules apply.
    scope: `engine` uses 4-bit weights only in layers where the target runs them, `all` in every layer.
    fallback: `reference` leaves the layers that the reference script excludes in float (alias: `seed`), `none` only
        those that the engine cannot run quantized.
    exclude: globs of layers that stay float.
    include: globs of layers that are quantized in spite of the reference exclusions; `exclude` takes precedence.
    float_as: scheme in place of FLOAT, where the target runs it, of layers that would stay float although `exclude`
        does not name them; FLOAT for none.
    substitutes: schemes for layers on which the target does not run the default scheme, nor what is usual in its place;
        the first one that it runs, before `float_as`.
    """

    name: ClassVar[str] = "assign-precision"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    summary: ClassVar[str] = "choose a scheme per group, within what the target engine accepts"
    before: ClassVar[tuple[str, ...]] = ("quantize-activations", "quantize-weights", "lower-linears")

    scheme: str = DEFAULT_SCHEME
    group_size: int = 64
    target: str = "both"
    scope: Literal["engine", "all"] = "engine"
    fallback: Literal["reference", "none"] = field(default="reference", metadata={"aliases": {"seed": "reference"}})
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    float_as: str = Scheme.FLOAT
    substitutes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.fallback == "seed":  # type: ignore[comparison-overlap]
            warnings.warn("fallback='seed' is renamed to 'reference'", DeprecationWarning, stacklevel=3)
            object.__setattr__(self, "fallback", "reference")
        require(self.scheme in tuple(Scheme), f"scheme must be one of {', '.join(Scheme)}")
        require(self.float_as in floats(), f"float_as must be one of {', '.join(floats())}")
        require(set(self.substitutes) <= set(Scheme), f"substitutes must be some of {', '.join(Scheme)}")
        require(self.fallback in ("reference", "none"), "fallback must be reference or none")
        require(self.scope in ("engine", "all"), "scope must be engine or all")
        require(self.group_size >= 1, "group_size must be 1 or more")
        parse_target(self.target)

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """All schemes that it may choose."""
        asked = Scheme(self.scheme)
        others = map(Scheme, (*self.substitutes, self.float_as))
        return tuple(dict.fromkeys([asked, asked.substitute or asked, *others, Scheme.FLOAT]))

    def run(self, stage: Stage) -> bool:
        changed = False
        for members in stage.scheme_groups():
            decision = self.choose(members, stage.family)
            group_size = self.group_size if decision.scheme.spec.weight.per_group else None
            for site in members:
                before = (site.scheme, site.group_size, site.reason)
                site.scheme, site.group_size, site.reason = decision.scheme, group_size, decision.reason
                changed |= before != (site.scheme, site.group_size, site.reason)
            if decision.note:
                stage.notes.append(decision.note)
        return changed

    def choose(self, members: list[Site], family: ModelFamily) -> Decision:
        """Returns the common scheme of sites of `Stage.scheme_groups`; see `choose_scheme`."""
        return choose_scheme(
            {site.name: site.shape for site in members},
            family=family,
            scheme=Scheme(self.scheme),
            target=self.target,
            group_size=self.group_size,
            scope=self.scope,
            fallback=self.fallback,
            exclude=self.exclude,
            include=self.include,
            float_as=Scheme(self.float_as),
            substitutes=[Scheme(name) for name in self.substitutes],
        )
