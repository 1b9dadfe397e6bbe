"""Rows, a weight and their group, and the errors that the formula foresees for them once more, in NumPy."""

import numpy as np
import pytest
import torch

from vlqc.passes.algorithms.error_model import CLIPPED_SHARES, ConsumerGroup, SchemeNoise

ROWS, INPUTS, OUTPUTS, GROUP = 400, 24, 16, 8
STATIC, PER_TOKEN, IN_GROUPS = SchemeNoise(), SchemeNoise(per_token=True), SchemeNoise(True, 7, GROUP)
CLIPPED, CLEVER = SchemeNoise(clips=True), SchemeNoise(True, 7, GROUP, weights="gptq")
EVERY_NOISE = pytest.mark.parametrize(
    "noise", [STATIC, PER_TOKEN, IN_GROUPS, CLEVER], ids=["static", "per token", "in groups", "clever"]
)


def rows_and_weight(seed: int, outlier: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x [400, 24] with one channel `outlier` times as large and an offset in another, W [16, 24]; float32."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(ROWS, INPUTS, generator=generator)
    rows[:, 3] *= outlier
    rows[:, 7] += 2
    return rows, torch.randn(OUTPUTS, INPUTS, generator=generator)


def reader_of(
    rows: torch.Tensor,
    weight: torch.Tensor,
    noise: SchemeNoise = STATIC,
    share: torch.Tensor | None = None,
    range_rows: torch.Tensor | None = None,
) -> ConsumerGroup:
    """Every column is a channel; rows weighted by `share`, else equally; `range_rows`: the rows that give the range."""
    equal = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
    range_rows = rows if range_rows is None else range_rows
    return ConsumerGroup(
        channel=torch.arange(rows.shape[1]),
        low=range_rows.amin(0),
        high=range_rows.amax(0),
        second_moment=rows.square().mean(0),
        rows=rows,
        row_weight=equal if share is None else share,
        weight=weight,
        noise=noise,
    )


def in_groups(matrix: np.ndarray, noise: SchemeNoise) -> np.ndarray:
    parts: np.ndarray = matrix.reshape(len(matrix), -1, noise.group_size or matrix.shape[1])
    return parts


def weight_steps(heavy: np.ndarray, noise: SchemeNoise) -> np.ndarray:
    """[N, K]: the step of each weight."""
    parts = in_groups(heavy, noise)
    steps = np.abs(parts).max(2, keepdims=True) / noise.weight_max
    return np.broadcast_to(steps, parts.shape).reshape(heavy.shape)


def input_steps(smooth: np.ndarray, bottom: float, top: float, noise: SchemeNoise) -> np.ndarray:
    """[T, 1]"""
    if noise.per_token:
        largest: np.ndarray = np.abs(smooth).max(1, keepdims=True)
        return largest / 127
    return np.full((len(smooth), 1), (top - bottom) / 255)


def by_numpy(group: ConsumerGroup, scale: torch.Tensor) -> float:
    """The engines' noise in float64: q = clamp(rint(x/step + offset), -128, 127), or rint(x/step) per row.

    The input rounded beside the exact weight, and the weight beside the exact input; a range that may be clipped is the
    one with the smallest of `clipped_errors`.
    """
    tensors = (group.rows, group.row_weight, group.weight, scale, group.low, group.high)
    x, share, w, s, low, high = (tensor.double().numpy() for tensor in tensors)
    bottom, top = min((low / s).min(), 0.0), max((high / s).max(), 0.0)
    if group.noise.clips:
        errors = clipped_errors(group, scale)
        kept = CLIPPED_SHARES[errors.index(min(errors))]
        bottom, top = bottom * kept, top * kept
    step = input_steps(x / s, bottom, top, group.noise)
    if group.noise.per_token:
        rounded = np.rint(x / s / step) * step
    else:
        offset = -128 - np.rint(bottom / step)
        rounded = (np.clip(np.rint(x / s / step) + offset, -128, 127) - offset) * step
    weight_step = weight_steps(w * s, group.noise)
    activation = (rounded - x / s) @ (w * s).T
    weight = x / s @ (np.rint(w * s / weight_step) * weight_step - w * s).T
    return float(share @ ((activation**2).sum(1) + (weight**2).sum(1)))


def clipped_errors(group: ConsumerGroup, scale: torch.Tensor) -> list[float]:
    """Per share of the full range: noise of the steps, and of what is cut off every value of every row, float64."""
    tensors = (group.rows, group.row_weight, group.weight, scale, group.low, group.high)
    x, share, w, s, low, high = (tensor.double().numpy() for tensor in tensors)
    energy = ((w * s) ** 2).sum(0)
    errors = []
    for kept in CLIPPED_SHARES:
        bottom, top = kept * min((low / s).min(), 0.0), kept * max((high / s).max(), 0.0)
        beyond = (np.clip(x / s, bottom, top) - x / s) ** 2
        errors.append(((top - bottom) / 255) ** 2 / 12 * energy.sum() + share @ beyond @ energy)
    return errors
