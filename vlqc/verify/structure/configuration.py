"""Checks the keys of config.json and quant_model_description*.json that apply to the whole folder."""

from collections.abc import Iterator

from vlqc.errors import UserError
from vlqc.families.registry import FAMILIES, family_of, find_family
from vlqc.formatting import excerpt
from vlqc.frontend.checkpoint.config_schema import config_faults
from vlqc.frontend.model_structure import ModelStructure, model_structure
from vlqc.frontend.streamed_model import check_available
from vlqc.kernels_ref.matmul import CORRECTION_STEP
from vlqc.targets.engine import CACHE_KEYS, QUANT_BIAS_CORRECTION, FinishedFolder, join_and
from vlqc.targets.target import Target
from vlqc.verify.findings import COMPILE_AGAIN, VerificationResult
from vlqc.verify.folder.contents import FolderFiles
from vlqc.verify.structure.expected import DTYPE_CODES

HARMLESS_SIZE, HARMLESS_BLOCKS = 1 << 18, 256  # a model of these sizes is built, without weights, in a second
DESCRIPTION_KEYS = ("version", "model_quant_type", "group_size", QUANT_BIAS_CORRECTION)


# ---- config.json -----------------------------------------------------------------------------------------------------


def check_dtype(files: FolderFiles, result: VerificationResult) -> str:
    """dtype code of the dtype in config.json; if that is missing, unsupported or stated twice with different values, a
    fault, and the dtype of most float tensors."""
    dtypes = (find_family(files.config) or FAMILIES[0]).dtypes(files.config)
    first, *others = dtypes.values()
    if first in tuple(DTYPE_CODES) and all(other == first for other in others):
        return DTYPE_CODES[first]
    if files.config:
        result.add_fault(
            "config",
            "config.json",
            ", ".join(f"{key} is {value!r}" for key, value in dtypes.items()),
            "engines compute the float layers in it and read deq_scale accordingly",
            f"set {join_and(dtypes)} to bfloat16 or float16, as the float tensors are stored",
        )
    stored = [tensor.dtype for tensor in files.tensors.values()]
    return "F16" if stored.count("F16") > stored.count("BF16") else "BF16"


def check_model(files: FolderFiles, result: VerificationResult, *, trust_remote_code: bool) -> ModelStructure | None:
    """The model that config.json describes; None, and faults, if it cannot be built. UserError if the installed version
    of transformers does not have it.

    Sizes up to HARMLESS_SIZE are accepted even if no tensor is as large, because tensors may be missing. Then the
    faults are the shapes that differ.
    """
    if not files.config:
        return None
    if (family := find_family(files.config)) and not trust_remote_code:
        check_available(family, str(files.path / "config.json"))
    largest = max((size for tensor in files.tensors.values() for size in tensor.shape), default=1)
    limits = max(largest, HARMLESS_SIZE), max(len(files.tensors), HARMLESS_BLOCKS)
    try:
        family = family_of(files.config, "config.json")
        config = family.engine_config(files.config)
        faults = config_faults(family, config, "config.json", *limits)
        if not faults:
            return model_structure(files.path, family, config, trust_remote_code=trust_remote_code)
    except UserError as error:
        faults = list(error.faults)
    fix = "restore the values of the float checkpoint's config.json"
    for fault in faults:
        result.add_fault(
            "config", "config.json", fault.what, fault.why or "the expected tensors follow from it", fault.fix or fix
        )
    return None


def check_config(folder: FinishedFolder, model: ModelStructure, target: Target, result: VerificationResult) -> None:
    """Checks the keys by which each engine of the target finds the quantization."""
    if model.tied and (head := f"{model.output_head}.weight") in folder.tensors:
        result.add_fault(
            "config",
            "config.json",
            f"{head} is stored, but it is tied to the embedding",
            "engines use the embedding's weight, and ignore or reject a second one",
            COMPILE_AGAIN,
        )
    for engine in target.engines:
        result.add_faults("config", engine.config_faults(folder))


# ---- quant_model_description*.json -----------------------------------------------------------------------------------


def check_description_keys(folder: FinishedFolder, result: VerificationResult, *, has_model: bool) -> str:
    """Checks the header and unknown keys -> the folder's type.

    The type follows from the schemes; it is model_quant_type if nothing is quantized. has_model: whether config.json
    describes a model; otherwise the schemes are unknown, and that is a fault already.
    """
    description, where = folder.description, folder.description_name
    claimed = description.get("model_quant_type")
    if not description:
        return folder.quant_type
    if not folder.quant_type.is_quantized and isinstance(claimed, str):
        if has_model:
            result.add_warning("description", where, "no layer is quantized")
        return claimed
    result.add_faults("description", folder.layout.header_faults(folder))
    result.add_faults("description", folder.layout.cache_faults(folder))
    for what, why in _misplaced_keys(folder):
        result.add_fault("description", where, what, why, COMPILE_AGAIN)
    for key, value in description.items():
        if isinstance(value, dict | list):
            why = "engines read a flat JSON object"
            result.add_fault("description", where, f"{key!r} is a list or an object", why, COMPILE_AGAIN)
        elif key not in (*DESCRIPTION_KEYS, *CACHE_KEYS) and "." not in key:
            result.add_warning("description", where, f"unknown key {key!r}", "engines ignore it")
    return folder.quant_type


def _misplaced_keys(folder: FinishedFolder) -> Iterator[tuple[str, str]]:
    """(what, why) of keys of the description that no layer of the folder gives a meaning."""
    specs = [scheme.spec for scheme in folder.schemes.values()]
    size, step = (folder.description.get(key) for key in ("group_size", QUANT_BIAS_CORRECTION))
    if size not in (None, 0) and not any(spec.weight.per_group for spec in specs):
        yield f"group_size is {excerpt(size)}", "no weight of the folder has groups"
    if step is not None and (type(step) is not int or step != CORRECTION_STEP):
        yield f"{QUANT_BIAS_CORRECTION} is {excerpt(step)}", f"vlqc writes {CORRECTION_STEP} only"
    elif step is not None and not any(name.endswith(".quant_bias") for name in folder.tensors):
        yield f"unexpected key {QUANT_BIAS_CORRECTION}", "the folder has no quant_bias"


def group_size(folder: FinishedFolder, result: VerificationResult) -> int:
    """Number of inputs that share a scale, from the key that engines read, else from shapes; 0 without groups."""
    layer = next((layer for layer, scheme in folder.schemes.items() if scheme.spec.weight.per_group), None)
    if layer is None:
        return 0
    where, key, value = folder.layout.group_size_entry(folder)
    scale, weight = (folder.tensors.get(f"{layer}.{suffix}") for suffix in ("weight_scale_second", "weight"))
    stored = 0
    if scale and weight and len(scale.shape) == len(weight.shape) == 2 and scale.shape[1]:
        stored = weight.shape[1] // scale.shape[1]
    if type(value) is not int or value < 1:
        check = "description" if where == folder.description_name else "config"
        why = "engines derive the shape of the group scales from it"
        result.add_fault(check, where, f"{key} is {value!r}", why, f"set it to {stored}" if stored else COMPILE_AGAIN)
        return stored
    if why := folder.layout.group_size_warning(value):
        result.add_warning("engine rules", where, f"group_size is {value}", why)
    return value
