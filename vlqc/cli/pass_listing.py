"""The list of passes that `vlqc passes` prints."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.text import Text

from vlqc.errors import UserError
from vlqc.formatting import escape_control_chars
from vlqc.pipeline.registry import REGISTRY, load_pass, plugin_passes
from vlqc.pipeline.spec import print_value


def describe_passes() -> list[dict[str, Any]]:
    """The built-in passes, then those of installed packages, as JSON objects.

    Keys: name, class, kind, summary, after, before, options (with their defaults); for a pass that cannot be loaded
    name, class and error.
    """
    builtin = {name: [path] for name, path in REGISTRY.items()}
    return [_describe(name, paths) for name, paths in (builtin | plugin_passes() | builtin).items()]


def print_passes(console: Console) -> None:
    """Prints the same as text: a line per pass, and below it its options with their defaults."""
    passes = describe_passes()
    width = max(len(each["name"]) for each in passes)
    for each in passes:
        name, origin = f"{each['name']:<{width}}", "" if each["name"] in REGISTRY else f"  ({each['class']})"
        if "error" in each:
            line, style = f"  cannot be used: {each['error']}{origin}", "bold red"
        else:
            line, style = f"  {each['kind']:<8}  {each['summary']}{origin}", ""
        console.print(Text.assemble((name, "bold"), (escape_control_chars(line), style)), soft_wrap=True)
        if options := ", ".join(f"{option}={default}" for option, default in each.get("options", {}).items()):
            console.print(Text(f"{'':<{width}}  options: {options}"), soft_wrap=True)


def _describe(name: str, paths: list[str]) -> dict[str, Any]:
    try:
        cls = load_pass(name)
    except UserError as error:
        return {"name": name, "class": " and ".join(paths), "error": error.faults[0].what}
    return {
        "name": name,
        "class": paths[0],
        "kind": cls.kind,
        "summary": cls.summary,
        "after": list(cls.after),
        "before": list(cls.before),
        "options": {option.name: _default(option) for option in dataclasses.fields(cls)},
    }


def _default(option: "dataclasses.Field[Any]") -> str:
    """The default as in a pipeline text."""
    if option.default_factory is not dataclasses.MISSING:
        return print_value(option.default_factory())
    return "(required)" if option.default is dataclasses.MISSING else print_value(option.default)
