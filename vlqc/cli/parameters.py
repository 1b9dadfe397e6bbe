"""Parameters of the commands: those that all share, those of a compilation, help in panels, and shell completion."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from vlqc.cli.output import CommandOutput, check_output_file, run_and_exit
from vlqc.families.registry import check_model_type, load_family, register_family
from vlqc.files import trust_links
from vlqc.options.fields import PANELS, OptionInfo, option_info, option_text
from vlqc.options.options import Options
from vlqc.pipeline.registry import REGISTRY, plugin_passes
from vlqc.targets.target import NAMES

Completion = Callable[[click.Context, click.Parameter, str], list[str]]

PATH = click.Path(path_type=Path)
OUTPUT_PANEL = "What this command prints"
CONTEXT: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda name: name.replace("-", "_"),
    "max_content_width": 120,
    "show_default": True,
}
GUIDE = """\b
Usual order:
  vlqc compile --model_path FLOAT --calib_images IMAGES --save_directory OUT
  vlqc verify OUT --model_path FLOAT --calib_images IMAGES --locate
  vlqc report OUT

Exit codes: 0 success, 1 verification failed or dumps differ, 2 invalid input, 70 bug in vlqc, 130 interrupted.

In option names, dash and underscore are the same.

\b
Shell completion of commands, options and values (also: zsh_source, fish_source):
  eval "$(_VLQC_COMPLETE=bash_source vlqc)"
"""
EXAMPLES = """\b
Static W8A8 for vLLM Ascend and MindIE, with the options of quant_qwen2_5vl.py:
  vlqc compile --model_path FLOAT --calib_images IMAGES --save_directory OUT --anti_method m2

\b
Activation scales per token; 4-bit weights in groups; MindIE's own layout:
  vlqc compile ... --scheme w8a8_dynamic
  vlqc compile ... --scheme w4a8_dynamic --group_size 256
  vlqc compile ... --mindie_format

\b
Estimate of time, memory and result; options from a file; continue after an interruption:
  vlqc compile ... --plan
  vlqc compile --recipe w8a8.yaml --anti_method m4
  vlqc compile ... --resume
"""


# ---- commands and options --------------------------------------------------------------------------------------------


class PanelOption(click.Option):
    """An option with the heading under which the help lists it."""

    def __init__(self, *args: Any, panel: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.panel = panel


class DescribedArgument(click.Argument):
    """A positional argument with a description in the help."""

    def __init__(self, *args: Any, description: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.panel = "Arguments"
        self.description = description

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        return self.make_metavar(ctx), self.description


class Command(click.Command):
    """A command whose help lists its options under their panels, and whose errors `run_and_exit` reports."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                panels.setdefault(getattr(parameter, "panel", "Options"), []).append(record)
        for panel, records in panels.items():
            with formatter.section(panel):
                formatter.write_dl(records)

    def main(self, args: Any = None, prog_name: str | None = None, **extra: Any) -> Any:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False
        run_and_exit(lambda: super(Command, self).main(words, prog_name, **extra), as_json="--json" in words)


class CommandGroup(Command, click.Group):
    """A group of such commands."""

    command_class = Command

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


option = functools.partial(click.option, cls=PanelOption)
argument = functools.partial(click.argument, cls=DescribedArgument)


def output_options(command: Callable[..., int | None]) -> Callable[..., int | None]:
    """Adds --json, --json_file and --quiet. The command receives them as `output`, a CommandOutput."""

    @functools.wraps(command)
    def with_output(*, as_json: bool, json_file: Path | None, quiet: bool, **values: Any) -> int | None:
        check_output_file("--json_file", json_file)
        return command(output=CommandOutput(as_json, json_file, quiet), **values)

    help_json = "Print one JSON object on stdout and nothing else there."
    help_file = "Also write that object to a file."
    decorated: Callable[..., int | None] = with_output
    for decorator in (
        option("--quiet", "-q", is_flag=True, help="Print errors only.", panel=OUTPUT_PANEL),
        option("--json_file", type=PATH, default=None, metavar="FILE", help=help_file, panel=OUTPUT_PANEL),
        option("--json", "as_json", is_flag=True, help=help_json, panel=OUTPUT_PANEL),
    ):
        decorated = decorator(decorated)
    return decorated


def family_option(command: Callable[..., int | None]) -> Callable[..., int | None]:
    """Adds --family, which registers a model family before the command runs. It must be one for the command's model."""

    @functools.wraps(command)
    def with_family(*, family: str | None, **values: Any) -> int | None:
        if family is not None:
            cls = load_family(family)
            check_model_type(cls, next(values[name] for name in ("model", "bundle", "folder") if name in values))
            register_family(cls)
        return command(**values)

    info = option_info("family")
    return option(info.flag, default=None, metavar=info.metavar, help=info.help)(with_family)


def links_option(folder: str) -> Callable[[Callable[..., int | None]], Callable[..., int | None]]:
    """Adds --follow_links, which allows the links in a folder. folder: name of the parameter with its path."""

    def decorate(command: Callable[..., int | None]) -> Callable[..., int | None]:
        @functools.wraps(command)
        def with_links(*, follow_links: bool, **values: Any) -> int | None:
            if follow_links and values[folder] is not None:
                trust_links(values[folder])
            return command(**values)

        info = option_info("follow_links")
        help_text = "Read the files to which links in the float checkpoint's folder lead, anywhere on this machine."
        return option(info.flag, is_flag=True, help=help_text)(with_links)

    return decorate


def compile_options(command: Callable[..., int | None]) -> Callable[..., int | None]:
    """Adds one option per field of Options, and --recipe. The command receives those that were set as `options`.

    Values stay text: Options parses them, so that all faults are reported at once. Defaults are not passed on, so that
    a recipe can replace them.
    """

    @functools.wraps(command)
    def with_options(**values: Any) -> int | None:
        context = click.get_current_context()
        options = {name: values.pop(name) for name in (*Options.model_fields, "recipe")}
        was_set = {name for name in options if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
        return command(options={name: value for name, value in options.items() if name in was_set}, **values)

    help_recipe = "YAML file with options under the same names; options on the command line take precedence."
    decorated: Callable[..., int | None] = with_options
    decorated = option("--recipe", default=None, metavar="FILE", help=help_recipe, panel=PANELS[0])(decorated)
    in_panels = sorted(Options.model_fields, key=lambda name: PANELS.index(option_info(name).panel))
    for name in reversed(in_panels):
        decorated = _option_of_field(name)(decorated)
    return decorated


def _option_of_field(name: str) -> Callable[[Callable[..., int | None]], Callable[..., int | None]]:
    field, info = Options.model_fields[name], option_info(name)
    if info.is_flag:
        return option(info.flag, is_flag=True, help=info.help, panel=info.panel)
    no_default = field.is_required() or field.default is None
    return option(
        info.flag,
        multiple=info.multiple,
        default=() if info.multiple else None if no_default else option_text(field.default),
        metavar=info.metavar,
        shell_complete=_completion(info),
        help=info.help,
        panel=info.panel,
    )


# ---- shell completion ------------------------------------------------------------------------------------------------


def complete_word(words: list[str]) -> Completion:
    """Completes one of the words."""
    return lambda context, parameter, incomplete: [word for word in words if word.startswith(incomplete)]


def complete_list(words: list[str]) -> Completion:
    """Completes a comma-separated list without repetition: `text,o` to `text,onnx`."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
        head, comma, last = incomplete.rpartition(",")
        return [head + comma + word for word in words if word.startswith(last) and word not in head.split(",")]

    return complete


def complete_pass(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Completes the name of a pass of vlqc or of an installed package."""
    return complete_word([*REGISTRY, *plugin_passes()])(context, parameter, incomplete)


def _completion(info: OptionInfo) -> Completion | None:
    """None: the shell completes file names."""
    if info.choices:
        return (complete_list if info.comma_separated else complete_word)(list(info.choices))
    if info.metavar == "ENGINE":
        return complete_word(list(NAMES))
    if info.metavar == "PASS":
        return complete_pass
    return complete_word(["True", "False"]) if info.metavar == "True|False" else None
