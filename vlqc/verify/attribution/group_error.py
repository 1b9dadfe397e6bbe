"""Where a group's own error comes from: its weights or its inputs, and what would make it smaller, measured.

Everything is measured at the outputs of the group's layers, on the inputs that they have in the float model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vlqc.ir.stage import MODALITIES
from vlqc.kernels_ref.quant_linear import GroupQuantLinear, QuantLinear, StaticQuantLinear
from vlqc.kernels_ref.quantize import (
    INT8_MAX,
    INT8_MIN,
    activation_scale_and_offset,
    dequantize_per_tensor,
    quantize_per_tensor,
    quantize_per_token,
    quantize_weight_per_channel_absmax,
)
from vlqc.verify.attribution.stage_pair import StagePair, stored_bias, stored_weight, weight_steps

NARROWER = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of the range of the samples: what is tried in place of the stored range
SMOOTHING = 0.5  # exponent of the closed-form smoothing that is tried
INT4_MAX = 7
NEARLY = 0.01  # steps: what an uncertain scale between two Linears may move a weight
SMALLER_GROUP = 64  # columns that share a 4-bit weight's scale at least
PER_TOKEN, WIDER, TIGHTER, EIGHT_BITS, SMALL_GROUPS, SMOOTHED = (
    "per token", "wider range", "narrower range", "8-bit weights", "smaller groups", "smoothed"
)  # fmt: skip


@dataclass
class Measured:
    """Noise power of a group's outputs, each row relative to the power of its stage's output in that row.

    both: as stored; weights, inputs: with only the one side rounded; others: what the two sides together would be, by
    what is changed; clipped: per modality (values outside the static range, all values); reach: the largest input over
    the range's end; largest: largest channel of the stored input over the median one; plain: share of the integers that
    are nearest to the float weight.
    """

    both: float = 0.0
    weights: float = 0.0
    inputs: float = 0.0
    others: dict[str, float] = field(default_factory=dict)
    clipped: dict[str, tuple[int, int]] = field(default_factory=dict)
    reach: float = 0.0
    largest: float = 0.0
    plain: float = 0.0

    @property
    def input_share(self) -> float:
        """Of the error, 0 to 1; 0.5 where there is none."""
        return self.inputs / (self.inputs + self.weights) if self.inputs + self.weights > 0 else 0.5


@dataclass(frozen=True)
class SeenInput:
    """What entered a group in the float model: rows float32 [T, K], modality int8 [T] as in `ir.MODALITIES`, and how
    much a row's error counts, float64 [T]."""

    rows: Tensor
    modality: Tensor
    weight: Tensor

    def power(self, error: Tensor) -> float:
        """error float [T, N] -> its weighted power."""
        return float((error.double().square().sum(dim=1) * self.weight).sum())


@torch.no_grad()
def measure(pair: StagePair, layers: Sequence[str], seen: SeenInput, dtype: torch.dtype) -> Measured:
    """layers: the members of one group, all quantized; dtype: the folder's, in which scales are stored."""
    found = Measured()
    entered = pair.changes[layers[0]].enter(seen.rows)
    first = pair.stored[layers[0]]
    if isinstance(first, StaticQuantLinear):
        _measure_range(found, first, entered, seen.modality)
    size = entered.abs().amax(dim=0)
    found.largest = float(size.amax() / size.median().clamp(min=torch.finfo(torch.float32).tiny))
    smooth = _smoothing(pair, layers, seen.rows) if pair.smoothable(layers[0]) else None
    totals: dict[str, list[float]] = {}
    for layer in layers:
        linear, stored, change = pair.linears[layer], pair.stored[layer], pair.changes[layer]
        assert isinstance(stored, QuantLinear)
        exact = linear.forward(seen.rows)

        def of_inputs(rounded: Tensor, linear: nn.Linear = linear, columns: Tensor = change.columns) -> float:
            return seen.power(((rounded - entered) * columns) @ linear.weight.T)

        def of_weights(error: Tensor, inputs: Tensor, rows: Tensor | None = change.rows) -> float:
            made = inputs @ error.T
            return seen.power(made if rows is None else made / rows)

        product = change.leave(entered @ stored_weight(stored).T + stored_bias(stored))
        weights, inputs = seen.power(product - exact), of_inputs(_rounded(stored, entered))
        found.both += seen.power(change.leave(stored.forward(entered)) - exact)
        found.weights += weights
        found.inputs += inputs
        folded = linear.weight * change.columns * change.rows[:, None]
        found.plain += _nearest(stored, folded) / len(layers)
        centred = entered if change.shift is None else entered - change.shift
        tried: dict[str, float] = {}
        if isinstance(stored, StaticQuantLinear):
            tried[PER_TOKEN] = weights + of_inputs(_per_token(entered))
            tried[WIDER] = weights + of_inputs(_static(entered, 1.0, dtype))
            tried[TIGHTER] = weights + min(of_inputs(_static(entered, share, dtype)) for share in NARROWER)
        if isinstance(stored, GroupQuantLinear):
            tried[EIGHT_BITS] = inputs + of_weights(_eight_bits(folded, dtype) - folded, centred)
            if stored.group_size > SMALLER_GROUP:
                tried[SMALL_GROUPS] = inputs + of_weights(_four_bits(folded, SMALLER_GROUP) - folded, centred)
        if smooth is not None:
            entering, weight = seen.rows / smooth, linear.weight * smooth
            small = _like(stored, weight, dtype)
            rounded = _static(entering, 1.0, dtype) if isinstance(stored, StaticQuantLinear) else _per_token(entering)
            tried[SMOOTHED] = of_weights(small - weight, entering, None) + seen.power((rounded - entering) @ weight.T)
        for name, noise in tried.items():
            totals.setdefault(name, []).append(noise)
    found.others = {name: sum(noises) for name, noises in totals.items()}
    return found


def _measure_range(found: Measured, stored: StaticQuantLinear, entered: Tensor, modality: Tensor) -> None:
    """How much of the input lies outside what its scale and offset reach, by more than the half step of rounding."""
    scale, offset = float(stored.input_scale), float(stored.input_offset)
    low, high = (INT8_MIN - offset) * scale, (INT8_MAX - offset) * scale
    outside = (entered < low - scale / 2) | (entered > high + scale / 2)
    for number, name in enumerate(MODALITIES):
        of_this = outside[modality == number]
        if len(of_this):
            found.clipped[name] = int(of_this.sum()), of_this.numel()
    found.reach = max(_over(float(entered.min()), low), _over(float(entered.max()), high))


def _nearest(stored: QuantLinear, folded: Tensor) -> float:
    """The share of a stored layer's integers that are the nearest to the folded float weight [N, K]."""
    off = (stored_weight(stored) - folded).abs() / weight_steps(stored)
    return float((off <= 0.5 + NEARLY).float().mean())


def _over(end: float, limit: float) -> float:
    """How many times the range's end an input is; 0 where the range does not reach to that side at all."""
    return end / limit if limit != 0 and end / limit > 0 else 0.0


def _rounded(stored: QuantLinear, entered: Tensor) -> Tensor:
    """The input as the stored layer's integers mean it."""
    if isinstance(stored, StaticQuantLinear):
        integers = quantize_per_tensor(entered, stored.input_scale, stored.input_offset)
        return dequantize_per_tensor(integers, stored.input_scale, stored.input_offset, torch.float32)
    if isinstance(stored, GroupQuantLinear) and stored.weight_only:
        return entered
    return _per_token(entered)


def _per_token(entered: Tensor) -> Tensor:
    integers, scale = quantize_per_token(entered)
    return integers.float() * scale


def _static(entered: Tensor, share: float, dtype: torch.dtype) -> Tensor:
    """Rounded with one scale and offset for this share of the range of all rows."""
    scale, offset = activation_scale_and_offset(float(entered.min()) * share, float(entered.max()) * share, dtype)
    return dequantize_per_tensor(quantize_per_tensor(entered, scale, offset), scale, offset, torch.float32)


def _smoothing(pair: StagePair, layers: Sequence[str], rows: Tensor) -> Tensor:
    """float32 [K]: what the inputs would be divided by so that inputs and weights share their outliers evenly."""
    inputs = rows.abs().amax(dim=0)
    weights = torch.stack([pair.linears[layer].weight.abs().amax(dim=0) for layer in layers]).amax(dim=0)
    scale = inputs**SMOOTHING / weights ** (1 - SMOOTHING)
    return scale.where((inputs > 0) & (weights > 0), torch.ones(()))


def _like(stored: QuantLinear, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight rounded plainly, with the bits and groups of a stored layer."""
    if isinstance(stored, GroupQuantLinear):
        return _four_bits(weight, stored.group_size)
    return _eight_bits(weight, dtype)


def _eight_bits(weight: Tensor, dtype: torch.dtype) -> Tensor:
    integers, scale = quantize_weight_per_channel_absmax(weight, scale_dtype=dtype)
    return integers.float() * scale


def _four_bits(weight: Tensor, group_size: int) -> Tensor:
    groups = weight.reshape(len(weight), -1, group_size)
    step = (groups.abs().amax(dim=2, keepdim=True) / INT4_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    return ((groups / step).round() * step).reshape(weight.shape)
