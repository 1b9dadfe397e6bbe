"""What config.json and quant_model_description*.json say of a folder as a whole, held against each other."""

from collections.abc import Mapping

from vlqc.targets.mindie import MINDIE
from vlqc.targets.schemes import Scheme, quant_type
from vlqc.targets.target import Target
from vlqc.targets.vllm_ascend import FAST_GROUP_SIZES, VLLM_ASCEND
from vlqc.verify.findings import VerificationResult, format_list
from vlqc.verify.folder.contents import FolderFiles
from vlqc.verify.structure.expected import DTYPE_CODES, ExpectedModel, expected_model, is_tied

CORRECTED = "quant_bias_correction"  # quant_bias takes mean errors off, in multiples of so many steps
DESCRIPTION_KEYS = ("version", "model_quant_type", "group_size", CORRECTED)
DESCRIPTION_VERSION = "1.0.0"  # by which vLLM Ascend knows packed 4-bit weights


# ---- config.json -----------------------------------------------------------------------------------------------------


def check_dtype(files: FolderFiles, result: VerificationResult) -> str:
    """torch_dtype -> dtype code; a wrong one is reported and the embedding's dtype taken instead."""
    name = files.config.get("torch_dtype", files.config.get("dtype"))
    if isinstance(name, str) and name in DTYPE_CODES:
        return DTYPE_CODES[name]
    if files.config:
        result.add_fault(
            "config",
            "config.json",
            f"torch_dtype is {name!r}",
            "engines run the float parts, and read deq_scale, by it",
            "set it to bfloat16 or float16, as the float tensors are stored",
        )
    embedding = files.tensors.get("model.embed_tokens.weight")
    return "F16" if embedding and embedding.dtype == "F16" else "BF16"


def check_model(files: FolderFiles, result: VerificationResult) -> ExpectedModel | None:
    """The model that config.json describes; None, reported, when it describes none."""
    if not files.config:
        return None
    model = expected_model(files.config)
    if isinstance(model, str):
        result.add_fault(
            "config", "config.json", model, "the expected tensors follow from it", "restore the source's values"
        )
        return None
    return model


def check_config(
    files: FolderFiles, target: Target, type_name: str, schemes: Mapping[str, Scheme], result: VerificationResult
) -> None:
    """The keys by which each engine of the target knows that, and how, the folder is quantized."""
    config = files.config
    if not config:
        return
    if VLLM_ASCEND in target.engines and "quantization_config" in config:
        result.add_fault(
            "config",
            "config.json",
            "it contains quantization_config",
            "vLLM would read that key instead of quant_model_description.json",
            "remove the key",
        )
    if is_tied(config) and "lm_head.weight" in files.tensors:
        result.add_fault(
            "config",
            "config.json",
            "tie_word_embeddings is true, yet lm_head.weight is stored",
            "engines share the embedding's table, and the stored one would be ignored or refused",
            "store the embedding only",
        )
    if MINDIE in target.engines:
        _check_mindie_keys(files, type_name, schemes, result)


def _check_mindie_keys(
    files: FolderFiles, type_name: str, schemes: Mapping[str, Scheme], result: VerificationResult
) -> None:
    config = files.config
    if "text_config" in config:
        result.add_fault("config", "config.json", "it is nested (text_config)", "MindIE reads a flat config only")
    vision_config = config.get("vision_config")
    vision_word = vision_config.get("quantize") if isinstance(vision_config, Mapping) else None
    vision = {scheme for layer, scheme in schemes.items() if layer.startswith("visual.")} - {Scheme.FLOAT}
    wanted = {"quantize": type_name, "vision_config.quantize": "w8a8" if vision else None}
    if vision - {Scheme.W8A8} and vision_word:
        wanted["vision_config.quantize"] = vision_word  # no version has a word for it; the engine rules say so
    for key, found in (("quantize", config.get("quantize")), ("vision_config.quantize", vision_word)):
        if found != wanted[key]:
            result.add_fault(
                "config",
                "config.json",
                f"{key} is {found!r} instead of {wanted[key]!r}",
                "MindIE builds quantized layers exactly where this key says so, and derives it from nothing else",
                f"set {key}" if wanted[key] else f"remove {key}",
            )
    options = config.get("quantization_config")
    if isinstance(options, Mapping) and options.get("group_size", 0) not in MINDIE.group_sizes:
        result.add_fault(
            "config",
            "config.json",
            f"quantization_config.group_size is {options['group_size']!r}",
            f"MindIE accepts {format_list(MINDIE.group_sizes)}",
        )
    elif files.layout == MINDIE and not isinstance(options, Mapping):
        why = "MindIE's layout carries the quantization's options, the group size among them, in it"
        result.add_fault("config", "config.json", "quantization_config is missing", why, "compile again")


# ---- quant_model_description*.json -----------------------------------------------------------------------------------


def check_description_keys(files: FolderFiles, schemes: Mapping[str, Scheme], result: VerificationResult) -> str:
    """version, model_quant_type, strange keys -> the folder's type by its schemes (model_quant_type without any)."""
    description, where = files.description, files.description_name
    scheme = quant_type(schemes.values())
    claimed = description.get("model_quant_type")
    if not description:
        return scheme
    if scheme == Scheme.FLOAT and isinstance(claimed, str):
        result.add_warning("description", where, "no layer is quantized")
        return claimed
    wanted = {"model_quant_type": str(scheme)}
    if files.layout == MINDIE:
        expected = f"quant_model_description_{scheme.lower()}.json"
        if where != expected:
            result.add_fault("description", where, f"a folder of type {scheme} names this file {expected}")
    else:
        wanted["version"] = DESCRIPTION_VERSION
    for key, word in wanted.items():
        if description.get(key) != word:
            result.add_fault("description", where, f"{key} is {description.get(key)!r} instead of {word!r}")
    for key, value in description.items():
        if isinstance(value, dict | list):
            result.add_fault("description", where, f"{key!r} is not a plain value", "engines read a flat object")
        elif key not in DESCRIPTION_KEYS and "." not in key:
            result.add_warning("description", where, f"unknown key {key!r}")
    return scheme


def group_size(files: FolderFiles, schemes: Mapping[str, Scheme], result: VerificationResult) -> int:
    """How many inputs share a scale, by what the engine reads, else by the tensors; 0 without W4A8_DYNAMIC."""
    layer = next((layer for layer, scheme in schemes.items() if scheme == Scheme.W4A8_DYNAMIC), None)
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
        why = "engines shape the group scales by it"
        result.add_fault(check, where, f"{key} is {value!r}", why, f"set it to {stored}" if stored else "compile again")
        return stored
    if files.layout != MINDIE and value not in (*FAST_GROUP_SIZES, *MINDIE.group_sizes):
        sizes = " or ".join(map(str, FAST_GROUP_SIZES))
        result.add_warning(
            "engine rules", where, f"group_size is {value}", f"vLLM Ascend's int4 kernels prefer {sizes}"
        )
    return value
