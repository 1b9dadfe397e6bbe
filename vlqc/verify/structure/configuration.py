"""Checks the keys of config.json and quant_model_description*.json that apply to the whole folder."""

from collections.abc import Mapping

from vlqc.errors import UserError
from vlqc.families.family import ModelFamily
from vlqc.families.registry import family_of, find_family
from vlqc.frontend.checkpoint.config_schema import config_faults
from vlqc.frontend.model_structure import ModelStructure, model_structure
from vlqc.frontend.streamed_model import check_available
from vlqc.targets.engine import QUANT_BIAS_CORRECTION
from vlqc.targets.mindie import MINDIE
from vlqc.targets.schemes import Scheme, quant_type
from vlqc.targets.target import Target
from vlqc.targets.vllm_ascend import DESCRIPTION_VERSION, FAST_GROUP_SIZES, VLLM_ASCEND
from vlqc.verify.findings import COMPILE_AGAIN, VerificationResult, format_list
from vlqc.verify.folder.contents import FolderFiles
from vlqc.verify.structure.expected import DTYPE_CODES

HARMLESS_SIZE, HARMLESS_BLOCKS = 1 << 18, 256  # a model of these sizes is built, without weights, in a second
DESCRIPTION_KEYS = ("version", "model_quant_type", "group_size", QUANT_BIAS_CORRECTION)


# ---- config.json -----------------------------------------------------------------------------------------------------


def check_dtype(files: FolderFiles, result: VerificationResult) -> str:
    """dtype code of torch_dtype; if that is missing or unsupported, a fault, and the dtype of most float tensors."""
    name = files.config.get("torch_dtype", files.config.get("dtype"))
    if isinstance(name, str) and name in DTYPE_CODES:
        return DTYPE_CODES[name]
    if files.config:
        result.add_fault(
            "config",
            "config.json",
            f"torch_dtype is {name!r}",
            "engines compute the float layers in it and read deq_scale accordingly",
            "set it to bfloat16 or float16, as the float tensors are stored",
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
        result.add_fault("config", "config.json", fault.what, fault.why or "the expected tensors follow from it", fix)
    return None


def check_config(
    files: FolderFiles,
    model: ModelStructure | None,
    target: Target,
    type_name: str,
    schemes: Mapping[str, Scheme],
    result: VerificationResult,
) -> None:
    """Checks the keys that tell each engine of the target how the folder is quantized."""
    config = files.config
    if not config:
        return
    if VLLM_ASCEND in target.engines and "quantization_config" in config:
        result.add_fault(
            "config",
            "config.json",
            "unexpected key quantization_config",
            "vLLM would read that key instead of quant_model_description.json",
            "remove the key",
        )
    if model and model.tied and (head := f"{model.output_head}.weight") in files.tensors:
        result.add_fault(
            "config",
            "config.json",
            f"tie_word_embeddings is true, but {head} is stored",
            "engines use the embedding's weight, and ignore or reject a second one",
            COMPILE_AGAIN,
        )
    if MINDIE in target.engines and model:
        _check_mindie_keys(files, model.family, type_name, schemes, result)


def _check_mindie_keys(
    files: FolderFiles,
    family: ModelFamily,
    type_name: str,
    schemes: Mapping[str, Scheme],
    result: VerificationResult,
) -> None:
    config = files.config
    if "text_config" in config:
        fix = "move the keys of text_config to the top level"
        result.add_fault("config", "config.json", "nested config (text_config)", "MindIE reads a flat config only", fix)
    vision_config = config.get("vision_config")
    vision_key = vision_config.get("quantize") if isinstance(vision_config, Mapping) else None
    vision = {scheme for layer, scheme in schemes.items() if family.in_vision_tower(layer) and scheme.is_quantized}
    wanted = {"quantize": type_name, "vision_config.quantize": "w8a8" if vision else None}
    if vision_key and not all(scheme.spec.takes_added_bias for scheme in vision):
        wanted["vision_config.quantize"] = vision_key  # no version supports it; the engine rules report that
    for key, value in (("quantize", config.get("quantize")), ("vision_config.quantize", vision_key)):
        if value != wanted[key]:
            result.add_fault(
                "config",
                "config.json",
                f"{key} is {value!r} instead of {wanted[key]!r}",
                "MindIE quantizes the layers of this part of the model only if this key says so",
                f"set {key}" if wanted[key] else f"remove {key}",
            )
    options = config.get("quantization_config")
    if isinstance(options, Mapping) and options.get("group_size", 0) not in MINDIE.group_sizes:
        result.add_fault(
            "config",
            "config.json",
            f"quantization_config.group_size is {options['group_size']!r}",
            f"MindIE accepts {format_list(MINDIE.group_sizes)}",
            "compile again with another --group_size",
        )
    elif files.layout == MINDIE and not isinstance(options, Mapping):
        why = "MindIE reads the group size from it"
        result.add_fault("config", "config.json", "quantization_config is missing", why, COMPILE_AGAIN)


# ---- quant_model_description*.json -----------------------------------------------------------------------------------


def check_description_keys(files: FolderFiles, schemes: Mapping[str, Scheme], result: VerificationResult) -> str:
    """Checks version, model_quant_type and unknown keys -> the folder's type.

    The type follows from the schemes; it is model_quant_type if nothing is quantized.
    """
    description, where = files.description, files.description_name
    scheme = quant_type(schemes.values())
    claimed = description.get("model_quant_type")
    if not description:
        return scheme
    if not scheme.is_quantized and isinstance(claimed, str):
        result.add_warning("description", where, "no layer is quantized")
        return claimed
    wanted = {"model_quant_type": str(scheme)}
    if files.layout == MINDIE:
        expected = f"quant_model_description_{scheme.lower()}.json"
        if where != expected:
            what, why = f"named {where} instead of {expected}", f"MindIE derives the name from the type {scheme}"
            result.add_fault("description", where, what, why, "rename the file")
    else:
        wanted["version"] = DESCRIPTION_VERSION
    for key, value in wanted.items():
        if description.get(key) != value:
            what = f"{key} is {description.get(key)!r} instead of {value!r}"
            result.add_fault("description", where, what, "engines choose how to load the folder by it", f"set {key}")
    for key, value in description.items():
        if isinstance(value, dict | list):
            why = "engines read a flat JSON object"
            result.add_fault("description", where, f"{key!r} is a list or an object", why, COMPILE_AGAIN)
        elif key not in DESCRIPTION_KEYS and "." not in key:
            result.add_warning("description", where, f"unknown key {key!r}", "engines ignore it")
    return scheme


def group_size(files: FolderFiles, schemes: Mapping[str, Scheme], result: VerificationResult) -> int:
    """Number of inputs that share a scale, from the key that engines read, else from shapes; 0 without groups."""
    layer = next((layer for layer, scheme in schemes.items() if scheme.spec.weight.per_group), None)
    if layer is None:
        return 0
    options = files.config.get("quantization_config")
    if files.layout == MINDIE:
        where, key = "config.json", "quantization_config.group_size"
        value = options.get("group_size") if isinstance(options, Mapping) else None
    else:
        where, key, value = files.description_name, "group_size", files.description.get("group_size")
    scale, weight = (files.tensors.get(f"{layer}.{suffix}") for suffix in ("weight_scale_second", "weight"))
    stored = 0
    if scale and weight and len(scale.shape) == len(weight.shape) == 2 and scale.shape[1]:
        stored = weight.shape[1] // scale.shape[1]
    if type(value) is not int or value < 1:
        check = "config" if files.layout == MINDIE else "description"
        why = "engines derive the shape of the group scales from it"
        result.add_fault(check, where, f"{key} is {value!r}", why, f"set it to {stored}" if stored else COMPILE_AGAIN)
        return stored
    if files.layout != MINDIE and value not in (*FAST_GROUP_SIZES, *MINDIE.group_sizes):
        sizes = " or ".join(map(str, FAST_GROUP_SIZES))
        result.add_warning(
            "engine rules", where, f"group_size is {value}", f"vLLM Ascend's int4 kernels prefer {sizes}"
        )
    return value
