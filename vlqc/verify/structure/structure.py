"""Checks the structure of a compiled folder: config, description, and dtype and shape of every tensor.

Not all engines check completeness when they load a folder: a missing tensor stays uninitialized without an error.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vlqc.families.family import ModelFamily
from vlqc.families.registry import FAMILIES, find_family
from vlqc.formatting import pluralize
from vlqc.frontend.model_structure import ModelStructure
from vlqc.targets.advice import grouped_layers, parallel_notes
from vlqc.targets.caches import CacheSchemes, describe_caches, projections, stated_scheme
from vlqc.targets.engine import Engine, FinishedFolder
from vlqc.targets.rules import folder_type
from vlqc.targets.schemes import Scheme, StorageFormat, scheme_of_tensors
from vlqc.targets.target import NAMES, Target, written_for
from vlqc.targets.versions import supporting_versions
from vlqc.verify.findings import COMPILE_AGAIN, VerificationResult, format_list
from vlqc.verify.folder.contents import FolderFiles, check_files, open_folder
from vlqc.verify.folder.manifest import SUMMARY
from vlqc.verify.folder.reader import read_json_object
from vlqc.verify.folder.rotations import Seeds, stated_rotations
from vlqc.verify.structure.configuration import (
    check_config,
    check_description_keys,
    check_dtype,
    check_model,
    group_size,
)
from vlqc.verify.structure.engine_rules import check_engine_rules
from vlqc.verify.structure.expected import (
    DTYPE_CODES,
    ExpectedTensor,
    expected_tensors,
    shift_tensors,
)

WEIGHT_METHOD = re.compile(r"\bquantize-weights\b(\{[^}]*\})?")  # with its parameters, in a pipeline's text
NEAREST_METHOD = re.compile(r"\bmethod=(round|clip)\b")
MOST_PACKED = 8  # 4-bit integers in one element, of an int32


@dataclass
class CompiledFolder:
    """A folder, as the later checks need it.

    model: None if config.json does not describe one. schemes: by linear layer, embedding or convolution.
    valid_tensors: those that exist with the right dtype and shape. rotations: those that it states. caches: of keys and
    values, by attention module.
    """

    files: FolderFiles
    form: StorageFormat
    model: ModelStructure | None
    schemes: dict[str, Scheme]
    valid_tensors: dict[str, ExpectedTensor]
    rotations: Seeds
    caches: CacheSchemes = field(default_factory=dict)

    @property
    def family(self) -> ModelFamily:
        """The family of the model, where there is one."""
        assert self.model is not None
        return self.model.family

    @property
    def float_dtype(self) -> str:
        """dtype code of the float tensors, "BF16" or "F16"."""
        return self.form.float_dtype

    @cached_property
    def rounds_to_nearest(self) -> bool:
        """Whether the folder's vlqc_report.json states a pipeline that rounds every weight to the nearest integer."""
        content, _ = read_json_object(self.files.path / SUMMARY)  # of another tool's folder there is none
        pipeline = (content or {}).get("pipeline")
        methods = WEIGHT_METHOD.findall(pipeline) if isinstance(pipeline, str) else []
        return bool(methods) and all(NEAREST_METHOD.search(method) for method in methods)

    @property
    def sizes_are_stored(self) -> bool:
        """Whether no linear layer is larger than the largest stored tensor.

        Otherwise config.json is wrong, which is a fault already, and arrays of its sizes may not fit into memory.
        """
        widest = max((size for tensor in self.files.tensors.values() for size in tensor.shape), default=0) * MOST_PACKED
        return self.model is not None and all(
            max(linear.inputs, linear.outputs) <= widest for linear in self.model.linears.values()
        )


def check_structure(
    path: Path, target: Target | None, result: VerificationResult, *, trust_remote_code: bool = False
) -> CompiledFolder:
    """Reads a folder and checks its structure. target: None for the one that the folder is written for."""
    files = open_folder(path, result)
    float_dtype = check_dtype(files, result)
    model = check_model(files, result, trust_remote_code=trust_remote_code)
    schemes = _schemes(files, model, result) if model else {}
    caches = _caches(files, model) if model else {}
    dtype = next(name for name, code in DTYPE_CODES.items() if code == float_dtype)
    stated = _stated_engines(files, model, schemes, caches, dtype) if model else ()
    claimed = target or written_for(files.layout, files.config, stated)
    result.engine = str(claimed)
    finished = _finished_folder(files, model, schemes, caches)
    type_name = check_description_keys(finished, result, has_model=model is not None).lower()
    form = StorageFormat(float_dtype, packed=files.layout.packs_int4, group_size=group_size(finished, result))
    family = find_family(files.config)
    has_images = not files.config or (family is not None and family.image_format is not None)
    check_files(files, type_name, result, has_images=has_images)
    if model:
        check_config(finished, model, claimed, result)
    valid = _check_tensors(files, model, schemes, caches, form, result) if model else {}
    loads_in = []
    if model:
        named = target is not None
        loads_in = check_engine_rules(finished, claimed, dtype, named=named, stated=stated, result=result)
    if model and form.group_size:
        _add_parallel_sizes(claimed, model, schemes, form.group_size, result)
    result.facts |= _facts(files, dtype, schemes, caches, form) | {"loads in": loads_in or ["no known engine version"]}
    rotations = stated_rotations(files.path, model, result) if model else {}
    return CompiledFolder(files, form, model, schemes, valid, rotations, caches)


def _stated_engines(
    files: FolderFiles, model: ModelStructure, schemes: Mapping[str, Scheme], caches: CacheSchemes, dtype: str
) -> tuple[Engine, ...]:
    """The engines for which vlqc wrote the folder, as its summary says; config.json may have lost their keys since.

    Without those that run no such schemes, of which the compilation warned: a --pipeline may choose any.
    """
    if not any(scheme.is_quantized for scheme in schemes.values()):
        return ()
    stated = (read_json_object(files.path / SUMMARY)[0] or {}).get("target")
    engines = NAMES.get(stated.partition("@")[0], ()) if isinstance(stated, str) else ()
    return tuple(engine for engine in engines if supporting_versions(engine, model.family, schemes, dtype, caches))


def _finished_folder(
    files: FolderFiles, model: ModelStructure | None, schemes: Mapping[str, Scheme], caches: CacheSchemes
) -> FinishedFolder:
    """The folder as the engines' rules need it. Without a model, which is a fault already, it has no layers, and rules
    that depend on the family are not applied."""
    family = model.family if model else FAMILIES[0]
    shiftable = [norm for norm in model.norms if not model.has_bias(norm)] if model else []
    return FinishedFolder(
        path=files.path,
        layout=files.layout,
        family=family,
        files=files.names,
        description_name=files.description_name,
        description=files.description,
        config=files.config,
        tensors=files.tensors,
        quant_type=folder_type(written_for(files.layout, files.config), family, schemes),
        schemes=schemes,
        embedding=model.embedding if model else "",
        linears=model.linears if model else {},
        norm_readers={norm: tuple(model.edges[norm].consumers) for norm in shiftable} if model else {},
        caches=caches,
    )


# ---- schemes ---------------------------------------------------------------------------------------------------------


def _schemes(files: FolderFiles, model: ModelStructure, result: VerificationResult) -> dict[str, Scheme]:
    """Scheme of every linear layer, embedding and convolution: its `.weight` entry or, if that is unknown, by its
    tensors."""
    schemes = {}
    for layer in model.layers_with_matrices:
        entry = files.description.get(f"{layer}.weight")
        if entry in tuple(Scheme):
            scheme = Scheme(entry)
        else:
            scheme = _scheme_by_tensors(files, layer)
            what = "has no entry" if entry is None else f"has the unknown scheme {entry!r}"
            why = "engines look up every linear layer and embedding there; without it they stop or misread the layer"
            if files.description:
                result.add_fault("description", files.description_name, f"{layer}.weight {what}", why, COMPILE_AGAIN)
        schemes[layer] = scheme
    return schemes


def _scheme_by_tensors(files: FolderFiles, layer: str) -> Scheme:
    weight = files.tensors.get(f"{layer}.weight")
    if weight is None or weight.dtype != "I8":
        return Scheme.FLOAT
    prefix = f"{layer}."
    return scheme_of_tensors(name.removeprefix(prefix) for name in files.tensors if name.startswith(prefix))


def _caches(files: FolderFiles, model: ModelStructure) -> CacheSchemes:
    """Scheme of the cache of every decoder layer, by the names of its tensors in the files or the description."""
    names = files.tensors.keys() | files.description.keys()
    return {
        attention: stated_scheme(pair, names) for attention, pair in projections(model.family, model.linears).items()
    }


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _check_tensors(
    files: FolderFiles,
    model: ModelStructure,
    schemes: Mapping[str, Scheme],
    caches: CacheSchemes,
    form: StorageFormat,
    result: VerificationResult,
) -> dict[str, ExpectedTensor]:
    """Checks presence, dtype, shape and description entry of every tensor -> the tensors with right dtype and shape."""
    expected = expected_tensors(model, schemes, form, caches)
    shifts = shift_tensors(model, schemes, form, files.layout.norm_copies)
    allowed = {name: tensor for name, tensor in shifts.items() if name in files.tensors}
    result.add_examined("tensors", len(expected))
    renamed = [name for name in files.tensors if model.family.checkpoint_name(name) != name]
    if renamed:
        original = model.family.checkpoint_name(renamed[0])
        result.add_fault(
            "tensors",
            format_list(renamed, 3),
            f"{pluralize(len(renamed), 'tensor')} named as by newer transformers versions",
            f"older engine versions accept the original names only, such as {original!r}",
            COMPILE_AGAIN,
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
            why = "engines reject 0-dimensional scales" if not stored.shape else "it follows from config.json"
            what = f"shape {list(stored.shape)} instead of {list(wanted.shape)}"
            result.add_fault("tensors", name, what, why, COMPILE_AGAIN)
        if not right_dtype:
            what = f"dtype {stored.dtype} instead of {' or '.join(wanted.dtypes)}"
            why = "engines read the stored bytes as the expected dtype"
            result.add_fault("tensors", name, what, why, COMPILE_AGAIN)
        if right_shape and right_dtype:
            valid[name] = wanted
        entry = files.description.get(name)
        optional = name.endswith(".weight") or not files.layout.describes(model.family, name)  # weights: `_schemes`
        if files.description and entry != wanted.scheme and not (optional and entry is None):
            what = f"described as {entry!r} instead of {str(wanted.scheme)!r}"
            why = "engines choose how to load a tensor by this entry"
            result.add_fault("description", name, what, why, COMPILE_AGAIN)
    if renamed and len(missing) > len(expected) // 4:
        missing.clear()  # present under their new names
    for layer, suffixes in missing.items():
        result.add_fault(
            "tensors",
            layer,
            f"missing: {', '.join(f'{layer}.{suffix}' for suffix in suffixes)}",
            "an engine may load the folder without an error and run the layer on uninitialized memory",
            "copy the folder again, or compile again",
        )
    for name in sorted(files.tensors.keys() - expected.keys() - allowed.keys() - set(renamed)):
        why = "neither config.json nor the layer's scheme implies it"
        result.add_fault("tensors", name, "unexpected tensor", why, COMPILE_AGAIN)
    for name in sorted(name for name in files.description if "." in name):
        if name not in files.tensors and name not in expected:
            what, why = f"entry for {name!r}, which no file contains", "engines would look for the tensor"
            result.add_fault("description", files.description_name, what, why, COMPILE_AGAIN)
    return valid


def _add_parallel_sizes(
    target: Target, model: ModelStructure, schemes: Mapping[str, Scheme], size: int, result: VerificationResult
) -> None:
    """Over how many devices each engine can shard the layers whose weights have groups."""
    shapes = {layer: (linear.outputs, linear.inputs) for layer, linear in model.linears.items()}
    layers = {layer: (schemes[layer], shape) for layer, shape in shapes.items() if layer in schemes}
    if notes := parallel_notes(target, grouped_layers(model.family, layers), size):
        result.facts["tensor parallelism"] = notes


def _facts(
    files: FolderFiles, dtype: str, schemes: Mapping[str, Scheme], caches: CacheSchemes, form: StorageFormat
) -> dict[str, Any]:
    counts = {str(scheme): list(schemes.values()).count(scheme) for scheme in sorted(set(schemes.values()))}
    facts: dict[str, Any] = {
        "layout": files.layout.name,
        "tensors": len(files.tensors),
        "bytes": sum(tensor.nbytes for tensor in files.tensors.values()),
        "float dtype": dtype,
    }
    facts |= {"layers per scheme": counts} if counts else {}
    if text := describe_caches(caches):
        facts["KV cache"] = text
    return facts | ({"group size": form.group_size} if form.group_size else {})
