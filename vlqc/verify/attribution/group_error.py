"""Measures whether a group's error comes from its weights or its inputs, and how much other options would reduce it.

All errors are measured at the outputs of the group's layers, on their inputs in the float model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vlqc.ir.observation import MODALITIES
from vlqc.kernels_ref.quant_linear import QuantLinear
from vlqc.kernels_ref.quantize import (
    INT8_MAX,
    INT8_MIN,
    activation_scale_and_offset,
    dequantize_per_tensor,
    quantize_per_tensor,
    quantize_per_token,
    quantize_weight_per_channel_absmax,
)
from vlqc.targets.schemes import Scheme
from vlqc.verify.attribution.stage_pair import StagePair, stored_weight

NARROWER = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # shares of the samples' range that are tried as the input's range
SMOOTHING = 0.5  # exponent of the closed-form smoothing (SmoothQuant's alpha) that is tried
INT4_MAX = 7
NEAREST_TOLERANCE = 0.01  # steps by which an uncertain scale between two linear layers may move a weight
SMALLEST_GROUP = 64  # columns that share a scale of 4-bit weights, at least
PER_TOKEN, WIDER, TIGHTER, EIGHT_BITS, SMALL_GROUPS, SMOOTHED = (
    "per token", "wider range", "narrower range", "8-bit weights", "smaller groups", "smoothed"
)  # fmt: skip


@dataclass
class GroupError:
    """Noise power of a group's outputs, each row relative to the power of its stage's output in that row.

    total: as stored; from_weights, from_inputs: with only that side rounded; alternatives: sum of both sides under
    another option, by its name; clipped: per modality (values outside the static range, all values); overshoot: the
    largest input over the end of the range; outlier_ratio: the largest channel of the stored input over the median one;
    nearest_share: share of the integers that are the nearest to the float weight.
    """

    total: float = 0.0
    from_weights: float = 0.0
    from_inputs: float = 0.0
    alternatives: dict[str, float] = field(default_factory=dict)
    clipped: dict[str, tuple[int, int]] = field(default_factory=dict)
    overshoot: float = 0.0
    outlier_ratio: float = 0.0
    nearest_share: float = 0.0

    @property
    def input_share(self) -> float:
        """Share of the error that comes from the inputs, 0 to 1; 0.5 if there is no error."""
        both = self.from_inputs + self.from_weights
        return self.from_inputs / both if both > 0 else 0.5


@dataclass(frozen=True)
class CapturedInput:
    """Input of a group in the float model: rows float32 [T, K], modality int8 [T] (index into `ir.MODALITIES`), and the
    weight of each row's error, float64 [T]."""

    rows: Tensor
    modality: Tensor
    weight: Tensor

    def power(self, error: Tensor) -> float:
        """error float [T, N] -> its weighted power."""
        return float((error.double().square().sum(dim=1) * self.weight).sum())


@torch.no_grad()
def measure_group(pair: StagePair, layers: Sequence[str], captured: CapturedInput, dtype: torch.dtype) -> GroupError:
    """layers: the members of one group, all quantized; dtype: the folder's float dtype, in which scales are stored."""
    error = GroupError()
    inputs = pair.transforms[layers[0]].input_to_stored(captured.rows)
    first = pair.stored[layers[0]]
    if isinstance(first, QuantLinear) and first.static_input:
        _measure_range(error, first, inputs, captured.modality)
    size = inputs.abs().amax(dim=0)
    error.outlier_ratio = float(size.amax() / size.median().clamp(min=torch.finfo(torch.float32).tiny))
    smooth = _smoothing_scale(pair, layers, captured.rows) if pair.smoothable(layers[0]) else None
    totals: dict[str, list[float]] = {}
    for layer in layers:
        linear, stored, transform = pair.linears[layer], pair.stored[layer], pair.transforms[layer]
        assert isinstance(stored, QuantLinear)
        spec = Scheme(stored.scheme).spec
        exact = linear.forward(captured.rows)

        def input_noise(rounded: Tensor, linear: nn.Linear = linear, columns: Tensor = transform.columns) -> float:
            return captured.power(((rounded - inputs) * columns) @ linear.weight.T)

        def weight_noise(difference: Tensor, inputs: Tensor, rows: Tensor | None = transform.rows) -> float:
            output = inputs @ difference.T
            return captured.power(output if rows is None else output / rows)

        product = transform.output_from_stored(inputs @ stored_weight(stored).T + stored.effective_bias())
        from_weights, from_inputs = captured.power(product - exact), input_noise(stored.rounded_input(inputs))
        error.total += captured.power(transform.output_from_stored(stored.forward(inputs)) - exact)
        error.from_weights += from_weights
        error.from_inputs += from_inputs
        folded = linear.weight * transform.columns * transform.rows[:, None]
        error.nearest_share += _nearest_share(stored, folded) / len(layers)
        centered = inputs if transform.shift is None else inputs - transform.shift
        tried: dict[str, float] = {}
        if stored.static_input:
            tried[PER_TOKEN] = from_weights + input_noise(_per_token(inputs))
            tried[WIDER] = from_weights + input_noise(_static(inputs, 1.0, dtype))
            tried[TIGHTER] = from_weights + min(input_noise(_static(inputs, share, dtype)) for share in NARROWER)
        if spec.weight.per_group:
            tried[EIGHT_BITS] = from_inputs + weight_noise(_eight_bits(folded, dtype) - folded, centered)
            if stored.group_size > SMALLEST_GROUP:
                tried[SMALL_GROUPS] = from_inputs + weight_noise(_four_bits(folded, SMALLEST_GROUP) - folded, centered)
        if smooth is not None:
            smoothed, weight = captured.rows / smooth, linear.weight * smooth
            low_bit = _nearest_as(stored, weight, dtype)
            rounded = _rounded_as(stored, smoothed, dtype)
            of_inputs = captured.power((rounded - smoothed) @ weight.T)
            tried[SMOOTHED] = weight_noise(low_bit - weight, smoothed, None) + of_inputs
        for name, noise in tried.items():
            totals.setdefault(name, []).append(noise)
    error.alternatives = {name: sum(noises) for name, noises in totals.items()}
    return error


def _measure_range(error: GroupError, stored: QuantLinear, inputs: Tensor, modality: Tensor) -> None:
    """Counts the inputs that lie outside the static range by more than half a step."""
    scale, offset = float(stored.get_buffer("input_scale")), float(stored.get_buffer("input_offset"))
    low, high = (INT8_MIN - offset) * scale, (INT8_MAX - offset) * scale
    outside = (inputs < low - scale / 2) | (inputs > high + scale / 2)
    for number, name in enumerate(MODALITIES):
        selected = outside[modality == number]
        if len(selected):
            error.clipped[name] = int(selected.sum()), selected.numel()
    error.overshoot = max(_ratio(float(inputs.min()), low), _ratio(float(inputs.max()), high))


def _nearest_share(stored: QuantLinear, folded: Tensor) -> float:
    """Share of a stored layer's integers that are the nearest to the folded float weight [N, K]."""
    steps = (stored_weight(stored) - folded).abs() / stored.weight_steps()
    return float((steps <= 0.5 + NEAREST_TOLERANCE).float().mean())


def _ratio(value: float, limit: float) -> float:
    """value / limit; 0 if the range has no extent on that side of zero."""
    return value / limit if limit != 0 and value / limit > 0 else 0.0


def _rounded_as(stored: QuantLinear, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Inputs quantized as a stored layer does it, with their own range, and dequantized to float32."""
    if not Scheme(stored.scheme).spec.activation.is_quantized:
        return inputs
    return _static(inputs, 1.0, dtype) if stored.static_input else _per_token(inputs)


def _per_token(inputs: Tensor) -> Tensor:
    integers, scale = quantize_per_token(inputs)
    return integers.float() * scale


def _static(inputs: Tensor, share: float, dtype: torch.dtype) -> Tensor:
    """Quantized with one scale and offset that cover `share` of the range of all rows, dequantized."""
    scale, offset = activation_scale_and_offset(float(inputs.min()) * share, float(inputs.max()) * share, dtype)
    return dequantize_per_tensor(quantize_per_tensor(inputs, scale, offset), scale, offset, torch.float32)


def _smoothing_scale(pair: StagePair, layers: Sequence[str], rows: Tensor) -> Tensor:
    """float32 [K]: divisor of the inputs by SmoothQuant's formula, alpha = SMOOTHING."""
    inputs = rows.abs().amax(dim=0)
    weights = torch.stack([pair.linears[layer].weight.abs().amax(dim=0) for layer in layers]).amax(dim=0)
    scale = inputs**SMOOTHING / weights ** (1 - SMOOTHING)
    return scale.where((inputs > 0) & (weights > 0), torch.ones(()))


def _nearest_as(stored: QuantLinear, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight rounded to the nearest, with the bits and groups of a stored layer, dequantized."""
    if Scheme(stored.scheme).spec.weight.per_group:
        return _four_bits(weight, stored.group_size)
    return _eight_bits(weight, dtype)


def _eight_bits(weight: Tensor, dtype: torch.dtype) -> Tensor:
    integers, scale = quantize_weight_per_channel_absmax(weight, scale_dtype=dtype)
    return integers.float() * scale


def _four_bits(weight: Tensor, group_size: int) -> Tensor:
    groups = weight.reshape(len(weight), -1, group_size)
    step = (groups.abs().amax(dim=2, keepdim=True) / INT4_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    return ((groups / step).round() * step).reshape(weight.shape)
