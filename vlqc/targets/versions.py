"""Which versions of an engine load an assignment of schemes, or a finished folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from packaging.version import Version

from vlqc.families.family import ModelFamily
from vlqc.families.registry import find_family
from vlqc.targets.engine import Engine
from vlqc.targets.rules import group_faults
from vlqc.targets.schemes import Scheme
from vlqc.targets.target import ENGINES


@dataclass(frozen=True)
class VersionRange:
    """Versions of one engine, from `since` on and below `before` (None: no known end)."""

    engine: Engine
    since: str
    before: str | None = None

    def __str__(self) -> str:
        return f"{self.engine.title} {self.since} and later" + (f", before {self.before}" if self.before else "")

    def __contains__(self, version: str) -> bool:
        parsed = Version(version)
        return Version(self.since) <= parsed and (self.before is None or parsed < Version(self.before))


def supporting_versions(
    engine: Engine, family: ModelFamily, schemes: Mapping[str, Scheme], dtype: str
) -> VersionRange | None:
    """The versions of the engine that run every (layer, scheme); None when there is none."""
    since, before = engine.since, None
    for layer, scheme in schemes.items():
        if not scheme.is_quantized:
            continue
        rules = (rule for rule in engine.rules_of(family) if rule.scheme == scheme and rule.applies(None, dtype))
        rule = next((rule for rule in rules if family.role(layer) in rule.roles), None)
        if rule is None:
            return None
        since = max(since, rule.since, key=Version)
        before = min(filter(None, (before, rule.before)), key=Version, default=None)
    return None if before and Version(before) <= Version(since) else VersionRange(engine, since, before)


def loading_versions(
    engine: Engine, family: ModelFamily, schemes: Mapping[str, Scheme], dtype: str, config: Mapping[str, Any]
) -> VersionRange | None:
    """The versions of one engine that load a folder of these schemes with this config.json; None when none does."""
    if not engine.reads_config(family, schemes, config) or group_faults(engine, family, schemes):
        return None
    return supporting_versions(engine, family, schemes, dtype)


def loading_engines(description: Mapping[str, Any], dtype: str, config: Mapping[str, Any]) -> list[str]:
    """The engines that load a finished folder, as text, e.g. ["vLLM Ascend 0.10.2rc2 and later"]; [] when none does.

    description: quant_model_description*.json (tensor name -> scheme); dtype: "bfloat16" or "float16";
    config: config.json.
    """
    family, schemes = find_family(config), layer_schemes(description)
    if family is None:
        return []
    ranges = (loading_versions(engine, family, schemes, dtype, config) for engine in ENGINES)
    return [str(versions) for versions in ranges if versions is not None]


def layer_schemes(description: Mapping[str, Any]) -> dict[str, Scheme]:
    """Description (tensor name -> scheme) -> scheme per layer, from the entries that end in `.weight`.

    A norm that MindIE's layout repeats as `X.module.weight`, listed with the folder's type, counts once, as FLOAT.
    """
    values = {str(scheme) for scheme in Scheme}
    copies = tuple(f".{engine.norm_copies}.weight" for engine in ENGINES if engine.norm_copies)
    return {
        name.removesuffix(".weight"): Scheme(value)
        for name, value in description.items()
        if name.endswith(".weight") and not name.endswith(copies) and value in values
    }
