"""The form of a compiled folder: config, description, every tensor with its dtype and shape, as engines look them up.

vLLM Ascend does not check completeness when it loads: a missing tensor is silent garbage, so it is checked here.
"""

import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlqc.engines import BOTH, MINDIE, VLLM_ASCEND, Scheme, assignment_faults, engines_of, loads
from vlqc.verify.expected import (
    CHECKED_SCHEMES,
    DTYPE_CODES,
    ExpectedModel,
    ExpectedTensor,
    expected_model,
    expected_tensors,
    folder_type,
    is_tied,
    norm_biases,
)
from vlqc.verify.files import FolderFiles, check_files, open_folder
from vlqc.verify.report import Report, listed

DESCRIPTION_KEYS = ("version", "model_quant_type", "group_size")
DESCRIPTION_VERSION = "1.0.0"
RENAMED = ("model.visual.", "model.language_model.", "language_model.")  # names of newer transformers versions
MINDIE_GROUP_SIZES = (0, 64, 128, 256)


@dataclass
class CompiledFolder:
    """A folder as the later checks need it. `model` is None when config.json does not describe one."""

    files: FolderFiles
    engine: str
    glue: str  # dtype code of the float tensors, "BF16" or "F16"
    model: ExpectedModel | None
    schemes: dict[str, Scheme]  # every Linear of the model -> its scheme
    sound: dict[str, ExpectedTensor]  # tensors that exist with the right dtype and shape


def check_structure(path: Path, engine: str | None, report: Report) -> CompiledFolder:
    """Folder and engine ("vllm-ascend", "mindie", "both"; None: what config.json claims) -> what the folder holds."""
    files = open_folder(path, report)
    engine = engine or _claimed_engine(files)
    report.engine = engine
    glue = _check_dtype(files, report)
    model = _check_model(files, report)
    schemes = _schemes(files, model, report) if model else {}
    type_name = _check_description_keys(files, schemes, report)
    check_files(files, type_name.lower(), report)
    _check_config(files, engine, type_name.lower(), schemes, report)
    sound: dict[str, ExpectedTensor] = {}
    if model:
        sound = _check_tensors(files, model, schemes, glue, report)
        _check_norm_biases(files, model, schemes, engine, report)
    report.look("engine rules", len(schemes))
    for fault in assignment_faults(engine, schemes):
        report.fault("engine rules", fault.where, fault.what, fault.why, fault.fix)
    _check_permissions(files, engine, report)
    report.facts |= _facts(files, glue, schemes)
    return CompiledFolder(files, engine, glue, model, schemes, sound)


def _claimed_engine(files: FolderFiles) -> str:
    if files.layout == MINDIE:
        return MINDIE
    return BOTH if "quantize" in files.config else VLLM_ASCEND


# ---- config.json -----------------------------------------------------------------------------------------------------


def _check_dtype(files: FolderFiles, report: Report) -> str:
    """torch_dtype -> dtype code; a wrong one is reported and the embedding's dtype taken instead."""
    name = files.config.get("torch_dtype", files.config.get("dtype"))
    if isinstance(name, str) and name in DTYPE_CODES:
        return DTYPE_CODES[name]
    if files.config:
        report.fault(
            "config",
            "config.json",
            f"torch_dtype is {name!r}",
            "engines run the float parts, and read deq_scale, by it",
            "set it to bfloat16 or float16, as the float tensors are stored",
        )
    embedding = files.tensors.get("model.embed_tokens.weight")
    return "F16" if embedding and embedding.dtype == "F16" else "BF16"


def _check_model(files: FolderFiles, report: Report) -> ExpectedModel | None:
    if not files.config:
        return None
    model = expected_model(files.config)
    if isinstance(model, str):
        report.fault(
            "config", "config.json", model, "the expected tensors follow from it", "restore the source's values"
        )
        return None
    return model


def _check_config(
    files: FolderFiles, engine: str, type_name: str, schemes: Mapping[str, Scheme], report: Report
) -> None:
    config = files.config
    if not config:
        return
    engines = engines_of(engine)
    if VLLM_ASCEND in engines and "quantization_config" in config:
        report.fault(
            "config",
            "config.json",
            "it contains quantization_config",
            "vLLM would read that key instead of quant_model_description.json",
            "remove the key",
        )
    if is_tied(config) and "lm_head.weight" in files.tensors:
        report.fault(
            "config",
            "config.json",
            "tie_word_embeddings is true, yet lm_head.weight is stored",
            "engines share the embedding's table, and the stored one would be ignored or refused",
            "store the embedding only",
        )
    if MINDIE not in engines:
        return
    if "text_config" in config:
        report.fault("config", "config.json", "it is nested (text_config)", "MindIE reads a flat config only")
    vision_config = config.get("vision_config")
    vision_word = vision_config.get("quantize") if isinstance(vision_config, Mapping) else None
    vision = any(scheme != Scheme.FLOAT for layer, scheme in schemes.items() if layer.startswith("visual."))
    wanted = {"quantize": type_name, "vision_config.quantize": "w8a8" if vision else None}
    for key, found in (("quantize", config.get("quantize")), ("vision_config.quantize", vision_word)):
        if found != wanted[key]:
            report.fault(
                "config",
                "config.json",
                f"{key} is {found!r} instead of {wanted[key]!r}",
                "MindIE builds quantized layers exactly where this key says so, and derives it from nothing else",
                f"set {key}" if wanted[key] else f"remove {key}",
            )
    options = config.get("quantization_config")
    if isinstance(options, Mapping) and options.get("group_size", 0) not in MINDIE_GROUP_SIZES:
        report.fault(
            "config",
            "config.json",
            f"quantization_config.group_size is {options['group_size']!r}",
            f"MindIE accepts {listed(MINDIE_GROUP_SIZES)}",
        )


# ---- quant_model_description.json ------------------------------------------------------------------------------------


def _schemes(files: FolderFiles, model: ExpectedModel, report: Report) -> dict[str, Scheme]:
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
                report.fault("description", files.description_name, f"{layer}.weight {what}", why)
        schemes[layer] = scheme
    return schemes


def _scheme_by_tensors(files: FolderFiles, layer: str) -> Scheme:
    weight = files.tensors.get(f"{layer}.weight")
    if weight is None or weight.dtype != "I8":
        return Scheme.FLOAT
    return Scheme.W8A8 if f"{layer}.deq_scale" in files.tensors else Scheme.W8A8_DYNAMIC


def _check_description_keys(files: FolderFiles, schemes: Mapping[str, Scheme], report: Report) -> str:
    """version, model_quant_type, strange keys -> the folder's type by its schemes (model_quant_type without any)."""
    description, where = files.description, files.description_name
    scheme = folder_type(schemes.values())
    claimed = description.get("model_quant_type")
    if not description:
        return scheme
    if scheme == Scheme.FLOAT and isinstance(claimed, str):
        report.warn("description", where, "no layer is quantized")
        return claimed
    for key, wanted in (("version", DESCRIPTION_VERSION), ("model_quant_type", str(scheme))):
        if description.get(key) != wanted:
            report.fault("description", where, f"{key} is {description.get(key)!r} instead of {wanted!r}")
    for key, value in description.items():
        if isinstance(value, dict | list):
            report.fault("description", where, f"{key!r} is not a plain value", "engines read a flat object")
        elif key not in DESCRIPTION_KEYS and "." not in key:
            report.warn("description", where, f"unknown key {key!r}")
    return scheme


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _check_tensors(
    files: FolderFiles, model: ExpectedModel, schemes: Mapping[str, Scheme], glue: str, report: Report
) -> dict[str, ExpectedTensor]:
    """Completeness, surplus, names, dtype, shape and description word of every tensor -> the ones that are sound."""
    expected = expected_tensors(model, schemes, glue)
    allowed = {name: tensor for name, tensor in norm_biases(model, glue).items() if name in files.tensors}
    report.look("tensors", len(expected))
    renamed = [name for name in files.tensors if name.startswith(RENAMED)]
    if renamed:
        report.fault(
            "tensors",
            listed(renamed, 3),
            f"{len(renamed)} tensors carry names of newer transformers versions",
            "every engine version accepts the original names (visual.*, model.*), older ones accept nothing else",
            "compile again",
        )
    missing: dict[str, list[str]] = {}
    sound = {}
    for name, wanted in (expected | allowed).items():
        stored = files.tensors.get(name)
        if stored is None:
            layer, _, suffix = name.rpartition(".")
            missing.setdefault(layer, []).append(suffix)
            continue
        right_shape, right_dtype = stored.shape == wanted.shape, stored.dtype in wanted.dtypes
        if not right_shape:
            why = "engines refuse 0-dimensional scales" if not stored.shape else "it follows from config.json"
            report.fault("tensors", name, f"shape {list(stored.shape)} instead of {list(wanted.shape)}", why)
        if not right_dtype:
            report.fault("tensors", name, f"dtype {stored.dtype} instead of {' or '.join(wanted.dtypes)}")
        if right_shape and right_dtype:
            sound[name] = wanted
        word = files.description.get(name)
        if files.description and word != wanted.word and not (name.endswith(".weight") and word is None):
            report.fault("description", name, f"its word is {word!r} instead of {str(wanted.word)!r}")
    if renamed and len(missing) > len(expected) // 4:
        missing.clear()  # they are there, under the other names
    for layer, suffixes in missing.items():
        report.fault(
            "tensors",
            layer,
            f"missing: {', '.join(f'{layer}.{suffix}' for suffix in suffixes)}",
            "vLLM Ascend loads the folder without a word and runs the layer on uninitialised memory",
            "compile again",
        )
    for name in sorted(files.tensors.keys() - expected.keys() - allowed.keys() - set(renamed)):
        report.fault("tensors", name, "this tensor does not belong to the model", "by config.json and its scheme")
    for name in sorted(name for name in files.description if "." in name):
        if name not in files.tensors and name not in expected:
            report.fault("description", files.description_name, f"it lists {name!r}, which no file contains")
    return sound


def _check_norm_biases(
    files: FolderFiles, model: ExpectedModel, schemes: Mapping[str, Scheme], engine: str, report: Report
) -> None:
    """A norm bias (a folded shift) must be one that the engine applies."""
    biased = [norm for norm in model.norms if f"{norm}.bias" in files.tensors]
    triggered = any("norm.bias" in key for key in files.description)
    for norm in biased:
        if VLLM_ASCEND in engines_of(engine) and not triggered:
            why = "vLLM Ascend gives norms a bias only if some description key contains 'norm.bias'"
            report.fault("engine rules", f"{norm}.bias", "this bias would be dropped", why)
        consumers = [layer for layer in consumers_of_norm(norm) if layer in schemes]
        if MINDIE in engines_of(engine) and any(schemes[layer] != Scheme.W8A8 for layer in consumers):
            why = "MindIE applies a norm bias only if every layer behind the norm is static W8A8"
            report.fault("engine rules", f"{norm}.bias", "this bias would be dropped", why)


def consumers_of_norm(norm: str) -> tuple[str, ...]:
    """Norm layer -> the Linears that read its output. model.norm: lm_head."""
    parent, _, name = norm.rpartition(".")
    behind = {
        "norm1": ("attn.qkv",),
        "norm2": ("mlp.gate_proj", "mlp.up_proj"),
        "ln_q": ("mlp.0",),
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
    return tuple(f"{parent}.{consumer}" for consumer in behind[name]) if name in behind else ("lm_head",)


# ---- the rest --------------------------------------------------------------------------------------------------------


def _check_permissions(files: FolderFiles, engine: str, report: Report) -> None:
    """MindIE checks owners and paths before it reads; both depend on where the folder will lie, so only warnings."""
    if MINDIE not in engines_of(engine):
        return
    report.look("engine rules")
    if not re.fullmatch(r"[0-9a-zA-Z_./-]+", real := str(files.path.resolve())):
        report.warn("engine rules", real, "MindIE accepts paths of letters, digits and _ . / - only")
    for path in (files.path, *files.weights):
        if path.stat().st_mode & stat.S_IWOTH:
            report.warn("engine rules", path.name, "everybody may write it; MindIE refuses that", "", "chmod o-w")


def _facts(files: FolderFiles, glue: str, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    dtype = next(name for name, code in DTYPE_CODES.items() if code == glue)
    counts = {str(scheme): list(schemes.values()).count(scheme) for scheme in sorted(set(schemes.values()))}
    return {
        "tensors": len(files.tensors),
        "bytes": sum(tensor.nbytes for tensor in files.tensors.values()),
        "float dtype": dtype,
        "layers per scheme": counts,
        "loads in": loads(files.description, dtype, files.config) or ["no known engine version"],
    }
