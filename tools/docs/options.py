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
FOOT = """## Precision search

`--fallback auto` gives each group of linear layers (q/k/v, gate/up, all experts of a layer, each other layer alone) one
of its *candidates*: every scheme in which the engines of `--target` run the group in one folder with the scheme that
was asked for, whatever that is. `W8A8_MIX` is a candidate only if it was asked for; layers of `--exclude` stay in
float. Fewer bits than asked for are candidates with `--max_bytes` only. Without a version, the target stands for all
versions, so `W4A8_DYNAMIC` may be chosen, which vLLM Ascend dropped in 0.26: `--target vllm-ascend@0.26` leaves it out.
Both engines together run W8A8 and FLOAT only, and the default target of static W8A8 is both: use
`--target vllm-ascend` for more candidates.

- `--min_sqnr DB`: the least run time at which the predicted SQNR of the logits is DB or more. A group keeps the scheme
  that was asked for unless another one is needed. Time above that scheme is at most 1 % above the optimum. A bound that
  cannot be met is a warning, and the folder with the least error is written.
- `--max_bytes BYTES`: the least predicted error with weight files of BYTES or less, headers and float tensors included.
  The error is at most 1 % above the optimum. The asked scheme has no preference, and run time does not matter: where
  the engine runs W8A16, it often takes the place of W8A8, which is as large and less precise. A bound that is too small
  is an error before the calibration, with the smallest possible size.
- `--max_float_groups NUMBER`: the asked scheme everywhere, but NUMBER groups in float, those with the largest error
  first. No other scheme is chosen, W8A16 neither; layers on which the engine does not run the asked scheme are as
  `--float_as` says. With the other two goals, the search begins there with the cheapest scheme that the engine runs.

Run time is what reading the tensors takes, and 10 % more with scales per token, or 50 % more for 8-bit weights with
float inputs: a mean of prompts, where float products take twice the time of integer ones, and single tokens, where only
reading counts. Inputs of `W8A8_MIX` count as quantized per token: with static inputs, as on decode nodes, the SQNR is
lower, and `vlqc verify` states both. All candidates are made of the weights as they were smoothed for the asked scheme,
so ask for the one that most layers should have.

`--plan` prints the possible sizes. The search needs more time and disk space than a compilation: weights are quantized
once in each format of the candidates (static 8-bit, other 8-bit, 4-bit), and all of them are on the disk until the last
stage is finished. To choose among fewer schemes, copy the pipeline of `vlqc passes --explain` and add, for example,
`measure-sensitivity{schemes=W8A8_DYNAMIC;W8A16}`.

The prediction adds the noise that every group causes alone. On the calibration samples, the measured SQNR of the
logits of `tools/demo/tiny_vl` was 47.4 dB where 44.0 dB were predicted (`--min_sqnr`), and 38.2 dB instead of 33.5 dB
(near the smallest size); that of a random checkpoint with outliers was 35.2 dB instead of 35.8 dB.

## Recipes

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
