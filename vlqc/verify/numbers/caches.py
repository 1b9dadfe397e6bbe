"""Checks the scales of cached keys and values, and compares them with what vlqc_report.json states.

No other tensor follows from them, so that a scale which is wrong but plausible is detected only by the report, or by
the outputs of the stages against those of the float model.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vlqc.targets.caches import projections
from vlqc.verify.findings import COMPILE_AGAIN, VerificationResult, format_list
from vlqc.verify.folder.manifest import SUMMARY
from vlqc.verify.folder.reader import Array, read_json_object, round_to
from vlqc.verify.structure.structure import CompiledFolder

CHECK = "KV cache"
DIGITS = 6e-4  # relative error of a value that is rounded to four digits, with a margin


def check_caches(folder: CompiledFolder, result: VerificationResult) -> None:
    """Adds faults for scales that are not positive, finite and values of the folder's dtype, for offsets that are not
    0, and for scales other than the stated ones."""
    if folder.model is None:
        return
    content, _ = read_json_object(folder.files.path / SUMMARY)  # of another tool's folder there is none
    stated = dict(_stated_scales(content or {}))
    for attention, pair in projections(folder.family, folder.model.linears).items():
        scheme = folder.caches.get(attention)
        if scheme is None:
            continue
        result.add_examined(CHECK)
        for member, layer in zip(("key", "value"), pair, strict=True):
            for spec in scheme.spec.stored:
                name = f"{layer}.{spec.suffix}"
                if name not in folder.valid_tensors:
                    continue
                values = folder.files.tensors[name].read().astype(np.float32)  # [channels]
                if spec.suffix.endswith("offset"):
                    _check_offset(name, values, result)
                else:
                    _check_scale(name, values, folder.float_dtype, result)
                    _compare(name, values, stated.get(attention, {}).get(member), result)


def _check_offset(name: str, values: Array, result: VerificationResult) -> None:
    channels = np.flatnonzero(values != 0)
    if channels.size:
        why = "engines add it before rounding, and do not subtract it in decoding"
        result.add_fault(CHECK, name, f"not zero in channels {format_list(channels)}", why, COMPILE_AGAIN)


def _check_scale(name: str, values: Array, dtype: str, result: VerificationResult) -> None:
    good = np.isfinite(values) & (values > 0)
    if not good.all():
        what = f"not a positive finite number in channels {format_list(np.flatnonzero(~good))}"
        result.add_fault(CHECK, name, what, "the channels would be zero, negated or NaN", COMPILE_AGAIN)
    inexact = good & (round_to(dtype, values) != values)
    if inexact.any():
        what = f"not representable in {dtype} in channels {format_list(np.flatnonzero(inexact))}"
        result.add_fault(CHECK, name, what, "engines round it to the float dtype", COMPILE_AGAIN)


def _compare(name: str, values: Array, stated: tuple[float, float] | None, result: VerificationResult) -> None:
    """stated: root mean square and maximum of the scales."""
    if stated is None or not np.isfinite(values).all():
        return
    actual = (float(np.sqrt(np.mean(values.astype(np.float64) ** 2))), float(values.max()))
    if any(not abs(value - other) <= DIGITS * abs(other) for value, other in zip(actual, stated, strict=True)):
        figures = [f"{rms:.4g} and {largest:.4g}" for rms, largest in (actual, stated)]
        what = f"root mean square and maximum are {figures[0]}, according to {SUMMARY} {figures[1]}"
        why = "the scales are damaged, or the file is that of another folder"
        result.add_fault(CHECK, name, what, why, COMPILE_AGAIN)


def _stated_scales(content: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, tuple[float, float]]]]:
    """(attention module, scales of its keys and values) of every valid entry; the file is checked in full where it is
    read for a report."""
    for stage in _objects(content.get("stages")):
        for cache in _objects(stage.get("caches")):
            name, members = cache.get("name"), {}
            for member in ("key", "value"):
                pair = cache.get(member)
                if isinstance(pair, list) and len(pair) == 2 and all(type(each) in (int, float) for each in pair):
                    members[member] = (float(pair[0]), float(pair[1]))
            if isinstance(name, str):
                yield name, members


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []
