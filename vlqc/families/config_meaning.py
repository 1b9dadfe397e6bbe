"""What config.json says of a model, in one form for all versions of transformers: files that mean the same are equal.

`verify` compares a compiled folder with its float checkpoint by it. It shares no code with `ModelFamily.engine_config`,
which converts the one into the other, so that a mistake there is not repeated here.

transformers from 4.52 on, and vLLM, build the language model from `text_config` alone where that is an object. Keys of
the language model that stand at the top level beside it are not read.
"""

from collections.abc import Mapping
from typing import Any

from vlqc.families.config_values import ImageTokens, TextConfig

TEXT, LAYER_TYPES, ROPE, PARAMETERS = "text_config", "layer_types", "rope_scaling", "rope_parameters"
TIE, HEADS, KEY_VALUE_HEADS = "tie_word_embeddings", "num_attention_heads", "num_key_value_heads"
SLIDING, FULL = "sliding_attention", "full_attention"  # values of `layer_types`
DTYPES = frozenset({"dtype", "torch_dtype"})  # of the stored tensors, which the compiler may convert
# Not of the model: who wrote the file, and which class it describes.
ABOUT_THE_FILE = frozenset({"transformers_version", "_name_or_path"})
ABOUT_TEXT = frozenset({"model_type", "architectures", *DTYPES, *ABOUT_THE_FILE, *ImageTokens.__annotations__})
NOT_IN_OBJECTS = DTYPES | {"model_type"}  # versions of transformers name the vision tower differently
SPECIAL_TOKENS = frozenset({"bos_token_id", "eos_token_id", "pad_token_id"})  # read at either level
OF_LANGUAGE = TextConfig.__annotations__.keys() | {"rope_theta", ROPE, PARAMETERS, LAYER_TYPES, "attention_bias"}
ONLY_IN_TEXT = frozenset(OF_LANGUAGE - ABOUT_TEXT - SPECIAL_TOKENS - {TIE})


def config_meaning(config: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """The keys of config.json by dotted name, those of `text_config` without prefix, and their values.

    A missing key and null are the same, and so are a default that every class has and a missing key. Not among them are
    keys that say nothing of what the model computes: dtypes, and who wrote the file.

    renamed: key in newer versions of transformers -> in older ones.
    """
    keys = _language_keys(config) if isinstance(config.get(TEXT), Mapping) else dict(config)
    if keys.get(KEY_VALUE_HEADS, 0) is None:  # as many as query heads; a missing key has another default
        keys[KEY_VALUE_HEADS] = keys.get(HEADS)
    keys = {key: value for key, value in keys.items() if value is not None}
    keys = {older: keys.pop(newer) for newer, older in renamed.items() if newer in keys} | keys
    keys = {key: value for key, value in keys.items() if key not in DTYPES | ABOUT_THE_FILE}
    keys[TIE] = bool(keys.get(TIE))
    flat: dict[str, Any] = {}
    for key, value in (_without_rope(keys) | _rope(keys)).items():
        if isinstance(value, Mapping):
            inner = {name: each for name, each in value.items() if each is not None and name not in NOT_IN_OBJECTS}
            flat |= {f"{key}.{name}": each for name, each in inner.items()}
        else:
            flat[key] = value
    return _windows(flat)


def _language_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config with `text_config`, all at one level."""
    text = {key: value for key, value in config[TEXT].items() if key not in ABOUT_TEXT}
    top = {key: value for key, value in config.items() if key != TEXT and key not in ONLY_IN_TEXT}
    kept = {key: value for key, value in text.items() if value is not None or key == KEY_VALUE_HEADS or key not in top}
    return top | kept


def _without_rope(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if key not in ("rope_theta", ROPE, PARAMETERS)}


def _rope(keys: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, the latter without its default type.

    Where two forms contradict each other, which versions of transformers read differently, also `rope_parameters`.
    """
    older = _scaling(keys.get(ROPE), keys.get("rope_theta"))
    newer = _scaling(keys.get(PARAMETERS), keys.get("rope_theta"))
    if PARAMETERS not in keys or newer == older:
        return older
    if ROPE in keys:
        return older | {PARAMETERS: newer}
    return newer | ({PARAMETERS: newer} if "rope_theta" in keys else {})


def _scaling(value: Any, theta: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {} if theta is None else {"rope_theta": theta}
    scaling = {key: each for key, each in value.items() if each is not None and key not in ("type", "rope_type")}
    kind = value.get("rope_type") or value.get("type") or "default"
    if kind not in ("default", "mrope"):  # sections alone make it multimodal
        scaling["rope_type"] = kind
    theta = scaling.pop("rope_theta", theta)
    return ({} if theta is None else {"rope_theta": theta}) | ({ROPE: scaling} if scaling else {})


def _windows(keys: dict[str, Any]) -> dict[str, Any]:
    """Keys of sliding attention only where it is used, with the layers that have it. `layer_types` also where it is no
    list of as many layers as the model has."""
    window, layers = keys.get("sliding_window"), keys.get("num_hidden_layers")
    is_used = bool(keys.get("use_sliding_window")) and window is not None
    types = keys.get(LAYER_TYPES)
    if types is None and is_used and isinstance(layers, int) and isinstance(keys.get("max_window_layers"), int):
        first = keys["max_window_layers"]
        types = [FULL if number < first else SLIDING for number in range(layers)]
    is_plain = types is None or (isinstance(types, list) and len(types) == layers and set(map(str, types)) == {FULL})
    left_out = (LAYER_TYPES, "sliding_window", *(() if is_used else ("use_sliding_window", "max_window_layers")))
    rest = {key: value for key, value in keys.items() if key not in left_out}
    if is_used or not is_plain:
        rest |= {key: value for key, value in (("sliding_window", window), (LAYER_TYPES, types)) if value is not None}
    return rest
