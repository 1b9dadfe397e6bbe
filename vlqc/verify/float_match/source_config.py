"""Compares config.json of a compiled folder with that of its float checkpoint, in every key that a model depends on.

Both are read by `ModelFamily.config_meaning`, and not by the code that converts the one into the other. A key may
differ only where the compiler or an engine is known to change it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlqc.families.config_meaning import PARAMETERS, TIE
from vlqc.families.family import ModelFamily
from vlqc.families.registry import find_family
from vlqc.targets.target import ENGINES
from vlqc.verify.findings import VerificationResult
from vlqc.verify.folder.reader import read_json_object
from vlqc.verify.structure.structure import CompiledFolder

CHECK = "float config"
CONFIG = "config.json"
CLASSES = "architectures"
LONGEST = 80  # characters of a value in a message
QUANTIZATION_KEYS = {key for engine in ENGINES for key in engine.quantization_keys}


def check_config_against_source(folder: CompiledFolder, model_path: Path, result: VerificationResult) -> None:
    """Adds a fault for every key of config.json that says something else than the float checkpoint's."""
    family = find_family(folder.files.config)
    if family is None:
        return  # a fault already
    content, error = read_json_object(model_path / CONFIG)
    if content is None:
        where = str(model_path / CONFIG)
        result.add_warning(CHECK, where, f"{CONFIG} of the float checkpoint {error}", "the folder's is not compared")
        return
    own, source = (_meaning(family, config) for config in (folder.files.config, content))
    own[CLASSES] = folder.files.config.get(CLASSES)
    source[CLASSES] = content.get(CLASSES) or [family.architectures[0]]  # which the folder must say
    if source.get(TIE) and not own.get(TIE) and f"{family.output_head}.weight" in folder.valid_tensors:
        own[TIE] = True  # the head has got a weight of its own, which is compared with the embedding
    keys = {key: None for key in (*source, *own) if key in source or key in own}
    result.add_examined(CHECK, len(keys))
    for key in keys:
        if key.startswith(f"{PARAMETERS}.") and key not in own:
            continue  # the source contradicts itself; the other form counts, see `config_meaning`
        stored, expected = own.get(key), source.get(key)
        if not same_value(stored, expected):
            what = f"{key} is {value_text(stored)}; the float checkpoint has {value_text(expected)}"
            why = "outputs, tokens or images of the model depend on it"
            result.add_fault(CHECK, CONFIG, what, why, "restore the float checkpoint's value, or compile again")


def _meaning(family: ModelFamily, config: Mapping[str, Any]) -> dict[str, Any]:
    meaning = family.config_meaning(config)
    return {key: value for key, value in meaning.items() if not _is_of_quantization(key)}


def _is_of_quantization(key: str) -> bool:
    return any(key == known or key.startswith(f"{known}.") for known in QUANTIZATION_KEYS)


def same_value(first: Any, second: Any) -> bool:
    """Equality of JSON values: 1 and 1.0 are equal, 1 and true are not."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same_value, first, second))
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(same_value(first[key], second[key]) for key in first)
    return bool(first == second)


def value_text(value: Any) -> str:
    text = "none" if value is None else repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
