"""The known model families: those of vlqc, those of installed packages, and those that the user names."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from vlqc.errors import Fault, UserError
from vlqc.families.family import ModelFamily
from vlqc.families.qwen2 import QWEN2
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.families.qwen2_vl import QWEN2_VL
from vlqc.families.qwen3 import QWEN3
from vlqc.families.qwen3_vl import QWEN3_VL
from vlqc.families.qwen3_vl_moe import QWEN3_VL_MOE
from vlqc.files import read_json_object
from vlqc.formatting import did_you_mean, excerpt
from vlqc.import_paths import entry_points, import_path, resolve_class

FAMILIES: tuple[ModelFamily, ...] = (QWEN2_5_VL, QWEN2_VL, QWEN3_VL, QWEN3_VL_MOE, QWEN2, QWEN3)
ENTRY_POINTS = "vlqc.families"  # group of entry points; the name of each is a model type, its object a ModelFamily
FLAG = "--family"
LONGEST_TYPE = 100  # characters of a model type that is looked for among the known ones
GUIDE = "vlqc/docs/contributing.md"

_registered: list[ModelFamily] = []


def register_family(family: type[ModelFamily]) -> None:
    """Adds a family for this process. It takes precedence over all others with the same model type.

    Raises:
        UserError: with every missing and every malformed attribute of the class.
    """
    if not (isinstance(family, type) and issubclass(family, ModelFamily)):
        raise UserError(Fault(f"{family!r} is not a subclass of vlqc.ModelFamily", "register_family"))
    _check(family)
    _registered[:] = [family(), *(known for known in _registered if type(known) is not family)]


def load_family(path: str, flag: str = FLAG) -> type[ModelFamily]:
    """Imports a family. path: "module:Class", see `resolve_class`. Raises UserError."""
    base: type[ModelFamily] = ModelFamily  # type: ignore[type-abstract]
    cls = resolve_class(path, base, flag=flag, example="my_families:MyVL", guide=GUIDE)
    _check(cls)
    return cls


def check_model_type(cls: type[ModelFamily], folder: Path) -> None:
    """UserError if a family that the user names is not for the model type in the config.json of a folder.

    Without a config.json that can be read there is none: that is an error when the folder is opened.
    """
    try:
        config = read_json_object(folder / "config.json")
    except UserError:
        return
    if (found := config.get("model_type")) not in cls.model_types:
        path, types = import_path(cls), " or ".join(cls.model_types)
        what = f"{path} is for model type {types}; config.json has {'none' if found is None else found}"
        fix = f"name a family for it, add it to `model_types` of {path}, or omit {FLAG}"
        raise UserError(Fault(what, str(folder / "config.json"), fix=fix))


@contextmanager
def errors_of(cls: type[ModelFamily], method: str) -> Iterator[None]:
    """Turns what a method of a family outside of vlqc raises into a UserError; errors in vlqc's own are bugs."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or cls.__module__.split(".")[0] == __name__.split(".")[0]:
            raise
        path, why = import_path(cls), f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(Fault(f"{path}.{method} failed", path, why, f"see vlqc.ModelFamily, and {GUIDE}")) from error


def _check(cls: type[ModelFamily]) -> None:
    """UserError if a class is incomplete, or its methods that take no config fail."""
    _check_complete(cls)
    with errors_of(cls, "__init__"):
        family = cls()
    with errors_of(cls, "config_schema"):
        family.config_schema()


def _check_complete(cls: type[ModelFamily]) -> None:
    """UserError with the methods and attributes that are missing, or have another type than ModelFamily declares."""
    faults = [f"{name} is not defined" for name in sorted(getattr(cls, "__abstractmethods__", ()))]
    for name, hint in get_type_hints(ModelFamily).items():
        if not hasattr(cls, name):
            faults.append(f"{name} is not defined")
            continue
        (declared,) = get_args(hint)  # of ClassVar[...]
        try:
            value = TypeAdapter(declared).validate_python(getattr(cls, name), strict=True)
        except ValidationError as error:
            row = error.errors()[0]
            place = "".join(f"[{key!r}]" for key in row["loc"] if key != "[key]")
            faults.append(f"{name}{place}: {row['msg']}")
            continue
        if name in ("name", "model_types") and not value:
            faults.append(f"{name} is empty")
        if name == "engine_rows" and value and value not in (known := [each.name for each in FAMILIES]):
            hint = did_you_mean(value, known) or f"it is one of {', '.join(known)}"
            faults.append(f"{name}: no engine has rows of a family {value!r}; {hint}")
    if faults:
        fix = f"see vlqc.ModelFamily, and {GUIDE}"
        raise UserError(Fault(f"{import_path(cls)} is incomplete", import_path(cls), "; ".join(faults), fix))


def known_model_types() -> list[str]:
    """The model types that have a family. Imports no family of an installed package."""
    types = [model_type for each in (*_registered, *FAMILIES) for model_type in each.model_types]
    return list(dict.fromkeys([*types, *entry_points(ENTRY_POINTS)]))


def find_family(config: Mapping[str, Any]) -> ModelFamily | None:
    """The family of a config.json, by model_type; None if there is none.

    Families that the user registers take precedence over those of vlqc, and these over those of installed packages.

    Raises:
        UserError: if two installed packages have a family for the model type, or the only one cannot be used.
    """
    model_type = config.get("model_type")
    found = next((each for each in (*_registered, *FAMILIES) if model_type in each.model_types), None)
    return found or (_installed(model_type) if isinstance(model_type, str) else None)


def _installed(model_type: str) -> ModelFamily | None:
    """The family that an installed package registers for a model type."""
    paths = entry_points(ENTRY_POINTS).get(model_type, [])
    if len(paths) > 1:
        why = f"installed packages register {' and '.join(paths)} for it"
        raise UserError(
            Fault(f"two families for the model type {model_type}", "config.json", why, f"add {FLAG} with one of them")
        )
    if not paths:
        return None
    cls = load_family(paths[0], f"entry point {model_type}")
    if model_type not in cls.model_types:
        why = f"its entry point is {model_type}, its model types are {', '.join(cls.model_types)}"
        raise UserError(Fault(f"{paths[0]} has no model type {model_type}", paths[0], why))
    return _instance(cls)


@functools.cache
def _instance(cls: type[ModelFamily]) -> ModelFamily:
    return cls()


def family_of(config: Mapping[str, Any], where: str) -> ModelFamily:
    """The family of a config.json. UserError, with all model types, if there is none. where: path of the file."""
    if (family := find_family(config)) is not None:
        return family
    known, model_type = known_model_types(), config.get("model_type")
    fix = f"add a family as {GUIDE} describes, or name one with {FLAG} module:Class"
    if suggestion := did_you_mean(str(model_type)[:LONGEST_TYPE], known):
        fix = f"{suggestion} Else {fix}"
    what, why = f"unsupported model type {excerpt(model_type)}", f"supported: {', '.join(known)}"
    raise UserError(Fault(what, where, why, fix))
