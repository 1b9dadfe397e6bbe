"""quantize-weights: from float weights to integers and scales."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlqc.engines import Scheme
from vlqc.errors import Fault, UserError
from vlqc.ir import Site, Stage, WeightQuantization
from vlqc.kernels_ref.group import quantize_weight_per_group_absmax
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
    summary: ClassVar[str] = "round the weights of quantized sites to integers, per output channel or group"
    after: ClassVar[tuple[str, ...]] = ("assign-precision",)
    before: ClassVar[tuple[str, ...]] = ("lower-linears",)

    def run(self, stage: Stage) -> bool:
        changed = False
        for site in stage.sites.values():
            if site.scheme in (None, Scheme.FLOAT):
                continue
            new = rounded(stage, site)
            changed |= site.weight is None or not _same(site.weight, new)
            site.weight = new
        return changed


def rounded(stage: Stage, site: Site) -> WeightQuantization:
    """The weight of a quantized site as its scheme stores it, with scales in the dtype in which engines read them."""
    linear = stage.linear(site)
    if site.scheme == Scheme.W4A8_DYNAMIC:
        if site.group_size is None:
            fix = "let assign-precision choose the scheme"
            raise UserError(Fault(f"{site.name} has no group size", stage.name, fix=fix))
        return WeightQuantization(*quantize_weight_per_group_absmax(linear.weight, site.group_size, stage.dtype))
    if site.scheme == Scheme.W8A8_DYNAMIC:
        return WeightQuantization(*quantize_weight_per_channel_absmax(linear.weight, scale_dtype=stage.dtype))
    bias, smallest = emitted_bias(stage, site), None
    if site.input is not None and bias is not None:
        smallest = smallest_weight_scale_for_bias(bias, site.input.scale, linear.in_features)
    return WeightQuantization(*quantize_weight_per_channel_absmax(linear.weight, smallest))


def emitted_bias(stage: Stage, site: Site) -> Tensor | None:
    """The bias float32 [N] as it is stored, that is rounded to the stage's dtype, or None: what quant_bias is made of.

    One that the layer gained from a pass is stored nowhere else, so it is not rounded.
    """
    bias = stage.linear(site).bias
    if bias is None or site.gained_bias:
        return None if bias is None else bias.detach().float()
    return bias.detach().to(stage.dtype).float()


def _same(one: WeightQuantization, other: WeightQuantization) -> bool:
    pairs = zip(one.tensors(), other.tensors(), strict=False)
    return len(one.tensors()) == len(other.tensors()) and all(torch.equal(left, right) for left, right in pairs)
