"""lower-linears: replace every quantized Linear by the module that computes with its integers."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlqc.errors import Fault, UserError
from vlqc.ir.observation import row_weights
from vlqc.ir.stage import Site, Stage
from vlqc.kernels_ref.quant_linear import LayerQuantization, QuantLinear
from vlqc.kernels_ref.quantize import dequantize_per_tensor, quantize_per_tensor
from vlqc.passes.quantize_weights import emitted_bias
from vlqc.pipeline.pass_api import Pass

ROWS_PER_CHUNK = 512  # of observed inputs and of weights: bounds the temporaries


@dataclass(frozen=True)
class LowerLinears(Pass):
    """Replaces the Linear of every quantized site in the module tree, and thereby in the graph.

    If no pass has run the samples yet, it runs them before: later stages get the outputs of the float stage.

    correct_bias: subtract the mean error of a static layer's outputs, where known, in its quant_bias. On inputs outside
        the calibration set it gained less than 0.1 dB and sometimes lost as much. The correction cannot be recomputed
        from the folder, so the folder records that it was applied.
    """

    name: ClassVar[str] = "lower-linears"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "rewrite"
    summary: ClassVar[str] = "replace quantized linear layers by modules that run the stored integers"
    after: ClassVar[tuple[str, ...]] = ("quantize-weights",)

    correct_bias: bool = False

    def run(self, stage: Stage) -> bool:
        sites = [site for site in stage.sites.values() if site.is_quantized]
        stage.execution.ensure_outputs()
        lowered = {site.target: lower(stage, site, self.correct_bias) for site in sites}
        for target, module in lowered.items():
            stage.module.set_submodule(target, module)
        return bool(lowered)


def lower(stage: Stage, site: Site, correct_bias: bool = False) -> QuantLinear:
    """Returns the quantized module of a site. UserError if an earlier pass is missing from the pipeline."""
    fix = "in the pipeline, let quantize-activations, quantize-weights and lower-linears follow each other"
    spec, weight = site.spec, site.weight
    if weight is None or spec.weight.per_group != (weight.group_scale is not None):
        why = f"its weight is not quantized as {site.scheme}"
        raise UserError(Fault(f"{site.name} cannot be lowered", stage.name, why, fix))
    if spec.activation.is_static and site.input is None:
        raise UserError(Fault(f"{site.name} cannot be lowered", stage.name, "its input is not quantized", fix))
    result = LayerQuantization(
        weight.integers,
        weight.scale,
        weight.group_scale,
        input=None if site.input is None else (site.input.scale, site.input.offset),
        mean_error=mean_output_error(stage, site) if correct_bias and spec.activation.is_static else None,
    )
    try:
        lowered = spec.quant_linear().from_quantized(result, emitted_bias(stage, site), stage.dtype)
    except ValueError as error:  # the bias overflows: weights were quantized before the input scale was known
        raise UserError(Fault(f"{site.name} cannot be lowered", stage.name, str(error), fix)) from error
    if site.added_bias and spec.takes_added_bias:
        lowered.bias = None  # it is part of quant_bias; engines expect no bias of this layer
    return lowered


def mean_output_error(stage: Stage, site: Site) -> Tensor | None:
    """Mean excess of a static layer's outputs over the observed rows, float32 [N]; None without an observation.

    Rows are weighted so that modalities count equally. The mean is not zero for channels that hardly vary, which are
    always rounded in the same direction, and for one-sided clipping. Per-token quantization is symmetric.
    """
    observation, quantization, weight = stage.observations.get(site.source), site.input, site.weight
    if observation is None or not len(observation.kept) or quantization is None or weight is None:
        return None
    scale, offset = quantization.scale, quantization.offset
    share = row_weights(observation.kept_modality, torch.ones(len(observation.kept)), balance=observation.balance)
    mean, quantized_mean = torch.zeros(2, observation.channels, dtype=torch.float64)
    chunks = zip(torch.split(observation.kept, ROWS_PER_CHUNK), torch.split(share, ROWS_PER_CHUNK), strict=True)
    for rows, part in chunks:
        quantized = quantize_per_tensor(rows, scale, offset)
        mean += part @ rows.double()
        quantized_mean += part @ dequantize_per_tensor(quantized, scale, offset, torch.float32).double()
    linear = stage.linear(site).weight.detach()
    errors = [
        weight_scale.flatten() * (integers.float() @ quantized_mean.float()) - rows @ mean.float()
        for integers, weight_scale, rows in zip(
            torch.split(weight.integers, ROWS_PER_CHUNK),
            torch.split(weight.scale, ROWS_PER_CHUNK),
            torch.split(linear, ROWS_PER_CHUNK),
            strict=True,
        )
    ]
    return torch.cat(errors)
