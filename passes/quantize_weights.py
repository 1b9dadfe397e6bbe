"""quantize-weights: from float weights to integers and scales."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlqc.engines import Scheme
from vlqc.ir import Stage, WeightQuantization
from vlqc.kernels_ref.quantize import quantize_weight_per_channel_absmax
from vlqc.pipeline import Pass


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Rounds the weight of every quantized site; the float weight stays until it is lowered."""

    name: ClassVar[str] = "quantize-weights"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    summary: ClassVar[str] = "round the weights of quantized sites to integers, symmetric per output channel"

    def run(self, stage: Stage) -> bool:
        sites = [site for site in stage.sites.values() if site.scheme == Scheme.W8A8]
        for site in sites:
            site.weight = WeightQuantization(*quantize_weight_per_channel_absmax(stage.linear(site).weight))
        return bool(sites)
