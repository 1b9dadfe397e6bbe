"""The numbers of a compiled folder against each other: what can be recomputed is recomputed, exactly.

From scales, offset, integers and the stored bias follow deq_scale and quant_bias. So one wrong byte in a scale, an
offset, deq_scale or quant_bias shows here, and one in an int8 weight shows through quant_bias wherever input_offset is
not 0. Not visible without the float model: an int8 weight byte of a layer whose input_offset is 0 (or whose scheme is
W8A8_DYNAMIC), a change of a bias below half a step of deq_scale, and float tensors, as long as they stay finite.
"""

from dataclasses import dataclass

import numpy as np

from vlqc.engines import Scheme, fused_group
from vlqc.verify.folder import FLOATS, Array, StoredTensor, round_to
from vlqc.verify.report import Report, listed
from vlqc.verify.structure import CompiledFolder

INT8_MAX = 127
INT32_MAX = 2**31 - 1
# A row this full of +-127 was clipped: with scale absmax/127 one weight per row has that value, with clipping a few.
SATURATED_SHARE, SATURATED_COUNT = 0.25, 8
# A row of zero weights has a scale at some floor; one whose scale is like its neighbours' had weights, and lost them.
DEAD_ROW_SCALE = 1e-3
HALF = {"BF16": 2.0**-8, "F16": 2.0**-11}  # largest relative error of rounding to that dtype, with a little room


@dataclass(frozen=True)
class RowSums:
    """Per output channel of an int8 weight [N, K]: facts about its integers, each int64 [N]."""

    total: Array
    absmax: Array
    at_limit: Array  # how many are 127, -127 or -128
    lowest: Array


def check_arithmetic(folder: CompiledFolder, report: Report) -> None:
    """Findings for every value that is not finite, out of range, or not what the other tensors make it."""
    report.look("finite", 0)
    for name, stored in folder.files.tensors.items():
        if name in folder.sound and stored.dtype in FLOATS:
            _check_finite(stored, report)
    for layer, scheme in folder.schemes.items():
        if scheme != Scheme.FLOAT:
            _check_layer(folder, layer, scheme, report)
    if folder.model:
        for group in dict.fromkeys(fused_group(layer) for layer in folder.model.linears):
            _check_group(folder, group, report)


def _check_finite(stored: StoredTensor, report: Report) -> None:
    report.look("finite")
    bad = [(start, rows) for start, rows in stored.rows() if not np.isfinite(rows).all()]
    if bad:
        start, rows = bad[0]
        where = np.argwhere(~np.isfinite(rows))[0]
        index = [int(where[0]) + start, *map(int, where[1:])] if stored.shape else []
        report.fault("finite", stored.name, f"NaN or Inf, first at {index}", "every output behind it becomes NaN")


def _check_layer(folder: CompiledFolder, layer: str, scheme: Scheme, report: Report) -> None:
    """One quantized Linear. Tensors that are missing or misshapen were reported already and end the check here."""
    stored = {
        name: folder.files.tensors[f"{layer}.{name}"] for name in _names(scheme) if f"{layer}.{name}" in folder.sound
    }
    if "weight" not in stored or "weight_scale" not in stored:
        return
    weight_scale = stored["weight_scale"].read().astype(np.float32).reshape(-1)  # [N]
    rows = row_sums(stored["weight"])
    report.look("scales")
    _check_positive(f"{layer}.weight_scale", weight_scale, report)
    if "weight_offset" in stored:
        offsets = stored["weight_offset"].read()
        if offsets.any():
            channels = listed(np.flatnonzero(offsets.reshape(-1)))
            why = "weights are symmetric; engines subtract this offset or refuse it"
            report.fault("scales", f"{layer}.weight_offset", f"not zero in channels {channels}", why, "compile again")
    quant_bias = stored["quant_bias"].read().astype(np.int64) if "quant_bias" in stored else np.zeros(len(weight_scale))
    exact_scales = stored["weight_scale"].dtype == "F32"
    _check_integers(layer, rows, weight_scale, quant_bias, stored["weight"].shape[1], exact_scales, report)
    if scheme == Scheme.W8A8 and set(_names(scheme)) <= stored.keys():
        _check_static(folder, layer, stored, weight_scale, quant_bias, rows, report)


def _names(scheme: Scheme) -> tuple[str, ...]:
    dynamic = ("weight", "weight_scale", "weight_offset")
    return (*dynamic, "input_scale", "input_offset", "quant_bias", "deq_scale") if scheme == Scheme.W8A8 else dynamic


def row_sums(weight: StoredTensor) -> RowSums:
    """int8 [N, K] on disk -> sums per row, a slice of rows in memory at a time."""
    parts = []
    for _, rows in weight.rows():
        wide = rows.astype(np.int16)
        absolute = np.abs(wide)
        total = rows.sum(axis=1, dtype=np.int64)
        at_limit = (absolute >= INT8_MAX).sum(axis=1)
        parts.append((total, absolute.max(axis=1).astype(np.int64), at_limit, wide.min(axis=1).astype(np.int64)))
    return RowSums(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _check_positive(name: str, scale: Array, report: Report) -> None:
    bad = np.flatnonzero(~(np.isfinite(scale) & (scale > 0)))
    if bad.size:
        report.fault("scales", name, f"not a positive finite number in channels {listed(bad)}", "", "compile again")


def _check_integers(
    layer: str, rows: RowSums, weight_scale: Array, quant_bias: Array, columns: int, exact: bool, report: Report
) -> None:
    """Dead, clipped and poorly used rows. exact: scales in float32, as vlqc writes them, so that -128 cannot occur."""
    report.look("integers", len(rows.total))
    live = rows.absmax > 0
    usual = float(np.median(weight_scale[live])) if live.any() else 0.0
    # A scale may also be at the floor that keeps the bias in int32; then quant_bias is near its limit.
    at_floor = (weight_scale <= DEAD_ROW_SCALE * usual) | (np.abs(quant_bias) > INT32_MAX // 4)
    dead = np.flatnonzero(~live & ~at_floor)
    if dead.size:
        why = "every integer of the channel is 0, yet its scale says that its weights were not: its output is lost"
        report.fault("integers", f"{layer}.weight", f"dead channels {listed(dead)}", why, "compile again")
    empty = np.flatnonzero(~live & at_floor)
    if empty.size:
        report.warn("integers", f"{layer}.weight", f"channels {listed(empty)} have no weights", "the scale says so too")
    full = np.flatnonzero((rows.at_limit >= SATURATED_COUNT) & (rows.at_limit > SATURATED_SHARE * columns))
    if full.size:
        why = f"more than {SATURATED_SHARE:.0%} of the channel's integers are at +-127: its scale is far too small"
        report.fault("integers", f"{layer}.weight", f"saturated channels {listed(full)}", why, "compile again")
    beyond = np.flatnonzero(rows.lowest < -INT8_MAX)
    if exact and beyond.size:
        why = "symmetric weights end at -127"
        report.fault("integers", f"{layer}.weight", f"-128 in channels {listed(beyond)}", why, "compile again")
    poor = np.flatnonzero(live & (rows.absmax < INT8_MAX - 1))
    if poor.size:
        worst = int(rows.absmax[poor].min())
        what = f"channels {listed(poor)} do not use their range: the largest integer is {worst} where 127 is possible"
        report.warn("integers", f"{layer}.weight", what, "the scale is larger than needed")


def _check_static(
    folder: CompiledFolder,
    layer: str,
    stored: dict[str, StoredTensor],
    weight_scale: Array,
    quant_bias: Array,
    rows: RowSums,
    report: Report,
) -> None:
    input_scale = stored["input_scale"].read().astype(np.float32)  # [1]
    offset = float(stored["input_offset"].read()[0])
    _check_positive(f"{layer}.input_scale", input_scale, report)
    if round_to(folder.glue, input_scale)[0] != input_scale[0]:
        why = (
            "engines read it in the float dtype: activations would be quantized by another scale than deq_scale assumes"
        )
        report.fault("scales", f"{layer}.input_scale", f"{input_scale[0]!r} is no {folder.glue} value", why)
    if not offset.is_integer() or not -128 <= offset <= INT8_MAX:
        why = "the offset is an int8 value"
        report.fault("scales", f"{layer}.input_offset", f"{offset!r} is not a whole number in -128..127", why)
        return
    deq_scale = _decoded(stored["deq_scale"], report)
    report.look("deq_scale", len(deq_scale))
    _check_positive(stored["deq_scale"].name, deq_scale, report)
    with np.errstate(all="ignore"):
        product = input_scale * weight_scale  # float32 [N]
        # The reference tool multiplies scales that it stores in the float dtype in that dtype.
        tolerated = deq_scale == product
        if stored["weight_scale"].dtype != "F32":
            tolerated |= deq_scale == round_to(folder.glue, product)
    wrong = np.flatnonzero(~tolerated)
    if wrong.size:
        first = wrong[0]
        what = (
            f"channels {listed(wrong)}: stored {deq_scale[first]!r}, input_scale * weight_scale is {product[first]!r}"
        )
        why = "engines read deq_scale only: the channel's output has the wrong size"
        report.fault("deq_scale", stored["deq_scale"].name, what, why, "compile again")
    bias_name = f"{layer}.bias"
    bias = folder.files.tensors[bias_name].read() if bias_name in folder.sound else np.zeros(len(deq_scale))
    _check_quant_bias(folder, layer, bias, deq_scale, quant_bias, offset, rows, report)


def _decoded(stored: StoredTensor, report: Report) -> Array:
    """deq_scale as stored -> float32 [N]; int64 holds the float32's bits in its low half and zeros in its high half."""
    values = stored.read()
    if stored.dtype != "I64":
        return values
    wide = np.flatnonzero((values < 0) | (values > 0xFFFFFFFF))
    if wide.size:
        what = f"channels {listed(wide)} have bits above the float32"
        report.fault("deq_scale", stored.name, what, "the int64 holds a zero-extended float32")
    return (values & 0xFFFFFFFF).astype(np.uint32).view(np.float32)


def _check_quant_bias(
    folder: CompiledFolder,
    layer: str,
    bias: Array,
    deq_scale: Array,
    quant_bias: Array,
    offset: float,
    rows: RowSums,
    report: Report,
) -> None:
    """quant_bias = round(bias / deq_scale - offset * sum_k W): int64 sums and float64, one rounding."""
    report.look("quant_bias", len(quant_bias))
    with np.errstate(all="ignore"):
        steps = bias.astype(np.float64) / deq_scale.astype(np.float64)  # [N]
    exact = steps - offset * rows.total
    error = np.abs(quant_bias - exact)
    # Half a step is the rounding itself; the rest is what a division in float32 may move.
    allowed = 0.5 + np.abs(steps) * 2.0**-23
    if folder.files.tensors[f"{layer}.weight_scale"].dtype != "F32":
        # The reference tool divides, multiplies and adds in the float dtype.
        allowed = 0.5 + (np.abs(steps) + np.abs(exact)) * HALF[folder.glue]
    wrong = np.flatnonzero(~(error <= allowed))
    if wrong.size:
        first = wrong[0]
        what = f"channels {listed(wrong)}: stored {int(quant_bias[first])}, recomputed {exact[first]:.6g}"
        why = (
            "bias / deq_scale - input_offset * (sum of the channel's integers) gives another number: "
            "quant_bias, weight, input_offset or bias is damaged"
        )
        report.fault("quant_bias", f"{layer}.quant_bias", what, why, "compile again")


def _check_group(folder: CompiledFolder, group: tuple[str, ...], report: Report) -> None:
    """All static members of a fused group share input_scale and input_offset."""
    static = [layer for layer in group if folder.schemes.get(layer) == Scheme.W8A8]
    report.look("groups")
    for suffix in ("input_scale", "input_offset"):
        names = [name for layer in static if (name := f"{layer}.{suffix}") in folder.sound]
        values = {name: float(folder.files.tensors[name].read()[0]) for name in names}
        if len(set(values.values())) > 1:
            report.fault(
                "groups",
                names[0],
                "; ".join(f"{name.split('.')[-2]} has {suffix} {value!r}" for name, value in values.items()),
                "the group is one product: vLLM Ascend keeps the last member's value, MindIE refuses a difference",
                "compile again",
            )
