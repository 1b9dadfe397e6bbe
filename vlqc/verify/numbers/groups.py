"""W4A8_DYNAMIC: what follows from 4-bit integers and their group scales."""

import numpy as np

from vlqc.verify.findings import VerificationResult, format_list
from vlqc.verify.folder.reader import Array, StoredTensor
from vlqc.verify.numbers.integers import StoredIntegers

HALF_RANGE = 8  # the operator reads an activation's low half as signed, 8 too low
FLOAT32_SUM = 1e-6  # of the sum of absolute values: what adding up in float32 may lose


def check_scale_bias(
    scale_bias: StoredTensor, integers: StoredIntegers, scale: Array, result: VerificationResult
) -> None:
    """scale_bias [N, P] = 8 * the sum of each P-th of a row's weights. scale: float32 [N, K/G], of one step."""
    found = scale_bias.read().astype(np.float64)
    parts, columns = found.shape[1], integers.shape[1]
    result.add_examined("scale_bias", len(found))
    if columns % parts:
        what = f"{columns} inputs cannot be cut into {parts} parts"
        result.add_fault("scale_bias", scale_bias.name, what, "each part has its own sum")
        return
    wrong: list[int] = []
    first = ""
    for start, rows in integers.rows():
        stop = start + len(rows)
        steps = np.repeat(scale[start:stop].astype(np.float64), columns // scale.shape[1], axis=1)
        weights = (rows * steps).reshape(len(rows), parts, -1)
        sums, sizes = HALF_RANGE * weights.sum(axis=2), HALF_RANGE * np.abs(weights).sum(axis=2)
        error = np.abs(found[start:stop] - sums)
        bad = np.argwhere(~(error <= np.abs(sums) * 2.0**-23 + FLOAT32_SUM * sizes))
        if len(bad) and not first:
            row, part = bad[0]
            first = f"stored {found[start + row, part]:.6g}, recomputed {sums[row, part]:.6g}"
        wrong += [int(row) + start for row in np.unique(bad[:, 0])]
    if wrong:
        what = f"channels {format_list(wrong)}: {first}"
        why = "8 * (sum of the channel's weights) gives another number: scale_bias, weight or a scale is damaged"
        result.add_fault("scale_bias", scale_bias.name, what, why, "compile again")
