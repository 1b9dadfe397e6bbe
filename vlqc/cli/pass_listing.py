"""The passes as `vlqc passes` lists them."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.text import Text

from vlqc.errors import UserError
from vlqc.formatting import escape_control_chars
from vlqc.pipeline.pass_api import Pass
from vlqc.pipeline.registry import REGISTRY, load_pass, plugin_passes
from vlqc.pipeline.spec import print_value


def print_passes(console: Console) -> None:
    """Every pass that has a name: its kind and one line, below it its options with their defaults.

    Those of installed packages follow, each with its class; one that cannot be loaded says why.
    """
    offered = {name: places for name, places in plugin_passes().items() if name not in REGISTRY}
    width = max(map(len, [*REGISTRY, *offered]))
    for name in [*REGISTRY, *offered]:
        origin = "" if name in REGISTRY else f"  ({' and '.join(offered[name])})"
        try:
            step = load_pass(name)
        except UserError as error:
            told = escape_control_chars(f"  cannot be used: {error.faults[0].what}{origin}")
            console.print(Text.assemble((f"{name:<{width}}", "bold"), (told, "bold red")), soft_wrap=True)
            continue
        line = f"  {step.kind:<8}  {step.summary}{origin}"
        console.print(Text.assemble((f"{name:<{width}}", "bold"), escape_control_chars(line)), soft_wrap=True)
        if options := options_of(step):
            shown = ", ".join(f"{option}={default}" for option, default in options.items())
            console.print(Text(f"{'':<{width}}  options: {shown}"), soft_wrap=True)


def describe_passes() -> list[dict[str, Any]]:
    """The same in JSON: name, class, kind, summary, passes it stands after and before, options with their defaults."""
    described: list[dict[str, Any]] = []
    own = {name: [place] for name, place in REGISTRY.items()}
    for name, places in (own | plugin_passes() | own).items():
        try:
            step = load_pass(name)
        except UserError as error:
            described.append({"name": name, "class": " and ".join(places), "error": error.faults[0].what})
            continue
        facts: dict[str, Any] = {
            "kind": step.kind,
            "summary": step.summary,
            "after": list(step.after),
            "before": list(step.before),
        }
        described.append({"name": name, "class": places[0], **facts, "options": options_of(step)})
    return described


def options_of(step: type[Pass]) -> dict[str, str]:
    """Option -> its default as the text of a pipeline has it, "(required)" where there is none."""
    return {option.name: _default(option) for option in dataclasses.fields(step)}


def _default(option: "dataclasses.Field[Any]") -> str:
    if option.default_factory is not dataclasses.MISSING:
        return print_value(option.default_factory())
    return "(required)" if option.default is dataclasses.MISSING else print_value(option.default)
