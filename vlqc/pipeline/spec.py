"""The text of a pipeline: `name{option=value,...}` after `name{...}`, written and read.

What a name stands for is the caller's business: `print_steps` is given the name of every pass, `parse_steps` the way
from a name to its class, a dataclass whose fields are its options.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal

from vlqc.errors import Fault, UserError
from vlqc.formatting import did_you_mean


def print_steps(named: Sequence[tuple[str, Any]]) -> str:
    """(name, pass) -> text; options that have their default are left out."""
    return ",".join(_print_step(name, step) for name, step in named)


def parse_steps(text: str, class_of: Callable[[str], type]) -> list[Any]:
    """`print_steps` backwards: the passes. UserError with every fault of the text at once."""
    steps: list[Any] = []
    faults: list[Fault] = []
    for part in _split_outside_braces(text):
        try:
            steps.append(_parse_step(part, class_of))
        except UserError as error:
            faults += error.faults
    if faults:
        raise UserError(*faults)
    return steps


def names_in(text: str) -> list[str]:
    """What stands before the braces, without asking what it means."""
    return [part.partition("{")[0].strip() for part in _split_outside_braces(text)]


def print_value(value: Any) -> str:
    """An option's value as it stands in the text."""
    if isinstance(value, bool):
        return str(value).lower()
    return ";".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _print_step(name: str, step: Any) -> str:
    options = [
        f"{option.name}={print_value(getattr(step, option.name))}"
        for option in dataclasses.fields(step)
        if getattr(step, option.name) != option.default
    ]
    return name + (f"{{{','.join(options)}}}" if options else "")


def _split_outside_braces(text: str) -> list[str]:
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [part for part in [*parts, current.strip()] if part]


def _parse_step(text: str, class_of: Callable[[str], type]) -> Any:
    name, brace, rest = text.partition("{")
    name = name.strip()
    kind: Any = class_of(name)
    if brace and not rest.endswith("}"):
        raise UserError(Fault(f"{name}: options must end with }}", where=text, fix="write name{option=value,...}"))
    types_of = _types_of(kind, text)
    known = [option.name for option in dataclasses.fields(kind)]
    aliases = {option.name: option.metadata.get("aliases", {}) for option in dataclasses.fields(kind)}
    given: dict[str, Any] = {}
    faults = []
    for item in filter(None, (item.strip() for item in rest.removesuffix("}").split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in known or not equals:
            fix = did_you_mean(key, known) or (
                f"{name} takes {', '.join(known)}" if known else f"{name} takes no options"
            )
            faults.append(Fault(f"{name} has no option {item!r}", where=text, fix=fix))
            continue
        if key in given:
            faults.append(Fault(f"{name}: {key} is given twice", where=text))
        try:
            given[key] = _parse_value(aliases[key].get(value, value), types_of[key])
        except ValueError as error:
            faults.append(Fault(f"{name}: {key}={value} cannot be used", where=text, why=str(error)))
    required = [option.name for option in dataclasses.fields(kind) if _is_required(option) and option.name not in given]
    if faults or required:
        lacking = [
            Fault(f"{name}: {option} is missing", text, "it has no default", f"write {name}{{{option}=...}}")
            for option in required
            if not faults
        ]
        raise UserError(*faults, *lacking)
    try:
        return kind(**given)
    except (ValueError, TypeError) as error:  # a pass may check its options when it is made
        raise UserError(Fault(f"{name}: these options cannot be used", where=text, why=str(error))) from error


def _is_required(option: "dataclasses.Field[Any]") -> bool:
    return option.default is dataclasses.MISSING and option.default_factory is dataclasses.MISSING


def _types_of(kind: type, text: str) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind)
    except (NameError, TypeError) as error:  # written as text, under TYPE_CHECKING
        why = f"the types of its options cannot be told: {error}"
        raise UserError(Fault(f"{kind.__name__} cannot be used", where=text, why=why)) from error


def _parse_value(text: str, wanted: Any) -> Any:
    """A value of the field's type; ValueError says what would be right."""
    origin = typing.get_origin(wanted)
    if origin is Literal:
        choices = typing.get_args(wanted)
        if text not in choices:
            raise ValueError(f"choose from {', '.join(map(str, choices))}")
        return text
    if origin in (typing.Union, types.UnionType):
        inner = [kind for kind in typing.get_args(wanted) if kind is not type(None)]
        return None if text == "None" else _parse_value(text, inner[0])
    if origin is tuple:
        return tuple(filter(None, text.split(";")))
    if wanted is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("true or false is wanted")
        return text.lower() == "true"
    if wanted in (int, float):
        try:
            return wanted(text)
        except ValueError:
            raise ValueError("a whole number is wanted" if wanted is int else "a number is wanted") from None
    if wanted is str:
        return text
    raise ValueError(f"an option of type {getattr(wanted, '__name__', wanted)} has no text: give such a pass in Python")
