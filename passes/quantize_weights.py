"""quantize-weights: from float weights to integers and scales."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vlqc.engines import Scheme
from vlqc.ir import Stage, WeightQuantization
from vlqc.kernels_ref.matmul import smallest_weight_scale_for_bias
from vlqc.kernels_ref.quantize import quantize_weight_per_channel_absmax
from vlqc.pipeline import Pass


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Rounds the weight of every quantized site; the float weight stays until it is lowered.

    It comes after the activations: where an input's scale is tiny, a row's scale must not be, or its bias would not
    fit into int32 steps of their product.
    """

    name: ClassVar[str] = "quantize-weights"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    summary: ClassVar[str] = "round the weights of quantized sites to integers, symmetric per output channel"

    def run(self, stage: Stage) -> bool:
        changed = False
        for site in stage.sites.values():
            if site.scheme != Scheme.W8A8:
                continue
            linear = stage.linear(site)
            bias, smallest = emitted_bias(linear, stage.dtype), None
            if site.input is not None and bias is not None:
                smallest = smallest_weight_scale_for_bias(bias, site.input.scale, linear.in_features)
            new = WeightQuantization(*quantize_weight_per_channel_absmax(linear.weight, smallest))
            changed |= site.weight is None or not _same(site.weight, new)
            site.weight = new
        return changed


def emitted_bias(linear: nn.Linear, dtype: torch.dtype) -> Tensor | None:
    """The bias float32 [N] as it is stored, that is rounded to `dtype`, or None: what quant_bias is computed from."""
    return None if linear.bias is None else linear.bias.detach().to(dtype).float()


def _same(one: WeightQuantization, other: WeightQuantization) -> bool:
    return torch.equal(one.integers, other.integers) and torch.equal(one.scale, other.scale)
