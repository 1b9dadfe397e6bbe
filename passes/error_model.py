"""How much error rounding adds to the outputs of linears: in closed form from statistics, and measured on rows.

Notation: x [T, K] the input, W [N, K] the weights of all consumers, s [K] a smoothing scale: x/s meets W*s.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlqc.engines import Scheme
from vlqc.ir import Site
from vlqc.kernels_ref.quantize import INT8_MAX, INT8_STEPS, WEIGHT_INT8_MAX

ROWS_OF_WEIGHT = 1024  # rows of W that a search looks at, evenly spread: bounds its cost, whatever the layer
ROWS_OF_INPUT = 512  # the same for rows of x
WEIGHT_INT4_MAX = 7
GOLDEN_RATIO = (5**0.5 - 1) / 2


def representative_rows(weights: Sequence[Tensor], most: int = ROWS_OF_WEIGHT) -> Tensor:
    """[N_i, K] of all consumers -> float32 [<= most, K]: evenly spread rows of them all, in order."""
    total = sum(weight.shape[0] for weight in weights)
    step = max(1, -(-total // most))
    return torch.cat([weight[::step] for weight in weights]).float().cpu()


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


@dataclass(frozen=True)
class Arithmetic:
    """How a scheme rounds, as far as its error goes.

    per_token: one symmetric step per row of x (else one asymmetric step for all rows); weight_max: the largest integer
    of a weight; group_size: columns that share a weight's step (None: the whole row).
    """

    per_token: bool = False
    weight_max: int = WEIGHT_INT8_MAX
    group_size: int | None = None


def arithmetic_of(site: Site) -> Arithmetic:
    """Of the scheme that a site was assigned; static W8A8 if it has none yet."""
    if site.scheme == Scheme.W4A8_DYNAMIC:
        return Arithmetic(True, WEIGHT_INT4_MAX, site.group_size)
    return Arithmetic(per_token=site.scheme == Scheme.W8A8_DYNAMIC)


@dataclass(frozen=True)
class Reader:
    """Consumers that read the same node, as a search sees them.

    channel: int64 [K], see ir.Edge.consumers; low, high, second_moment: float32 [K], the input's range and mean square
    per channel; rows: float32 [T, K] of it, row_weight: float64 [T], sums to 1; weight: float32 [N, K], of them all.
    """

    channel: Tensor
    low: Tensor
    high: Tensor
    second_moment: Tensor
    rows: Tensor
    row_weight: Tensor
    weight: Tensor
    arithmetic: Arithmetic = Arithmetic()

    def columns(self, scales: Tensor) -> Tensor:
        """Scales per producer channel [..., C] -> per input column [..., K]; 1 where no channel arrives."""
        return torch.where(self.channel >= 0, scales[..., self.channel.clamp(min=0)], 1.0)

    def expected_error(self, scales: Tensor) -> Tensor:
        """Expected squared error of a row of x W^T, summed over outputs: scales [R, C] -> float64 [R].

        Rounding is uniform noise of variance step^2/12. The activation's step is per tensor or per row, its noise
        reaches the output through all of W*s; the weight's step is per row or group of W, its noise is carried by the
        columns of x/s that it covers.
        """
        energy_per_column = self.weight.square().sum(0).double()  # [K]
        errors = []
        for scale in self.columns(scales):
            spread = (energy_per_column * scale.double().square()).sum()
            carried = self._grouped((self.second_moment / scale.square()).double()[None]).sum(-1)  # [1, groups]
            weight = (self._weight_step(self.weight * scale).double().square() * carried).sum()
            errors.append((self._mean_square_step(scale) * spread + weight) / 12)
        return torch.stack(errors)

    def measured_error(self, scales: Tensor) -> float:
        """Squared error of x W^T with both sides rounded, weighted over rows and summed over outputs; scales [C]."""
        scale = self.columns(scales)
        smooth, heavy = self.rows / scale, self.weight * scale
        rounded = self._rounded_input(smooth, scale)
        step = self._weight_step(heavy)[..., None]  # [N, groups, 1]
        weight = (torch.round(self._grouped(heavy) / step) * step).reshape(heavy.shape)
        error = rounded @ weight.T - self.rows @ self.weight.T
        return float((error.square().sum(1).double() * self.row_weight).sum())

    def _grouped(self, rows: Tensor) -> Tensor:
        """[N, K] -> [N, groups, K / groups]"""
        return rows.reshape(*rows.shape[:-1], -1, self.arithmetic.group_size or rows.shape[-1])

    def _weight_step(self, heavy: Tensor) -> Tensor:
        """[N, K] -> [N, groups]"""
        return self._grouped(heavy).abs().amax(-1).clamp(min=1e-30) / self.arithmetic.weight_max

    def _range(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        return (self.low / scale).amin().clamp(max=0), (self.high / scale).amax().clamp(min=0)

    def _mean_square_step(self, scale: Tensor) -> Tensor:
        """Of the activation, float64 scalar."""
        if self.arithmetic.per_token:
            step_per_token = (self.rows / scale).abs().amax(1).double() / INT8_MAX
            return (step_per_token.square() * self.row_weight).sum()
        bottom, top = self._range(scale)
        return ((top - bottom).double() / INT8_STEPS).square()

    def _rounded_input(self, smooth: Tensor, scale: Tensor) -> Tensor:
        if self.arithmetic.per_token:
            step = smooth.abs().amax(1, keepdim=True).clamp(min=1e-12) / INT8_MAX
            return torch.round(smooth / step) * step
        bottom, top = self._range(scale)
        step = ((top - bottom) / INT8_STEPS).clamp(min=1e-12)
        offset = torch.round(bottom / step)
        return ((torch.round(smooth / step) - offset).clamp(0, INT8_STEPS) + offset) * step


def balanced(kept_modality: Tensor) -> Tensor:
    """int8 [T] -> float64 [T] weights that sum to 1, in which every modality present counts the same."""
    weights = torch.zeros(kept_modality.shape[0], dtype=torch.float64)
    present = sorted(set(kept_modality.tolist()))
    for modality in present:
        members = kept_modality == modality
        weights[members] = 1 / (int(members.sum()) * len(present))
    return weights
