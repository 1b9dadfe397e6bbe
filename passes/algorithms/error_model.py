"""How much error rounding adds to the outputs of linears: in closed form from statistics, and measured on rows.

Notation: x [T, K] the input, W [N, K] the weights of all consumers, s [K] a smoothing scale: x/s meets W*s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from vlqc.ir.stage import Site
from vlqc.kernels_ref.quantize import INT8_MAX, INT8_STEPS, WEIGHT_INT8_MAX
from vlqc.targets.schemes import Scheme

ROWS_OF_WEIGHT = 512  # rows of W that a search looks at, evenly spread: bounds its cost, whatever the layer
ROWS_OF_INPUT = 256  # the same for rows of x
EXTREMES = 16  # values of a column, on either side, that are looked at one by one: a range may cut off just these
STRATA = 16  # into which all other values of a column are put together: it may be always large, and all be cut off
CLIPPED_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # of the full range, the first is all of it
WEIGHT_INT4_MAX = 7

WeightMethod = Literal["auto", "round", "clip", "gptq"]
WEIGHT_NOISE = {"round": 1.0, "clip": 0.85, "gptq": 0.6, "auto": 0.6}  # of that of rounding to the nearest, as measured


def representative_rows(weights: Sequence[Tensor], most: int = ROWS_OF_WEIGHT) -> Tensor:
    """[N_i, K] of all consumers -> float32 [<= most, K]: evenly spread rows of them all, in order."""
    total = sum(weight.shape[0] for weight in weights)
    step = max(1, -(-total // most))
    return torch.cat([weight[::step] for weight in weights]).float().cpu()


@dataclass(frozen=True)
class Arithmetic:
    """How a scheme rounds, as far as its error goes.

    per_token: one symmetric step per row of x (else one asymmetric step for all rows); weight_max: the largest integer
    of a weight; group_size: columns that share a weight's step (None: the whole row); clips: whether a static range may
    leave out what is rare; weight_noise: what rounding weights leaves of the noise of rounding them to the nearest.
    """

    per_token: bool = False
    weight_max: int = WEIGHT_INT8_MAX
    group_size: int | None = None
    clips: bool = False
    weight_noise: float = 1.0


@dataclass(frozen=True)
class Rounding:
    """What later passes will do, as far as a search foresees it: clip activation ranges, round weights cleverly."""

    clip: bool = False
    weights: WeightMethod = "round"


PLAIN = Rounding()


def arithmetic_of(site: Site, rounding: Rounding = PLAIN) -> Arithmetic:
    """Of the scheme that a site was assigned; static W8A8 if it has none yet."""
    weight_noise = WEIGHT_NOISE[rounding.weights]
    if site.scheme == Scheme.W4A8_DYNAMIC:
        return Arithmetic(True, WEIGHT_INT4_MAX, site.group_size, False, weight_noise)
    per_token = site.scheme == Scheme.W8A8_DYNAMIC
    return Arithmetic(per_token, clips=rounding.clip and not per_token, weight_noise=weight_noise)


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

    @cached_property
    def energy_per_column(self) -> Tensor:
        """float32 [K]: sum over outputs of W^2, by how much an error in a column reaches the outputs."""
        return self.weight.square().sum(0)

    def expected_error(self, scales: Tensor) -> Tensor:
        """Expected squared error of a row of x W^T, summed over outputs: scales [R, C] -> float64 [R].

        Rounding is uniform noise of variance step^2/12. The activation's step is per tensor or per row, its noise
        reaches the output through all of W*s; the weight's step is per row or group of W, its noise is carried by the
        columns of x/s that it covers.
        """
        errors = []
        for scale in self.columns(scales):
            carried = self._grouped((self.second_moment / scale.square()).double()[None]).sum(-1)  # [1, groups]
            weight = (self._weight_step(self.weight * scale).double().square() * carried).sum() / 12
            errors.append(self._activation_error(scale) + weight * self.arithmetic.weight_noise)
        return torch.stack(errors)

    def measured_error(self, scales: Tensor) -> float:
        """Squared error of x W^T when each side is rounded, weighted over rows and summed over outputs; scales [C].

        Each side by itself: one does not follow from the other, so their product's mean is small beside both.
        """
        scale = self.columns(scales)
        smooth, heavy = self.rows / scale, self.weight * scale
        activation = self._rounded_input(smooth, scale).sub_(smooth) @ heavy.T
        step = self._weight_step(heavy)[..., None]  # [N, groups, 1]
        rounded = (self._grouped(heavy) / step).round_().mul_(step).reshape(heavy.shape)
        weight = smooth @ rounded.sub_(heavy).T
        per_row = activation.square().sum(1).double() + self.arithmetic.weight_noise * weight.square().sum(1).double()
        return float((per_row * self.row_weight).sum())

    def _activation_error(self, scale: Tensor) -> Tensor:
        """Expected squared error of the outputs when x/s is rounded, float64 scalar."""
        if self.arithmetic.per_token:
            spread = (self.energy_per_column.double() * scale.double().square()).sum()
            step_per_token = (self.rows / scale).abs().amax(1).double() / INT8_MAX
            return (step_per_token.square() * self.row_weight).sum() * spread / 12
        return min(self._static_errors(scale))

    def _static_errors(self, scale: Tensor) -> list[Tensor]:
        """As `_activation_error` for each of the shares of the full range to which it may be clipped."""
        spread = (self.energy_per_column.double() * scale.double().square()).sum()
        bottom, top = self._range(scale)
        return [
            ((top - bottom).double() * share / INT8_STEPS).square() * spread / 12
            + self._clipping_error(bottom * share * scale, top * share * scale)
            for share in self._shares
        ]

    @property
    def _shares(self) -> tuple[float, ...]:
        return CLIPPED_SHARES if self.arithmetic.clips else CLIPPED_SHARES[:1]

    def _clipping_error(self, bottom: Tensor, top: Tensor) -> Tensor:
        """Of the outputs, float64 scalar, when column k of x is kept within bottom[k] and top[k], both float32 [K]."""
        (lowest, weight_of_lowest), (highest, weight_of_highest) = self._sorted_values
        below = (bottom - lowest).clamp(min=0).square() * weight_of_lowest
        above = (highest - top).clamp(min=0).square() * weight_of_highest
        return ((below + above).sum(0) * self.energy_per_column).sum(dtype=torch.float64)

    @cached_property
    def _sorted_values(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The rows' values per column, from the lowest up and from the highest down, with the rows' weights.

        float32 [<= EXTREMES + STRATA, K] each; behind the first EXTREMES, means of what was put together.
        """
        values, order = self.rows.sort(0)
        weight = self.row_weight.float()[order]
        return in_strata(values, weight), in_strata(values.flip(0), weight.flip(0))

    def _grouped(self, rows: Tensor) -> Tensor:
        """[N, K] -> [N, groups, K / groups]"""
        return rows.reshape(*rows.shape[:-1], -1, self.arithmetic.group_size or rows.shape[-1])

    def _weight_step(self, heavy: Tensor) -> Tensor:
        """[N, K] -> [N, groups]"""
        return self._grouped(heavy).abs().amax(-1).clamp(min=1e-30) / self.arithmetic.weight_max

    def _range(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        return (self.low / scale).amin().clamp(max=0), (self.high / scale).amax().clamp(min=0)

    def _rounded_input(self, smooth: Tensor, scale: Tensor) -> Tensor:
        if self.arithmetic.per_token:
            step = smooth.abs().amax(1, keepdim=True).clamp(min=1e-12) / INT8_MAX
            return (smooth / step).round_().mul_(step)
        errors = self._static_errors(scale)
        share = self._shares[errors.index(min(errors))]
        bottom, top = (end * share for end in self._range(scale))
        step = ((top - bottom) / INT8_STEPS).clamp(min=1e-12)
        offset = torch.round(bottom / step)
        return (smooth / step).round_().sub_(offset).clamp_(0, INT8_STEPS).add_(offset).mul_(step)


def in_strata(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted values and their weights [T, K] -> the first EXTREMES, then weighted means of STRATA parts of the rest."""
    first, rest = values[:EXTREMES], len(values) - EXTREMES
    if rest <= 0:
        return values, weight
    parts = list(zip(*(torch.tensor_split(it[EXTREMES:], min(STRATA, rest)) for it in (values, weight)), strict=True))
    total = torch.stack([part.sum(0) for _, part in parts])
    mean = torch.stack([(value * part).sum(0) for value, part in parts]) / total.clamp(
        min=torch.finfo(total.dtype).tiny
    )
    return torch.cat([first, mean]), torch.cat([weight[:EXTREMES], total])
