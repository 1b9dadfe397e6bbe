"""lower-linears: every quantized Linear becomes the module that runs its integers."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlqc.engines import Scheme
from vlqc.errors import Fault, UserError
from vlqc.ir import Site, Stage
from vlqc.kernels_ref.linear import DynamicQuantLinear, GroupQuantLinear, QuantLinear, StaticQuantLinear
from vlqc.passes.quantize_weights import emitted_bias
from vlqc.pipeline import Pass


@dataclass(frozen=True)
class LowerLinears(Pass):
    """Replaces the Linear of every site that is not to stay float, in the module tree and so in the graph."""

    name: ClassVar[str] = "lower-linears"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "rewrite"
    summary: ClassVar[str] = "replace quantized linears by modules that run the stored integers"
    after: ClassVar[tuple[str, ...]] = ("quantize-weights",)

    def run(self, stage: Stage) -> bool:
        sites = [site for site in stage.sites.values() if site.scheme not in (None, Scheme.FLOAT)]
        lowered = {site.target: lower(stage, site) for site in sites}
        for target, module in lowered.items():
            stage.live.set_submodule(target, module)
        return bool(lowered)


def lower(stage: Stage, site: Site) -> QuantLinear:
    """The quantized module of a site. UserError if the pipeline left something undecided before it."""
    fix = "in the pipeline, let quantize-activations, quantize-weights and lower-linears follow each other"
    weight, in_groups = site.weight, site.scheme == Scheme.W4A8_DYNAMIC
    if weight is None or in_groups != (weight.group_scale is not None):
        why = f"its weight is not quantized as {site.scheme}"
        raise UserError(Fault(f"{site.name} cannot be lowered", stage.name, why, fix))
    bias = emitted_bias(stage, site)
    if weight.group_scale is not None:
        return GroupQuantLinear.from_float(weight.integers, weight.scale, weight.group_scale, bias)
    if site.scheme == Scheme.W8A8_DYNAMIC:
        return DynamicQuantLinear.from_float(weight.integers, weight.scale, bias)
    if site.input is None:
        raise UserError(Fault(f"{site.name} cannot be lowered", stage.name, "its input is not quantized", fix))
    try:
        lowered = StaticQuantLinear.from_float(
            weight.integers, weight.scale, site.input.scale, site.input.offset, bias, stage.dtype
        )
    except ValueError as error:  # a bias that overflows: weights were rounded before the input's scale was known
        raise UserError(Fault(f"{site.name} cannot be lowered", stage.name, str(error), fix)) from error
    if site.gained_bias:
        lowered.bias = None  # it is in quant_bias; engines know no bias of this layer
    return lowered
