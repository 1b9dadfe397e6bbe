"""Which engine versions load a folder, and what keeps the others from it: schemes, norm biases, shapes, permissions."""

import re
import stat
from collections.abc import Mapping

import numpy as np

from vlqc.errors import Fault
from vlqc.targets.engine import Engine
from vlqc.targets.mindie import MINDIE
from vlqc.targets.rules import group_faults, layer_faults, mixed_group_faults, supported_schemes
from vlqc.targets.schemes import Scheme
from vlqc.targets.target import ENGINES, Target
from vlqc.targets.versions import loading_versions, supporting_versions
from vlqc.targets.vllm_ascend import INT4_OUTPUTS, VLLM_ASCEND
from vlqc.verify.findings import VerificationResult, format_list
from vlqc.verify.folder.contents import FolderFiles
from vlqc.verify.structure.expected import ExpectedModel, consumers_of_norm

CHECK = "engine rules"


def check_engine_rules(
    files: FolderFiles,
    model: ExpectedModel | None,
    schemes: Mapping[str, Scheme],
    target: Target,
    dtype: str,
    *,
    named: bool,
    result: VerificationResult,
) -> list[str]:
    """Findings for what the target's engines refuse or drop -> the versions of all engines that load the folder.

    named: the user asked for this target; then a scheme that it does not run is a fault. Otherwise it is one, too, if
    another engine runs the folder, or if no layer of that kind is ever quantized; and if none runs it, a warning says
    so: such a folder can be compiled, and its form and numbers can be right.
    """
    result.add_examined(CHECK, len(schemes))
    versions = {engine: supporting_versions(engine, schemes, dtype) for engine in ENGINES}
    broken = {engine: _norm_faults(files, model, schemes, engine) for engine in ENGINES} if model else {}
    broken.setdefault(VLLM_ASCEND, []).extend(_int4_faults(model, schemes))
    if files.layout == MINDIE:
        why = "it reads quant_model_description.json only"
        broken[VLLM_ASCEND].append(Fault("vLLM Ascend finds no description", files.description_name, why))
    layers = _by_kind(layer_faults(target, schemes, dtype))
    runs = any(versions[engine] for engine in target.engines)
    if named or runs:
        for engine in target.engines:
            found, title = versions[engine], target.title(engine)
            if found is None:
                why = layers[0].why if layers else ""
                result.add_fault(CHECK, str(files.path), f"no version of {engine.title} loads it", why)
            elif target.version and target.version not in found:
                result.add_fault(CHECK, str(files.path), f"{title} does not load it", f"{found} do")
        faults = layers + group_faults(target, schemes)
    else:
        first = next((fault for fault in layers), None)
        why = f"{first.what}: {first.why}" if first else ""
        result.add_warning(CHECK, str(files.path), "no version loads it", why)
        faults = [fault for fault in layers if _is_never_quantized(fault.where)] + mixed_group_faults(target, schemes)
    for engine in target.engines:
        faults += broken.get(engine, [])
    for fault in faults:
        result.add_fault(CHECK, fault.where, fault.what, fault.why, fault.fix)
    _check_permissions(files, target, result)
    loaded = (loading_versions(engine, schemes, dtype, files.config) for engine in ENGINES if not broken.get(engine))
    return [str(each) for each in loaded if each is not None]


def _is_never_quantized(layer: str) -> bool:
    return all(supported_schemes(engine, layer) == {Scheme.FLOAT} for engine in ENGINES)


def _by_kind(faults: list[Fault]) -> list[Fault]:
    """The same fault of the same layer in many blocks -> one, of the first."""
    kinds: dict[tuple[str, ...], list[Fault]] = {}
    for fault in faults:
        numberless = re.sub(r"\.\d+\.", ".*.", fault.where)
        kinds.setdefault((numberless, fault.what.removeprefix(fault.where), fault.why), []).append(fault)
    return [
        Fault(
            f"{first.what}, and {len(rest)} more of its kind" if rest else first.what, first.where, first.why, first.fix
        )
        for first, *rest in kinds.values()
    ]


def _int4_faults(model: ExpectedModel | None, schemes: Mapping[str, Scheme]) -> list[Fault]:
    """vLLM Ascend's int4 operator takes outputs in eights."""
    int4 = [layer for layer, scheme in schemes.items() if scheme == Scheme.W4A8_DYNAMIC]
    return [
        Fault(f"{model.linears[layer].outputs} outputs in 4 bits", layer, f"vLLM Ascend takes them in {INT4_OUTPUTS}s")
        for layer in int4
        if model and layer in model.linears and model.linears[layer].outputs % INT4_OUTPUTS
    ]


# ---- norm biases -----------------------------------------------------------------------------------------------------


def _norm_faults(
    files: FolderFiles, model: ExpectedModel, schemes: Mapping[str, Scheme], engine: Engine
) -> list[Fault]:
    """A norm bias (a folded shift) must be one that the engine applies."""
    biased = [norm for norm in model.norms if f"{norm}.bias" in files.tensors]
    if engine == VLLM_ASCEND:
        if any("norm.bias" in key for key in files.description):
            return []
        why = "vLLM Ascend gives norms a bias only if some description key contains 'norm.bias'"
        return [Fault("this bias would be dropped", f"{norm}.bias", why) for norm in biased]
    faults = []
    for norm in biased:
        consumers = [layer for layer in consumers_of_norm(norm) if layer in schemes]
        if any(schemes[layer] != Scheme.W8A8 for layer in consumers):
            why = "MindIE applies a norm bias only if every layer behind the norm is static W8A8"
            faults.append(Fault("this bias would be dropped", f"{norm}.bias", why))
    for norm in model.norms:
        faults += _module_faults(files, norm, norm in biased)
    return faults


def _module_faults(files: FolderFiles, norm: str, biased: bool) -> list[Fault]:
    """MindIE: exactly the norms with a bias repeat weight and bias as X.module.weight and X.module.bias."""
    faults = []
    for suffix in ("weight", "bias"):
        name, copy = f"{norm}.{suffix}", f"{norm}.module.{suffix}"
        if (copy in files.tensors) != biased:
            what = f"{copy} is {'missing' if biased else 'there without a bias'}"
            why = "MindIE applies norm biases where the norm's tensors are repeated under X.module, and only there"
            faults.append(Fault(what, name, why))
        elif biased and name in files.tensors:
            one, other = files.tensors[name], files.tensors[copy]
            if (one.dtype, one.shape) != (other.dtype, other.shape) or not np.array_equal(one.read(), other.read()):
                faults.append(Fault(f"it differs from {name}", copy, "MindIE reads one or the other"))
    return faults


# ---- permissions -----------------------------------------------------------------------------------------------------


def _check_permissions(files: FolderFiles, target: Target, result: VerificationResult) -> None:
    """MindIE checks modes and paths before it reads. Both change with the place, so most are warnings."""
    if MINDIE not in target.engines:
        return
    if not re.fullmatch(r"[0-9a-zA-Z_./-]+", real := str(files.path.resolve())):
        result.add_warning(CHECK, real, "MindIE accepts paths of letters, digits and _ . / - only")
    writable = [path.name for path in (files.path, *sorted(files.path.iterdir())) if path.stat().st_mode & stat.S_IWOTH]
    if writable:
        finding = result.add_fault if files.layout == MINDIE else result.add_warning
        finding(CHECK, format_list(writable), "everybody may write it; MindIE refuses that", "", "chmod o-w")
