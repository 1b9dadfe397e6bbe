"""The options of a compilation as typer sees them: one parameter per field of `Options`, in the panels of the help."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from vlqc.cli.command_help import BARE
from vlqc.cli.completion import Completer, one_of, one_pass, several_of
from vlqc.options.options import PANELS, OptionInfo, Options, option_info
from vlqc.targets.target import NAMES

RECIPE = typer.Option(
    "--recipe",
    help="YAML file with options, under the same names; what is given on the command line counts.",
    rich_help_panel=PANELS[0],
    metavar="FILE",
)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives `command`, which takes **options, one parameter per field of Options. Only what was given arrives."""
    taken = [each for each in inspect.signature(command).parameters.values() if each.kind is not each.VAR_KEYWORD]
    in_panels = sorted(Options.model_fields, key=lambda name: PANELS.index(option_info(name).panel))
    recipe = inspect.Parameter(
        "recipe", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, RECIPE]
    )
    # Panels appear in the order of their first option: the command's own come last.
    parameters = [
        *(_parameter(name) for name in in_panels),
        recipe,
        *(each.replace(kind=each.KEYWORD_ONLY) for each in taken),
    ]
    bare = {each.name for each in parameters if each.default is False} - {each.name for each in taken}
    untouched = {
        name for name, field in Options.model_fields.items() if field.default is not None and not field.is_required()
    }

    @functools.wraps(command)
    def with_options(context: typer.Context, **given: Any) -> None:
        def is_given(name: str, value: Any) -> bool:
            if value is None or value == []:
                return False
            # A default that typer fills in would stand in the way of what a recipe says.
            source = context.get_parameter_source(name)
            return name not in bare | untouched or source is None or source.name != "DEFAULT"

        command(**{name: value for name, value in given.items() if is_given(name, value)})

    of_typer = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    with_options.__signature__ = inspect.Signature([of_typer, *parameters])  # type: ignore[attr-defined]
    with_options.__annotations__ = {each.name: each.annotation for each in (of_typer, *parameters)}
    return with_options


def _parameter(name: str) -> inspect.Parameter:
    """A field of Options as typer sees it. Values stay text: Options reads them, so that all faults come at once."""
    field, info = Options.model_fields[name], option_info(name)
    default: Any = (
        False
        if info.is_flag
        else None
        if info.multiple or field.is_required() or field.default is None
        else str(field.default)
    )
    option = typer.Option(
        info.flag,
        help=info.help,
        rich_help_panel=info.panel,
        metavar=BARE if info.is_flag else info.metavar,
        autocompletion=_completer(info),
    )
    kind: Any = bool if info.is_flag else list[str] | None if info.multiple else str | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _completer(info: OptionInfo) -> Completer | None:
    """What a shell can complete."""
    if info.choices:
        return (several_of if info.comma_separated else one_of)(list(info.choices))
    if info.metavar == "ENGINE":
        return one_of(list(NAMES))
    if info.metavar == "PASS":
        return one_pass
    return one_of(["True", "False"]) if info.metavar == "True|False" and not info.is_flag else None
