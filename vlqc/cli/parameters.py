"""The options of a compilation as typer sees them: one parameter per field of `Options`, in the panels of the help."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from vlqc.cli.command_help import BARE
from vlqc.cli.completion import Completer, one_of, one_pass, several_of
from vlqc.options.option_values import extra_of, flag_of
from vlqc.options.options import PANELS, Options

RECIPE = typer.Option(
    "--recipe",
    help="YAML file with options, under the same names; what is given on the command line counts.",
    rich_help_panel=PANELS[0],
    metavar="FILE",
)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives `command`, which takes **options, one parameter per field of Options. Only what was given arrives."""
    taken = [each for each in inspect.signature(command).parameters.values() if each.kind is not each.VAR_KEYWORD]
    in_panels = sorted(
        Options.model_fields, key=lambda name: PANELS.index(extra_of(Options.model_fields[name])["panel"])
    )
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
    field = Options.model_fields[name]
    extra = extra_of(field)
    many = extra["kind"] == "globs"
    default: Any = (
        False if extra["flag"] else None if many or field.is_required() or field.default is None else str(field.default)
    )
    option = typer.Option(
        flag_of(name),
        help=field.description,
        rich_help_panel=extra["panel"],
        metavar=BARE if extra["flag"] else _placeholder(field.annotation, extra),
        autocompletion=_completer(field.annotation, extra),
    )
    kind: Any = bool if extra["flag"] else list[str] | None if many else str | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _completer(annotation: object, extra: dict[str, Any]) -> Completer | None:
    """What a shell can complete."""
    if extra["values"]:
        return (several_of if extra["kind"] == "formats" else one_of)(list(map(str, extra["values"])))
    if extra["kind"] == "target":
        return one_of(["vllm-ascend", "mindie", "both"])
    if extra["kind"] == "pass":
        return one_pass
    return one_of(["True", "False"]) if annotation is bool and not extra["flag"] else None


def _placeholder(annotation: object, extra: dict[str, Any]) -> str:
    """What stands for the value in the help."""
    if extra["values"]:
        return "|".join(map(str, extra["values"]))
    if extra["kind"]:
        return {"globs": "GLOB", "target": "ENGINE", "pass": "PASS"}[extra["kind"]]
    words = {"bool": "True|False", "Path": "PATH", "int": "NUMBER", "float": "NUMBER"}
    return next((word for part, word in words.items() if part in str(annotation)), "TEXT")
