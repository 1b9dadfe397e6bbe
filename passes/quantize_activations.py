"""quantize-activations: from what was observed to one input scale and offset per group."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlqc.engines import Scheme
from vlqc.ir import InputQuantization, Observation, Stage
from vlqc.kernels_ref.quantize import (
    INT8_MAX,
    INT8_MIN,
    activation_scale_and_offset,
    dequantize_per_tensor,
    quantize_per_tensor,
)
from vlqc.passes.error_model import balanced, representative_inputs, representative_rows
from vlqc.passes.insert_observers import observed
from vlqc.pipeline import Pass

BINS = 2048  # as in PyTorch's HistogramObserver
SHARES = tuple(0.5 ** (step / 8) for step in range(41))  # of the full range on either side: 1 down to 1/32


@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Sets the static input quantization of every W8A8 group.

    method: `minmax` covers everything that was seen; `histogram` clips where that lowers the expected error of the
    outputs; `automatic` takes, per group, whichever of the two has the smaller error on real rows.
    """

    name: ClassVar[str] = "quantize-activations"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    summary: ClassVar[str] = "choose the static input range of every W8A8 group"
    after: ClassVar[tuple[str, ...]] = ("insert-observers", "assign-precision")
    before: ClassVar[tuple[str, ...]] = ("quantize-weights", "lower-linears")

    method: Literal["minmax", "histogram", "automatic"] = "histogram"

    def run(self, stage: Stage) -> bool:
        changed = False
        for source, members in stage.groups().items():
            if members[0].scheme != Scheme.W8A8:
                continue
            seen = observed(stage, source, self.name)
            weights = [stage.linear(site).weight for site in members]
            quantization = self._choose(seen, weights, stage.dtype)
            for site in members:
                changed |= site.input != quantization
                site.input = quantization
        return changed

    def _choose(self, seen: Observation, weights: list[Tensor], dtype: torch.dtype) -> InputQuantization:
        low, high = float(seen.minimum().amin()), float(seen.maximum().amax())
        full = InputQuantization(*activation_scale_and_offset(low, high, dtype))
        if self.method == "minmax":
            return full
        energy = torch.stack([weight.square().sum(0) for weight in weights]).sum(0).cpu()
        clipped = InputQuantization(*activation_scale_and_offset(*clipped_range(seen, energy, low, high, dtype), dtype))
        if self.method == "histogram":
            return clipped
        errors = {one: output_error(seen, representative_rows(weights), one) for one in (full, clipped)}
        return min(errors, key=lambda one: errors[one])


def output_error(seen: Observation, weight: Tensor, grid: InputQuantization) -> float:
    """Mean squared error of the outputs, on kept rows, when only the input is rounded; modalities count the same.

    weight: float32 [N, K], rows of all consumers.
    """
    index = representative_inputs(seen.kept_modality)
    rows = seen.kept[index]
    rounded = dequantize_per_tensor(
        quantize_per_tensor(rows, grid.scale, grid.offset), grid.scale, grid.offset, rows.dtype
    )
    error = (rounded - rows) @ weight.T
    return float((error.square().sum(1).double() * balanced(seen.kept_modality[index])).sum())


def clipped_range(
    seen: Observation, energy_per_column: Tensor, low: float, high: float, dtype: torch.dtype
) -> tuple[float, float]:
    """The range within [low, high] that minimises the expected squared error of the outputs.

    energy_per_column: float32 [K], sum over outputs of W^2: by how much an error in a column reaches the output. Values
    of all kept rows go into one histogram, weighted by that and so that every modality counts the same; each candidate
    range is judged on the bins' centres with the arithmetic that will be used, scale rounded to `dtype`.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if high - low == 0.0 or not bool(energy_per_column.any()):
        return low, high
    centres, mass = weighted_histogram(seen, energy_per_column, low, high)  # [BINS]
    best, smallest = (low, high), float("inf")
    for low_share in SHARES if low < 0 else (1.0,):
        ranges = [(low * low_share, high * high_share) for high_share in (SHARES if high > 0 else (1.0,))]
        grids = torch.tensor([activation_scale_and_offset(*one, dtype) for one in ranges], dtype=torch.float64)
        scale, offset = grids[:, :1], grids[:, 1:]  # [R, 1]
        rounded = (torch.round(centres / scale + offset).clamp(INT8_MIN, INT8_MAX) - offset) * scale  # [R, BINS]
        errors = (rounded - centres).square() @ mass  # [R]
        number = int(errors.argmin())
        if float(errors[number]) < smallest:
            best, smallest = ranges[number], float(errors[number])
    return best


def weighted_histogram(seen: Observation, energy_per_column: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """(centres float64 [BINS], mass float64 [BINS]) of the kept rows' values between low and high."""
    width = (high - low) / BINS
    mass = torch.zeros(BINS, dtype=torch.float64)
    for row, weight in zip(torch.split(seen.kept, 64), torch.split(balanced(seen.kept_modality), 64), strict=True):
        bins = ((row - low) / width).long().clamp(0, BINS - 1).flatten()
        mass += torch.bincount(bins, (weight[:, None] * energy_per_column.double()).flatten(), BINS)
    return low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * width, mass
