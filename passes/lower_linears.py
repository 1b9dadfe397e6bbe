"""lower-linears: every quantized Linear becomes the module that runs its integers."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlqc.errors import Fault, UserError
from vlqc.ir.observation import row_weights
from vlqc.ir.stage import Site, Stage
from vlqc.kernels_ref.quant_linear import DynamicQuantLinear, GroupQuantLinear, QuantLinear, StaticQuantLinear
from vlqc.kernels_ref.quantize import dequantize_per_tensor, quantize_per_tensor
from vlqc.passes.quantize_weights import emitted_bias
from vlqc.pipeline.pass_api import Pass
from vlqc.targets.schemes import Scheme

ROWS_AT_ONCE = 512  # of observed inputs, and of weights: bounds the temporaries


@dataclass(frozen=True)
class LowerLinears(Pass):
    """Replaces the Linear of every site that is not to stay float, in the module tree and so in the graph.

    correct_bias: take the mean error of a static layer's outputs, as far as it is known, off in its quant_bias. On
    inputs that calibration did not see it gained less than 0.1 dB, and now and then lost as much; and what is taken off
    cannot be recomputed from the folder, which has to say that it was.
    """

    name: ClassVar[str] = "lower-linears"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "rewrite"
    summary: ClassVar[str] = "replace quantized linears by modules that run the stored integers"
    after: ClassVar[tuple[str, ...]] = ("quantize-weights",)

    correct_bias: bool = False

    def run(self, stage: Stage) -> bool:
        sites = [site for site in stage.sites.values() if site.scheme not in (None, Scheme.FLOAT)]
        lowered = {site.target: lower(stage, site, self.correct_bias) for site in sites}
        for target, module in lowered.items():
            stage.module.set_submodule(target, module)
        return bool(lowered)


def lower(stage: Stage, site: Site, correct_bias: bool = False) -> QuantLinear:
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
            weight.integers,
            weight.scale,
            site.input.scale,
            site.input.offset,
            bias,
            stage.dtype,
            mean_output_error(stage, site) if correct_bias else None,
        )
    except ValueError as error:  # a bias that overflows: weights were rounded before the input's scale was known
        raise UserError(Fault(f"{site.name} cannot be lowered", stage.name, str(error), fix)) from error
    if site.added_bias:
        lowered.bias = None  # it is in quant_bias; engines know no bias of this layer
    return lowered


def mean_output_error(stage: Stage, site: Site) -> Tensor | None:
    """float32 [N]: by how much a static layer's outputs are too large on average, over what was observed; else None.

    Modalities count the same. A channel that hardly varies is always rounded the same way, and what a range cuts off
    lies to one side: such errors have a mean. Per-token rounding is symmetric and leaves none.
    """
    seen, grid, weight = stage.observations.get(site.source), site.input, site.weight
    if seen is None or not len(seen.kept) or grid is None or weight is None:
        return None
    share = row_weights(seen.kept_modality, torch.ones(len(seen.kept)), balance=seen.balance)
    mean, moved = torch.zeros(seen.channels, dtype=torch.float64), torch.zeros(seen.channels, dtype=torch.float64)
    for rows, part in zip(torch.split(seen.kept, ROWS_AT_ONCE), torch.split(share, ROWS_AT_ONCE), strict=True):
        rounded = quantize_per_tensor(rows, grid.scale, grid.offset)
        mean += part @ rows.double()
        moved += part @ dequantize_per_tensor(rounded, grid.scale, grid.offset, torch.float32).double()
    linear = stage.linear(site).weight.detach()
    errors = [
        scale.flatten() * (integers.float() @ moved.float()) - rows @ mean.float()
        for integers, scale, rows in zip(
            torch.split(weight.integers, ROWS_AT_ONCE),
            torch.split(weight.scale, ROWS_AT_ONCE),
            torch.split(linear, ROWS_AT_ONCE),
            strict=True,
        )
    ]
    return torch.cat(errors)
