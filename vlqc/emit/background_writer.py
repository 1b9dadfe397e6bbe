"""Writing behind: tensors go to the disk in a thread of their own while the next ones are computed."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from torch import Tensor

from vlqc.emit.shard_writer import ShardWriter
from vlqc.errors import InternalError

MOST_WAITING = 512 << 20  # bytes that may wait to be written: whoever adds more waits until there is room
SYNC_EVERY = 256 << 20  # bytes after which the disk is made to follow: otherwise all would be left for the very end


class WriteBehind:
    """A ShardWriter's `add` and `close`, in the same order, without waiting for the disk.

    A tensor must not be changed once it was added. What goes wrong in the thread is raised by the next call, as it is:
    an OSError for a full disk.
    """

    def __init__(self, writer: ShardWriter, most_waiting: int = MOST_WAITING) -> None:
        self.writer, self.most_waiting = writer, most_waiting
        self._thread = ThreadPoolExecutor(1, "write-behind")
        self._pending: deque[tuple[int, Future[None]]] = deque()
        self._waiting = self._unsynced = 0
        self._names = set[str]()
        self._broken = False  # in the thread: whether something went wrong, and nothing behind it may be done

    def add(self, name: str, tensor: Tensor) -> None:
        if name in self._names:
            raise InternalError(f"{name} is written twice")
        self._names.add(name)
        size = tensor.numel() * tensor.element_size()
        while self._pending and (self._pending[0][1].done() or self._waiting + size > self.most_waiting):
            self._settle_first()
        self._waiting += size
        self._pending.append((size, self._thread.submit(self._do, partial(self._write, name, tensor, size))))

    def then(self, action: Callable[[], None]) -> None:
        """Has the thread do something once everything added so far is written."""
        while self._pending and self._pending[0][1].done():
            self._settle_first()
        self._pending.append((0, self._thread.submit(self._do, action)))

    def known(self, names: Iterable[str]) -> None:
        """These were written before."""
        self._names.update(names)

    def stop(self) -> None:
        """After an error: what waits is not written any more, and nothing is being written when this returns."""
        self._thread.shutdown(cancel_futures=True)

    def close(self, stem: str) -> None:
        while self._pending:
            self._settle_first()
        self._thread.shutdown()
        self.writer.close(stem)

    def _settle_first(self) -> None:
        size, written = self._pending.popleft()
        self._waiting -= size
        try:
            written.result()
        except BaseException:
            self._thread.shutdown(wait=False, cancel_futures=True)
            raise

    def _do(self, action: Callable[[], None]) -> None:
        """In the thread. Behind a failure nothing is done: a mark would vouch for what was not written."""
        if self._broken:
            return
        try:
            action()
        except BaseException:
            self._broken = True
            raise

    def _write(self, name: str, tensor: Tensor, size: int) -> None:
        self.writer.add(name, tensor)
        self._unsynced += size
        if self._unsynced >= SYNC_EVERY:
            self.writer.sync()
            self._unsynced = 0
