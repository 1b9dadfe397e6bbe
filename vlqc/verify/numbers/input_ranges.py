"""Compares the static input ranges of a folder with those that vlqc_report.json states.

input_scale, deq_scale and quant_bias may be changed together so that they fit each other; then no other tensor shows
that the range is another one. vlqc_report.json has its limits to four digits.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from vlqc.targets.schemes import Scheme
from vlqc.verify.findings import COMPILE_AGAIN, VerificationResult
from vlqc.verify.folder.manifest import SUMMARY
from vlqc.verify.folder.reader import read_json_object
from vlqc.verify.numbers.integers import INT8_MAX
from vlqc.verify.structure.structure import CompiledFolder

CHECK = "input ranges"
DIGITS = 6e-4  # relative error of a value that is rounded to four digits, with a margin


def check_input_ranges(folder: CompiledFolder, result: VerificationResult) -> None:
    """Adds a fault for every static layer whose scale and offset give another range than the stated one."""
    content, _ = read_json_object(folder.files.path / SUMMARY)  # of another tool's folder there is none
    for layer, stated in _stated_ranges(content or {}):
        if not folder.schemes.get(layer, Scheme.FLOAT).spec.activation.is_static:
            continue
        names = [f"{layer}.{suffix}" for suffix in ("input_scale", "input_offset")]
        if not all(name in folder.valid_tensors for name in names):
            continue
        result.add_examined(CHECK)
        scale, offset = (float(folder.files.tensors[name].read()[0]) for name in names)
        actual = tuple((limit - offset) * scale for limit in (-INT8_MAX - 1, INT8_MAX))
        width = max(map(abs, (*actual, *stated)))
        if any(not abs(value - other) <= DIGITS * width for value, other in zip(actual, stated, strict=True)):
            ranges = [f"{low:.4g} to {high:.4g}" for low, high in (actual, stated)]
            what = f"the input range is {ranges[0]}, according to {SUMMARY} {ranges[1]}"
            why = "input_scale and input_offset are damaged, or the file is that of another folder"
            result.add_fault(CHECK, names[0], what, why, COMPILE_AGAIN)


def _stated_ranges(content: Mapping[str, Any]) -> Iterator[tuple[str, tuple[float, float]]]:
    """(layer, (low, high)) of every valid entry; the file is checked in full where it is read for a report."""
    for stage in _objects(content.get("stages")):
        for site in _objects(stage.get("sites")):
            name, low, high = (site.get(key) for key in ("name", "low", "high"))
            if isinstance(name, str) and all(type(limit) in (int, float) for limit in (low, high)):
                yield name, (float(low), float(high))  # type: ignore[arg-type]


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []
