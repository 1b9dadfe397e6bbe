"""The key-value caches of a model: which attention modules have one, and how a folder states their schemes."""

from collections.abc import Iterable, Mapping
from typing import Any

from vlqc.families.family import ModelFamily
from vlqc.families.layer_names import matches_any
from vlqc.targets.cache_schemes import CacheScheme
from vlqc.targets.schemes import Scheme

TensorScheme = Scheme | CacheScheme  # of a tensor in a folder
CacheSchemes = Mapping[str, CacheScheme | None]  # attention module of a decoder layer -> scheme; None: in float


def tensor_scheme(name: str) -> TensorScheme:
    """The scheme of a tensor by its name in quant_model_description.json. Raises ValueError for an unknown name."""
    return CacheScheme(name) if name in tuple(CacheScheme) else Scheme(name)


def projections(family: ModelFamily, layers: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Linear layers of a model -> key and value projection of every decoder layer, by the name of the attention
    module."""
    if not family.key_value:
        return {}
    key, value = family.key_value
    known = dict.fromkeys(layers)
    pairs = {}
    for layer in known:
        if matches_any(layer, [key]):
            attention = layer.rpartition(".")[0]
            pairs[attention] = (layer, f"{attention}.{value.rpartition('.')[2]}")
    return {attention: pair for attention, pair in pairs.items() if pair[1] in known}


def cache_tensors(pair: tuple[str, str], scheme: CacheScheme) -> dict[str, tuple[str, str]]:
    """Key and value projection -> names of the tensors of their cache -> (projection, suffix)."""
    return {f"{layer}.{spec.suffix}": (layer, spec.suffix) for layer in pair for spec in scheme.spec.stored}


def stated_scheme(pair: tuple[str, str], names: Iterable[str]) -> CacheScheme | None:
    """The scheme of which one of the tensors is among these names; None without any."""
    present = set(names)
    return next((scheme for scheme in CacheScheme if present & cache_tensors(pair, scheme).keys()), None)


def described_caches(family: ModelFamily, description: Mapping[str, Any]) -> dict[str, CacheScheme | None]:
    """Description of a folder (tensor name -> scheme) -> scheme of the cache of every decoder layer."""
    layers = [name.removesuffix(".weight") for name in description if name.endswith(".weight")]
    entries = description.keys()
    return {attention: stated_scheme(pair, entries) for attention, pair in projections(family, layers).items()}


def used_schemes(caches: CacheSchemes) -> list[CacheScheme]:
    """The schemes that occur, in the order of `CacheScheme`."""
    return [scheme for scheme in CacheScheme if scheme in caches.values()]


def describe_caches(caches: CacheSchemes) -> str:
    """How many layers have a quantized cache, such as "int8 in 27 of 28 layers"; empty if none has."""
    counts = [
        f"{scheme.spec.option} in {list(caches.values()).count(scheme)} of {len(caches)} layers"
        for scheme in used_schemes(caches)
    ]
    return ", ".join(counts)


def bytes_per_token(channels: int, item_bytes: float) -> int:
    """Bytes of the keys and values of one token in one layer. channels: key-value heads * head size."""
    return round(2 * channels * item_bytes)
