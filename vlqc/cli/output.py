"""How a command ends: what goes to stdout and stderr, in words or as JSON, and the exit code.

0: fine; 1: a folder failed verification; 2: something in the user's input; 70: a fault of vlqc; 130: interrupted.

With --json stdout holds one JSON object and nothing else: the result, or `{"error": ...}` with the exit code and every
fault as what, where, why and fix. Progress and warnings go to stderr as ever, with --quiet nothing but errors does.
"""

import functools
import inspect
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from vlqc.cli.command_help import BARE
from vlqc.cli.standard_streams import Unwritable
from vlqc.errors import Fault, UserError, VlqcError, third_party_notes
from vlqc.files import format_json
from vlqc.frontend.distributed import current_process_group, init_distributed
from vlqc.options.paths import output_faults

FAILED, USER, INTERNAL, INTERRUPTED = 1, 2, 70, 130
OUR_FAULT = "this is a fault of vlqc; please report it with the lines above"
OUTPUT = "What this command prints"
_signals: list[int] = []  # those that have come and are to end this program


@dataclass(frozen=True)
class Answer:
    """How a command gives its result: what its options --json, --json_file and --quiet say."""

    as_json: bool = False
    json_file: Path | None = None
    quiet: bool = False

    def give(self, value: Any, render: Callable[[Console], None]) -> None:
        """A result. value: for JSON; render: the same as words, onto a console."""
        text = format_json(value)
        if self.json_file is not None:
            write_file("--json_file", self.json_file, text)
        if self.as_json:
            typer.echo(text, nl=False)
        elif not self.quiet:
            render(Console())


ANSWER: dict[str, Any] = {
    "as_json": Annotated[
        bool,
        typer.Option(
            "--json",
            metavar=BARE,
            help="Print one JSON object on stdout and nothing else there.",
            rich_help_panel=OUTPUT,
        ),
    ],
    "json_file": Annotated[
        Path | None,
        typer.Option("--json_file", metavar="FILE", help="Also write that object into a file.", rich_help_panel=OUTPUT),
    ],
    "quiet": Annotated[
        bool, typer.Option("--quiet", "-q", metavar=BARE, help="Print nothing but errors.", rich_help_panel=OUTPUT)
    ],
}


class Commands(TyperGroup):
    """The group of commands. With --json, what is wrong with the command line itself is told as JSON, too."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        as_json = standalone_mode and "--json" in words
        try:
            ended = super().main(
                words, prog_name, complete_var, standalone_mode and not as_json, windows_expand_args, **extra
            )
        except Exception as error:
            if isinstance(error, Unwritable):  # --help, which no command tells
                print_error(error)
                sys.exit(USER)
            message = getattr(error, "format_message", None)  # of the command line; commands tell of all else
            if not as_json or message is None:
                raise
            fault = Fault(message(), fix="vlqc --help lists the commands, vlqc COMMAND --help their options")
            _echo_json(_failure("usage", USER, [fault]))
            sys.exit(USER)
        if as_json:
            sys.exit(ended if isinstance(ended, int) else 0)
        return ended


def answering(command: Callable[..., None]) -> Callable[..., None]:
    """Gives `command`, which takes an `answer`, the options that all commands have in its place.

    What it raises becomes text on stderr, or JSON on stdout, and an exit code.
    """
    signature = inspect.signature(command)
    own = [each for each in signature.parameters.values() if each.name != "answer"]
    defaults = vars(Answer())
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=kind)
        for name, kind in ANSWER.items()
    ]

    @functools.wraps(command)
    def answer(*args: Any, **given: Any) -> None:
        how = Answer(**{name: given.pop(name) for name in ANSWER if name in given})
        try:
            check_file("--json_file", how.json_file)
            command(*args, answer=how, **given)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            told = current_process_group().should_report(error)
            if _signals or isinstance(error, KeyboardInterrupt):
                code = INTERRUPTED
                if told:
                    _print_interrupted(error, as_json=how.as_json)
            elif isinstance(error, VlqcError):
                code = error.exit_code
                if told:
                    print_error(error, as_json=how.as_json and not isinstance(error, Unwritable))
            else:
                code = INTERNAL
                if told:
                    _print_unforeseen(error, as_json=how.as_json)
            raise typer.Exit(code) from None

    answer.__signature__ = signature.replace(parameters=[*own, *shared])  # type: ignore[attr-defined]
    answer.__annotations__ = {each.name: each.annotation for each in (*own, *shared)}
    return answer


def together(command: Callable[..., None]) -> Callable[..., None]:
    """Lets `command` run in all processes that torchrun started. Around everything: bad options, too, are told once."""

    @functools.wraps(command)
    def run(*args: Any, **given: Any) -> None:
        try:
            with init_distributed():
                command(*args, **given)
        except UserError as error:  # the processes do not find each other
            print_error(error, as_json=bool(given.get("as_json")))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as error:  # they were still waiting for each other
            _print_interrupted(error, as_json=bool(given.get("as_json")))
            raise typer.Exit(INTERRUPTED) from None

    return run


def check_file(flag: str, file: Path | None) -> None:
    """UserError for a file that cannot be written, or lies in a checkpoint: before the work, not after it."""
    if file is not None and file.exists() and not file.is_dir() and not file.is_file():  # a pipe may never take it
        fix = "name a file; --json prints on stdout" if flag == "--json_file" else "name a file"
        raise UserError(Fault(f"{flag} {file} cannot be written", why="it is not an ordinary file", fix=fix))
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        why = "it is a folder" if file.is_dir() else f"there is no folder {file.parent}"
        raise UserError(Fault(f"{flag} {file} cannot be written", why=why, fix="name a file in an existing folder"))
    if file is not None and (faults := output_faults(f"{flag} {file} is not written", file)):
        raise UserError(*faults)


def write_file(flag: str, file: Path, text: str) -> None:
    """UserError where it cannot be written although `check_file` found nothing: the disk is full, or not ours."""
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(Fault(f"{flag} {file} cannot be written", why=str(error), fix="name another file")) from None


def end_as_if_interrupted() -> None:
    """Lets SIGTERM, which schedulers send, end a command as Ctrl-C does: what is finished is kept, and it says so.

    Either is remembered: code that was being imported may make another error of it. Where Ctrl-C is ignored, as in the
    background of a script, it stays so. Not under torchrun, which ends the other processes by SIGTERM when one has told
    what is wrong.
    """

    def interrupt(number: int, _: object) -> None:
        _signals.append(number)
        raise KeyboardInterrupt

    if "TORCHELASTIC_RUN_ID" in os.environ:
        return
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)


def stderr() -> Console:
    return Console(stderr=True)


def print_error(error: VlqcError, *, as_json: bool = False) -> None:
    """The faults one below the other, what is wrong in bold where the terminal can."""
    if as_json:
        kind = "input" if isinstance(error, UserError) else "internal"
        _echo_json(_failure(kind, error.exit_code, error.faults, error))
        return
    console = stderr()
    if not isinstance(error, UserError):
        console.print(Text(str(error)), soft_wrap=True)
    for fault in error.faults if isinstance(error, UserError) else ():
        head, *rest = str(fault).split("\n")
        console.print(Text.assemble(("error: ", "bold red"), (head, "bold")), soft_wrap=True)
        for line in rest:
            console.print(Text(line), soft_wrap=True)
    _print_notes(error)


def _print_interrupted(error: BaseException, *, as_json: bool) -> None:
    if as_json:
        _echo_json(_failure("interrupted", INTERRUPTED, [Fault("interrupted")], error))
        return
    stderr().print("interrupted")
    _print_notes(error)


def _print_unforeseen(error: BaseException, *, as_json: bool) -> None:
    traceback.print_exception(error)  # with the notes
    others = third_party_notes(error)
    if not others:
        stderr().print(OUR_FAULT)
    if as_json:
        fault = Fault(f"{type(error).__name__}: {error}", fix=", ".join(others) or OUR_FAULT)
        _echo_json(_failure("internal", INTERNAL, [fault], error))


def _failure(kind: str, code: int, faults: Sequence[Fault], error: BaseException | None = None) -> dict[str, Any]:
    notes = list(getattr(error, "__notes__", ()))
    return {"error": kind, "exit_code": code, "faults": [asdict(fault) for fault in faults], "notes": notes}


def _echo_json(value: Any) -> None:
    typer.echo(format_json(value), nl=False)


def _print_notes(error: BaseException) -> None:
    """How to go on, where that is possible."""
    for note in getattr(error, "__notes__", ()):
        stderr().print(Text(note), soft_wrap=True)
