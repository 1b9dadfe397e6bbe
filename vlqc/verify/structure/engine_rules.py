"""Checks a folder against the rules of each engine: schemes, look-ups, norm biases, shapes and file permissions."""

from collections.abc import Collection

from vlqc.families.family import ModelFamily
from vlqc.targets.advice import default_schemes, missing_rows_fix
from vlqc.targets.caches import used_schemes
from vlqc.targets.engine import Engine, FinishedFolder
from vlqc.targets.rules import group_faults, layer_faults, merge_repeated, mixed_group_faults, supported_schemes
from vlqc.targets.schemes import Scheme, option_name
from vlqc.targets.target import ENGINES, Target
from vlqc.targets.versions import loading_versions, reading_versions, supporting_versions, unread_in
from vlqc.verify.findings import VerificationResult

CHECK = "engine rules"


def check_engine_rules(
    folder: FinishedFolder,
    target: Target,
    dtype: str,
    *,
    named: bool,
    stated: Collection[Engine] = (),
    result: VerificationResult,
) -> list[str]:
    """Adds faults for everything the target's engines reject or ignore -> versions of all engines that load the folder.

    dtype: "bfloat16" or "float16". named: the user named this target. Then a scheme that the target does not support is
    a fault. Otherwise it is a fault only if some engine of the target loads the folder, or if no engine ever quantizes
    that layer; if no version of the target loads the folder, that is a warning, because such a folder can be compiled.
    stated: engines for which vlqc wrote the folder, as its summary says: all their versions must find everything.
    """
    family, schemes = folder.family, folder.schemes
    result.add_examined(CHECK, len(schemes))
    caches = folder.caches
    size = family.head_size(folder.config)
    versions = {engine: supporting_versions(engine, family, schemes, dtype, caches, size) for engine in ENGINES}
    entries = {engine: engine.description_faults(folder) for engine in ENGINES}
    tensors = {engine: engine.tensor_faults(folder) for engine in ENGINES}
    layers = merge_repeated(layer_faults(target, family, schemes, dtype))
    loads = any(versions[engine] for engine in target.engines)
    if named or loads:
        for engine in target.engines:
            supported, title = versions[engine], target.title(engine)
            if supported is None:
                what, why = f"no version of {engine.title} loads the folder", layers[0].why if layers else ""
                fix = missing_rows_fix(family) or f"compile again with --target {engine}"
                result.add_fault(CHECK, str(folder.path), what, why, fix)
            elif target.version and target.version not in supported:
                what, why = f"{title} does not load the folder", f"supported: {supported}"
                result.add_fault(CHECK, str(folder.path), what, why, _other_options(folder, target, engine, dtype))
        faults = layers + group_faults(target, family, schemes)
    else:
        why = f"{layers[0].what}: {layers[0].why}" if layers else ""
        fix = missing_rows_fix(family) or "compile again with --target and the engine that will serve the folder"
        result.add_warning(CHECK, str(folder.path), "no version loads the folder", why, fix)
        faults = [fault for fault in layers if _is_never_quantized(family, fault.where)] + mixed_group_faults(
            target, family, schemes
        )
    result.add_faults(CHECK, faults)
    known = {(fault.where, fault.what) for fault in result.faults}
    for engine in target.engines:
        new = [fault for fault in entries[engine] if (fault.where, fault.what) not in known]
        result.add_faults(CHECK, new + tensors[engine] + engine.placement_faults(folder))
        for warning in engine.description_warnings(folder) + engine.placement_warnings(folder):
            result.add_warning(CHECK, warning.where, warning.what, warning.why, warning.fix)
    unread = {engine: engine.side_file_faults(folder) for engine in ENGINES}
    not_found = {engine: engine.version_faults(folder) for engine in ENGINES}
    for engine in target.engines:
        range_of, title = versions[engine], target.title(engine)
        if range_of is not None and (target.version or reading_versions(range_of, unread[engine]) is None):
            for fault in unread_in(target.version, unread[engine]):
                add = result.add_fault if named else result.add_warning
                add(CHECK, fault.where, fault.what, f"{fault.why}; {title} has it", fault.fix)
        if target.version:
            result.add_faults(CHECK, unread_in(target.version, not_found[engine]))
        else:
            for fault in dict.fromkeys(fault for faults in not_found[engine].values() for fault in faults):
                add = result.add_fault if engine in stated else result.add_warning
                add(CHECK, fault.where, fault.what, fault.why, fault.fix)
    loads_in = []
    for engine in ENGINES:
        if not entries[engine] and not tensors[engine]:
            config = engine.completed_config(folder) or folder.config
            loaded = loading_versions(engine, family, schemes, dtype, config, caches)
            for by_range in (unread[engine], not_found[engine]):
                loaded = None if loaded is None else reading_versions(loaded, by_range)
            loads_in += [] if loaded is None else [str(loaded)]
    return loads_in


def _other_options(folder: FinishedFolder, target: Target, engine: Engine, dtype: str) -> str:
    """What to do about a folder that the target's version does not load: options of a compilation that it loads. The
    folder's own scheme comes first, because the version may run it on fewer layers."""
    family, used, version = folder.family, set(folder.schemes.values()), str(target.version)
    own = max(used, key=lambda each: each.spec.naming_priority, default=None)  # the one that the user asked for
    options = f"--target {target}"
    quantized = (scheme for scheme in Scheme if scheme.is_quantized)
    for scheme in sorted(quantized, key=lambda each: (each != own, each not in used)):
        schemes = default_schemes(target.only(engine), family, scheme, "engine")
        versions = supporting_versions(engine, family, schemes, dtype)
        if versions is not None and version in versions:
            options += "" if scheme == own else f" --scheme {option_name(scheme)}"
            break
    with_cache = supporting_versions(engine, family, {}, dtype, folder.caches)
    if used_schemes(folder.caches) and (with_cache is None or version not in with_cache):
        options += ", without --kv_cache"
    return f"compile again with {options}"


def _is_never_quantized(family: ModelFamily, layer: str) -> bool:
    if not any(engine.rules_of(family) for engine in ENGINES):  # no engine has this family
        return family.role(layer) is None
    return not any(scheme.is_quantized for engine in ENGINES for scheme in supported_schemes(engine, family, layer))
