"""Several processes, connected by torch.distributed.

Objects and CPU tensors are sent over gloo, tensors on a device over the library of that device (nccl, hccl). Every
collective starts by exchanging error status, so one rank's failure raises on all. A process that was killed is noticed
as a broken connection.
"""

import contextlib
import datetime
import io
import itertools
import os
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from vlqc.errors import Fault, InternalError, UserError, VlqcError, third_party_notes
from vlqc.frontend.process_group import ProcessGroup
from vlqc.ir.serialization import aligned_offset, empty_strided, raw_bytes

T = TypeVar("T")

INIT_TIMEOUT = datetime.timedelta(minutes=5)  # until all processes have started
# Between two collectives: longer than any task of a stage, and than the final checks on rank 0. It is for machines that
# become unreachable; a process that ends is noticed at once.
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=1)
POLL_SECONDS = 0.2
DEVICE_BACKENDS = {"cuda": "nccl", "npu": "hccl"}

_init_count = itertools.count()  # all processes call init equally often; each time the store gets a new key prefix
_stores: list[Store] = []


class ProcessLost(UserError):
    """The connection to another process of the run is broken."""


class TorchProcessGroup(ProcessGroup):
    """Rank `rank` of `size` processes. Created and closed by `init_distributed`."""

    def __init__(self, rank: int, size: int) -> None:
        """Waits for all processes. Raises UserError if they do not connect within INIT_TIMEOUT."""
        if dist.is_initialized():
            fix = "call torch.distributed.destroy_process_group() before"
            raise UserError(Fault("torch.distributed is already initialized", "the calling program", fix=fix))
        self.rank, self.size = rank, size
        self._collectives = 0  # number of collectives so far, equal on all ranks
        self._failed = False
        self._failed_rank: int | None = None  # the first rank with an error; None if a process was lost
        self._device: torch.device | None = None
        self._device_group: Any = None
        try:
            self._store = PrefixStore(f"vlqc/{next(_init_count)}", _rendezvous())
            dist.init_process_group("gloo", store=self._store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
        except (RuntimeError, ValueError) as error:
            where = f"RANK={rank}, WORLD_SIZE={size}"
            fix = "start all processes with one torchrun command; for a single process, unset RANK and WORLD_SIZE"
            raise UserError(Fault("processes cannot connect", where, _first_sentence(error), fix)) from error

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # the connection may be broken already
            dist.destroy_process_group()

    def local_device(self, device: torch.device) -> torch.device:
        if device.type == "cpu":
            return device
        index, backend = int(os.environ.get("LOCAL_RANK", self.rank)), getattr(torch, device.type)
        if index >= backend.device_count():
            why = f"LOCAL_RANK is {index}, and {backend.device_count()} are visible"
            fix = "start one process per device, and check ASCEND_RT_VISIBLE_DEVICES or CUDA_VISIBLE_DEVICES"
            raise UserError(Fault(f"not enough {device.type} devices", f"rank {self.rank}", why, fix))
        self._exchange_errors(0)  # a failure above must raise on all ranks before they call new_group
        backend.set_device(index)
        self._device = torch.device(device.type, index)
        self._device_group = dist.new_group(backend=DEVICE_BACKENDS[device.type], timeout=COLLECTIVE_TIMEOUT)
        return self._device

    def broadcast(self, src: int, value: T | None) -> T:
        is_src = src == self.rank
        content, buffers = dump_with_tensors(value) if is_src else (b"", [])
        self._exchange_errors(src)
        objects = [content]
        with self._connection():
            dist.broadcast_object_list(objects, src)
        result: Any = value
        if not is_src:
            result, buffers = load_with_tensors(objects[0], self._device)
        for buffer in buffers:
            if buffer.numel():
                with self._connection():
                    group = None if buffer.device.type == "cpu" else self._device_group
                    dist.broadcast(buffer, src, group=group)
        return result  # type: ignore[no-any-return]

    def should_report(self, error: BaseException) -> bool:
        if not self._failed:
            with contextlib.suppress(VlqcError):  # another rank has an error as well, or is gone
                self._exchange_errors(-1, error)
        if self._failed_rank not in (None, self.rank):
            return False
        try:
            return self._store.add("reported", 1) == 1
        except RuntimeError:  # torchrun, which holds the store, is gone
            return self._failed_rank == self.rank or self.is_rank0

    def handle_sigterm(self, *unused: object) -> None:
        """Signal handler: raises ProcessLost once. Ignored during shutdown, so that cleanup completes."""
        if not self._failed:
            self._failed = True
            raise self._lost("torchrun sent SIGTERM to this process, as it does when another one fails")

    def _exchange_errors(self, src: int, error: BaseException | None = None) -> None:
        """Raises the error of the lowest rank that has one, on all other ranks. src: for a consistency check."""
        self._collectives += 1
        status = (self._collectives, src, None if error is None else error_state(error))
        statuses: list[Any] = [None] * self.size
        with self._connection():
            dist.all_gather_object(statuses, status)
        for rank, (_, _, state) in enumerate(statuses):
            if state is not None:
                self._failed, self._failed_rank = True, rank
                if rank == self.rank:
                    return
                raise remote_error(state, rank)
        if len(set(statuses)) > 1:
            raise InternalError(f"ranks call different collectives: {statuses}")

    @contextmanager
    def _connection(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._failed = True
            raise self._lost(_first_sentence(error)) from error

    def _lost(self, why: str) -> ProcessLost:
        what = f"connection lost to another of the {self.size} processes"
        fix = "see the output of that process; one without output was killed, usually for lack of memory. "
        fix += "If a stage is finished, run the same command with --resume to continue"
        return ProcessLost(Fault(what, f"rank {self.rank}", why, fix))


# ---- serialization ---------------------------------------------------------------------------------------------------


class _Pickler(pickle.Pickler):
    """Pickles the layout of tensors; their data goes into `buffers`, without a copy."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.buffers: list[Tensor] = []

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        self.buffers.append(raw_bytes(value))
        layout = tuple(value.shape), value.stride(), aligned_offset(value)
        return value.dtype, *layout, value.device.type != "cpu"


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, device: torch.device | None) -> None:
        super().__init__(file)
        self.buffers: list[Tensor] = []
        self._device = device

    def persistent_load(self, layout: Any) -> Tensor:
        dtype, shape, stride, offset, on_device = layout
        tensor, buffer = empty_strided(dtype, shape, stride, offset, self._device if on_device else None)
        self.buffers.append(buffer)
        return tensor


def dump_with_tensors(value: Any) -> tuple[bytes, list[Tensor]]:
    """Pickles everything but the data of tensors; returns that as uint8 tensors [n], which share their memory.

    Unlike torch.save, it does not copy the data, and leaves out the parts of a storage that a tensor does not span.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return file.getvalue(), pickler.buffers


def load_with_tensors(content: bytes, device: torch.device | None) -> tuple[Any, list[Tensor]]:
    """The inverse: a value with uninitialized tensors, and their memory as uint8 tensors [n], which are to be filled.

    device: of tensors that were not on the CPU. Strides and alignment are as they were.
    """
    unpickler = _Unpickler(io.BytesIO(content), device)
    return unpickler.load(), unpickler.buffers


def error_state(error: BaseException) -> tuple[bool, Any]:
    """(whether it is a UserError, its faults; of other errors what happened and what to do)."""
    if isinstance(error, UserError):
        return True, error.faults
    if isinstance(error, InternalError):
        return False, tuple((fault.what, fault.fix) for fault in error.faults)
    return False, ((f"{type(error).__name__}: {error}", *third_party_notes(error)),)


def remote_error(state: tuple[bool, Any], rank: int) -> VlqcError:
    """The exception to raise for an error of another rank."""
    is_user_error, content = state
    if is_user_error:
        return UserError(*content)
    ((what, *fix),) = content
    return InternalError(f"rank {rank} failed: {what}", *fix)


# ---- initialization --------------------------------------------------------------------------------------------------


def _rendezvous() -> Store:
    """The store of torchrun, or the one of rank 0 if the processes were started otherwise.

    Runs in a thread, because torch does not handle Ctrl-C while it waits. Created once per process.
    """
    errors: list[BaseException] = []

    def connect() -> None:
        try:
            _stores.append(next(iter(rendezvous("env://", timeout=INIT_TIMEOUT)))[0])
        except BaseException as error:
            errors.append(error)

    if not _stores:
        thread = threading.Thread(target=connect, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
    if errors:
        raise errors[0]
    return _stores[0]


def _first_sentence(error: BaseException) -> str:
    """The first sentence of a message of torch, without the location in its source code."""
    return str(error).split("\n")[0].rpartition("] ")[2].partition(". ")[0] or type(error).__name__
