"""Bounds of the values in config.json, and the keys that the language models of all families have.

A model's constructor takes what it gets: a size of 10**12 allocates that memory, a million blocks take hours. No size
can exceed the largest dimension of the checkpoint's tensors, and each block has tensors of its own.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationInfo
from typing_extensions import TypedDict  # pydantic accepts typing.TypedDict from Python 3.12 on


@dataclass(frozen=True)
class ConfigLimits:
    """Upper bounds of values in config.json, from the tensors of the checkpoint and from other values.

    size: the largest dimension of any tensor; blocks: the number of tensors; last_block: index of the last block of the
    vision tower; last_token: the largest token id; heads: query heads of the language model, 0 if unknown; rotary: half
    the channels of one of them.
    """

    size: int
    blocks: int
    last_block: int
    last_token: int
    heads: int
    rotary: int

    @classmethod
    def of(
        cls, text: Mapping[str, Any], vision: Mapping[str, Any] | None, largest: int, tensors: int
    ) -> "ConfigLimits":
        """Limits for a config that may be invalid.

        text, vision: keys of the language model and of the vision tower; largest: largest dimension of any tensor;
        tensors: their number.
        """
        depth, vocabulary = (vision or {}).get("depth"), text.get("vocab_size")
        heads = text.get("num_attention_heads")
        return cls(
            size=largest,
            blocks=tensors,
            last_block=(int(depth or 0) if is_size(depth, tensors) else tensors) - 1,
            last_token=(int(vocabulary or 0) if is_size(vocabulary, largest) else largest) - 1,
            heads=int(heads or 0) if is_size(heads, 2**31) else 0,
            rotary=head_size(text) // 2,
        )


def is_size(value: Any, maximum: int) -> bool:
    """Whether a value is an integer from 1 to `maximum`."""
    return type(value) is int and 1 <= value <= maximum


def head_size(text: Mapping[str, Any]) -> int:
    """Channels of a head of the language model, from its keys; 0 if they do not determine it."""
    size = text.get("head_dim")
    if is_size(size, 2**31):
        return int(size or 0)
    heads, hidden = text.get("num_attention_heads", 64), text.get("hidden_size")
    return int(hidden or 0) // int(heads) if is_size(heads, 2**31) and is_size(hidden, 2**31) else 0


def _at_most(limit: str, meaning: str) -> AfterValidator:
    def check(value: int, info: ValidationInfo) -> int:
        maximum = getattr(info.context, limit)
        if value > maximum:
            raise ValueError(f"it must be at most {maximum}, {meaning}")
        return value

    return AfterValidator(check)


def _divides_heads(value: int, info: ValidationInfo) -> int:
    heads = getattr(info.context, "heads", 0)
    if heads % value:
        raise ValueError(f"it must divide num_attention_heads, which is {heads}")
    return value


def check_mrope(value: Any, info: ValidationInfo) -> Any:
    sections: Any = value.get("mrope_section") if isinstance(value, dict) else None
    half = getattr(info.context, "rotary", 0)
    are_sizes = isinstance(sections, list) and all(is_size(size, 2**20) for size in sections)
    if not are_sizes or len(sections) != 3 or sum(sections) != half:
        raise ValueError(f"it needs an mrope_section of three integers above 0 whose sum is {half}, half of a head")
    return value


Size = Annotated[int, Field(ge=1), _at_most("size", "the largest dimension of any tensor")]
Blocks = Annotated[int, Field(ge=1), _at_most("blocks", "the number of tensors")]
BlockIndex = Annotated[int, Field(ge=0), _at_most("last_block", "the index of the last block")]
Token = Annotated[int, Field(ge=0), _at_most("last_token", "the last id of the vocabulary")]
Tokens = Token | list[Token] | None
Positions = Annotated[int, Field(ge=1, le=2**31 - 1)]
Deviation = Annotated[float, Field(ge=0, le=1e3)]
Mrope = Annotated[Any, AfterValidator(check_mrope)]  # rope_scaling with sections for time, height and width


class TextConfig(TypedDict, total=False):
    """Keys of a language model."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_attention_heads: Size
    num_key_value_heads: Annotated[Size, AfterValidator(_divides_heads)]
    head_dim: Size | None
    num_hidden_layers: Blocks
    bos_token_id: Tokens
    eos_token_id: Tokens
    pad_token_id: Tokens
    hidden_act: str
    model_type: str
    torch_dtype: str
    dtype: str
    tie_word_embeddings: bool
    use_sliding_window: bool
    use_cache: bool
    rms_norm_eps: Annotated[float, Field(ge=1e-12, le=1e-2)]
    rope_theta: Annotated[float, Field(ge=1, le=1e12)]
    attention_dropout: Annotated[float, Field(ge=0, le=1)]
    initializer_range: Deviation
    max_position_embeddings: Positions
    max_window_layers: Annotated[int, Field(ge=0, le=2**31 - 1)]
    sliding_window: Positions | None
    architectures: list[str]


class ImageTokens(TypedDict, total=False):
    """Ids of the tokens that stand for images."""

    image_token_id: Token
    video_token_id: Token
    vision_start_token_id: Token
    vision_end_token_id: Token
    vision_token_id: Token


# Keys whose null transformers and vLLM read as if the key were missing.
NULL_IS_MISSING = frozenset({
    "architectures", "attention_bias", "attention_dropout", "dtype", "initializer_range", "max_window_layers",
    "model_type", "quantization_config", "rope_parameters", "rope_scaling", "text_config", "tie_word_embeddings",
    "torch_dtype", "use_cache", "use_sliding_window",
})  # fmt: skip


def without_nulls(config: Mapping[str, Any], objects: Iterable[str]) -> dict[str, Any]:
    """config.json without keys whose null means a missing key. A null of `num_key_value_heads` means that there are as
    many as query heads, and is replaced.

    objects: keys whose values are objects, in which nulls mean the same.
    """
    values = {key: value for key, value in config.items() if value is not None or key not in NULL_IS_MISSING}
    if "num_key_value_heads" in values and values["num_key_value_heads"] is None and "num_attention_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
    nested = {key: without_nulls(values[key], ()) for key in objects if isinstance(values.get(key), Mapping)}
    return values | nested


def rope_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces `rope_parameters`, which transformers 5 writes, by the keys of earlier versions.

    These are `rope_theta` and, unless the rotary embedding is the plain one, `rope_scaling`. Keys of a language model
    without `rope_parameters` are returned unchanged. Beside `rope_scaling`, which every version reads, it is left out.
    """
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, Mapping):
        return dict(config)
    keys = {key: value for key, value in config.items() if key != "rope_parameters"}
    if keys.get("rope_scaling"):
        return keys
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    if "rope_theta" in parameters:
        keys["rope_theta"] = parameters["rope_theta"]
    if scaling not in ({}, {"rope_type": "default"}):
        keys["rope_scaling"] = scaling
    return keys
