"""quantize-activations: from what was observed to one input scale and offset per group."""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlqc.ir.observation import Observation
from vlqc.ir.stage import InputQuantization, Site, Stage
from vlqc.kernels_ref.quantize import (
    INT8_MAX,
    INT8_MIN,
    activation_scale_and_offset,
    activation_scales_and_offsets,
    dequantize_per_tensor,
    quantize_per_tensor,
)
from vlqc.passes.algorithms.error_model import representative_rows
from vlqc.passes.insert_observers import observed
from vlqc.pipeline.pass_api import Pass
from vlqc.targets.schemes import Scheme

ROWS_JUDGED = 512  # kept rows on which two ranges are compared
BINS = 2048  # as in PyTorch's HistogramObserver
BEYOND = (1.25, 1.15, 1.05)  # of the seen range on either side: room for what was not seen
SHARES = (*BEYOND, *(0.5 ** (step / 8) for step in range(41)))  # the seen range itself among them, down to 0.03
COLUMNS_AT_A_TIME = 128
UNSEEN = 0.25  # by that share, over the root of the number of samples, values beyond calibration differ from those seen
NODES = ((-2, 0.06), (-1, 0.24), (0, 0.4), (1, 0.24), (2, 0.06))  # standard deviations, and their shares


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
        groups = {source: it for source, it in stage.groups().items() if it[0].scheme == Scheme.W8A8}
        tasks = [partial(self._choose, stage, source, members) for source, members in groups.items()]
        for members, quantization in zip(
            groups.values(), stage.execution.process_group.parallel_map(tasks), strict=True
        ):
            for site in members:
                changed |= site.input != quantization
                site.input = quantization
        return changed

    def _choose(self, stage: Stage, source: str, members: list[Site]) -> InputQuantization:
        seen, weights, dtype = (
            observed(stage, source, self.name),
            [stage.linear(it).weight for it in members],
            stage.dtype,
        )
        low, high = float(seen.minimum().amin()), float(seen.maximum().amax())
        full = InputQuantization(*activation_scale_and_offset(low, high, dtype))
        if self.method == "minmax":
            return full
        energy = torch.stack([energy_per_column(weight) for weight in weights]).sum(0).cpu()
        clipped = InputQuantization(*activation_scale_and_offset(*clipped_range(seen, energy, low, high, dtype), dtype))
        if self.method == "histogram":
            return clipped
        errors = {one: output_error(seen, representative_rows(weights), one) for one in (full, clipped)}
        return min(errors, key=lambda one: errors[one])


def energy_per_column(weight: Tensor) -> Tensor:
    """[N, K] -> [K]: sum over outputs of W^2; few columns at a time, so that the squares stay in the cache."""
    return torch.cat([part.square().sum(0) for part in torch.split(weight, COLUMNS_AT_A_TIME, dim=1)])


def output_error(seen: Observation, weight: Tensor, grid: InputQuantization) -> float:
    """Mean squared error of the outputs, on kept rows, when only the input is rounded; see `row_weight`.

    weight: float32 [N, K], rows of all consumers.
    """
    index = seen.representative(ROWS_JUDGED)
    rows = seen.kept[index]
    rounded = dequantize_per_tensor(
        quantize_per_tensor(rows, grid.scale, grid.offset), grid.scale, grid.offset, rows.dtype
    )
    error = (rounded - rows) @ weight.T
    return float((error.square().sum(1).double() * seen.row_weight(index)).sum())


def clipped_range(
    seen: Observation, energy_per_column: Tensor, low: float, high: float, dtype: torch.dtype
) -> tuple[float, float]:
    """The range within 1.25 times [low, high] that minimises the expected squared error of the outputs.

    energy_per_column: float32 [K], sum over outputs of W^2: by how much an error in a column reaches the output. Values
    of all kept rows go into one histogram, weighted by that and by what each row counts, and blurred by as much as
    unseen inputs will differ; each candidate range is judged on the bins' centres with the arithmetic that will be
    used, scale rounded to `dtype`.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if high - low == 0.0 or not bool(energy_per_column.any()):
        return low, high
    centres, mass = blurred(
        *weighted_histogram(seen, energy_per_column, low, high), UNSEEN / max(seen.samples, 1) ** 0.5
    )
    best, smallest = (low, high), float("inf")
    for low_share in SHARES if low < 0 else (1.0,):
        tops = high * torch.tensor(SHARES if high > 0 else (1.0,), dtype=torch.float64)  # [R]
        grids = activation_scales_and_offsets(torch.full_like(tops, low * low_share), tops, dtype)
        scale, offset = (it[:, None] for it in grids)  # [R, 1]
        rounded = (torch.round(centres / scale + offset).clamp(INT8_MIN, INT8_MAX) - offset) * scale  # [R, BINS]
        errors = (rounded - centres).square() @ mass  # [R]
        number = int(errors.argmin())
        if float(errors[number]) < smallest:
            best, smallest = (low * low_share, float(tops[number])), float(errors[number])
    return best


def weighted_histogram(seen: Observation, energy_per_column: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """(centres float64 [BINS], mass float64 [BINS]) of the kept rows' values between low and high."""
    width = (high - low) / BINS
    mass = torch.zeros(BINS, dtype=torch.float64)
    for row, weight in zip(torch.split(seen.kept, 64), torch.split(seen.row_weight(), 64), strict=True):
        bins = ((row - low) / width).long().clamp(0, BINS - 1).flatten()
        mass += torch.bincount(bins, (weight[:, None] * energy_per_column.double()).flatten(), BINS)
    return low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * width, mass


def blurred(centres: Tensor, mass: Tensor, deviation: float) -> tuple[Tensor, Tensor]:
    """A histogram float64 [BINS] twice -> that of values which differ from those by factors exp(N(0, deviation))."""
    reach = math.exp(NODES[-1][0] * deviation)
    width = float(centres[1] - centres[0]) * reach
    low = (float(centres[0]) - width / reach / 2) * reach
    spread = torch.zeros_like(mass)
    for distance, share in NODES:
        bins = ((centres * math.exp(distance * deviation) - low) / width).long().clamp(0, len(mass) - 1)
        spread += torch.bincount(bins, mass * share, len(mass))
    return low + (torch.arange(len(mass), dtype=torch.float64) + 0.5) * width, spread
