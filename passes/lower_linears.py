"""lower-linears: every quantized Linear becomes the module that runs its integers."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlqc.engines import Scheme
from vlqc.errors import Fault, UserError
from vlqc.ir import Site, Stage
from vlqc.kernels_ref.linear import StaticQuantLinear
from vlqc.passes.quantize_weights import emitted_bias
from vlqc.pipeline import Pass


@dataclass(frozen=True)
class LowerLinears(Pass):
    """Replaces the Linear of every site that is not to stay float, in the module tree and so in the graph."""

    name: ClassVar[str] = "lower-linears"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "rewrite"
    summary: ClassVar[str] = "replace quantized linears by modules that run the stored integers"

    def run(self, stage: Stage) -> bool:
        sites = [site for site in stage.sites.values() if site.scheme not in (None, Scheme.FLOAT)]
        lowered = {site.target: lower(stage, site) for site in sites}
        for target, module in lowered.items():
            stage.live.set_submodule(target, module)
        return bool(lowered)


def lower(stage: Stage, site: Site) -> StaticQuantLinear:
    """The quantized module of a W8A8 site. UserError if the pipeline left something undecided before it."""
    fix = "in the pipeline, let quantize-activations, quantize-weights and lower-linears follow each other"
    if site.weight is None or site.input is None:
        missing = "weight" if site.weight is None else "input"
        raise UserError(Fault(f"{site.name} cannot be lowered", stage.name, f"its {missing} is not quantized", fix))
    try:
        return StaticQuantLinear.from_float(
            site.weight.integers,
            site.weight.scale,
            site.input.scale,
            site.input.offset,
            emitted_bias(stage.linear(site), stage.dtype),
            stage.dtype,
        )
    except ValueError as error:  # a bias that overflows: weights were rounded before the input's scale was known
        raise UserError(Fault(f"{site.name} cannot be lowered", stage.name, str(error), fix)) from error
