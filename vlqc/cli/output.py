"""What a command prints, and how it exits: results and errors as text or JSON, exit codes, signals, broken streams.

Exit codes are 0: success; 1: a folder failed verification, or two dumps differ; 2: invalid input; 70: a bug in vlqc;
130: interrupted. With --json, stdout holds one JSON object: the result, or `{"error": ...}` with the exit code and the
faults. Progress and warnings go to stderr.
"""

import contextlib
import errno
import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.text import Text

from vlqc.errors import Fault, UserError, VlqcError, third_party_notes
from vlqc.files import format_json
from vlqc.formatting import escape_control_chars
from vlqc.frontend.distributed import init_distributed
from vlqc.options.paths import output_faults

FAILED, INVALID_INPUT, INTERNAL, INTERRUPTED = 1, 2, 70, 130
LIBRARIES = ("PIL", "transformers", "torch", "huggingface_hub")
BUG = "this is a bug in vlqc; please report it with the traceback above"
_is_program = False  # whether this process runs the command line, and not a test or a notebook
_signals: list[int] = []  # SIGINT and SIGTERM received so far

# ---- results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CommandOutput:
    """Where a command writes its result: the values of --json, --json_file and --quiet."""

    as_json: bool = False
    json_file: Path | None = None
    quiet: bool = False

    def write(self, value: Any, render: Callable[[Console], None]) -> None:
        """Writes the result. value: for JSON; render: prints the same as text."""
        text = format_json(value)
        if self.json_file is not None:
            write_file("--json_file", self.json_file, text)
        try:
            if self.as_json:
                click.echo(text, nl=False)
            elif not self.quiet:
                render(Console())
        except BrokenPipeError:  # `vlqc ... | head`
            raise
        except OSError as error:
            fix = "free disk space or redirect stdout; files that options name are complete"
            raise UserError(Fault("cannot write to stdout", why=str(error), fix=fix)) from error


def check_output_file(flag: str, path: Path | None) -> None:
    """Raises UserError if the file cannot be written or is part of a checkpoint. Called before the work starts."""
    if path is None:
        return
    what, fix = f"{flag} {path}: cannot write the file", "name a file in an existing folder"
    if path.is_dir() or not path.parent.is_dir():
        why = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise UserError(Fault(what, why=why, fix=fix))
    if path.exists() and not path.is_file():  # writing to a named pipe could block
        fix = "name a file, or use --json for JSON on stdout" if flag == "--json_file" else "name a file"
        raise UserError(Fault(what, why="it is not a regular file", fix=fix))
    if faults := output_faults(what, path):
        raise UserError(*faults)


def write_file(flag: str, path: Path, text: str) -> None:
    """Writes UTF-8. Raises UserError if that fails, for example on a full disk."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            Fault(f"{flag} {path}: cannot write the file", why=str(error), fix="name another file")
        ) from None


def print_lines(lines: Iterable[str], console: Console) -> None:
    """Prints lines as they are: no markup, no wrapping, control characters escaped."""
    for line in lines:
        console.print(Text(escape_control_chars(line)), soft_wrap=True)


def stderr() -> Console:
    """A console on the current sys.stderr."""
    return Console(stderr=True)


# ---- errors ----------------------------------------------------------------------------------------------------------


def run_and_exit(run: Callable[[], int | None], *, as_json: bool) -> NoReturn:
    """Runs a command and exits. The only place that turns errors into messages and exit codes."""
    under_torchrun = _is_program and "TORCHELASTIC_RUN_ID" in os.environ
    try:
        code = run() or 0
    except (Exception, KeyboardInterrupt) as error:
        if under_torchrun:  # it sends SIGTERM when another process fails; the error is printed before this one ends
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        code = _report(error, as_json=as_json)
    if under_torchrun:
        # Threads of torch.distributed can abort a process while the interpreter is torn down, after all work is done.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
                stream.flush()
        os._exit(code)
    sys.exit(code)


@contextmanager
def distributed_command() -> Iterator[None]:
    """Runs a command in all processes that torchrun started; only one of them reports an error."""
    with init_distributed() as process_group:
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if process_group.should_report(error):
                raise
            raise click.exceptions.Exit(_classify(error)[1]) from None


def _classify(error: BaseException) -> tuple[str, int, Sequence[Fault]]:
    """(kind of error in JSON, exit code, faults)."""
    if _signals or isinstance(error, KeyboardInterrupt | click.Abort):
        return "interrupted", INTERRUPTED, [Fault("interrupted")]
    if isinstance(error, click.ClickException):
        fix = "see vlqc --help for the commands and vlqc COMMAND --help for their options"
        return "usage", INVALID_INPUT, [Fault(error.format_message(), fix=fix)]
    if isinstance(error, VlqcError):
        return ("input" if isinstance(error, UserError) else "internal"), error.exit_code, error.faults
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "input", INVALID_INPUT, [Fault(str(error), fix="free disk space or redirect the output")]
    fix = ", ".join(third_party_notes(error)) or BUG
    return "internal", INTERNAL, [Fault(f"{type(error).__name__}: {error}", fix=fix)]


def _report(error: BaseException, *, as_json: bool) -> int:
    """Prints an error as text on stderr, or as JSON on stdout. Returns the exit code."""
    if isinstance(error, click.Abort):  # click raises it from KeyboardInterrupt
        error = error.__cause__ or error
    kind, code, faults = _classify(error)
    notes: list[str] = list(getattr(error, "__notes__", ()))
    unexpected = code == INTERNAL and not isinstance(error, VlqcError)
    if unexpected:
        traceback.print_exception(error)  # prints the notes, too
        if faults[0].fix == BUG:
            stderr().print(BUG)
    faults_json = [asdict(fault) for fault in faults]
    if as_json and _print_json({"error": kind, "exit_code": code, "faults": faults_json, "notes": notes}):
        return code
    if isinstance(error, click.ClickException):
        error.show()
    elif kind == "interrupted":
        print_lines(["interrupted", *notes], stderr())
    elif not unexpected:
        for fault in faults:
            _print_fault("error" if kind == "input" else "internal error", fault)
        print_lines(notes, stderr())
    return code


def _print_fault(label: str, fault: Fault) -> None:
    """The first line in bold where the terminal supports it."""
    what, *details = str(fault).split("\n")
    stderr().print(Text.assemble((f"{label}: ", "bold red"), (what, "bold")), soft_wrap=True)
    print_lines(details, stderr())


def _print_json(value: Any) -> bool:
    """Whether stdout could be written."""
    try:
        click.echo(format_json(value), nl=False)
    except OSError:
        return False
    return True


# ---- the process -----------------------------------------------------------------------------------------------------


class _LogStream(io.TextIOWrapper):
    """stderr, whose failure (a full disk, a closed file) must not end the work: what cannot be written is dropped."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def silence_libraries() -> None:
    """Keeps warnings and log messages of the libraries that read images and models off the terminal.

    They name no file and no remedy, and vlqc reports what it cannot use. -W, PYTHONWARNINGS and TRANSFORMERS_VERBOSITY
    bring them back.
    """
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=rf"({'|'.join(LIBRARIES)})(\.|$)")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def prepare_process() -> None:
    """Sets up the standard streams and the signals of a process that runs the command line.

    Characters that a stream's encoding lacks are escaped. SIGTERM, which job schedulers send, raises KeyboardInterrupt,
    as SIGINT does. Both are recorded, since code that runs during an import may turn KeyboardInterrupt into another
    error. An ignored SIGINT (a background job) stays ignored. Under torchrun signals are left alone: it ends the other
    processes by SIGTERM when one fails.
    """
    global _is_program
    _is_program = True
    silence_libraries()
    if isinstance(sys.stdout, io.TextIOWrapper):  # None if it was closed before the start
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stderr, io.TextIOWrapper):
        file = io.BufferedWriter(io.FileIO(sys.stderr.fileno(), "w", closefd=False))  # closing it leaves stderr open
        sys.stderr = _LogStream(file, sys.stderr.encoding, "backslashreplace", line_buffering=True)

    def interrupt(number: int, _: object) -> None:
        _signals.append(number)
        raise KeyboardInterrupt

    if "TORCHELASTIC_RUN_ID" in os.environ:
        return
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
