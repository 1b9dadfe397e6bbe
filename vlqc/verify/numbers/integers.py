"""Reads the integers of a quantized weight, packed or not, and checks their rows and their scale_bias."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vlqc.targets.schemes import Scheme, StorageFormat
from vlqc.verify.findings import COMPILE_AGAIN, VerificationResult, format_list
from vlqc.verify.folder.reader import Array, StoredTensor

INT8_MAX = 127
INT32_MAX = 2**31 - 1
# By bits: a row with a larger share of its largest integers counts as clipped. With a scale of absmax / 127 one weight
# per row has that value, with clipping a few; with 4 bits there are more.
SATURATED_SHARE, SATURATED_COUNT = {8: 0.25, 4: 0.5}, 8
USED = 0.85  # share of the largest integer that some weight of a channel should reach
# A row of zero weights has a scale at a floor. A row of zero integers had weights if its scale, relative to the median,
# is larger than this.
DEAD_ROW_SCALE = 1e-3
HALF_RANGE = 8  # the int4 operator reads the low half of an activation as signed, 8 too low
FLOAT32_SUM = 1e-6  # relative error of a sum in float32, of the sum of absolute values


@dataclass(frozen=True)
class StoredIntegers:
    """A weight of 8 or 4 bits. packed: two rows of 4 bits share their bytes, the even row in the low nibbles."""

    stored: StoredTensor
    bits: int
    packed: bool = False

    @classmethod
    def of(cls, stored: StoredTensor, scheme: Scheme, form: StorageFormat) -> "StoredIntegers":
        weight = scheme.spec.weight
        return cls(stored, weight.bits, weight.is_packed(form))

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the unpacked matrix."""
        rows, columns = self.stored.shape
        return (2 * rows if self.packed else rows), columns

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest integer that quantization produces."""
        return (-8, 7) if self.bits == 4 else (-INT8_MAX, INT8_MAX)

    def part(self, start: int, stop: int) -> Array:
        """Rows start..stop of [N, K] as int8; both even where rows are packed."""
        if not self.packed:
            return self.stored.part(start, stop)
        pairs = self.stored.part(start // 2, stop // 2)  # int8: low nibble row 2i, high nibble row 2i + 1
        rows = np.empty((stop - start, pairs.shape[1]), np.int8)
        rows[0::2] = np.left_shift(pairs, 4) >> 4  # >> repeats the nibble's sign
        rows[1::2] = pairs >> 4
        return rows

    def rows(self) -> Iterator[tuple[int, Array]]:
        """(first row, int8 slice of rows [n, K])."""
        for start, pairs in self.stored.rows():
            factor = 2 if self.packed else 1
            yield start * factor, self.part(start * factor, (start + len(pairs)) * factor)


@dataclass(frozen=True)
class RowSums:
    """Statistics of integers [N, K] per output channel, each int64 [N].

    at_limit: number of integers with the largest magnitude that quantization produces; squares: sum of squares.
    """

    total: Array
    absmax: Array
    at_limit: Array
    lowest: Array
    highest: Array
    squares: Array


def row_sums(integers: StoredIntegers) -> RowSums:
    """Statistics of all rows, with a slice of rows in memory at a time."""
    parts = []
    highest = integers.limits[1]
    for _, rows in integers.rows():
        wide = rows.astype(np.int16)
        absolute = np.abs(wide)
        parts.append(
            (
                rows.sum(axis=1, dtype=np.int64),
                absolute.max(axis=1).astype(np.int64),
                (absolute >= highest).sum(axis=1),
                wide.min(axis=1).astype(np.int64),
                wide.max(axis=1).astype(np.int64),
                np.square(rows, dtype=np.int32).sum(axis=1, dtype=np.int64),
            )
        )
    return RowSums(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def check_integers(
    layer: str,
    integers: StoredIntegers,
    rows: RowSums,
    scale: Array,
    quant_bias: Array,
    exact: bool,
    result: VerificationResult,
) -> None:
    """Adds findings for dead, clipped and poorly used rows.

    scale: the largest of each row [N]; quant_bias: [N], zeros without one; exact: whether scales are float32, as vlqc
    writes them, so that -128 cannot occur.
    """
    result.add_examined("integers", len(rows.total))
    where, (low, high) = f"{layer}.weight", integers.limits
    live = rows.absmax > 0
    usual = float(np.median(scale[live])) if live.any() else 0.0
    # A scale may also be at the floor that keeps the bias in int32; then quant_bias is near its limit. A matrix of
    # zeros (blocks added to a trained model are initialized so) has no median scale to compare with, but the same floor
    # in all channels, whereas scales of weights that were replaced by zeros differ.
    at_floor = scale <= DEAD_ROW_SCALE * usual if live.any() else scale == scale.min(initial=np.inf)
    at_floor |= np.abs(quant_bias) > INT32_MAX // 4
    dead = np.flatnonzero(~live & ~at_floor)
    if dead.size:
        why = "all integers of the channel are 0, but its scale is that of nonzero weights"
        result.add_fault("integers", where, f"dead channels {format_list(dead)}", why, COMPILE_AGAIN)
    empty = np.flatnonzero(~live & at_floor)
    if empty.size:
        what, why = f"all weights are 0 in channels {format_list(empty)}", "the scale is that of zero weights, too"
        result.add_warning("integers", where, what, why, "check the float checkpoint if this is unexpected")
    share = SATURATED_SHARE[integers.bits]
    full = np.flatnonzero((rows.at_limit >= SATURATED_COUNT) & (rows.at_limit > share * integers.shape[1]))
    if full.size:
        # Not a fault: smoothing with alpha 0 brings many weights to the same size.
        why = f"more than {share:.0%} of the channel's integers are at +-{high}: its scale may be too small"
        what = f"saturated channels {format_list(full)}"
        result.add_warning("integers", where, what, why, "verify with --model_path")
    beyond = np.flatnonzero(((rows.lowest < low) & (exact or integers.bits == 4)) | (rows.highest > high))
    if beyond.size:
        values = "-128" if integers.bits == 8 else f"{rows.lowest[beyond].min()} to {rows.highest[beyond].max()}"
        what = f"{values} in channels {format_list(beyond)}"
        why = f"quantization produces integers from {low} to {high}"
        result.add_fault("integers", where, what, why, COMPILE_AGAIN)
    wanted = USED * high  # a range search or error compensation (GPTQ) may leave out the largest integers
    poor = np.flatnonzero(live & (rows.absmax < wanted))
    if poor.size:
        worst = int(rows.absmax[poor].min())
        extent = f"the largest integer is {worst} where {high} is possible"
        what = f"channels {format_list(poor)} do not use their range: {extent}"
        result.add_warning("integers", where, what, "the scale is larger than needed", "verify with --model_path")


def check_scale_bias(
    scale_bias: StoredTensor, integers: StoredIntegers, scale: Array, result: VerificationResult
) -> None:
    """scale_bias [N, P] must be 8 * the sums of the P equal parts of each row's weights. scale: float32 [N, K/G]."""
    stored = scale_bias.read().astype(np.float64)
    parts, columns = stored.shape[1], integers.shape[1]
    result.add_examined("scale_bias", len(stored))
    if columns % parts:
        what, why = f"{columns} inputs are not divisible into {parts} parts", "each part has its own sum"
        result.add_fault("scale_bias", scale_bias.name, what, why, COMPILE_AGAIN)
        return
    wrong: list[int] = []
    first = ""
    for start, rows in integers.rows():
        stop = start + len(rows)
        steps = np.repeat(scale[start:stop].astype(np.float64), columns // scale.shape[1], axis=1)
        weights = (rows * steps).reshape(len(rows), parts, -1)
        sums, sizes = HALF_RANGE * weights.sum(axis=2), HALF_RANGE * np.abs(weights).sum(axis=2)
        error = np.abs(stored[start:stop] - sums)
        bad = np.argwhere(~(error <= np.abs(sums) * 2.0**-23 + FLOAT32_SUM * sizes))
        if len(bad) and not first:
            row, part = bad[0]
            first = f"stored {stored[start + row, part]:.6g}, recomputed {sums[row, part]:.6g}"
        wrong += [int(row) + start for row in np.unique(bad[:, 0])]
    if wrong:
        what = f"channels {format_list(wrong)}: {first}"
        why = "it is not 8 * (sum of the channel's weights): scale_bias, weight or a scale is damaged"
        result.add_fault("scale_bias", scale_bias.name, what, why, COMPILE_AGAIN)
