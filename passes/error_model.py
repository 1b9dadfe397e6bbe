"""How much error int8 adds to the outputs of linears: in closed form from statistics, and measured on rows.

Notation: x [T, K] the input, W [N, K] the weights of all consumers, s [K] a smoothing scale: x/s meets W*s.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vlqc.kernels_ref.quantize import INT8_STEPS, WEIGHT_INT8_MAX

ROWS_OF_WEIGHT = 1024  # rows of W that a search looks at, evenly spread: bounds its cost, whatever the layer
ROWS_OF_INPUT = 512  # the same for rows of x
GOLDEN_RATIO = (5**0.5 - 1) / 2


def representative_rows(weights: Sequence[Tensor], most: int = ROWS_OF_WEIGHT) -> Tensor:
    """[N_i, K] of all consumers -> float32 [<= most, K]: evenly spread rows of them all, in order."""
    total = sum(weight.shape[0] for weight in weights)
    step = max(1, -(-total // most))
    return torch.cat([weight[::step] for weight in weights]).float()


def representative_inputs(kept_modality: Tensor, most: int = ROWS_OF_INPUT) -> Tensor:
    """int8 [T] -> int64 [<= most]: positions of kept rows, ascending, spread over all of every modality.

    Rows come sample by sample, text before image: equal strides could meet only one modality, or only first rows.
    Multiples of the golden ratio, modulo 1, have no period to fall in with.
    """
    present = sorted(set(kept_modality.tolist()))
    chosen = []
    for modality in present:
        where = (kept_modality == modality).nonzero().flatten()
        order = (torch.arange(len(where), dtype=torch.float64) * GOLDEN_RATIO).frac().argsort()
        chosen.append(where[order[: max(1, most // len(present))]])
    return torch.cat(chosen).sort().values


def expected_error(low: Tensor, high: Tensor, second_moment: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """Expected squared error of a row of x W^T, summed over outputs, for each candidate scale.

    low, high, second_moment: float32 [K], the input's range and mean square per channel; weight: float32 [N, K];
    scales: float32 [C, K] -> float64 [C]. Rounding is uniform noise of variance step^2/12: the activation's step is
    per tensor, its noise reaches the output through all of W*s; the weight's step is per row, its noise is carried by
    all of x/s.
    """
    energy_per_column = weight.square().sum(0).double()  # [K]
    errors = []
    for scale in scales:
        span = (high / scale).amax().clamp(min=0) - (low / scale).amin().clamp(max=0)
        activation = (span.double() / INT8_STEPS) ** 2 / 12 * (energy_per_column * scale.double().square()).sum()
        step_per_row = (weight * scale).abs().amax(1).double() / WEIGHT_INT8_MAX  # [N]
        carried = (second_moment / scale.square()).double().sum()
        errors.append(activation + step_per_row.square().sum() / 12 * carried)
    return torch.stack(errors)


def measured_error(rows: Tensor, row_weight: Tensor, weight: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> float:
    """Squared error of x W^T with both sides in int8, weighted over rows of x and summed over outputs.

    rows: float32 [T, K]; row_weight: float32 [T], sums to 1; weight: float32 [N, K]; scale: float32 [K];
    low, high: float32 [K], the exact range of the input per channel.
    """
    smooth, heavy = rows / scale, weight * scale
    top, bottom = (high / scale).amax().clamp(min=0), (low / scale).amin().clamp(max=0)
    step = ((top - bottom) / INT8_STEPS).clamp(min=1e-12)
    offset = torch.round(bottom / step)
    rounded = (torch.round(smooth / step) - offset).clamp(0, INT8_STEPS) + offset
    step_per_row = heavy.abs().amax(1, keepdim=True).clamp(min=1e-30) / WEIGHT_INT8_MAX
    error = (rounded * step) @ (torch.round(heavy / step_per_row) * step_per_row).T - rows @ weight.T
    return float((error.square().sum(1).double() * row_weight).sum())


def balanced(kept_modality: Tensor) -> Tensor:
    """int8 [T] -> float64 [T] weights that sum to 1, in which every modality present counts the same."""
    weights = torch.zeros(kept_modality.shape[0], dtype=torch.float64)
    present = sorted(set(kept_modality.tolist()))
    for modality in present:
        members = kept_modality == modality
        weights[members] = 1 / (int(members.sum()) * len(present))
    return weights
