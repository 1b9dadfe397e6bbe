"""lower-linears: every quantized Linear becomes the module that runs its integers."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlqc.errors import InternalError
from vlqc.ir import Site, Stage
from vlqc.kernels_ref.linear import StaticQuantLinear
from vlqc.pipeline import Pass


@dataclass(frozen=True)
class LowerLinears(Pass):
    """Replaces the Linear of every site that has integers, in the module tree and so in the graph."""

    name: ClassVar[str] = "lower-linears"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "rewrite"
    summary: ClassVar[str] = "replace quantized linears by modules that run the stored integers"

    def run(self, stage: Stage) -> bool:
        sites = [site for site in stage.sites.values() if site.weight is not None]
        for site in sites:
            stage.live.set_submodule(site.target, lower(stage, site))
        return bool(sites)


def lower(stage: Stage, site: Site) -> StaticQuantLinear:
    """The quantized module of a W8A8 site.

    The bias is rounded to the emitted dtype before it is used, so that quant_bias follows from what is stored.
    """
    if site.weight is None or site.input is None:
        raise InternalError(f"{site.name} cannot be lowered: quantize its weight and its input first")
    bias = stage.linear(site).bias
    return StaticQuantLinear.from_float(
        site.weight.integers,
        site.weight.scale,
        site.input.scale,
        site.input.offset,
        None if bias is None else bias.detach().to(stage.dtype).float(),
        stage.dtype,
    )
