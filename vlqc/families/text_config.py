"""Which value counts where config.json has keys of the language model at the top level and in `text_config`.

transformers builds the language model from `text_config` alone from version 4.52 on, and so does vLLM. What stands at
the top level beside it is a leftover: those versions write the values from which a config was first read there, and
`resize_token_embeddings`, for instance, changes those of `text_config`. A key that `text_config` lacks has the default
of its class, whatever the top level says.

Two kinds of keys are read at the top level: the ids of the image tokens, and `tie_word_embeddings` where `text_config`
lacks it (transformers 5 writes it there only).
"""

from collections.abc import Collection, Mapping
from typing import Any

from vlqc.families.config_values import ImageTokens, TextConfig

TEXT = "text_config"
TIE = "tie_word_embeddings"
FULL, SLIDING = "full_attention", "sliding_attention"  # values of `layer_types`
# Keys of `text_config` that describe it, not the model.
OF_THE_OBJECT = frozenset({"model_type", "dtype", "torch_dtype", "layer_types", "architectures"})
READ_AT_THE_TOP = OF_THE_OBJECT | ImageTokens.__annotations__.keys()
# The ids of other tokens are not part of the arithmetic: they are kept at the level at which they stand.
TOKENS = frozenset({"bos_token_id", "eos_token_id", "pad_token_id"})
ROTARY = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})
READ_IN_TEXT = (TextConfig.__annotations__.keys() | ROTARY | {"attention_bias"}) - READ_AT_THE_TOP - TOKENS - {TIE}


def nested_text(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """`text_config`; None if it is missing, null or not an object."""
    text = config.get(TEXT)
    return text if isinstance(text, Mapping) else None


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output head shares the embedding's weight: the key in `text_config`, else that at the top level."""
    inner = (nested_text(config) or {}).get(TIE)
    return bool(config.get(TIE) if inner is None else inner)


def tie_faults(config: Mapping[str, Any], names: Collection[str], head: str) -> list[tuple[str, str]]:
    """What the two levels and the stored tensors say differently about the tie, and what to change; [] if nothing.

    A tie of `text_config` against the top level is read as it is if the stored tensors agree. transformers 5 writes a
    tie at the top level only, where transformers 4 and the engines do not read it: then no head may be stored.

    names: of the stored tensors; head: the output head.
    """
    text, top = nested_text(config), config.get(TIE)
    if text is None or top is None or bool(top) == bool(text.get(TIE)):
        return []
    is_stored = f"{head}.weight" in names
    if is_stored != is_tied(config):
        return []
    inner = "text_config lacks it" if text.get(TIE) is None else f"{_word(text[TIE])} in text_config"
    stored = "stored" if is_stored else "missing"
    why = f"{TIE} is {_word(top)} at the top level, {inner}, and {head}.weight is {stored}"
    return [(why, f"set {TIE} to {_word(not is_stored)} at both levels, as the stored tensors are")]


def layer_type_faults(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What `layer_types` says differently from the keys from which it follows, and what to change; [] if nothing.

    Versions of transformers before 4.53 and engines do not read it. config: as it is stored.
    """
    keys = nested_text(config) or config
    types, layers = keys.get("layer_types"), keys.get("num_hidden_layers")
    if types is None or not isinstance(layers, int):
        return []
    first = keys.get("max_window_layers")
    is_used = keys.get("use_sliding_window") and keys.get("sliding_window") is not None and isinstance(first, int)
    full = min(int(first or 0), layers) if is_used else layers
    is_list = isinstance(types, list) and len(types) == layers
    if is_list and all((kind == FULL) == (i < full) and kind in (FULL, SLIDING) for i, kind in enumerate(types)):
        return []
    why = "layer_types is not what follows from num_hidden_layers, use_sliding_window and max_window_layers"
    return [(why, "change one of them: engines and versions of transformers read one or the other")]


def flat_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without `text_config`: its keys at the top level, with the values that count."""
    text = nested_text(config)
    if text is None:
        return dict(config)
    flat = {key: value for key, value in config.items() if key != TEXT and key not in READ_IN_TEXT}
    flat |= {key: value for key, value in text.items() if key not in READ_AT_THE_TOP}
    return flat | _unused_window(config, text)


def corrected_top_level(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with `text_config`, whose keys at the top level have the values that count."""
    text = nested_text(config) or {}
    config = {key: value for key, value in config.items() if key not in READ_IN_TEXT or key in text}
    return config | {key: text[key] for key in config.keys() & text.keys() & (READ_IN_TEXT | {TIE})}


def _unused_window(config: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """`sliding_window` of the top level, where `text_config` has null for it because nothing uses it."""
    key, is_used = "sliding_window", bool(text.get("use_sliding_window"))
    return {key: config[key]} if key in config and text.get(key) is None and not is_used else {}


def _word(value: Any) -> str:
    return str(bool(value)).lower()
