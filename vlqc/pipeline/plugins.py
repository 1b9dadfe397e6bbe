"""Third-party passes: classes named by an import path `module:Class`, and entry points of installed packages.

Resolving an import path runs the code of that module, as `python -m` does. Import paths are therefore accepted on the
command line and in Python only, never from a checkpoint or a recipe.
"""

import functools
import importlib
import importlib.metadata
import inspect
import operator
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from vlqc.errors import Fault, UserError
from vlqc.formatting import did_you_mean

T = TypeVar("T")
PASS_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
KINDS = ("analysis", "rewrite")


def is_import_path(name: str) -> bool:
    """Whether the name in a pipeline text is `module:Class` rather than the name of a pass."""
    return ":" in name


def import_path(cls: type) -> str:
    """Class -> "module:Class", the inverse of `resolve_class`."""
    return f"{cls.__module__}:{cls.__qualname__}"


def resolve_class(path: str, base: type[T]) -> type[T]:
    """Imports a subclass of `base`.

    The working directory is searched, too, after everything that is installed.

    Args:
        path: "module:Class" or "module:Outer.Inner".

    Raises:
        UserError: malformed path, missing or failing module, missing class, or not a complete subclass of `base`.
    """
    module_name, _, qualified_name = path.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *qualified_name.split(".")]):
        fix = "write module:Class, for example my_passes:Kurtosis for class Kurtosis in my_passes.py"
        raise UserError(Fault(f"invalid import path {path!r}", "--pipeline", fix=fix))
    module = _import(module_name, path)
    try:
        cls: object = operator.attrgetter(qualified_name)(module)
    except AttributeError:
        known = [name for name, value in vars(module).items() if _is_proper_subclass(value, base)]
        fix = did_you_mean(qualified_name, known) or (f"its passes are {', '.join(known)}" if known else "")
        raise UserError(Fault(f"{module_name} has no class {qualified_name}", path, fix=fix)) from None
    if not isinstance(cls, type) or not _is_proper_subclass(cls, base):
        kind = "a class" if isinstance(cls, type) else f"an object of type {type(cls).__name__}"
        why = f"{qualified_name} is {kind}, not a subclass of vlqc.{base.__name__}"
        fix = f"derive it from vlqc.{base.__name__}, as vlqc/docs/cookbook.md shows"
        raise UserError(Fault(f"{path} is not a {base.__name__}", path, why, fix))
    if faults := [Fault(f"{path} is incomplete", path, why, fix) for why, fix in _missing_attributes(cls)]:
        raise UserError(*faults)
    return cls


def entry_points(group: str) -> dict[str, list[str]]:
    """Name -> import paths that installed packages register in the group, sorted by name. Imports none of them."""
    return {name: list(paths) for name, paths in _entry_points(group, tuple(sys.path)).items()}


@functools.cache
def _entry_points(group: str, search_path: tuple[str, ...]) -> dict[str, list[str]]:
    """Cached, as reading the metadata of all packages takes longer than parsing a pipeline; per `sys.path`."""
    paths: dict[str, list[str]] = {}
    for entry in importlib.metadata.entry_points(group=group):
        path = f"{entry.module}:{entry.attr}"
        if path not in paths.setdefault(entry.name, []):
            paths[entry.name].append(path)
    return dict(sorted(paths.items()))


def _import(module_name: str, path: str) -> object:
    try:
        with _working_directory_last():
            return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            fix = f"install the package that provides it, or run vlqc in the folder of {missing}.py"
            if module_name.endswith(".py"):
                fix = f"omit the suffix: {module_name.removesuffix('.py')}:{path.partition(':')[2]}"
            raise UserError(Fault(f"there is no module {missing}", path, fix=fix)) from error
        why = f"it imports {missing}, which is not installed"
        raise UserError(Fault(f"cannot import {module_name}", path, why)) from error
    except Exception as error:  # the module's code may raise anything
        why = f"{type(error).__name__}: {error}"
        raise UserError(Fault(f"cannot import {module_name}", path, why)) from error


@contextmanager
def _working_directory_last() -> Iterator[None]:
    """Makes modules of the working directory importable; at the end of sys.path, they shadow nothing installed."""
    if "" in sys.path:
        yield
        return
    sys.path.append("")
    try:
        yield
    finally:
        sys.path.remove("")


def _is_proper_subclass(value: object, base: type) -> bool:
    return isinstance(value, type) and issubclass(value, base) and value is not base


def _missing_attributes(cls: type) -> Iterator[tuple[str, str]]:
    """(what is wrong with a subclass of Pass, how to fix it)."""
    name = inspect.getattr_static(cls, "name", None)
    if not isinstance(name, str) or not PASS_NAME.fullmatch(name):
        why = "it has no name" if name is None else f"its name is {name!r}"
        yield why, 'add name: ClassVar[str] = "kebab-case"'
    if getattr(cls, "kind", None) not in KINDS:
        yield "its kind is missing or invalid", f"add kind: ClassVar = one of {', '.join(map(repr, KINDS))}"
    if not isinstance(getattr(cls, "summary", None), str):
        yield "it has no summary", 'add summary: ClassVar[str] = "one line for vlqc passes"'
    parameters = getattr(cls, "__dataclass_params__", None)
    if "__dataclass_fields__" not in vars(cls) or parameters is None or not parameters.frozen:
        yield "it is not a frozen dataclass", "decorate it with @dataclass(frozen=True)"
