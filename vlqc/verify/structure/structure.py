"""The form of a compiled folder: config, description, every tensor with its dtype and shape, as engines look them up.

vLLM Ascend does not check completeness when it loads: a missing tensor is silent garbage, so it is checked here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlqc.targets.mindie import MINDIE
from vlqc.targets.schemes import Scheme, StorageFormat
from vlqc.targets.target import BOTH, Target, as_target
from vlqc.targets.vllm_ascend import VLLM_ASCEND
from vlqc.verify.findings import VerificationResult, format_list
from vlqc.verify.folder.contents import FolderFiles, check_files, open_folder
from vlqc.verify.structure.configuration import (
    check_config,
    check_description_keys,
    check_dtype,
    check_model,
    group_size,
)
from vlqc.verify.structure.engine_rules import check_engine_rules
from vlqc.verify.structure.expected import (
    CHECKED_SCHEMES,
    DTYPE_CODES,
    ExpectedModel,
    ExpectedTensor,
    expected_tensors,
    norm_biases,
)

RENAMED = ("model.visual.", "model.language_model.", "language_model.")  # names of newer transformers versions
MOST_PACKED = 8  # 4-bit integers that one element, of an int32, holds


@dataclass
class CompiledFolder:
    """A folder as the later checks need it. `model` is None when config.json does not describe one."""

    files: FolderFiles
    form: StorageFormat
    model: ExpectedModel | None
    schemes: dict[str, Scheme]  # every Linear of the model -> its scheme
    valid_tensors: dict[str, ExpectedTensor]  # tensors that exist with the right dtype and shape

    @property
    def float_dtype(self) -> str:
        """dtype code of the float tensors, "BF16" or "F16"."""
        return self.form.float_dtype

    @property
    def sizes_are_stored(self) -> bool:
        """Whether no Linear is wider than what is stored. Else config.json is wrong, which is a fault already, and
        scales of its sizes may not fit into memory."""
        widest = max((size for tensor in self.files.tensors.values() for size in tensor.shape), default=0) * MOST_PACKED
        return self.model is not None and all(
            max(it.inputs, it.outputs) <= widest for it in self.model.linears.values()
        )


def check_structure(path: Path, target: Target | None, result: VerificationResult) -> CompiledFolder:
    """Folder and the engines it is for (None: what it claims to be for) -> what the folder holds."""
    files = open_folder(path, result)
    claimed = target or _claimed_target(files)
    result.engine = str(claimed)
    float_dtype = check_dtype(files, result)
    model = check_model(files, result)
    schemes = _schemes(files, model, result) if model else {}
    type_name = check_description_keys(files, schemes, result).lower()
    form = StorageFormat(float_dtype, packed=files.layout.packs_int4, group_size=group_size(files, schemes, result))
    check_files(files, type_name, result)
    check_config(files, claimed, type_name, schemes, result)
    valid = _check_tensors(files, model, schemes, form, result) if model else {}
    dtype = next(name for name, code in DTYPE_CODES.items() if code == float_dtype)
    loads_in = check_engine_rules(files, model, schemes, claimed, dtype, named=target is not None, result=result)
    result.facts |= _facts(files, dtype, schemes, form) | {"loads in": loads_in or ["no known engine version"]}
    return CompiledFolder(files, form, model, schemes, valid)


def _claimed_target(files: FolderFiles) -> Target:
    if files.layout == MINDIE:
        return as_target(MINDIE)
    return as_target(BOTH if "quantize" in files.config else VLLM_ASCEND)


# ---- schemes ---------------------------------------------------------------------------------------------------------


def _schemes(files: FolderFiles, model: ExpectedModel, result: VerificationResult) -> dict[str, Scheme]:
    """Every Linear's scheme by its `.weight` entry; a missing or unknown word is reported, and the tensors decide."""
    schemes = {}
    for layer in model.embeddings_and_linears():
        word = files.description.get(f"{layer}.weight")
        if word in CHECKED_SCHEMES:
            scheme = Scheme(word)
        else:
            scheme = _scheme_by_tensors(files, layer)
            what = "is not listed" if word is None else f"has the scheme {word!r}"
            why = "engines look up every Linear and embedding there and stop (KeyError) or misread the layer without it"
            if word in tuple(Scheme):
                why = "this version of vlqc cannot verify that scheme"
            if files.description:
                result.add_fault("description", files.description_name, f"{layer}.weight {what}", why)
        schemes[layer] = scheme
    return schemes


def _scheme_by_tensors(files: FolderFiles, layer: str) -> Scheme:
    weight = files.tensors.get(f"{layer}.weight")
    if weight is None or weight.dtype != "I8":
        return Scheme.FLOAT
    if f"{layer}.weight_scale_second" in files.tensors:
        return Scheme.W4A8_DYNAMIC
    return Scheme.W8A8 if f"{layer}.deq_scale" in files.tensors else Scheme.W8A8_DYNAMIC


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _check_tensors(
    files: FolderFiles,
    model: ExpectedModel,
    schemes: Mapping[str, Scheme],
    form: StorageFormat,
    result: VerificationResult,
) -> dict[str, ExpectedTensor]:
    """Completeness, surplus, names, dtype, shape and description word of every tensor -> the valid ones."""
    expected = expected_tensors(model, schemes, form)
    allowed = {name: tensor for name, tensor in norm_biases(model, schemes, form).items() if name in files.tensors}
    result.add_examined("tensors", len(expected))
    renamed = [name for name in files.tensors if name.startswith(RENAMED)]
    if renamed:
        result.add_fault(
            "tensors",
            format_list(renamed, 3),
            f"{len(renamed)} tensors carry names of newer transformers versions",
            "every engine version accepts the original names (visual.*, model.*), older ones accept nothing else",
            "compile again",
        )
    missing: dict[str, list[str]] = {}
    valid = {}
    for name, wanted in (expected | allowed).items():
        stored = files.tensors.get(name)
        if stored is None:
            layer, _, suffix = name.rpartition(".")
            missing.setdefault(layer, []).append(suffix)
            continue
        right_shape, right_dtype = stored.shape == wanted.shape, stored.dtype in wanted.dtypes
        if not right_shape:
            why = "engines refuse 0-dimensional scales" if not stored.shape else "it follows from config.json"
            result.add_fault("tensors", name, f"shape {list(stored.shape)} instead of {list(wanted.shape)}", why)
        if not right_dtype:
            result.add_fault("tensors", name, f"dtype {stored.dtype} instead of {' or '.join(wanted.dtypes)}")
        if right_shape and right_dtype:
            valid[name] = wanted
        word = files.description.get(name)
        if files.description and word != wanted.word and not (name.endswith(".weight") and word is None):
            result.add_fault("description", name, f"its word is {word!r} instead of {str(wanted.word)!r}")
    if renamed and len(missing) > len(expected) // 4:
        missing.clear()  # they are there, under the other names
    for layer, suffixes in missing.items():
        result.add_fault(
            "tensors",
            layer,
            f"missing: {', '.join(f'{layer}.{suffix}' for suffix in suffixes)}",
            "vLLM Ascend loads the folder without a word and runs the layer on uninitialised memory",
            "compile again",
        )
    for name in sorted(files.tensors.keys() - expected.keys() - allowed.keys() - set(renamed)):
        result.add_fault("tensors", name, "this tensor does not belong to the model", "by config.json and its scheme")
    for name in sorted(name for name in files.description if "." in name):
        if name not in files.tensors and name not in expected:
            result.add_fault("description", files.description_name, f"it lists {name!r}, which no file contains")
    return valid


def _facts(files: FolderFiles, dtype: str, schemes: Mapping[str, Scheme], form: StorageFormat) -> dict[str, Any]:
    counts = {str(scheme): list(schemes.values()).count(scheme) for scheme in sorted(set(schemes.values()))}
    facts: dict[str, Any] = {
        "layout": files.layout.name,
        "tensors": len(files.tensors),
        "bytes": sum(tensor.nbytes for tensor in files.tensors.values()),
        "float dtype": dtype,
        "layers per scheme": counts,
    }
    return facts | ({"group size": form.group_size} if form.group_size else {})
