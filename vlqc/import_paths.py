"""Classes of other packages: named by an import path `module:Class`, or by entry points of installed packages.

Resolving an import path runs the code of that module, as `python -m` does. Import paths are therefore accepted on the
command line and in Python only, never from a checkpoint or a recipe.
"""

import functools
import importlib
import importlib.metadata
import operator
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from vlqc.errors import Fault, UserError
from vlqc.formatting import did_you_mean

T = TypeVar("T")


def is_import_path(name: str) -> bool:
    """Whether a name is `module:Class`."""
    return ":" in name


def import_path(cls: type) -> str:
    """Class -> "module:Class", the inverse of `resolve_class`."""
    return f"{cls.__module__}:{cls.__qualname__}"


def resolve_class(path: str, base: type[T], *, flag: str, example: str, guide: str) -> type[T]:
    """Imports a subclass of `base`.

    The working directory is searched, too, after everything that is installed.

    Args:
        path: "module:Class" or "module:Outer.Inner".
        flag: the option that the path comes from, for messages.
        example: a path that the message about a malformed one shows.
        guide: page that describes how to derive from `base`.

    Raises:
        UserError: malformed path, missing or failing module, missing class, or not a subclass of `base`.
    """
    module_name, _, qualified_name = path.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *qualified_name.split(".")]):
        file, _, name = example.partition(":")
        fix = f"write module:Class, for example {example} for class {name} in {file}.py"
        raise UserError(Fault(f"invalid import path {path!r}", flag, fix=fix))
    module = _import(module_name, path)
    try:
        cls: object = operator.attrgetter(qualified_name)(module)
    except AttributeError:
        known = [name for name, value in vars(module).items() if _is_proper_subclass(value, base)]
        fix = did_you_mean(qualified_name, known)
        if known and not fix:
            fix = f"its subclasses of vlqc.{base.__name__} are {', '.join(known)}"
        raise UserError(Fault(f"{module_name} has no class {qualified_name}", path, fix=fix)) from None
    if not isinstance(cls, type) or not _is_proper_subclass(cls, base):
        kind = "a class" if isinstance(cls, type) else f"an object of type {type(cls).__name__}"
        why = f"{qualified_name} is {kind}, not a subclass of vlqc.{base.__name__}"
        fix = f"derive it from vlqc.{base.__name__}, as {guide} shows"
        raise UserError(Fault(f"{path} is not a {base.__name__}", path, why, fix))
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
