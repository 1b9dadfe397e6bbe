"""Whether the scales on both sides of an edge cancel, within what the stored tensors determine.

A producer's channel is divided by a scale and the consumers' columns are multiplied by it, so that the product of what
the stored tensors have of both is 1. Each side is known up to the rounding of its tensors: half a unit in the last
place of a norm's weight, or the uncertainty of a fit, which falls with the number of weights. A factor that all
channels have in common is known far better than that of one channel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlqc.verify.float_match.scale_fit import COMMON, EDGE_SIGMAS, Scales
from vlqc.verify.folder.reader import Array


@dataclass(frozen=True)
class ProducerSide:
    """What a producer leaves of the scale, by input column of a consumer.

    channel: int64 [K], -1 for columns that do not read it; values, deviation: [K], factor of the channel and its
    standard deviation; rounding: [K], bound of the relative error that rounding leaves in the factor.
    """

    channel: Array
    values: Array
    deviation: Array
    rounding: Array


@dataclass(frozen=True)
class Uncancelled:
    """channels: input columns whose scales do not cancel; common: the factor that all others have, None if it is 1."""

    channels: Array
    common: float | None


def find_uncancelled(columns: Scales, producers: Sequence[ProducerSide]) -> Uncancelled:
    """columns: scales of the consumers' columns [K], as fitted; producers: of these columns."""
    producer = np.prod([side.values for side in producers], axis=0)
    fitted = columns.values.astype(np.float64)
    # Uncertainties are those of scales that cancel: a fitted scale of 0 has the uncertainty of the one expected.
    expected = np.where(producer > 0, producer, 1 / np.where(fitted > 0, fitted, 1))
    deviation = fitted * producer - 1
    own = columns.deviation.astype(np.float64) * expected
    shared = [side.deviation / np.where(side.values > 0, side.values, expected) for side in producers]
    bound = np.sum([side.rounding for side in producers], axis=0)
    sigma = np.sqrt(own**2 + np.sum(np.square(shared), axis=0))
    read = np.any([side.channel >= 0 for side in producers], axis=0)
    tested = read & np.isfinite(sigma)
    wrong = tested & ~(np.abs(deviation) <= bound + EDGE_SIGMAS * sigma)
    rest = tested & ~wrong & np.isfinite(deviation) & (sigma + bound > 0)
    return Uncancelled(np.flatnonzero(wrong), _common_factor(deviation, own, shared, producers, rest))


def _common_factor(
    deviation: Array, own: Array, shared: Sequence[Array], producers: Sequence[ProducerSide], used: Array
) -> float | None:
    """The mean factor of the columns `used`, weighted by what is known of each; None where it may be 1."""
    if not used.any():
        return None
    own, deviation = own[used], deviation[used]
    # An error that rounding may have, between its bounds, has a standard deviation of 1/sqrt(3) of the bound.
    errors = [np.hypot(each, side.rounding / 3**0.5)[used] for each, side in zip(shared, producers, strict=True)]
    weight = 1 / (own**2 + np.sum(np.square(errors), axis=0))
    variance = float(((COMMON * weight * own) ** 2).sum())
    for error, side in zip(errors, producers, strict=True):
        # All columns that read a channel have its error.
        by_channel = np.bincount(side.channel[used] + 1, weight * error)
        variance += float((by_channel**2).sum())
    mean, sigma = float((weight * deviation).sum() / weight.sum()), variance**0.5 / float(weight.sum())
    return 1 + mean if abs(mean) > EDGE_SIGMAS * sigma else None
