"""Which versions of an engine load an assignment of schemes, or a finished folder."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from packaging.version import Version

from vlqc.errors import Fault
from vlqc.families.family import ModelFamily
from vlqc.families.registry import find_family
from vlqc.targets.caches import CacheSchemes, described_caches, used_schemes
from vlqc.targets.engine import Engine
from vlqc.targets.rules import group_faults
from vlqc.targets.schemes import Scheme
from vlqc.targets.target import ENGINES

Range = tuple[str, str | None]  # the first version, and the first one after it that is outside (None: no known end)


@dataclass(frozen=True)
class VersionRange:
    """Versions of one engine: one range or several, the earliest first, that do not touch."""

    engine: Engine
    ranges: tuple[Range, ...]

    def __str__(self) -> str:
        if len(self.ranges) == 1:
            since, before = self.ranges[0]
            return f"{self.engine.title} {since} and later" + (f", before {before}" if before else "")
        texts = (f"{since} to before {before}" if before else f"{since} and later" for since, before in self.ranges)
        return f"{self.engine.title} {', '.join(texts)}"

    def __contains__(self, version: str) -> bool:
        parsed = Version(version)
        return any(Version(since) <= parsed and _is_before(parsed, before) for since, before in self.ranges)

    @property
    def is_open(self) -> bool:
        """Whether all versions from the first one on belong to it."""
        return len(self.ranges) == 1 and self.ranges[0][1] is None

    @property
    def since(self) -> str:
        return self.ranges[0][0]


def supporting_versions(
    engine: Engine,
    family: ModelFamily,
    schemes: Mapping[str, Scheme],
    dtype: str,
    caches: CacheSchemes | None = None,
    head_size: int = 0,
) -> VersionRange | None:
    """The versions of the engine that run every (layer, scheme), and cache keys and values as in `caches` (None: in
    float); None when there is none. head_size: channels of a head of keys and values, 0 if it is not known."""
    first = engine.first_version(family)
    ranges: list[Range] = [] if first is None else [(first, None)]
    for scheme, role in {(scheme, family.role(layer)) for layer, scheme in schemes.items() if scheme.is_quantized}:
        rules = (rule for rule in engine.rules_of(family) if rule.scheme == scheme and rule.applies(None, dtype))
        runs = [(rule.since, rule.before) for rule in rules if role in rule.roles]
        ranges = [both for pair in product(ranges, runs) if (both := _intersection(*pair)) is not None]
    for cache_scheme in used_schemes(caches or {}):
        runs = [
            (rule.since, rule.before)
            for rule in engine.cache_rules_of(family, head_size)
            if rule.scheme == cache_scheme and dtype in rule.dtypes
            if not rule.every_layer or all(scheme == cache_scheme for scheme in (caches or {}).values())
        ]
        ranges = [both for pair in product(ranges, runs) if (both := _intersection(*pair)) is not None]
    return VersionRange(engine, tuple(_merged(ranges))) if ranges else None


def reading_versions(versions: VersionRange, unread: Mapping[Range, Sequence[Fault]]) -> VersionRange | None:
    """Those of the versions that read everything. unread: `Engine.side_file_faults` or `Engine.version_faults`."""
    readable = [each for each, faults in unread.items() if not faults]
    if not unread or len(readable) == len(unread):
        return versions
    ranges = [both for pair in product(versions.ranges, readable) if (both := _intersection(*pair)) is not None]
    return VersionRange(versions.engine, tuple(_merged(ranges))) if ranges else None


def unread_in(version: str | None, unread: Mapping[Range, list[Fault]]) -> list[Fault]:
    """The faults of one version; of None those of the newest one."""
    faults: list[Fault] = []
    for (since, before), of_range in unread.items():
        if version is None or (Version(since) <= Version(version) and _is_before(Version(version), before)):
            faults = of_range
    return faults


def _is_before(version: Version, before: str | None) -> bool:
    return before is None or version < Version(before)


def _intersection(first: Range, second: Range) -> Range | None:
    since = max(first[0], second[0], key=Version)
    before = min(filter(None, (first[1], second[1])), key=Version, default=None)
    return (since, before) if _is_before(Version(since), before) else None


def _merged(ranges: Iterable[Range]) -> list[Range]:
    """The ranges in order, those that overlap or touch as one."""
    merged: list[Range] = []
    for since, before in sorted(ranges, key=lambda each: Version(each[0])):
        last = merged[-1] if merged else None
        if last is None or (last[1] is not None and Version(last[1]) < Version(since)):
            merged.append((since, before))
        elif last[1] is not None and (before is None or Version(last[1]) < Version(before)):
            merged[-1] = (last[0], before)
    return merged


def loading_versions(
    engine: Engine,
    family: ModelFamily,
    schemes: Mapping[str, Scheme],
    dtype: str,
    config: Mapping[str, Any],
    caches: CacheSchemes | None = None,
) -> VersionRange | None:
    """The versions of one engine that load a folder of these schemes with this config.json; None when none does."""
    if not engine.reads_config(family, schemes, config) or group_faults(engine, family, schemes):
        return None
    return supporting_versions(engine, family, schemes, dtype, caches, family.head_size(config))


def loading_engines(description: Mapping[str, Any], dtype: str, config: Mapping[str, Any]) -> list[str]:
    """The engines that load a finished folder, as text, e.g. ["vLLM Ascend 0.10.2rc2 and later"]; [] when none does.

    Arguments: see `loading_ranges`.
    """
    return [str(versions) for versions in loading_ranges(description, dtype, config)]


def loading_ranges(description: Mapping[str, Any], dtype: str, config: Mapping[str, Any]) -> list[VersionRange]:
    """The versions that load a finished folder, one range per engine of which any does.

    description: quant_model_description*.json (tensor name -> scheme); dtype: "bfloat16" or "float16";
    config: config.json.
    """
    family, schemes = find_family(config), layer_schemes(description)
    if family is None:
        return []
    caches = described_caches(family, description)
    ranges = (loading_versions(engine, family, schemes, dtype, config, caches) for engine in ENGINES)
    return [versions for versions in ranges if versions is not None]


def layer_schemes(description: Mapping[str, Any]) -> dict[str, Scheme]:
    """Description (tensor name -> scheme) -> scheme per layer, from the entries that end in `.weight`.

    A norm whose tensors a layout repeats, listed with the folder's type, counts once, as FLOAT.
    """
    values = {str(scheme) for scheme in Scheme}
    copies = tuple(f".{engine.norm_copies}.weight" for engine in ENGINES if engine.norm_copies)
    return {
        name.removesuffix(".weight"): Scheme(value)
        for name, value in description.items()
        if name.endswith(".weight") and not name.endswith(copies) and value in values
    }
