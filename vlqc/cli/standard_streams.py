"""stdout and stderr of a command, where the disk behind them is full or the device refuses.

stderr is a log: what it cannot take is lost, and the work goes on. stdout is the result: what it cannot take is a fault
that the user can mend, told on stderr. Both take any text: what their encoding lacks is written out.
"""

import io
import sys
from typing import Any, TextIO, cast

from vlqc.errors import Fault, UserError


class Unwritable(UserError):
    """stdout takes no more."""


class Log:
    """stderr: a text stream that stays silent when it takes no more.

    After the first failure nothing is written: what waits in its buffer would fail again when the program ends.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._failed = stream, False

    def write(self, text: str) -> int:
        if text != "":  # written by those who ask whether a stream takes text; bytes it refuses
            self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, method: str, *given: str) -> None:
        if self._failed:
            return
        try:
            getattr(self._stream, method)(*given)
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self._failed = True


class Output(Log):
    """stdout. Unwritable where it takes no more."""

    def _fail(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):  # `vlqc ... | head`
            raise error
        super()._fail(error)
        fix = "make room, or send the output elsewhere; what was asked to be written into files is written"
        raise Unwritable(Fault("the output cannot be written", "stdout", str(error), fix)) from error


def guard() -> None:
    """Puts both in the place of the streams of this process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None: closed when the program began
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout is not None:
        sys.stdout = cast(TextIO, Output(sys.stdout))
    if sys.stderr is not None:
        sys.stderr = cast(TextIO, Log(sys.stderr))
