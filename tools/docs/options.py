"""Prints vlqc/docs/options.md: the options of every command, as the command line defines them.

python -m tools.docs.options > vlqc/docs/options.md
"""

from collections.abc import Iterable
from typing import Any

from typer.main import get_command

from vlqc.cli.commands import app
from vlqc.options.options import PANELS, Options

HEAD = """# Options

*Printed by `python -m tools.docs.options` from the options table `vlqc/options/options.py`; do not edit.*

In the name of an option, underscore and dash are the same: `--model_path`, `--model-path`. Boolean options take
`True` or `False` (also `true`, `false`, `1`, `0`, `yes`, `no`); flags take no value. Options that take a GLOB can be
repeated. `vlqc.compile` takes the options of `vlqc compile` as keyword arguments, and a recipe takes them as YAML keys.
"""
OF_EVERY_COMMAND = {"--json", "--json_file", "--quiet", "--help"}


def commands() -> dict[str, Any]:
    """Command name -> click command; the group itself under the empty name."""
    group: Any = get_command(app)
    return {**group.commands, "": group}


def page() -> str:
    """The text of vlqc/docs/options.md."""
    found = commands()
    options = options_of(found["compile"])
    parts = [HEAD, "## `vlqc compile`\n"]
    for panel in PANELS:
        parts.append(f"### {panel}\n\n{table(each for each in options if each.rich_help_panel == panel)}")
    parts.append(f"## Options of every command\n\n{table(each for each in options if flag(each) in OF_EVERY_COMMAND)}")
    for name, command in found.items():
        if name not in ("", "compile"):
            parts.append(section(name, command))
    return "\n".join(parts)


def section(name: str, command: Any) -> str:
    """A command other than compile: its arguments, purpose and own options."""
    arguments = [str(each.metavar or each.name) for each in command.params if each.param_type_name == "argument"]
    shared = {flag(each) for each in options_of(commands()["compile"])} if name == "passes" else OF_EVERY_COMMAND
    own = [each for each in options_of(command) if flag(each) not in shared]
    text = f"## `{' '.join(['vlqc', name, *arguments])}`\n\n{command.help}\n"
    if name == "passes":
        text += "\nWith `--explain`, it takes the options of `vlqc compile`.\n"
    return text + (f"\n{table(own)}" if own else "")


def options_of(command: Any) -> list[Any]:
    """Those that the help shows."""
    return [each for each in command.params if each.param_type_name == "option"]


def flag(option: Any) -> str:
    """The long name with underscores: --model_path."""
    return "--" + max(option.opts, key=len).removeprefix("--").replace("-", "_")


def table(options: Iterable[Any]) -> str:
    return "".join(["| option | value | default | meaning |\n|---|---|---|---|\n", *map(row, options)])


def row(option: Any) -> str:
    """One line of a table: names, values, default, meaning."""
    names = ", ".join(f"`{name}`" for name in (flag(option), *(name for name in option.opts if len(name) == 2)))
    metavar = (option.metavar or "").strip()
    field = Options.model_fields.get(flag(option).removeprefix("--"))
    default = option.default if field is None or field.is_required() else field.default
    if not metavar:
        values, shown = "flag", ""
    else:
        values, shown = f"`{metavar}`".replace("|", "\\|"), "" if default in (None, ()) else f"`{default}`"
    return f"| {names} | {values} | {shown} | {option.help} |\n"


if __name__ == "__main__":
    print(page(), end="")
