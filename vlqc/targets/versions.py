"""Which versions of an engine load an assignment of schemes, or a finished folder."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vlqc.targets.engines import group_faults
from vlqc.targets.rules import FLOAT_SINCE, NAMING_ORDER, TABLE, Scheme, matches
from vlqc.targets.target import ENGINE_TITLES, VLLM_ASCEND, Version


@dataclass(frozen=True)
class Span:
    """Versions of one engine, from `since` to `until` (None: no known end)."""

    engine: str
    since: str
    until: str | None = None

    def __str__(self) -> str:
        return f"{ENGINE_TITLES[self.engine]} {self.since} " + (f"to {self.until}" if self.until else "and later")

    def covers(self, version: str) -> bool:
        place = Version.parse(version)
        return Version.parse(self.since) <= place and (self.until is None or place <= Version.parse(self.until))


def span(engine: str, schemes: Mapping[str, Scheme], dtype: str) -> Span | None:
    """The versions of the engine in which every (layer, scheme) is legal; None when there is none."""
    since, until = FLOAT_SINCE[engine], None
    for layer, scheme in schemes.items():
        if scheme == Scheme.FLOAT:
            continue
        rule = next(
            (r for r in TABLE if r.scheme == scheme and r.holds(engine, None, dtype) and matches(layer, r.layers)),
            None,
        )
        if rule is None:
            return None
        since = max(since, rule.since, key=Version.parse)
        until = min(filter(None, (until, rule.until)), key=Version.parse, default=None)
    return None if until and Version.parse(until) < Version.parse(since) else Span(engine, since, until)


def loads(description: Mapping[str, Any], dtype: str, config: Mapping[str, Any]) -> list[str]:
    """Which engines load a finished folder, in words, e.g. ["vLLM Ascend 0.10.2rc2 and later"]; [] when none does.

    description: quant_model_description*.json (tensor name -> scheme); dtype: "bfloat16" or "float16";
    config: config.json.
    """
    schemes = layer_schemes(description)
    spans = (loading_span(engine, schemes, dtype, config) for engine in ENGINE_TITLES)
    return [str(found) for found in spans if found is not None]


def loading_span(engine: str, schemes: Mapping[str, Scheme], dtype: str, config: Mapping[str, Any]) -> Span | None:
    """The versions of one engine that load a folder of these schemes with this config.json; None when none does."""
    if not _reads_config(engine, schemes, config) or group_faults(engine, schemes):
        return None
    return span(engine, schemes, dtype)


def layer_schemes(description: Mapping[str, Any]) -> dict[str, Scheme]:
    """Description (tensor name -> scheme word) -> scheme per layer, from the entries that end in `.weight`.

    A norm that MindIE's layout repeats as `X.module.weight`, marked with the folder's type, counts once, as FLOAT.
    """
    words = {str(scheme) for scheme in Scheme}
    return {
        name.removesuffix(".weight"): Scheme(word)
        for name, word in description.items()
        if name.endswith(".weight") and not name.endswith(".module.weight") and word in words
    }


def folder_type(schemes: Iterable[Scheme]) -> Scheme:
    """Schemes that occur -> the one that names files and model_quant_type; FLOAT when nothing is quantized."""
    found = set(schemes)
    return next((scheme for scheme in NAMING_ORDER if scheme in found), Scheme.FLOAT)


def _reads_config(engine: str, schemes: Mapping[str, Scheme], config: Mapping[str, Any]) -> bool:
    """Whether the engine, given this config.json, treats the folder as quantized in the way it is."""
    if engine == VLLM_ASCEND:
        return "quantization_config" not in config  # vLLM would read that key instead of the description
    vision_config = config.get("vision_config")
    vision_key = vision_config.get("quantize") if isinstance(vision_config, Mapping) else None
    vision_quantized = any(name.startswith("visual.") and scheme != Scheme.FLOAT for name, scheme in schemes.items())
    quantize = folder_type(schemes.values()).lower()
    return "text_config" not in config and config.get("quantize") == quantize and vision_quantized == bool(vision_key)
