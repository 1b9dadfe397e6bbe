"""vlqc.emit.background_writer: the same files as without a thread, and no error is lost."""

import errno
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vlqc
from tools.demo import tiny_task
from vlqc.emit.background_writer import BackgroundWriter
from vlqc.emit.shard_writer import ShardWriter
from vlqc.errors import InternalError, UserError

TINY = Path(tiny_task.__file__).parent / "tiny_vl"


def tensors() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {f"t{count}": torch.randn(count, generator=random) for count in (1, 7, 64, 1000, 5)}


@pytest.mark.parametrize("queue_bytes", [0, 100, 1 << 20])
@pytest.mark.parametrize("limit", [None, 3000])
def test_same_bytes_as_without_a_thread(tmp_path: Path, queue_bytes: int, limit: int | None) -> None:
    """Catches tensors out of order or missing at the end, and a full queue that blocks forever."""
    plain, threaded = tmp_path / "plain", tmp_path / "threaded"
    for folder in (plain, threaded):
        folder.mkdir()
    writer = ShardWriter(plain, header_bytes=2000, limit=limit)
    thread = BackgroundWriter(ShardWriter(threaded, header_bytes=2000, limit=limit), queue_bytes)
    for name, tensor in tensors().items():
        writer.add(name, tensor)
        thread.add(name, tensor)
    writer.close("weights")
    thread.close("weights")
    written = {path.name: path.read_bytes() for path in plain.iterdir()}
    assert written == {path.name: path.read_bytes() for path in threaded.iterdir()} and written


class Full(ShardWriter):
    """A disk that is full at the second tensor."""

    def add(self, name: str, tensor: Tensor) -> None:
        if name != "t1":
            raise OSError(errno.ENOSPC, "No space left on device")
        super().add(name, tensor)


def test_an_error_is_raised_by_the_next_call(tmp_path: Path) -> None:
    """Catches a result without the tensors that could not be written."""
    thread = BackgroundWriter(Full(tmp_path, header_bytes=2000))
    with pytest.raises(OSError, match="No space left"):
        for name, tensor in tensors().items():
            thread.add(name, tensor)
        thread.close("weights")
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_repeated_name_is_refused_immediately(tmp_path: Path) -> None:
    """Catches an error that is raised only when a later stage is written."""
    thread = BackgroundWriter(ShardWriter(tmp_path, header_bytes=2000))
    thread.add("t", torch.ones(2))
    with pytest.raises(InternalError, match="t is written twice"):
        thread.add("t", torch.ones(2))


def test_the_queue_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches memory that grows because the disk is slower than the computation."""
    gate, waiting = threading.Event(), threading.Event()
    writer = ShardWriter(tmp_path, header_bytes=2000)
    add = writer.add

    def slow(name: str, tensor: Tensor) -> None:
        gate.wait()
        add(name, tensor)

    monkeypatch.setattr(writer, "add", slow)
    thread = BackgroundWriter(writer, queue_bytes=100)
    thread.add("first", torch.ones(20))

    def second() -> None:
        thread.add("second", torch.ones(20))
        waiting.set()

    other = threading.Thread(target=second)
    other.start()
    assert not waiting.wait(0.2)
    gate.set()
    other.join()
    assert waiting.is_set()
    thread.close("weights")


def test_a_full_disk_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback from the thread, and a work folder that is not removed."""

    def full(writer: ShardWriter, name: str, tensor: Tensor) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "add", full)
    with pytest.raises(UserError, match="No space left"):
        vlqc.compile(model_path=TINY, save_directory=tmp_path / "out", samples=tiny_task.samples(1, seed=0))
    assert list(tmp_path.iterdir()) == []
