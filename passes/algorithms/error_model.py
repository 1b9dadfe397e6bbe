"""Quantization error of linear layers' outputs: expected, in closed form from statistics, and measured on rows.

Notation: x [T, K] the input, W [N, K] the weights of all consumers, s [K] a smoothing scale per input column. Smoothing
replaces x W^T by (x / s) (W s)^T.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from vlqc.ir.stage import Site
from vlqc.kernels_ref.quantize import INT8_MAX, INT8_STEPS, WEIGHT_INT8_MAX
from vlqc.passes.algorithms.weight_clipping import (
    ELEMENTS_PER_CHUNK,
    ChannelScaleGrid,
    GroupScaleGrid,
    column_importance,
)
from vlqc.targets.schemes import DEFAULT_SCHEME

MAX_WEIGHT_ROWS = 512  # rows of W per search, evenly spread: bounds its cost, whatever the layer
MAX_INPUT_ROWS = 256  # rows of x per search
TAIL_VALUES = 16  # values at either end of a column that are evaluated one by one, as clipping may affect only these
STRATA = 16  # into which the other values of a column are averaged; clipping affects them in columns that are large
CLIPPED_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # of the full range
MIN_WEIGHT_SCALE = 1e-30
MIN_INPUT_SCALE = 1e-12

WeightMethod = Literal["auto", "round", "clip", "gptq"]
ROUNDED_WEIGHT_ROWS = 128  # rows of W that are rounded with searched scales, per candidate


def representative_rows(weights: Sequence[Tensor], max_rows: int = MAX_WEIGHT_ROWS) -> Tensor:
    """Weights [N_i, K] of all consumers -> float32 [<= max_rows, K]: evenly spread rows of all of them, in order."""
    total = sum(weight.shape[0] for weight in weights)
    step = max(1, -(-total // max_rows))
    return torch.cat([weight[::step] for weight in weights]).float().cpu()


@dataclass(frozen=True)
class SchemeNoise:
    """The properties of a scheme that determine its quantization error.

    per_token: one symmetric input scale per row of x; else one asymmetric scale for all rows.
    rounds_input: whether x is rounded at all.
    weight_max: largest integer of a weight.
    group_size: columns that share a weight scale; None for the whole row.
    clips: whether a static input range may be clipped.
    weights: how weights are rounded, see `QuantizeWeights`.
    """

    per_token: bool = False
    weight_max: int = WEIGHT_INT8_MAX
    group_size: int | None = None
    clips: bool = False
    weights: WeightMethod = "round"
    rounds_input: bool = True


@dataclass(frozen=True)
class QuantizationPreview:
    """What later passes will do: clip: whether input ranges are clipped; weights: how weights are rounded."""

    clip: bool = False
    weights: WeightMethod = "round"


ROUND_TO_NEAREST = QuantizationPreview()


def scheme_noise(site: Site, preview: QuantizationPreview = ROUND_TO_NEAREST) -> SchemeNoise:
    """The noise of the scheme that a site is assigned; that of the default scheme if it has none yet."""
    spec = (site.scheme or DEFAULT_SCHEME).spec
    per_token = spec.activation.is_dynamic
    return SchemeNoise(
        per_token,
        spec.weight.largest,
        site.group_size if spec.weight.per_group else None,
        clips=preview.clip and not per_token,
        weights=preview.weights,
        rounds_input=spec.activation.is_quantized,
    )


@dataclass(frozen=True)
class ConsumerGroup:
    """Linear layers that read the same node x, with the statistics of x.

    channel: int64 [K], producer channel of each column of x, see `ir.Edge.consumers`.
    low, high, second_moment: float32 [K], range and mean square of each column.
    rows: float32 [T, K], a selection of x; row_weight: float64 [T], sums to 1.
    weight: float32 [N, K], rows of all consumers.
    share: weight of the group's error, 1 if all rows reach it.
    uncompensated: computes, when first needed, the share of the weight error that GPTQ leaves in each column, float32
        [K], see `compensation`; None if errors are not compensated.
    """

    channel: Tensor
    low: Tensor
    high: Tensor
    second_moment: Tensor
    rows: Tensor
    row_weight: Tensor
    weight: Tensor
    noise: SchemeNoise = SchemeNoise()
    share: float = 1.0
    uncompensated: Callable[[], Tensor] | None = None

    def scale_per_column(self, scales: Tensor) -> Tensor:
        """Scales per producer channel [..., C] -> per input column [..., K]; 1 for columns without a channel."""
        return torch.where(self.channel >= 0, scales[..., self.channel.clamp(min=0)], 1.0)

    @cached_property
    def energy_per_column(self) -> Tensor:
        """float32 [K]: sum over outputs of W^2, the factor from an error in a column to the output error."""
        return self.weight.square().sum(0)

    @cached_property
    def weight_moment(self) -> Tensor:
        """float32 [K]: mean squared error of an output per squared error of a weight in each column."""
        return self.second_moment if self.uncompensated is None else self.second_moment * self.uncompensated()

    @cached_property
    def weight_noise(self) -> float:
        """`_weight_noise` of the weight as it is."""
        return self._weight_noise(torch.ones_like(self.second_moment))

    def expected_error(self, scales: Tensor) -> Tensor:
        """Expected squared error of a row of x W^T, summed over outputs: scales [R, C] -> float64 [R].

        Rounding is modeled as uniform noise of variance step^2 / 12. The input's step is per tensor or per row, and its
        noise is multiplied by all of W s. The weight's step is per row or group of W, and its noise is multiplied by
        the columns of x / s that the group covers, or by what GPTQ leaves of them.
        """
        errors = [
            self._input_error(scale) + self.weight_noise * self._uniform_weight_error(self.weight, scale)
            for scale in self.scale_per_column(scales)
        ]
        return torch.stack(errors)

    def measured_error(self, scales: Tensor) -> float:
        """Squared error of x W^T with rounded operands, averaged by row weight and summed over outputs; scales [C].

        Input and weight are rounded separately: the two errors are independent, so the mean of their product is small.
        """
        scale = self.scale_per_column(scales)
        scaled_input, scaled_weight = self.rows / scale, self.weight * scale
        activation = self._rounded_input(scaled_input, scale).sub_(scaled_input) @ scaled_weight.T
        return self._mean_square(activation) + self._measured_weight_error(scaled_input, scaled_weight, scale)

    def _mean_square(self, errors: Tensor) -> float:
        """Errors of the outputs [T, N] -> squared, summed over outputs, averaged by row weight."""
        return float((errors.square().sum(1).double() * self.row_weight).sum())

    def _measured_weight_error(self, scaled_input: Tensor, scaled_weight: Tensor, scale: Tensor) -> float:
        """Squared error of the outputs from rounding W s.

        Rounding to nearest is done as it is done later. Other methods round a column differently after every change of
        the columns before it, so that their error on a few rows is chance: only its mean is predicted.
        """
        if self.noise.weights == "round":
            step = self._weight_step(scaled_weight)[..., None]  # [N, groups, 1]
            rounded = (self._grouped(scaled_weight) / step).round_().mul_(step).reshape(scaled_weight.shape)
            return self._mean_square(scaled_input @ rounded.sub_(scaled_weight).T)
        return float(self._uniform_weight_error(self.weight, scale)) * self._weight_noise(scale)

    def _uniform_weight_error(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Expected squared error of the outputs from uniform noise in the steps of W s, float64 scalar."""
        moments = self._grouped((self.weight_moment / scale.square()).double()[None]).sum(-1)  # [1, groups]
        parts = torch.split(weight, max(1, ELEMENTS_PER_CHUNK // weight.shape[1]))  # temporaries stay in the cache
        steps = torch.cat([self._weight_step(part * scale) for part in parts])  # [N, groups]
        return (steps.double().square() * moments).sum() / 12

    def _weight_noise(self, scale: Tensor) -> float:
        """Error power of rounding W s with searched scales, relative to `_uniform_weight_error`; 1 without a search."""
        if self.noise.weights == "round":
            return 1.0
        weight = self.weight[:: -(-self.weight.shape[0] // ROUNDED_WEIGHT_ROWS)]
        moment = self.weight_moment / scale.square()
        difference = self._with_searched_scales(weight * scale, column_importance(moment)).sub_(weight * scale)
        uniform = float(self._uniform_weight_error(weight, scale))
        return float((difference.square_().sum(0).double() * moment).sum()) / uniform if uniform else 1.0

    def _with_searched_scales(self, scaled_weight: Tensor, importance: Tensor) -> Tensor:
        """Rounds W s [N, K] as quantize-weights does, without compensation."""
        if self.noise.group_size is None:
            rows = ChannelScaleGrid(scaled_weight, importance, None, torch.float32)
            return rows.round_to_nearest().float().mul_(rows.scale)
        groups = GroupScaleGrid(scaled_weight, importance, self.noise.group_size, torch.float32)
        integers = self._grouped(groups.round_to_nearest().float())
        return integers.mul_((groups.first * groups.second)[..., None]).reshape(scaled_weight.shape)

    def _input_error(self, scale: Tensor) -> Tensor:
        """Expected squared error of the outputs from rounding x / s, float64 scalar."""
        if not self.noise.rounds_input:
            return torch.zeros((), dtype=torch.float64)
        if self.noise.per_token:
            energy = (self.energy_per_column.double() * scale.double().square()).sum()
            step_per_token = (self.rows / scale).abs().amax(1).double() / INT8_MAX
            return (step_per_token.square() * self.row_weight).sum() * energy / 12
        return torch.tensor(min(self._static_errors(scale)), dtype=torch.float64)

    def _static_errors(self, scale: Tensor) -> list[float]:
        """`_input_error` of a static range for each candidate share of the full range, up to the best one at least.

        Clipping errors grow as the share falls: no share after one whose clipping error exceeds the best error can be
        the best.
        """
        energy = float((self.energy_per_column.double() * scale.double().square()).sum())
        low, high = self._range(scale)
        width, errors = float(high - low), list[float]()
        for share in self._shares:
            clipping = self._clipping_error(low * share * scale, high * share * scale)
            if errors and clipping >= min(errors):
                break
            step = width * share / INT8_STEPS
            errors.append(step * step * energy / 12 + clipping)
        return errors

    @property
    def _shares(self) -> tuple[float, ...]:
        return CLIPPED_SHARES if self.noise.clips else CLIPPED_SHARES[:1]

    def _clipping_error(self, low: Tensor, high: Tensor) -> float:
        """Squared error of the outputs when column k of x is clipped to [low[k], high[k]]."""
        (lowest, weight_of_lowest), (highest, weight_of_highest) = self._sorted_values
        below = (low - lowest).clamp_(min=0).square_().mul_(weight_of_lowest)
        above = (highest - high).clamp_(min=0).square_().mul_(weight_of_highest)
        return float((below.add_(above).sum(0) * self.energy_per_column).sum(dtype=torch.float64))

    @cached_property
    def _sorted_values(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(values, row weights) of each column in ascending and in descending order, reduced by `stratify`.

        float32 [<= TAIL_VALUES + STRATA, K] each.
        """
        values, order = self.rows.sort(0)
        weight = self.row_weight.float()[order]
        return stratify(values, weight), stratify(values.flip(0), weight.flip(0))

    def _grouped(self, rows: Tensor) -> Tensor:
        """[N, K] -> [N, groups, K / groups]"""
        return rows.reshape(*rows.shape[:-1], -1, self.noise.group_size or rows.shape[-1])

    def _weight_step(self, scaled_weight: Tensor) -> Tensor:
        """[N, K] -> [N, groups]"""
        return self._grouped(scaled_weight).abs().amax(-1).clamp(min=MIN_WEIGHT_SCALE) / self.noise.weight_max

    def _range(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        return (self.low / scale).amin().clamp(max=0), (self.high / scale).amax().clamp(min=0)

    def _rounded_input(self, scaled_input: Tensor, scale: Tensor) -> Tensor:
        if not self.noise.rounds_input:
            return scaled_input.clone()
        if self.noise.per_token:
            step = scaled_input.abs().amax(1, keepdim=True).clamp(min=MIN_INPUT_SCALE) / INT8_MAX
            return (scaled_input / step).round_().mul_(step)
        errors = self._static_errors(scale)
        share = self._shares[errors.index(min(errors))]
        low, high = (end * share for end in self._range(scale))
        step = ((high - low) / INT8_STEPS).clamp(min=MIN_INPUT_SCALE)
        offset = torch.round(low / step)
        return (scaled_input / step).round_().sub_(offset).clamp_(0, INT8_STEPS).add_(offset).mul_(step)


def stratify(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Reduces sorted values and their weights [T, K] to the first TAIL_VALUES and weighted means of STRATA parts."""
    tail, rest = values[:TAIL_VALUES], len(values) - TAIL_VALUES
    if rest <= 0:
        return values, weight
    strata = min(STRATA, rest)
    value_parts = torch.tensor_split(values[TAIL_VALUES:], strata)
    weight_parts = torch.tensor_split(weight[TAIL_VALUES:], strata)
    total = torch.stack([part.sum(0) for part in weight_parts])
    weighted_sum = torch.stack([(value * part).sum(0) for value, part in zip(value_parts, weight_parts, strict=True)])
    mean = weighted_sum / total.clamp(min=torch.finfo(total.dtype).tiny)
    return torch.cat([tail, mean]), torch.cat([weight[:TAIL_VALUES], total])
