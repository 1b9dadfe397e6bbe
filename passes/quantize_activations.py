"""quantize-activations: choose one static input scale and offset per W8A8 group from its observation."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch

from vlqc.ir.stage import InputQuantization, Site, Stage
from vlqc.kernels_ref.quantize import activation_scale_and_offset
from vlqc.passes.algorithms.error_model import representative_rows
from vlqc.passes.algorithms.observer import require_observation
from vlqc.passes.algorithms.range_search import energy_per_column, input_rounding_error, search_clipped_range
from vlqc.pipeline.pass_api import Pass
from vlqc.targets.schemes import Scheme


@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Sets `input` of every static W8A8 site; sites that share an input get the same scale and offset.

    method: `minmax` covers the observed range; `histogram` clips it where that lowers the expected error of the
        outputs; `automatic` takes, per group, the one with the smaller error on kept rows.
    """

    name: ClassVar[str] = "quantize-activations"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    summary: ClassVar[str] = "choose the static input range of every W8A8 group"
    after: ClassVar[tuple[str, ...]] = ("insert-observers", "assign-precision")
    before: ClassVar[tuple[str, ...]] = ("quantize-weights", "lower-linears")

    method: Literal["minmax", "histogram", "automatic"] = "histogram"

    def needs_samples(self, schemes: Collection[Scheme]) -> bool:
        return any(scheme.spec.activation.is_static for scheme in schemes)

    def run(self, stage: Stage) -> bool:
        changed = False
        groups = {source: members for source, members in stage.groups().items() if members[0].spec.activation.is_static}
        tasks = [partial(input_quantization, stage, source, members, self.method) for source, members in groups.items()]
        quantizations = stage.execution.process_group.parallel_map(tasks)
        for members, quantization in zip(groups.values(), quantizations, strict=True):
            for site in members:
                changed |= site.input != quantization
                site.input = quantization
        return changed


def input_quantization(stage: Stage, source: str, members: Sequence[Site], method: str) -> InputQuantization:
    """The static input scale and offset of sites that read the node `source`; method: as `QuantizeActivations`."""
    observation, dtype = require_observation(stage, source, QuantizeActivations.name), stage.dtype
    weights = [stage.linear(site).weight for site in members]
    low, high = float(observation.minimum().amin()), float(observation.maximum().amax())
    minmax = InputQuantization(*activation_scale_and_offset(low, high, dtype))
    if method == "minmax":
        return minmax
    energy = torch.stack([energy_per_column(weight) for weight in weights]).sum(0).cpu()
    low, high = search_clipped_range(observation, energy, low, high, dtype)
    clipped = InputQuantization(*activation_scale_and_offset(low, high, dtype))
    if method == "histogram":
        return clipped
    sampled = representative_rows(weights)
    errors = {choice: input_rounding_error(observation, sampled, choice) for choice in (minmax, clipped)}
    return min(errors, key=lambda choice: errors[choice])
