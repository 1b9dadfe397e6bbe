"""Recomputes the numbers of a compiled folder from each other and compares them exactly.

deq_scale and quant_bias follow from scales, offset, integers and the stored bias; scale_bias follows from integers and
group scales. So one wrong byte in a scale, an offset, deq_scale, quant_bias or scale_bias is detected, one in an int8
weight is detected through quant_bias wherever input_offset is not 0, one in a packed 4-bit weight through scale_bias.

Not detectable without the float model: an int8 weight of a layer whose input_offset is 0 or whose scheme is
W8A8_DYNAMIC; 4-bit weights that are not packed; a bias that is stored as a tensor, or that changes by less than half a
step of deq_scale; a per-token scale that stays a value of its dtype; float tensors that stay finite. If the description
says that mean errors are compensated, neither is a quant_bias that is off by a multiple of CORRECTION_STEP.
"""

import numpy as np
from torch import Tensor

from vlqc.kernels_ref.matmul import CORRECTION_STEP
from vlqc.targets.engine import QUANT_BIAS_CORRECTION
from vlqc.targets.schemes import Scheme, stored_tensors
from vlqc.verify.findings import COMPILE_AGAIN, VerificationResult, format_list
from vlqc.verify.folder.reader import FLOATS, Array, StoredTensor, round_to
from vlqc.verify.numbers.integers import (
    INT8_MAX,
    RowSums,
    StoredIntegers,
    check_integers,
    check_scale_bias,
    row_sums,
)
from vlqc.verify.structure.structure import CompiledFolder

HALF = {"BF16": 2.0**-8, "F16": 2.0**-11}  # bound of the relative error of rounding to that dtype, with a margin
SIGMAS = 5.0  # standard deviations of a sum of random errors that none of a million values exceeds
ROUNDING_NOISE = SIGMAS * 0.29  # bound for the error of a rounded integer, in steps: 0.29 = 1/sqrt(12)


def check_arithmetic(folder: CompiledFolder, result: VerificationResult) -> None:
    """Adds faults for every value that is not finite, out of range, or different from what other tensors imply."""
    result.add_examined("finite", 0)
    for name, stored in folder.files.tensors.items():
        if name in folder.valid_tensors and stored.dtype in FLOATS:
            _check_finite(stored, result)
    for layer, scheme in folder.schemes.items():
        if scheme.is_quantized:
            _check_layer(folder, layer, scheme, result)
    if folder.model:
        for group in dict.fromkeys(map(folder.family.fused_group, folder.model.linears)):
            _check_group(folder, group, result)
        for norm in folder.model.norms:
            _check_shift(folder, norm, result)


def _check_finite(stored: StoredTensor, result: VerificationResult) -> None:
    result.add_examined("finite")
    is_matrix = len(stored.shape) == 2 and stored.name.endswith(".weight") and stored.count
    if is_matrix and not any(rows.any() for _, rows in stored.rows()):
        why = "its outputs are 0, or its bias"
        result.add_warning("zeros", stored.name, "all weights are 0", why, "check the float checkpoint")
    bad = [(start, rows) for start, rows in stored.rows() if not np.isfinite(rows).all()]
    if bad:
        start, rows = bad[0]
        where = np.argwhere(~np.isfinite(rows))[0]
        index = [int(where[0]) + start, *map(int, where[1:])] if stored.shape else []
        why = "all outputs that depend on it become NaN"
        result.add_fault("finite", stored.name, f"NaN or Inf, first at {index}", why, COMPILE_AGAIN)


def _check_layer(folder: CompiledFolder, layer: str, scheme: Scheme, result: VerificationResult) -> None:
    """Checks one quantized linear layer, as far as its tensors exist with the right dtype and shape."""
    names = [spec.suffix for spec in stored_tensors(scheme, folder.form)]
    stored = {
        name: folder.files.tensors[f"{layer}.{name}"] for name in names if f"{layer}.{name}" in folder.valid_tensors
    }
    if "weight" not in stored or "weight_scale" not in stored:
        return
    scale = stored["weight_scale"].read().astype(np.float32)  # [N, 1]
    integers = StoredIntegers.of(stored["weight"], scheme, folder.form)
    rows = row_sums(integers)
    result.add_examined("scales")
    for name in ("weight_scale", "weight_scale_second"):
        if name in stored:
            values = stored[name].read().astype(np.float32)
            _check_positive(f"{layer}.{name}", values, result)
            if not scheme.spec.weight.float32_scale:
                _check_representable(folder, f"{layer}.{name}", values, result)
    for name in ("weight_offset", "weight_offset_second"):
        if name in stored and (offsets := stored[name].read()).any():
            channels = format_list(np.flatnonzero(offsets.reshape(len(offsets), -1).any(axis=1)))
            why = "weights are quantized symmetrically; engines subtract this offset or reject it"
            result.add_fault("scales", f"{layer}.{name}", f"not zero in channels {channels}", why, COMPILE_AGAIN)
    quant_bias = stored["quant_bias"].read().astype(np.int64) if "quant_bias" in stored else np.zeros(len(scale))
    largest = scale.reshape(-1)
    if "weight_scale_second" in stored:
        scale = scale * stored["weight_scale_second"].read().astype(np.float32)  # [N, K/G]
        largest = scale.max(axis=1)
    exact_scales = stored["weight_scale"].dtype == "F32"
    check_integers(layer, integers, rows, largest, quant_bias, exact_scales, result)
    if scheme.spec.replaces_float:
        _check_weights_in_float(folder, layer, rows.absmax * scale.reshape(-1), result)
    if len(stored) < len(names):
        return
    if scheme.spec.activation.is_static:
        _check_static(folder, layer, stored, scale.reshape(-1), quant_bias, rows, result)
    elif "scale_bias" in stored:
        check_scale_bias(stored["scale_bias"], integers, scale, result)


def _check_positive(name: str, scale: Array, result: VerificationResult) -> None:
    bad = np.flatnonzero(~(np.isfinite(scale) & (scale > 0)).reshape(len(scale), -1).all(axis=1))
    if bad.size:
        what = f"not a positive finite number in channels {format_list(bad)}"
        result.add_fault("scales", name, what, "the channels' outputs would be zero, negated or NaN", COMPILE_AGAIN)


def _check_weights_in_float(folder: CompiledFolder, layer: str, largest: Array, result: VerificationResult) -> None:
    """largest: magnitude of a weight of each channel, integer times scale."""
    bad = np.flatnonzero(np.isfinite(largest) & ~np.isfinite(round_to(folder.float_dtype, largest.astype(np.float32))))
    if bad.size:
        what = f"weights beyond {folder.float_dtype} in channels {format_list(bad)}"
        why = "engines multiply integers and scale in the float dtype, so these weights are infinite"
        result.add_fault("scales", f"{layer}.weight_scale", what, why, "compile again with --dtype bfloat16")


def _check_representable(folder: CompiledFolder, name: str, values: Array, result: VerificationResult) -> None:
    inexact = np.isfinite(values) & (round_to(folder.float_dtype, values) != values)
    bad = np.flatnonzero(inexact.reshape(len(values), -1).any(axis=1))
    if bad.size:
        what = f"not representable in {folder.float_dtype} in channels {format_list(bad)}"
        why = "engines round it to the float dtype and would multiply the weights by another scale"
        result.add_fault("scales", name, what, why, COMPILE_AGAIN)


def _check_static(
    folder: CompiledFolder,
    layer: str,
    stored: dict[str, StoredTensor],
    weight_scale: Array,
    quant_bias: Array,
    rows: RowSums,
    result: VerificationResult,
) -> None:
    input_scale = stored["input_scale"].read().astype(np.float32)  # [1]
    offset = float(stored["input_offset"].read()[0])
    _check_positive(f"{layer}.input_scale", input_scale, result)
    if round_to(folder.float_dtype, input_scale)[0] != input_scale[0]:
        what = f"{input_scale[0]:.9g} is not representable in {folder.float_dtype}"
        why = (
            "engines round it to the float dtype and would quantize activations by another scale than deq_scale assumes"
        )
        result.add_fault("scales", f"{layer}.input_scale", what, why, COMPILE_AGAIN)
    if not offset.is_integer() or not -128 <= offset <= INT8_MAX:
        what, why = f"{offset!r} is not an integer from -128 to 127", "engines read it as int8"
        result.add_fault("scales", f"{layer}.input_offset", what, why, COMPILE_AGAIN)
        return
    deq_scale = _decode_deq_scale(stored["deq_scale"], result)
    result.add_examined("deq_scale", len(deq_scale))
    _check_positive(stored["deq_scale"].name, deq_scale, result)
    with np.errstate(all="ignore"):
        product = input_scale * weight_scale  # float32 [N]
        right = deq_scale == product
        if stored["weight_scale"].dtype != "F32":  # the reference tool multiplies such scales in the float dtype
            right |= deq_scale == round_to(folder.float_dtype, product)
    wrong = np.flatnonzero(~right)
    if wrong.size:
        first = wrong[0]
        values = f"stored {deq_scale[first]:.9g}, input_scale * weight_scale is {product[first]:.9g}"
        what = f"channels {format_list(wrong)}: {values}"
        why = "engines scale the channels' outputs by deq_scale"
        result.add_fault("deq_scale", stored["deq_scale"].name, what, why, COMPILE_AGAIN)
    _check_quant_bias(folder, layer, weight_scale, deq_scale, quant_bias, offset, rows, result)


def _decode_deq_scale(stored: StoredTensor, result: VerificationResult) -> Array:
    """deq_scale as stored -> float32 [N]. int64 has the float32's bits in its low half and zeros in its high half."""
    values = stored.read()
    if stored.dtype != "I64":
        return values
    wide = np.flatnonzero((values < 0) | (values > 0xFFFFFFFF))
    if wide.size:
        what = f"channels {format_list(wide)}: the high 32 bits are not zero"
        result.add_fault("deq_scale", stored.name, what, "each int64 is a zero-extended float32", COMPILE_AGAIN)
    return (values & 0xFFFFFFFF).astype(np.uint32).view(np.float32)


def _check_quant_bias(
    folder: CompiledFolder,
    layer: str,
    weight_scale: Array,
    deq_scale: Array,
    quant_bias: Array,
    offset: float,
    rows: RowSums,
    result: VerificationResult,
) -> None:
    """quant_bias must be round(bias / deq_scale - offset * sum_k W), with int64 sums, float64 and one rounding.

    If the description says so, it may also compensate a mean error, in multiples of CORRECTION_STEP, by at most the
    root of the row's sum of squares. If the norm before the layer has a bias, the layer's bias compensates that. A
    layer that has no bias compensates it in quant_bias alone; the expected value is then computed from the integers,
    which are the float weights up to rounding. The shift of a norm with a bias of its own is unknown.
    """
    has_bias = f"{layer}.bias" in folder.valid_tensors
    if _has_own_bias(folder, layer) and not has_bias:
        return
    result.add_examined("quant_bias", len(quant_bias))
    shift = input_shift(folder, layer)
    slack: Array = np.zeros(len(deq_scale))
    if has_bias:
        bias = folder.files.tensors[f"{layer}.bias"].read().astype(np.float64)
        if shift is not None or _has_own_bias(folder, layer):
            slack = np.abs(bias) * HALF[folder.float_dtype]  # quant_bias may use the bias before rounding
    elif shift is not None:
        integers = StoredIntegers.of(folder.files.tensors[f"{layer}.weight"], folder.schemes[layer], folder.form)
        parts = [part.astype(np.float64) for _, part in integers.rows()]
        bias = -weight_scale * np.concatenate([part @ shift for part in parts])
        # Bound for the rounding of the float weights to integers and of the shift to the float dtype.
        squares = np.concatenate([part**2 @ (shift * HALF[folder.float_dtype]) ** 2 for part in parts])
        slack = weight_scale * np.sqrt((ROUNDING_NOISE * np.linalg.norm(shift)) ** 2 + SIGMAS**2 * squares)
    else:
        bias = np.zeros(len(deq_scale))
    with np.errstate(all="ignore"):
        steps, slack = bias / deq_scale.astype(np.float64), slack / deq_scale.astype(np.float64)  # [N]
    exact = steps - offset * rows.total
    whole = np.floor(np.sqrt(rows.squares) / CORRECTION_STEP)
    if folder.files.description.get(QUANT_BIAS_CORRECTION) != CORRECTION_STEP:
        whole = np.zeros_like(whole)
    corrected = CORRECTION_STEP * np.clip(np.rint((quant_bias - exact) / CORRECTION_STEP), -whole, whole)
    error = np.abs(quant_bias - exact - corrected)
    # Half a step for the rounding to an integer; the rest for a division in float32.
    allowed = 0.5 + np.abs(steps) * 2.0**-23 + slack
    if folder.files.tensors[f"{layer}.weight_scale"].dtype != "F32":
        # The reference tool computes it in the float dtype.
        allowed = 0.5 + (np.abs(steps) + np.abs(exact)) * HALF[folder.float_dtype] + slack
    wrong = np.flatnonzero(~(error <= allowed))
    if wrong.size:
        first = wrong[0]
        what = f"channels {format_list(wrong)}: stored {int(quant_bias[first])}, recomputed {exact[first]:.6g}"
        why = (
            "it is not bias / deq_scale - input_offset * (sum of the channel's integers): quant_bias, weight, "
            "input_offset or bias is damaged"
        )
        result.add_fault("quant_bias", f"{layer}.quant_bias", what, why, COMPILE_AGAIN)


def input_shift(folder: CompiledFolder, layer: str) -> Array | None:
    """Shift that was folded into the norm before a linear layer, per input channel of the layer, float64 [K].

    None without a shift, and where the norm has a bias of its own, of which the folder does not tell the shift.
    """
    before = folder.model and folder.model.norm_before(layer)
    if not folder.model or not before or folder.model.has_bias(before[0]):
        return None
    norm, channel = before
    if f"{norm}.bias" not in folder.valid_tensors:
        return None
    bias = folder.files.tensors[f"{norm}.bias"].read().astype(np.float64)
    return per_column(bias, channel, 0.0)


def per_column(values: Array, channel: Tensor, default: float) -> Array:
    """Per channel of a producer [C] -> per input column [K], by an edge's map; `default` where no channel is read."""
    channels = channel.numpy()
    return np.where(channels >= 0, values[np.maximum(channels, 0)], default)


def _has_own_bias(folder: CompiledFolder, layer: str) -> bool:
    """Whether the norm before a linear layer has a bias of its own, which a shift may have changed."""
    before = folder.model and folder.model.norm_before(layer)
    return bool(folder.model and before and folder.model.has_bias(before[0]))


def _check_shift(folder: CompiledFolder, norm: str, result: VerificationResult) -> None:
    """Every layer that reads a norm with a folded shift must have a bias or quant_bias to compensate it."""
    name = f"{norm}.bias"
    if folder.model is None or folder.model.has_bias(norm) or name not in folder.valid_tensors:
        return
    if not folder.files.tensors[name].read().any():
        return
    result.add_examined("shifts")
    for layer in folder.model.edges[norm].consumers:
        if not folder.model.linears[layer].bias and not folder.schemes[layer].spec.takes_added_bias:
            what = f"{layer} reads the norm and has no bias to compensate the norm's bias"
            why, fix = "the model's outputs change", "compile again without --shift"
            result.add_fault("shifts", name, what, why, fix)


def _check_group(folder: CompiledFolder, group: tuple[str, ...], result: VerificationResult) -> None:
    """All static members of a fused group must have the same input_scale and input_offset."""
    static = [layer for layer in group if folder.schemes.get(layer, Scheme.FLOAT).spec.activation.is_static]
    result.add_examined("groups")
    for suffix in ("input_scale", "input_offset"):
        names = [name for layer in static if (name := f"{layer}.{suffix}") in folder.valid_tensors]
        values = {name: float(folder.files.tensors[name].read()[0]) for name in names}
        if len(set(values.values())) > 1:
            result.add_fault(
                "groups",
                names[0],
                "; ".join(f"{name.split('.')[-2]} has {suffix} {value!r}" for name, value in values.items()),
                "it is one matrix product: engines keep the value of the last member, or reject a difference",
                COMPILE_AGAIN,
            )
