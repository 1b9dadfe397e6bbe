"""Prints vlqc/docs/options.md: the options of every command, as the command line defines them.

python -m tools.docs.options > vlqc/docs/options.md
"""

import inspect
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from vlqc.cli.commands import app
from vlqc.options.fields import PANELS, option_text
from vlqc.options.options import Options

HEAD = """# Options

*Printed by `python -m tools.docs.options` from the options table `vlqc/options/fields.py`; do not edit.*

In the name of an option, underscore and dash are the same: `--model_path`, `--model-path`. Boolean options take
`True` or `False` (also `true`, `false`, `1`, `0`, `yes`, `no`); flags take no value. Options that take a GLOB can be
repeated. `vlqc.compile` takes the options of `vlqc compile` as keyword arguments, and a recipe takes them as YAML keys.
"""
FOOT = """## Recipes

A recipe is a YAML file with options of `vlqc compile`. Options on the command line take precedence; paths are
relative to the working directory.

    model_path: Qwen2.5-VL-7B-Instruct
    calib_images: images
    save_directory: Qwen2.5-VL-7B-W8A8
    anti_method: m4
    exclude: ["*.o_proj"]

    vlqc compile --recipe w8a8.yaml --act_method 1

Options of other names are combined: `--scheme w8a8` with a recipe that says `is_dynamic: True` is an error.

A value is read as on the command line, not by YAML's rules for `no`, `010` or `1:30`. A recipe cannot make code run:
tags, anchors, `trust_remote_code: True`, `follow_links: True` and `module:Class` in `pipeline` are refused.

## Output for scripts

`--json` prints one JSON object on stdout, and `--json_file FILE` writes it to a file. After an error it has the keys
`error` (`input`, `usage`, `internal` or `interrupted`), `exit_code`, `faults` (each with `what`, `where`, `why`,
`fix`) and `notes`. Colors follow `NO_COLOR` and are off outside a terminal. Shell completion:
`eval "$(_VLQC_COMPLETE=bash_source vlqc)"` (also `zsh_source`, `fish_source`).

| exit code | meaning |
|---|---|
| 0 | success |
| 1 | a folder failed verification, or two dumps differ |
| 2 | error in the input |
| 70 | error in vlqc itself |
| 130 | interrupted |
"""
OF_EVERY_COMMAND = {"--json", "--json_file", "--quiet", "--help"}


def commands() -> dict[str, Any]:
    """Command name -> click command; the group itself under the empty name."""
    return {**app.commands, "": app}


def page() -> str:
    """The text of vlqc/docs/options.md."""
    by_name = commands()
    options = options_of(by_name["compile"])
    parts = [HEAD, "## `vlqc compile`\n"]
    for panel in PANELS:
        shown = [each for each in options if each.panel == panel]
        parts.append(f"### {panel}\n\n{table(shown, Options.model_fields)}")
    parts.append(f"## Options of every command\n\n{table(each for each in options if flag(each) in OF_EVERY_COMMAND)}")
    for name, command in by_name.items():
        if name not in ("", "compile"):
            parts.append(section(name, command))
    return "\n".join([*parts, FOOT])


def section(name: str, command: Any) -> str:
    """A command other than compile: its arguments, purpose and own options."""
    arguments = [str(each.metavar or each.name) for each in command.params if each.param_type_name == "argument"]
    shared = {flag(each) for each in options_of(commands()["compile"])} if name == "passes" else OF_EVERY_COMMAND
    own = [each for each in options_of(command) if flag(each) not in shared]
    text = f"## `{' '.join(['vlqc', name, *arguments])}`\n\n{inspect.cleandoc(command.help)}\n"
    if name == "passes":
        text += "\nWith `--explain`, it takes the options of `vlqc compile`.\n"
    return text + (f"\n{table(own)}" if own else "")


def options_of(command: Any) -> list[Any]:
    """Those that the help shows."""
    return [each for each in command.params if each.param_type_name == "option"]


def flag(option: Any) -> str:
    """The long name with underscores: --model_path."""
    return "--" + max(option.opts, key=len).removeprefix("--").replace("-", "_")


def table(options: Iterable[Any], fields: Mapping[str, Any] | None = None) -> str:
    """fields: of Options, whose defaults the command line does not repeat."""
    head = "| option | value | default | meaning |\n|---|---|---|---|\n"
    return "".join([head, *(row(option, (fields or {}).get(flag(option)[2:])) for option in options)])


def row(option: Any, field: Any = None) -> str:
    """One line of a table: names, values, default, meaning."""
    names = ", ".join(f"`{name}`" for name in (flag(option), *(name for name in option.opts if len(name) == 2)))
    metavar = (option.metavar or "").strip()
    required = field is not None and field.is_required()
    default = option.default if field is None else field.default
    unset = default in (None, ()) or (field is None and isinstance(default, Enum))  # the latter is a mark of click
    if not metavar:
        values, shown = "flag", ""
    else:
        values, shown = (
            f"`{metavar}`".replace("|", "\\|"),
            "" if unset else f"`{option_text(default)}`",
        )
    return f"| {names} | {values} | {'required' if required else shown} | {option.help} |\n"


if __name__ == "__main__":
    print(page(), end="")
