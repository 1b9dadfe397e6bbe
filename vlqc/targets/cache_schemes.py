"""The schemes of a quantized key-value cache: how the keys and values of a decoder layer are stored and read.

A scheme is one row of `CacheScheme`. Its tensors are stored beside the weights of the key and value projections of
every layer whose cache is quantized.
"""

from dataclasses import dataclass
from enum import StrEnum

from vlqc.families.linear import Linear, Shape
from vlqc.targets.schemes import StorageFormat, TensorSpec


def _per_channel(projection: Linear, _: StorageFormat) -> Shape:
    return (projection.outputs,)


@dataclass(frozen=True)
class CacheSpec:
    """Facts of a cache scheme that do not depend on an engine.

    Keys after the rotary embedding and values are integers q = clamp(rint(x / scale + offset), smallest, largest), with
    a scale and an offset per channel of every key-value head, the same for all tokens.

    name: in quant_model_description.json; option: value of `--kv_cache`; bits: of one value; stored: the tensors of a
    key or value projection, [channels] with channels = key-value heads * head dimension.
    """

    name: str
    option: str
    bits: int
    smallest: int
    largest: int
    stored: tuple[TensorSpec, ...]


class CacheScheme(StrEnum):
    """How keys and values are cached. The value is the name in quant_model_description.json; the row is `spec`.

    `CacheScheme("C8")` returns a scheme by name. Raises ValueError for a name that does not exist.
    """

    spec: CacheSpec

    def __new__(cls, spec: CacheSpec | str) -> "CacheScheme":  # str: type checkers compare CacheScheme("C8") with this
        assert isinstance(spec, CacheSpec)
        member = str.__new__(cls, spec.name)
        member._value_, member.spec = spec.name, spec
        return member

    C8 = CacheSpec(
        "C8",
        option="int8",
        bits=8,
        smallest=-128,
        largest=127,
        stored=(
            TensorSpec("kv_cache_scale", ("F32",), _per_channel),
            TensorSpec("kv_cache_offset", ("F32",), _per_channel),  # zeros: engines ignore it in decoding
        ),
    )


def cache_scheme_of_option(option: str) -> CacheScheme | None:
    """The scheme of a value of `--kv_cache`; None if no scheme has it, as for a cache in float."""
    return next((scheme for scheme in CacheScheme if scheme.spec.option == option), None)
