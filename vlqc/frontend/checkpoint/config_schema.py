"""What the values of config.json may be: checked before a model is built of them.

A model's constructor takes what it is given: a size of 10**12 asks the system for that memory, a million blocks take
hours, a word where a number belongs fails somewhere inside, or is taken for true. No size can be larger than the
largest dimension of the tensors, and each block has tensors of its own.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vlqc.errors import Fault

DEEPEST = 64  # levels of lists and objects
LARGEST_WINDOW = 2**15  # pixels; 112 in every published model. The model pads its pictures to the square of that
REPAIR = "take config.json from the float model again"
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
# What the model takes for sizes that are left out, where that is large.
DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "rope_scaling": None,
}
VISION_SIZES = (
    "hidden_size", "intermediate_size", "num_heads", "in_channels", "in_chans", "patch_size", "spatial_patch_size",
    "spatial_merge_size", "temporal_patch_size", "out_hidden_size", "tokens_per_second",
)  # fmt: skip
TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")
MANY_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # one, several or none
WORDS = ("hidden_act", "model_type", "torch_dtype", "dtype")
SWITCHES = ("tie_word_embeddings", "use_sliding_window", "use_cache")


@dataclass(frozen=True)
class Kind:
    """What a value may be, in words, and whether one is."""

    wanted: str
    holds: Callable[[Any], bool]


def is_whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def whole(least: int, most: int, why: str = "") -> Kind:
    return Kind(f"a whole number from {least} to {most}{why}", lambda it: is_whole(it, least, most))


def number(least: float, most: float) -> Kind:
    return Kind(f"a number from {least:g} to {most:g}", lambda it: type(it) in (int, float) and least <= it <= most)


def optional(kind: Kind) -> Kind:
    return Kind(f"{kind.wanted}, or null", lambda it: it is None or kind.holds(it))


def several(kind: Kind) -> Kind:
    return Kind(f"a list, each {kind.wanted}", lambda it: isinstance(it, list) and all(map(kind.holds, it)))


SWITCH = Kind("true or false", lambda it: type(it) is bool)
WORD = Kind("text", lambda it: isinstance(it, str))
OBJECT = Kind("an object", lambda it: isinstance(it, dict))


def config_faults(config: Mapping[str, Any], where: str, largest: int, tensors: int) -> list[Fault]:
    """Every value of a flat config.json that cannot be meant; keys that are not there, or not known, are none.

    largest: the largest dimension of any tensor; tensors: how many there are.
    """
    said, config = config, {**DEFAULTS, **config}
    vision = config.get("vision_config")
    vision = vision if isinstance(vision, dict) else {}
    of_text, of_vision = _kinds(config, vision, largest, tensors)
    faults = [] if _depth(config) <= DEEPEST else [Fault("config.json is nested too deeply", where, fix=REPAIR)]
    for part, values, kinds in (("", config, of_text), ("vision_config.", vision, of_vision)):
        for key, kind in kinds.items():
            if key in values and not kind.holds(values[key]):
                found = repr(values[key])
                shown = found if len(found) <= 60 else f"{found[:60]}..."
                verb = "is left out, which means" if not part and key not in said else "is"
                faults.append(Fault(f"{part}{key} {verb} {shown}", where, f"{kind.wanted} is wanted", REPAIR))
    return faults


def _kinds(
    config: Mapping[str, Any], vision: Mapping[str, Any], largest: int, tensors: int
) -> tuple[dict[str, Kind], dict[str, Kind]]:
    """By key what it may be: of the whole or the language model, and of the vision tower."""
    size = whole(1, largest, ", the largest dimension of any tensor")
    blocks = whole(1, tensors, ", the number of tensors")
    vocabulary = config["vocab_size"] if is_whole(config["vocab_size"], 1, largest) else largest
    depth = vision["depth"] if is_whole(vision.get("depth"), 1, tensors) else tensors
    token, block = whole(0, vocabulary - 1, ", below vocab_size"), whole(0, depth - 1, ", below depth")
    tokens = Kind(
        "a token id, a list of them, or null", lambda it: it is None or token.holds(it) or several(token).holds(it)
    )
    half = _head_size(config) // 2
    scaling = Kind(
        f"an object with an mrope_section of three whole numbers above 0 that add up to {half}, half of a head",
        lambda it: _is_scaling(it, half),
    )
    of_text = {
        **dict.fromkeys(SIZES, size),
        "head_dim": optional(size),
        "num_hidden_layers": blocks,
        **dict.fromkeys(TOKENS, token),
        **dict.fromkeys(MANY_TOKENS, tokens),
        **dict.fromkeys(WORDS, WORD),
        **dict.fromkeys(SWITCHES, SWITCH),
        "rms_norm_eps": number(1e-12, 1e-2),
        "rope_theta": number(1, 1e12),
        "attention_dropout": number(0, 1),
        "initializer_range": number(0, 1e3),
        "max_position_embeddings": whole(1, 2**31 - 1),
        "max_window_layers": whole(0, 2**31 - 1),
        "sliding_window": optional(whole(1, 2**31 - 1)),
        "rope_scaling": scaling,
        "vision_config": OBJECT,
        "architectures": several(WORD),
    }
    of_vision = {
        **dict.fromkeys(VISION_SIZES, size),
        "depth": blocks,
        **dict.fromkeys(WORDS, WORD),
        "window_size": whole(1, LARGEST_WINDOW),
        "fullatt_block_indexes": several(block),
        "initializer_range": number(0, 1e3),
    }
    return of_text, of_vision


def _head_size(config: Mapping[str, Any]) -> int:
    """Channels of one head of the language model; 0 where config.json does not say it."""
    heads, hidden = config.get("num_attention_heads", 64), config["hidden_size"]
    size: Any = config.get("head_dim")
    if not is_whole(size, 1, 2**31):
        size = hidden // heads if is_whole(heads, 1, 2**31) and is_whole(hidden, 1, 2**31) else 0
    return int(size)


def _is_scaling(value: Any, half: int) -> bool:
    sections: Any = value.get("mrope_section") if isinstance(value, dict) else None
    if not isinstance(sections, list) or len(sections) != 3:
        return False
    return all(is_whole(it, 1, 2**20) for it in sections) and sum(sections) == half


def _depth(value: Any) -> int:
    """How many levels of lists and objects a value has; no deeper than is asked for."""
    deepest, waiting = 0, [(value, 0)]
    while waiting and deepest <= DEEPEST:
        held, level = waiting.pop()
        deepest = max(deepest, level)
        waiting += [(inner, level + 1) for inner in _inner(held)]
    return deepest


def _inner(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value
