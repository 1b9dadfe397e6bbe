"""The known model families: those of vlqc, those of installed packages, and those that the user names."""

import functools
import importlib.metadata
from collections.abc import Mapping
from typing import Any

from vlqc.errors import Fault, UserError
from vlqc.families.family import ModelFamily
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.families.qwen2_vl import QWEN2_VL
from vlqc.families.qwen3_vl import QWEN3_VL
from vlqc.families.qwen3_vl_moe import QWEN3_VL_MOE
from vlqc.families.text_models import QWEN2, QWEN3
from vlqc.formatting import did_you_mean

FAMILIES: tuple[ModelFamily, ...] = (QWEN2_5_VL, QWEN2_VL, QWEN3_VL, QWEN3_VL_MOE, QWEN2, QWEN3)
ENTRY_POINTS = "vlqc.families"  # group of entry points, each a subclass of ModelFamily or an object of one
GUIDE = "docs/contributing.md describes how to add a family"

_registered: list[ModelFamily] = []


def register(family: ModelFamily) -> None:
    """Adds a family for this process. It takes precedence over known ones with the same model type."""
    if all(type(family) is not type(known) for known in _registered):
        _registered.insert(0, family)


def known_families() -> tuple[ModelFamily, ...]:
    """All families, those with precedence first."""
    return (*_registered, *_installed(), *FAMILIES)


@functools.cache
def _installed() -> tuple[ModelFamily, ...]:
    """Families that installed packages declare as entry points."""
    families = []
    for entry in sorted(importlib.metadata.entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
        try:
            value = entry.load()
            family = value() if isinstance(value, type) else value
        except Exception as error:  # code of another package
            why = f"{type(error).__name__}: {error}"
            raise UserError(Fault(f"cannot load the model family {entry.name}", entry.value, why)) from error
        if not isinstance(family, ModelFamily):
            raise UserError(Fault(f"{entry.value} is not a ModelFamily", f"entry point {entry.name}"))
        families.append(family)
    return tuple(families)


def find_family(config: Mapping[str, Any]) -> ModelFamily | None:
    """The family of a config.json, by model_type; None if there is none."""
    model_type = config.get("model_type")
    return next((family for family in known_families() if model_type in family.model_types), None)


def family_of(config: Mapping[str, Any], where: str) -> ModelFamily:
    """The family of a config.json. UserError, with all known families, if there is none. where: path of the file."""
    if (family := find_family(config)) is not None:
        return family
    known = [model_type for each in known_families() for model_type in each.model_types]
    model_type = config.get("model_type")
    suggestion = did_you_mean(str(model_type), known)
    fix = f"{suggestion} {GUIDE}" if suggestion else GUIDE
    why = f"supported: {', '.join(dict.fromkeys(known))}"
    raise UserError(Fault(f"unsupported model type {model_type!r}", where, why, fix))
