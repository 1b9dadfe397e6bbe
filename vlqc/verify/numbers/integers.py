"""The integers of a quantized weight, whichever way they are stored, and what their rows look like."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vlqc.targets.schemes import Scheme, StorageFormat
from vlqc.verify.findings import VerificationResult, format_list
from vlqc.verify.folder.reader import Array, StoredTensor

INT8_MAX = 127
INT32_MAX = 2**31 - 1
# A row this full of its largest integers was clipped: with scale absmax/127 one weight per row has that value, with
# clipping a few. Four bits put more of them there.
SATURATED_SHARE, SATURATED_COUNT = {8: 0.25, 4: 0.5}, 8
USED = 0.85  # of the largest integer that a channel should reach
# A row of zero weights has a scale at some floor; one whose scale is like its neighbours' had weights, and lost them.
DEAD_ROW_SCALE = 1e-3


@dataclass(frozen=True)
class StoredIntegers:
    """One weight of 8 bits, or of 4 bits, two rows in a byte (packed) or a row in a byte."""

    stored: StoredTensor
    bits: int
    packed: bool = False

    @classmethod
    def of(cls, stored: StoredTensor, scheme: Scheme, form: StorageFormat) -> "StoredIntegers":
        if scheme == Scheme.W4A8_DYNAMIC:
            return cls(stored, 4, form.packed)
        return cls(stored, 8)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix that is meant: [N, K]."""
        rows, columns = self.stored.shape
        return (2 * rows if self.packed else rows), columns

    @property
    def limits(self) -> tuple[int, int]:
        """The integers that rounding gives, from the lowest to the highest."""
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
    """Per output channel of integers [N, K]: facts about them, each int64 [N]."""

    total: Array
    absmax: Array
    at_limit: Array  # how many are as large as the largest, of either sign
    lowest: Array
    highest: Array
    squares: Array


def row_sums(integers: StoredIntegers) -> RowSums:
    """Sums per row, a slice of rows in memory at a time."""
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
    """Dead, clipped and poorly used rows. scale: the largest of each row [N]; quant_bias: [N], zeros without one;
    exact: scales in float32, as vlqc writes them, so that -128 cannot occur."""
    result.add_examined("integers", len(rows.total))
    where, (low, high) = f"{layer}.weight", integers.limits
    live = rows.absmax > 0
    usual = float(np.median(scale[live])) if live.any() else 0.0
    # A scale may also be at the floor that keeps the bias in int32; then quant_bias is near its limit. A matrix that is
    # empty throughout (blocks added to a trained model start so) has no usual scale to compare with.
    at_floor = (not live.any()) | (scale <= DEAD_ROW_SCALE * usual) | (np.abs(quant_bias) > INT32_MAX // 4)
    dead = np.flatnonzero(~live & ~at_floor)
    if dead.size:
        why = "every integer of the channel is 0, yet its scale says that its weights were not: its output is lost"
        result.add_fault("integers", where, f"dead channels {format_list(dead)}", why, "compile again")
    empty = np.flatnonzero(~live & at_floor)
    if empty.size:
        result.add_warning("integers", where, f"channels {format_list(empty)} have no weights", "the scale says so too")
    share = SATURATED_SHARE[integers.bits]
    full = np.flatnonzero((rows.at_limit >= SATURATED_COUNT) & (rows.at_limit > share * integers.shape[1]))
    if full.size:
        # No fault by itself: smoothing that evens out the columns (alpha 0) brings many weights to the same size.
        why = f"more than {share:.0%} of the channel's integers are at +-{high}: its scale may be too small"
        result.add_warning(
            "integers", where, f"saturated channels {format_list(full)}", why, "compare with --model_path"
        )
    beyond = np.flatnonzero(((rows.lowest < low) & (exact or integers.bits == 4)) | (rows.highest > high))
    if beyond.size:
        found = f"{rows.lowest[beyond].min()} to {rows.highest[beyond].max()}"
        what = (
            f"-128 in channels {format_list(beyond)}"
            if integers.bits == 8
            else f"{found} in channels {format_list(beyond)}"
        )
        why = "symmetric weights end at -127" if integers.bits == 8 else "4 bits hold -8 to 7"
        result.add_fault("integers", where, what, why, "compile again")
    wanted = USED * high  # a search for the range, or errors handed on to later columns, may leave out the last few
    poor = np.flatnonzero(live & (rows.absmax < wanted))
    if poor.size:
        worst = int(rows.absmax[poor].min())
        extent = f"the largest integer is {worst} where {high} is possible"
        what = f"channels {format_list(poor)} do not use their range: {extent}"
        result.add_warning("integers", where, what, "the scale is larger than needed")
