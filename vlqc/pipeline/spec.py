"""The text of a pipeline: `name{option=value,...}`, separated by commas.

Independent of the table of passes: `parse_spec` receives the function that maps a name to its class, a dataclass whose
fields are the options of the pass.
"""

import dataclasses
import typing
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from vlqc.errors import Fault, UserError
from vlqc.formatting import did_you_mean


def print_spec(named_passes: Sequence[tuple[str, Any]]) -> str:
    """(name, pass) pairs -> text, without the options that have their default."""
    return ",".join(_print_step(name, step) for name, step in named_passes)


def parse_spec(text: str, resolve: Callable[[str], type]) -> list[Any]:
    """Text -> passes, the inverse of `print_spec`. Raises UserError with every fault of the text."""
    steps: list[Any] = []
    faults: list[Fault] = []
    for part in _split_outside_braces(text):
        try:
            steps.append(_parse_step(part, resolve))
        except UserError as error:
            faults += error.faults
    if faults:
        raise UserError(*faults)
    return steps


def print_value(value: Any) -> str:
    """The text of an option's value: booleans in lower case, items of a tuple separated by semicolons."""
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


def _parse_step(text: str, resolve: Callable[[str], type]) -> Any:
    name, brace, rest = text.partition("{")
    name = name.strip()
    cls: Any = resolve(name)
    if brace and not rest.endswith("}"):
        raise UserError(Fault(f"{name}: options must end with }}", where=text, fix="write name{option=value,...}"))
    fields = {field.name: field for field in dataclasses.fields(cls)}
    annotations = _annotations(cls, text)
    values: dict[str, Any] = {}
    faults = []
    for item in filter(None, (item.strip() for item in rest.removesuffix("}").split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in fields or not equals:
            takes = f"the options of {name} are {', '.join(fields)}" if fields else f"{name} has no options"
            faults.append(Fault(f"{name} has no option {key!r}", text, fix=did_you_mean(key, fields) or takes))
            continue
        if key in values:
            faults.append(Fault(f"{name}: {key} is given twice", text))
        try:
            alias = fields[key].metadata.get("aliases", {}).get(value, value)
            values[key] = _parse_value(alias, annotations[key])
        except ValueError as error:
            faults.append(Fault(f"{name}: invalid value {key}={value}", text, str(error)))
    if not faults:
        faults = [
            Fault(f"{name}: {key} is missing", text, "it has no default", f"write {name}{{{key}=...}}")
            for key, field in fields.items()
            if key not in values and field.default is field.default_factory is dataclasses.MISSING
        ]
    if faults:
        raise UserError(*faults)
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:  # raised by __post_init__ of the pass
        raise UserError(Fault(f"{name}: invalid options", text, str(error))) from error
    except UserError as error:  # its faults name an option of `vlqc compile`
        raise UserError(*(dataclasses.replace(fault, where=text) for fault in error.faults)) from error


def _annotations(cls: type, text: str) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except (NameError, TypeError) as error:  # annotations that are imported under TYPE_CHECKING only
        why = f"the types of its options cannot be resolved: {error}"
        raise UserError(Fault(f"{cls.__name__} cannot be used", text, why)) from error


def _parse_value(text: str, annotation: Any) -> Any:
    """Text -> value of the field's type. Raises ValueError with the reason."""
    union = typing.get_args(annotation)
    if NoneType in union:
        if text == "None":
            return None
        annotation = next(arg for arg in union if arg is not NoneType)
    is_tuple = typing.get_origin(annotation) is tuple
    try:
        return TypeAdapter(annotation).validate_python(tuple(filter(None, text.split(";"))) if is_tuple else text)
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"]) from None
    except PydanticSchemaGenerationError:
        kind = getattr(annotation, "__name__", annotation)
        raise ValueError(f"options of type {kind} cannot be written as text; construct the pass in Python") from None
