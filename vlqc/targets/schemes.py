"""The quantization schemes: how one Linear is stored and run."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Scheme(StrEnum):
    """How one Linear is stored and run; the values are those of quant_model_description.json."""

    FLOAT = "FLOAT"
    W8A8 = "W8A8"  # int8 weight per output channel, int8 activation per tensor with stored scale and offset
    W8A8_DYNAMIC = "W8A8_DYNAMIC"  # int8 weight per output channel, int8 activation per token
    W4A8_DYNAMIC = "W4A8_DYNAMIC"  # int4 weight per group, int8 activation per token


@dataclass(frozen=True)
class SchemeSpec:
    """Facts of a scheme that do not depend on an engine.

    substitute: the scheme for layers on which an engine does not run this one, tried before FLOAT; alternatives: what
    the precision search may choose in its place, in this order; grouped: whether `group_size` columns share a weight
    scale; output_multiple: of which the number of outputs must be a multiple.
    """

    substitute: Scheme | None = None
    alternatives: tuple[Scheme, ...] = ()
    grouped: bool = False
    output_multiple: int = 1


SPECS: dict[Scheme, SchemeSpec] = {
    Scheme.FLOAT: SchemeSpec(),
    Scheme.W8A8: SchemeSpec(alternatives=(Scheme.W8A8_DYNAMIC, Scheme.FLOAT)),
    Scheme.W8A8_DYNAMIC: SchemeSpec(alternatives=(Scheme.FLOAT,)),
    Scheme.W4A8_DYNAMIC: SchemeSpec(
        substitute=Scheme.W8A8_DYNAMIC,
        alternatives=(Scheme.W8A8_DYNAMIC, Scheme.FLOAT),
        grouped=True,
        output_multiple=8,  # vLLM Ascend's int4 operator reads eight outputs at a time
    ),
}

# A folder of several schemes is named after the first of these that occurs in it.
NAMING_ORDER = (Scheme.W4A8_DYNAMIC, Scheme.W8A8, Scheme.W8A8_DYNAMIC)


def quant_type(schemes: Iterable[Scheme]) -> Scheme:
    """Schemes of a folder's layers -> the one that names its files and is its model_quant_type; FLOAT if none is
    quantized."""
    present = set(schemes)
    return next((scheme for scheme in NAMING_ORDER if scheme in present), Scheme.FLOAT)
