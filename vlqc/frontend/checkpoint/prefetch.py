"""Reading ahead: what will be wanted next is brought from the disk while something else is computed.

It only fills the system's cache of files, in one thread with one small buffer: whoever reads the same bytes later finds
them there, and they do not count as memory of the process.
"""

import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

BUFFER_BYTES = 4 << 20


@dataclass(frozen=True)
class Span:
    """Bytes begin to end of a file."""

    file: Path
    begin: int
    end: int


class ReadAhead:
    """Reads spans in the background, one set at a time: a new one ends what is left of the one before."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._enough = threading.Event()

    def start(self, spans: Iterable[Span]) -> None:
        """Errors are left to whoever really needs the bytes."""
        self.stop()
        self._enough = threading.Event()
        wanted = sorted(spans, key=lambda span: (str(span.file), span.begin))
        self._thread = threading.Thread(target=_read, args=(wanted, self._enough), daemon=True, name="read-ahead")
        self._thread.start()

    def wait(self) -> None:
        """Until all that was started is read."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def stop(self) -> None:
        self._enough.set()
        self.wait()


def _read(spans: Iterable[Span], enough: threading.Event) -> None:
    buffer = memoryview(bytearray(BUFFER_BYTES))
    for span in spans:
        try:
            handle = os.open(span.file, os.O_RDONLY)
        except OSError:
            continue
        try:
            position = span.begin
            while position < span.end and not enough.is_set():
                got = os.preadv(handle, [buffer[: min(BUFFER_BYTES, span.end - position)]], position)
                if not got:
                    break
                position += got
        except OSError:
            continue
        finally:
            os.close(handle)
