"""Checks the classes of third-party passes, which `import_paths` resolves."""

import inspect
import re
from collections.abc import Iterator

from vlqc.errors import Fault, UserError
from vlqc.import_paths import resolve_class
from vlqc.pipeline.pass_api import Pass

PASS_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
KINDS = ("analysis", "rewrite")


def resolve_pass(path: str) -> type[Pass]:
    """The class of a pass. UserError as for `resolve_class`, and for a class that lacks an attribute of a pass."""
    cls = resolve_class(path, Pass, flag="--pipeline", example="my_passes:Kurtosis", guide="vlqc/docs/cookbook.md")
    if faults := [Fault(f"{path} is incomplete", path, why, fix) for why, fix in _missing_attributes(cls)]:
        raise UserError(*faults)
    return cls


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
