"""Search for the clipped int8 input range that minimizes the expected squared error of a linear layer's outputs.

Notation: x [T, K] rows of the input, W [N, K] weights of all linear layers that read it.
"""

import math

import torch
from torch import Tensor

from vlqc.ir.observation import Observation
from vlqc.ir.stage import InputQuantization
from vlqc.kernels_ref.quantize import (
    INT8_MAX,
    INT8_MIN,
    activation_scales_and_offsets,
    dequantize_per_tensor,
    quantize_per_tensor,
)

MAX_ROWS = 512  # kept rows on which two ranges are compared
BINS = 2048  # as in PyTorch's HistogramObserver
MARGINS = (1.25, 1.15, 1.05)  # of the observed range on either side, for values beyond the calibration set
SHARES = (*MARGINS, *(0.5 ** (step / 8) for step in range(41)))  # includes 1, the observed range; ends at 0.03
COLUMNS_PER_CHUNK = 128
UNSEEN_DEVIATION = 0.25  # relative deviation of unseen inputs from calibration inputs, times sqrt(number of samples)
GAUSSIAN_NODES = ((-2, 0.06), (-1, 0.24), (0, 0.4), (1, 0.24), (2, 0.06))  # (standard deviations, probability)


def energy_per_column(weight: Tensor) -> Tensor:
    """weight [N, K] -> [K]: sum over outputs of W^2, in column chunks so that the squares stay in the cache."""
    return torch.cat([part.square().sum(0) for part in torch.split(weight, COLUMNS_PER_CHUNK, dim=1)])


def input_rounding_error(observation: Observation, weight: Tensor, quantization: InputQuantization) -> float:
    """Mean squared error of x W^T on kept rows when only x is quantized, weighted by `Observation.row_weight`.

    weight: float32 [N, K], rows of all consumers.
    """
    index = observation.representative(MAX_ROWS)
    rows = observation.kept[index]
    scale, offset = quantization.scale, quantization.offset
    rounded = dequantize_per_tensor(quantize_per_tensor(rows, scale, offset), scale, offset, rows.dtype)
    error = (rounded - rows) @ weight.T
    return float((error.square().sum(1).double() * observation.row_weight(index)).sum())


def search_clipped_range(
    observation: Observation, energy_per_column: Tensor, low: float, high: float, dtype: torch.dtype
) -> tuple[float, float]:
    """Returns the range within 1.25 times [low, high] with the smallest expected squared error of the outputs.

    energy_per_column: float32 [K], sum over outputs of W^2, the factor from an input error to the output error.
    dtype: of the stored scale.

    The values of all kept rows are collected in one histogram, weighted by that factor and by the row weights, and
    blurred by the expected deviation of unseen inputs. Each candidate range is evaluated on the bin centers with the
    scale rounded to `dtype`.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if high - low == 0.0 or not bool(energy_per_column.any()):
        return low, high
    deviation = UNSEEN_DEVIATION / max(observation.samples, 1) ** 0.5
    centers, mass = blur_histogram(*weighted_histogram(observation, energy_per_column, low, high), deviation)
    best, smallest = (low, high), float("inf")
    for low_share in SHARES if low < 0 else (1.0,):
        highs = high * torch.tensor(SHARES if high > 0 else (1.0,), dtype=torch.float64)  # [R]
        scales, offsets = activation_scales_and_offsets(torch.full_like(highs, low * low_share), highs, dtype)
        scale, offset = scales[:, None], offsets[:, None]  # [R, 1]
        rounded = (torch.round(centers / scale + offset).clamp(INT8_MIN, INT8_MAX) - offset) * scale  # [R, BINS]
        errors = (rounded - centers).square() @ mass  # [R]
        number = int(errors.argmin())
        if float(errors[number]) < smallest:
            best, smallest = (low * low_share, float(highs[number])), float(errors[number])
    return best


def weighted_histogram(
    observation: Observation, energy_per_column: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Histogram of the kept rows' values between low and high: (centers, mass), both float64 [BINS]."""
    width = (high - low) / BINS
    mass = torch.zeros(BINS, dtype=torch.float64)
    weights = observation.row_weight()
    for rows, weight in zip(torch.split(observation.kept, 64), torch.split(weights, 64), strict=True):
        bins = ((rows - low) / width).long().clamp(0, BINS - 1).flatten()
        mass += torch.bincount(bins, (weight[:, None] * energy_per_column.double()).flatten(), BINS)
    return low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * width, mass


def blur_histogram(centers: Tensor, mass: Tensor, deviation: float) -> tuple[Tensor, Tensor]:
    """Histogram (centers, mass) float64 [BINS] -> the same with every value multiplied by exp(N(0, deviation))."""
    stretch = math.exp(GAUSSIAN_NODES[-1][0] * deviation)
    width = float(centers[1] - centers[0]) * stretch
    low = (float(centers[0]) - width / stretch / 2) * stretch
    blurred = torch.zeros_like(mass)
    for distance, probability in GAUSSIAN_NODES:
        bins = ((centers * math.exp(distance * deviation) - low) / width).long().clamp(0, len(mass) - 1)
        blurred += torch.bincount(bins, mass * probability, len(mass))
    return low + (torch.arange(len(mass), dtype=torch.float64) + 0.5) * width, blurred
