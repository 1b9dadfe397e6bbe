"""The passes as `vlqc passes` lists them."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.text import Text

from vlqc.pipeline import REGISTRY, load_pass


def print_passes(console: Console) -> None:
    """Every registered pass: name, kind and one line, below it its options with their defaults."""
    width = max(map(len, REGISTRY))
    for name in REGISTRY:
        step = load_pass(name)
        console.print(Text.assemble((f"{name:<{width}}", "bold"), f"  {step.kind:<8}  {step.summary}"), soft_wrap=True)
        if options := dataclasses.fields(step):
            shown = ", ".join(f"{option.name}={_default(option)}" for option in options)
            console.print(Text(f"{'':<{width}}  options: {shown}"), soft_wrap=True)


def _default(option: "dataclasses.Field[Any]") -> str:
    if option.default_factory is not dataclasses.MISSING:
        return _in_pipeline(option.default_factory())
    return "(required)" if option.default is dataclasses.MISSING else _in_pipeline(option.default)


def _in_pipeline(value: Any) -> str:
    """A value as it is written in the text of a pipeline."""
    if isinstance(value, bool):
        return str(value).lower()
    return ";".join(map(str, value)) if isinstance(value, tuple) else str(value)
