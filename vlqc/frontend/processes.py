"""One of several processes: how they meet, what they send each other, and how all of them end when one does.

Statistics and decisions live in main memory and travel over gloo; tensors on a device travel over that device's own
library (hccl, nccl). Everything goes through `of`, where all processes meet and each first says whether it is well. So
an error on one ends all; one that was killed is noticed there as a broken connection.
"""

import contextlib
import datetime
import io
import os
import pickle
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from vlqc.errors import Fault, InternalError, UserError, VlqcError, third_party_notes
from vlqc.frontend.distributed import ProcessGroup
from vlqc.ir.serialization import aligned_offset, empty_strided, raw_bytes

T = TypeVar("T")

ARRIVAL = datetime.timedelta(minutes=5)  # until all processes have started
A_MOMENT = 0.2  # seconds
LAST_PORT = 65535
# Between two meetings: more than any one task of a stage, or the first process's last checks of the result, takes. It
# is for machines that fall silent; a process that ends is noticed at once.
SILENCE = datetime.timedelta(hours=1)
LIBRARIES = {"cuda": "nccl", "npu": "hccl"}


class ProcessLost(UserError):
    """Another process of the run ended without saying why."""


class TorchProcessGroup(ProcessGroup):
    """Process number `rank` of `size`. Made by `world.joined`, which also closes it."""

    def __init__(self, rank: int, size: int) -> None:
        if dist.is_initialized():
            fix = "leave that to vlqc: destroy the process group before"
            raise UserError(Fault("torch.distributed is in use already", "the calling program", fix=fix))
        self.rank, self.size = rank, size
        self._meetings = 0
        self._over = False
        self._speaker: int | None = None  # who tells the user why it is over; None where one was lost
        self._device: torch.device | None = None
        self._device_group: Any = None
        try:
            self._store = PrefixStore(f"vlqc/{next(_times)}", _store())
            dist.init_process_group("gloo", store=self._store, rank=rank, world_size=size, timeout=SILENCE)
        except (RuntimeError, ValueError) as error:
            where = f"RANK={rank}, WORLD_SIZE={size}"
            fix = "start all of them with one torchrun command; to run alone, unset RANK and WORLD_SIZE"
            raise UserError(Fault("the processes do not find each other", where, _one_line(error), fix)) from error

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # of a connection that is broken already
            dist.destroy_process_group()

    def local_device(self, device: torch.device) -> torch.device:
        if device.type == "cpu":
            return device
        index, backend = int(os.environ.get("LOCAL_RANK", self.rank)), getattr(torch, device.type)
        if index >= backend.device_count():
            why = f"this process is number {index} on its machine, from 0, and {backend.device_count()} are visible"
            fix = "start as many processes as there are devices, and see ASCEND_RT_VISIBLE_DEVICES"
            raise UserError(Fault(f"too few devices of kind {device.type}", f"process {self.rank}", why, fix))
        self.broadcast(0, None)  # none goes on alone to what follows
        backend.set_device(index)
        self._device = torch.device(device.type, index)
        self._device_group = dist.new_group(backend=LIBRARIES[device.type], timeout=SILENCE)
        return self._device

    def broadcast(self, owner: int, value: T | None) -> T:
        packed = _Packed(value) if owner == self.rank else None
        size = 0 if packed is None else len(packed.skeleton)
        sizes = self._meet(owner, size)
        skeleton = self._sent_bytes(owner, sizes[owner], None if packed is None else packed.skeleton)
        if packed is not None:
            for tensor in packed.tensors:
                self._send(owner, tensor)
            return value  # type: ignore[return-value]
        received = _Received(skeleton, self._device)
        made: T = received.load()
        for tensor in received.tensors:
            self._send(owner, tensor)
        return made

    def should_report(self, error: BaseException) -> bool:
        if not self._over:
            with contextlib.suppress(VlqcError):  # another one's error, or that another one is gone
                self._meet(-1, 0, error)
        if self._speaker not in (None, self.rank):
            return False
        try:
            return int(self._store.add("told", 1)) == 1
        except RuntimeError:  # torchrun itself is gone
            return self._speaker == self.rank or self.is_rank0

    def stop(self, *signal: object) -> None:
        """What SIGTERM does: an error, once. A process that is on its way out already has to clean up undisturbed."""
        if not self._over:
            self._over = True
            raise _lost("torchrun ended this one (SIGTERM), as it does when another one fails", self)

    # ---- meetings ----------------------------------------------------------------------------------------------------

    def _meet(self, owner: int, size: int, error: BaseException | None = None) -> list[int]:
        """Sizes in bytes that each process announces. Raises the error of the first process that has one, if it is not
        this one."""
        self._meetings += 1
        report = b"" if error is None else pickle.dumps(_report(error))
        mine = torch.tensor([self._meetings, owner, len(report) if error else size, error is not None])
        said = [torch.empty_like(mine) for _ in range(self.size)]
        with self._connected():
            dist.all_gather(said, mine)
        unwell = [rank for rank, each in enumerate(said) if each[3]]
        if unwell:
            self._over, self._speaker = True, unwell[0]
            report = self._sent_bytes(unwell[0], int(said[unwell[0]][2]), report)
            if unwell[0] == self.rank:
                return []
            raise _error_of(report, unwell[0])
        if any(each[:2].tolist() != mine[:2].tolist() for each in said):
            raise InternalError(f"processes meet for different reasons: {[each.tolist() for each in said]}")
        return [int(each[2]) for each in said]

    def _sent_bytes(self, owner: int, size: int, content: bytes | None) -> bytes:
        mine = owner == self.rank and content is not None
        buffer = torch.frombuffer(bytearray(content or b""), dtype=torch.uint8) if mine else _bytes(size)
        with self._connected():
            dist.broadcast(buffer, owner)
        return buffer.numpy().tobytes()

    def _send(self, owner: int, flat: Tensor) -> None:
        """Fills bytes [n], on every process but their owner."""
        if flat.numel():
            with self._connected():
                dist.broadcast(flat, owner, group=None if flat.device.type == "cpu" else self._device_group)

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._over = True
            raise _lost(_one_line(error), self) from error


# ---- what is sent ----------------------------------------------------------------------------------------------------


class _Packed:
    """A value as the bytes of everything but its tensors, and the tensors, each as the bytes [n] that it spans.

    A tensor arrives with the strides and the alignment that it has: the arithmetic on it may depend on both.
    """

    def __init__(self, value: Any) -> None:
        self.tensors: list[Tensor] = []
        file = io.BytesIO()
        pickler = pickle.Pickler(file, protocol=5)
        pickler.persistent_id = self._set_aside  # type: ignore[method-assign]
        pickler.dump(value)
        self.skeleton = file.getvalue()

    def _set_aside(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(raw_bytes(value))
        layout = tuple(value.shape), value.stride(), aligned_offset(value)
        return str(value.dtype).removeprefix("torch."), *layout, value.device.type != "cpu"


class _Received:
    """A value made of a skeleton; its tensors are there at once, what is in them once `tensors` are filled."""

    def __init__(self, skeleton: bytes, device: torch.device | None) -> None:
        self.tensors: list[Tensor] = []
        self._skeleton, self._device = skeleton, device

    def load(self) -> Any:
        unpickler = pickle.Unpickler(io.BytesIO(self._skeleton))
        unpickler.persistent_load = self._make  # type: ignore[method-assign]
        return unpickler.load()

    def _make(self, layout: Any) -> Tensor:
        dtype, shape, stride, offset, on_device = layout
        device = self._device if on_device else None
        tensor, content = empty_strided(getattr(torch, dtype), shape, stride, offset, device)
        self.tensors.append(content)
        return tensor


def _bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


# ---- errors ----------------------------------------------------------------------------------------------------------


def _report(error: BaseException) -> tuple[str, Any]:
    """An error as it travels: of the user's input the faults, of all others what happened and what to do."""
    if isinstance(error, UserError):
        return "faults", error.faults
    if isinstance(error, InternalError):
        return "broken", [(fault.what, fault.fix) for fault in error.faults]
    return "broken", [(f"{type(error).__name__}: {error}", *third_party_notes(error))]


def _error_of(report: bytes, rank: int) -> VlqcError:
    kind, content = pickle.loads(report)
    if kind == "faults":
        return UserError(*content)
    ((what, *fix),) = content
    return InternalError(f"process {rank} ended: {what}", *fix)


def _lost(why: str, process_group: TorchProcessGroup) -> ProcessLost:
    what = f"another of the {process_group.size} processes of this run has ended, or does not answer any more"
    fix = "see what it said itself; one that says nothing was killed, usually because memory ran out. "
    fix += "If a stage was finished, the same command with --resume goes on from there"
    return ProcessLost(Fault(what, f"process {process_group.rank}", why, fix))


def _one_line(error: BaseException) -> str:
    """The first sentence of what torch says, without the name of its source file."""
    return str(error).split("\n")[0].rpartition("] ")[2].partition(". ")[0] or type(error).__name__


_stores: list[Store] = []


def _store() -> Store:
    """Where processes find each other: torchrun's own, which outlives all of them. RuntimeError if there is none.

    Waited for in another thread: while torch waits, nobody hears Ctrl-C.
    """
    trouble: list[BaseException] = []

    def find() -> None:
        try:
            _stores.append(next(iter(rendezvous("env://", timeout=ARRIVAL)))[0])
        except BaseException as error:
            trouble.append(error)

    if not _stores:
        _reach_first_process()
        finding = threading.Thread(target=find, daemon=True)
        finding.start()
        while finding.is_alive():
            finding.join(A_MOMENT)
    if trouble:
        raise trouble[0]
    return _stores[0]


def _reach_first_process() -> None:
    """Waits until something listens where the others meet. RuntimeError if nothing ever does.

    torch would wait, too, and print pages of its own stack meanwhile.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    if not address or not port.isdecimal() or (os.environ.get("RANK") == "0" and not by_torchrun):
        return
    if len(port) > 5 or int(port) > LAST_PORT:
        raise RuntimeError(f"MASTER_PORT is {port[:20]}; {LAST_PORT} is the last one")
    until = time.monotonic() + ARRIVAL.total_seconds()
    while True:
        try:
            socket.create_connection((address, int(port)), timeout=A_MOMENT * 10).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise RuntimeError(f"nobody answers at {address}:{port}: {error}") from error
            time.sleep(A_MOMENT)


_times = iter(range(2**31))  # all processes join equally often; each time under new names
