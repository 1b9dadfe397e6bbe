"""Checks the values of config.json before a model is built from them.

A model's constructor takes what it gets: a size of 10**12 allocates that memory, a million blocks take hours, and a
value of the wrong type fails somewhere inside or is silently converted. No size can exceed the largest dimension of the
checkpoint's tensors, and each block has tensors of its own.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vlqc.errors import Fault
from vlqc.families.config_values import without_nulls
from vlqc.families.family import ModelFamily
from vlqc.families.registry import errors_of

DEEPEST = 64  # levels of lists and objects
SHOWN = 60  # characters of a value in a message
JSON_TYPES = {
    type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list",
}  # fmt: skip
REPAIR = "copy config.json from the float model again"


def engine_form(family: ModelFamily, source: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a float checkpoint -> the form of `ModelFamily.engine_config`.

    Null is read as transformers reads it, mostly like a missing key. Without `architectures` the model's class is the
    family's first one.
    """
    config = family.engine_config(without_nulls(source, family.config_objects))
    return config if config.get("architectures") else {**config, "architectures": [family.architectures[0]]}


def config_faults(
    family: ModelFamily, config: Mapping[str, Any], where: str, largest: int, tensors: int
) -> list[Fault]:
    """Every value of config.json that is out of bounds. Unknown and missing keys are no faults.

    UserError if a method of a family outside of vlqc fails.

    Args:
        family: of the model.
        config: the object in config.json, in the form of `ModelFamily.engine_config`.
        where: path of the file, for messages.
        largest: the largest dimension of any tensor.
        tensors: the number of tensors.
    """
    faults = [] if _depth(config) <= DEEPEST else [Fault("config.json is nested too deeply", where, fix=REPAIR)]
    if objects := list(object_faults(family.config_objects, config, where)):
        return faults + objects  # their keys have no values to check
    with errors_of(type(family), "complete_config"):
        complete = family.complete_config(config)
    with errors_of(type(family), "config_limits"):
        limits = family.config_limits(complete, largest, tensors)
    with errors_of(type(family), "config_schema"):
        invalid = invalid_values(family.config_schema(), complete, limits)
    for key, value, why in invalid:
        verb = "is" if _has(config, key) else "is missing, which means"
        faults.append(Fault(f"{key} {verb} {value}", where, why, REPAIR))
    return faults


def object_faults(objects: Mapping[str, bool], config: Mapping[str, Any], where: str) -> Iterator[Fault]:
    """A fault for each of `ModelFamily.config_objects` that is missing although required, empty, or not an object."""
    for key, required in objects.items():
        value = config.get(key)
        if required and key not in config:
            yield Fault(f"{key} is missing", where, fix=REPAIR)
        elif not isinstance(value, Mapping) and (required or value is not None):
            yield Fault(f"{key} is {JSON_TYPES[type(value)]}, not an object", where, fix=REPAIR)
        elif value == {}:
            yield Fault(f"{key} is empty", where, "it holds the sizes of a part of the model", REPAIR)


def invalid_values(
    schema: TypeAdapter[Any], values: Mapping[str, Any], limits: object = None
) -> list[tuple[str, str, str]]:
    """Validates JSON values strictly, without conversion -> (dotted key, value as text, reason) of the invalid ones.

    limits: context of the validators in the schema.
    """
    try:
        schema.validate_python(values, strict=True, context=limits)
    except ValidationError as error:
        invalid: dict[str, tuple[str, str, str]] = {}
        for detail in error.errors():
            path, value = _resolve(detail["loc"], values)
            text = repr(value)
            shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
            invalid.setdefault(path, (path, shown, detail["msg"].removeprefix("Value error, ")))
        return list(invalid.values())
    return []


def _has(config: Any, dotted: str) -> bool:
    """Whether a dotted key exists."""
    for key in dotted.split("."):
        if not isinstance(config, Mapping) or key not in config:
            return False
        config = config[key]
    return True


def _resolve(location: tuple[int | str, ...], values: Any) -> tuple[str, Any]:
    """The part of an error's location that consists of keys -> dotted key and value."""
    keys: list[str] = []
    for key in location:
        if not isinstance(values, Mapping) or key not in values:
            break
        keys.append(str(key))
        values = values[key]
    return ".".join(keys), values


def _depth(value: Any) -> int:
    """Levels of lists and objects of a value, at most DEEPEST + 1."""
    deepest, stack = 0, [(value, 0)]
    while stack and deepest <= DEEPEST:
        item, level = stack.pop()
        deepest = max(deepest, level)
        stack += [(inner, level + 1) for inner in _items(item)]
    return deepest


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value
