"""Passes that do not come with vlqc: classes named `module:Class`, and those that installed packages offer by name.

Whoever names `module:Class` asks for that module to be imported, as with `python -m`. So such a name is taken from the
user's own command line and from Python only: nothing that lies in a checkpoint or in a recipe comes this way.
"""

import functools
import importlib
import importlib.metadata
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from vlqc.errors import Fault, UserError
from vlqc.formatting import did_you_mean

T = TypeVar("T")
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")  # of a pass
KINDS = ("analysis", "rewrite")
HOW = "write module:Class, for example my_passes:Kurtosis for class Kurtosis in my_passes.py"


def is_import_path(name: str) -> bool:
    """Whether a pipeline text names a class by where it lies, rather than a pass by its name."""
    return ":" in name


def import_path(kind: type) -> str:
    """A class -> "module:Class", under which `resolve_class` finds it."""
    return f"{kind.__module__}:{kind.__qualname__}"


def resolve_class(place: str, wanted: type[T]) -> type[T]:
    """ "module:Class" -> that subclass of `wanted`, its module imported. UserError says what is in the way.

    Modules in the working folder are found, too, after all that are installed.
    """
    module_name, _, path = place.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *path.split(".")]):
        raise UserError(Fault(f"{place!r} names no pass", where="--pipeline", fix=HOW))
    found: object = _imported(module_name, place)
    for part in path.split("."):
        if not hasattr(found, part):
            known = [name for name, value in vars(found).items() if _is_kind_of(value, wanted)]
            fix = did_you_mean(part, known) or (f"it has {', '.join(known)}" if known else "")
            raise UserError(Fault(f"{module_name} has no {path}", place, fix=fix))
        found = getattr(found, part)
    if not isinstance(found, type) or not issubclass(found, wanted) or found is wanted:
        what = "a class" if isinstance(found, type) else f"of type {type(found).__name__}"
        why = f"{path} is {what}, no subclass of vlqc.{wanted.__name__}"
        fix = f"derive it from vlqc.{wanted.__name__}; the cookbook shows how"
        raise UserError(Fault(f"{place} is no {wanted.__name__}", place, why, fix))
    if faults := [Fault(f"{place} is not complete", place, why, fix) for why, fix in _lacks(found)]:
        raise UserError(*faults)
    return found


def installed_places(group: str) -> dict[str, list[str]]:
    """What installed packages offer as entry points of a group: name -> every "module:Class". Imports nothing."""
    return {name: list(places) for name, places in _offered(group, tuple(sys.path)).items()}


@functools.cache
def _offered(group: str, path: tuple[str, ...]) -> dict[str, list[str]]:
    """path: where packages are looked for; to look there takes longer than to read a pipeline."""
    places: dict[str, list[str]] = {}
    for entry in importlib.metadata.entry_points(group=group):
        place = f"{entry.module}:{entry.attr}"
        if place not in places.setdefault(entry.name, []):
            places[entry.name].append(place)
    return dict(sorted(places.items()))


def _imported(module_name: str, place: str) -> object:
    try:
        with _working_folder_last():
            return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            fix = f"install the package that has it, or run vlqc in the folder of {missing}.py"
            if module_name.endswith(".py"):
                fix = f"leave the ending out: {module_name.removesuffix('.py')}:{place.partition(':')[2]}"
            raise UserError(Fault(f"there is no module {missing}", place, fix=fix)) from error
        why = f"it imports {missing}, which is not installed"
        raise UserError(Fault(f"{module_name} cannot be imported", place, why)) from error
    except Exception as error:  # whatever stands in it was run
        why = f"{type(error).__name__}: {error}"
        raise UserError(Fault(f"{module_name} cannot be imported", place, why)) from error


@contextmanager
def _working_folder_last() -> Iterator[None]:
    """Inside, modules of the working folder can be imported; last in line, they stand in for nothing installed."""
    if "" in sys.path:
        yield
        return
    sys.path.append("")
    try:
        yield
    finally:
        sys.path.remove("")


def _is_kind_of(value: object, wanted: type) -> bool:
    return isinstance(value, type) and issubclass(value, wanted) and value is not wanted


def _lacks(kind: type) -> Iterator[tuple[str, str]]:
    """Why a class cannot stand in a pipeline, and what to do about it."""
    name = inspect.getattr_static(kind, "name", None)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        said = "it has no name" if name is None else f"its name is {name!r}"
        yield said, 'give it name: ClassVar[str] = "kebab-case"'
    if getattr(kind, "kind", None) not in KINDS:
        yield (
            "it does not say what kind of pass it is",
            f"give it kind: ClassVar = one of {', '.join(map(repr, KINDS))}",
        )
    if not isinstance(getattr(kind, "summary", None), str):
        yield "it does not say what it does", 'give it summary: ClassVar[str] = "one line for vlqc passes"'
    parameters = getattr(kind, "__dataclass_params__", None)
    if "__dataclass_fields__" not in vars(kind) or parameters is None or not parameters.frozen:
        yield "it is no frozen dataclass", "write @dataclass(frozen=True) above it"
