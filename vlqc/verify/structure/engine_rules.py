"""Checks a folder against the rules of each engine: schemes, norm biases, shapes and file permissions."""

import re
import stat
from collections.abc import Mapping

import numpy as np

from vlqc.errors import Fault
from vlqc.families.family import ModelFamily
from vlqc.frontend.model_structure import ModelStructure
from vlqc.targets.engine import Engine
from vlqc.targets.mindie import MINDIE
from vlqc.targets.rules import group_faults, layer_faults, mixed_group_faults, supported_schemes
from vlqc.targets.schemes import Scheme
from vlqc.targets.target import ENGINES, Target
from vlqc.targets.versions import loading_versions, supporting_versions
from vlqc.targets.vllm_ascend import VLLM_ASCEND
from vlqc.verify.findings import COMPILE_AGAIN, COPY_AGAIN, VerificationResult, format_list
from vlqc.verify.folder.contents import FolderFiles

CHECK = "engine rules"
IGNORED_BIAS = "the engine would ignore this bias"


def check_engine_rules(
    files: FolderFiles,
    model: ModelStructure,
    schemes: Mapping[str, Scheme],
    target: Target,
    dtype: str,
    *,
    named: bool,
    result: VerificationResult,
) -> list[str]:
    """Adds faults for everything the target's engines reject or ignore -> versions of all engines that load the folder.

    dtype: "bfloat16" or "float16". named: the user named this target. Then a scheme that the target does not support is
    a fault. Otherwise it is a fault only if some engine of the target loads the folder, or if no engine ever quantizes
    that layer; if no version of the target loads the folder, that is a warning, because such a folder can be compiled.
    """
    result.add_examined(CHECK, len(schemes))
    family = model.family
    versions = {engine: supporting_versions(engine, family, schemes, dtype) for engine in ENGINES}
    broken = {engine: _norm_faults(files, model, schemes, engine) for engine in ENGINES}
    broken[VLLM_ASCEND] += _int4_faults(model, schemes)
    if files.layout == MINDIE:
        why = "vLLM Ascend reads quant_model_description.json, not the description of MindIE's layout"
        broken[VLLM_ASCEND].append(Fault("no description for vLLM Ascend", files.description_name, why))
    layers = _merge_repeated(layer_faults(target, family, schemes, dtype))
    loads = any(versions[engine] for engine in target.engines)
    if named or loads:
        for engine in target.engines:
            supported, title = versions[engine], target.title(engine)
            if supported is None:
                what, why = f"no version of {engine.title} loads the folder", layers[0].why if layers else ""
                result.add_fault(CHECK, str(files.path), what, why, f"compile again with --target {engine}")
            elif target.version and target.version not in supported:
                what, why = f"{title} does not load the folder", f"supported: {supported}"
                result.add_fault(CHECK, str(files.path), what, why, f"compile again with --target {target}")
        faults = layers + group_faults(target, family, schemes)
    else:
        why = f"{layers[0].what}: {layers[0].why}" if layers else ""
        fix = "compile again with --target and the engine that will serve the folder"
        result.add_warning(CHECK, str(files.path), "no version loads the folder", why, fix)
        faults = [fault for fault in layers if _is_never_quantized(family, fault.where)] + mixed_group_faults(
            target, family, schemes
        )
    for engine in target.engines:
        faults += broken.get(engine, [])
    for fault in faults:
        result.add_fault(CHECK, fault.where, fault.what, fault.why, fault.fix)
    _check_permissions(files, target, result)
    loaded = (
        loading_versions(engine, family, schemes, dtype, files.config) for engine in ENGINES if not broken.get(engine)
    )
    return [str(each) for each in loaded if each is not None]


def _is_never_quantized(family: ModelFamily, layer: str) -> bool:
    return not any(scheme.is_quantized for engine in ENGINES for scheme in supported_schemes(engine, family, layer))


def _merge_repeated(faults: list[Fault]) -> list[Fault]:
    """Merges equal faults of the same layer in different blocks into that of the first block."""
    kinds: dict[tuple[str, ...], list[Fault]] = {}
    for fault in faults:
        numberless = re.sub(r"\.\d+\.", ".*.", fault.where)
        kinds.setdefault((numberless, fault.what.removeprefix(fault.where), fault.why), []).append(fault)
    return [
        Fault(f"{first.what}, and {len(rest)} more like it" if rest else first.what, first.where, first.why, first.fix)
        for first, *rest in kinds.values()
    ]


def _int4_faults(model: ModelStructure, schemes: Mapping[str, Scheme]) -> list[Fault]:
    """vLLM Ascend's int4 operator needs a number of outputs that is a multiple of 8."""
    return [
        Fault(
            f"{model.linears[layer].outputs} outputs in {scheme.spec.weight.bits} bits",
            layer,
            f"vLLM Ascend's int4 operator needs a multiple of {scheme.spec.output_multiple}",
            f"compile again with --exclude {layer}",
        )
        for layer, scheme in schemes.items()
        if layer in model.linears and model.linears[layer].outputs % scheme.spec.output_multiple
    ]


# ---- norm biases -----------------------------------------------------------------------------------------------------


def _norm_faults(
    files: FolderFiles, model: ModelStructure, schemes: Mapping[str, Scheme], engine: Engine
) -> list[Fault]:
    """Faults for every norm bias (a folded shift) that the engine does not apply."""
    norms = [norm for norm in model.norms if not model.has_bias(norm)]
    shifted = [norm for norm in norms if f"{norm}.bias" in files.tensors]
    if engine == VLLM_ASCEND:
        if any("norm.bias" in key for key in files.description):
            return []
        why = "vLLM Ascend loads norm biases only if some key of the description contains 'norm.bias'"
        return [Fault(IGNORED_BIAS, f"{norm}.bias", why, COMPILE_AGAIN) for norm in shifted]
    faults = []
    for norm in shifted:
        if not all(schemes[layer].spec.takes_added_bias for layer in model.edges[norm].consumers):
            why = "MindIE applies a norm bias only if every layer that reads the norm is W8A8"
            faults.append(Fault(IGNORED_BIAS, f"{norm}.bias", why, COMPILE_AGAIN))
    for norm in norms:
        faults += _module_faults(files, norm, norm in shifted)
    return faults


def _module_faults(files: FolderFiles, norm: str, shifted: bool) -> list[Fault]:
    """MindIE needs copies X.module.weight and X.module.bias of exactly the norms that have a bias."""
    faults = []
    for suffix in ("weight", "bias"):
        name, copy = f"{norm}.{suffix}", f"{norm}.module.{suffix}"
        if (copy in files.tensors) != shifted:
            what = f"{copy} is missing" if shifted else f"{copy} exists, but the norm has no bias"
            why = "MindIE applies the bias of exactly those norms whose tensors are repeated under X.module"
            faults.append(Fault(what, name, why, COMPILE_AGAIN))
        elif shifted and name in files.tensors:
            first, second = files.tensors[name], files.tensors[copy]
            same_form = (first.dtype, first.shape) == (second.dtype, second.shape)
            if not (same_form and np.array_equal(first.read(), second.read())):
                why = "they must be equal, because MindIE reads one or the other"
                faults.append(Fault(f"differs from {name}", copy, why, COPY_AGAIN))
    return faults


# ---- permissions -----------------------------------------------------------------------------------------------------


def _check_permissions(files: FolderFiles, target: Target, result: VerificationResult) -> None:
    """MindIE checks paths and file modes before it reads. A copy of the folder changes both: mostly warnings."""
    if MINDIE not in target.engines:
        return
    if not re.fullmatch(r"[0-9a-zA-Z_./-]+", real := str(files.path.resolve())):
        what = "MindIE accepts only letters, digits and _ . / - in paths"
        result.add_warning(CHECK, real, what, fix="move the folder before serving it with MindIE")
    writable = [path.name for path in (files.path, *sorted(files.path.iterdir())) if path.stat().st_mode & stat.S_IWOTH]
    if writable:
        add = result.add_fault if files.layout == MINDIE else result.add_warning
        add(CHECK, format_list(writable), "writable by all users", "MindIE rejects such files", "chmod o-w")
