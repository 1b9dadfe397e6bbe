"""Writes tensors in a background thread while the next ones are computed."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from torch import Tensor

from vlqc.emit.shard_writer import ShardWriter
from vlqc.errors import InternalError

QUEUE_BYTES = 512 << 20  # how much may be queued: `add` blocks until there is room
SYNC_BYTES = 256 << 20  # after so many bytes the file is synced, otherwise the whole sync would come at the end


class BackgroundWriter:
    """A ShardWriter's `add` and `close`, in the same order, without waiting for the disk.

    A tensor must not be changed after `add`. An exception of the thread is raised by the next call, unchanged: an
    OSError for a full disk.
    """

    def __init__(self, writer: ShardWriter, queue_bytes: int = QUEUE_BYTES) -> None:
        self.writer, self.queue_bytes = writer, queue_bytes
        self._thread = ThreadPoolExecutor(1, "background-writer")
        self._queue: deque[tuple[int, Future[None]]] = deque()
        self._queued_bytes = self._unsynced = 0
        self._names = set[str]()
        self._failed = False  # used by the thread only

    def add(self, name: str, tensor: Tensor) -> None:
        """Queues a tensor; InternalError for a name that was added before."""
        if name in self._names:
            raise InternalError(f"{name} is written twice")
        self._names.add(name)
        size = tensor.numel() * tensor.element_size()
        while self._queue and (self._queue[0][1].done() or self._queued_bytes + size > self.queue_bytes):
            self._wait_for_first()
        self._queued_bytes += size
        self._queue.append((size, self._thread.submit(self._run, partial(self._write, name, tensor, size))))

    def then(self, action: Callable[[], None]) -> None:
        """Runs `action` in the thread, once everything added so far is written."""
        while self._queue and self._queue[0][1].done():
            self._wait_for_first()
        self._queue.append((0, self._thread.submit(self._run, action)))

    def add_known(self, names: Iterable[str]) -> None:
        """Names of tensors that an earlier run wrote."""
        self._names.update(names)

    def stop(self) -> None:
        """After an error: drops what is queued; nothing is being written when this returns."""
        self._thread.shutdown(cancel_futures=True)

    def close(self, stem: str) -> None:
        """Waits for everything queued, then closes the writer."""
        while self._queue:
            self._wait_for_first()
        self._thread.shutdown()
        self.writer.close(stem)

    def _wait_for_first(self) -> None:
        size, written = self._queue.popleft()
        self._queued_bytes -= size
        try:
            written.result()
        except BaseException:
            self._thread.shutdown(wait=False, cancel_futures=True)
            raise

    def _run(self, action: Callable[[], None]) -> None:
        """In the thread. Skips all actions after a failure, so that no commit covers unwritten data."""
        if self._failed:
            return
        try:
            action()
        except BaseException:
            self._failed = True
            raise

    def _write(self, name: str, tensor: Tensor, size: int) -> None:
        self.writer.add(name, tensor)
        self._unsynced += size
        if self._unsynced >= SYNC_BYTES:
            self.writer.sync()
            self._unsynced = 0
