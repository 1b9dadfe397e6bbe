"""Process groups and their collectives. Threads stand in for the processes, except in tests/end_to_end."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.random_stage import decoder
from vlqc.errors import Fault, InternalError, UserError
from vlqc.frontend.distributed import current_process_group, init_distributed
from vlqc.frontend.process_group import ProcessGroup, balance_load, contiguous_share
from vlqc.frontend.torch_process_group import (
    TorchProcessGroup,
    dump_with_tensors,
    error_state,
    load_with_tensors,
    remote_error,
)
from vlqc.ir.printer import print_stage
from vlqc.ir.stage import Stage
from vlqc.passes.insert_observers import InsertObservers

T = TypeVar("T")


class ThreadGroup(ProcessGroup):
    """One of several threads; values are serialized as between processes."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, shared: list[Any]) -> None:
        self.rank, self.size, self._barrier, self._shared = rank, size, barrier, shared

    def broadcast(self, src: int, value: T | None) -> T:
        if self.rank == src:
            self._shared[:] = [dump_with_tensors(value)]
        self._barrier.wait()
        result: T = value if self.rank == src else received(*self._shared[0])  # type: ignore[assignment]
        self._barrier.wait()
        return result


def received(content: bytes, sent: list[Tensor]) -> Any:
    """The value on a process without a device."""
    value, buffers = load_with_tensors(content, None)
    for buffer, data in zip(buffers, sent, strict=True):
        buffer.copy_(data)
    return value


def run_on_ranks(size: int, program: Callable[[ProcessGroup], T]) -> list[T]:
    """The result of `program` on each of `size` ranks."""
    barrier, shared, results = threading.Barrier(size, timeout=60), list[Any](), dict[int, T]()

    def run(rank: int) -> None:
        try:
            results[rank] = program(ThreadGroup(rank, size, barrier, shared))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(size)]


# ---- load balancing --------------------------------------------------------------------------------------------------


@given(total=st.integers(0, 300), size=st.integers(1, 40))
def test_shares_are_contiguous(total: int, size: int) -> None:
    """Catches a sample on no rank or on two, an unbalanced split, and a rank 0 without samples."""
    shares = [contiguous_share(total, rank, size) for rank in range(size)]
    assert [number for share in shares for number in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1 and len(shares[0]) == max(map(len, shares))


@given(costs=st.lists(st.integers(1, 1000), max_size=30), size=st.integers(1, 8))
def test_load_is_balanced(costs: list[int], size: int) -> None:
    """Catches a load above 4/3 of a lower bound of the optimum, which longest-first scheduling guarantees."""
    owners = balance_load(costs, size)
    load = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(size)]
    assert sum(load) == sum(costs)
    bound = max([sum(costs) / size, *costs, *([sum(sorted(costs)[-size - 1 :][:2])] if len(costs) > size else [])])
    assert max(load) <= bound * 4 / 3 + 1e-9


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("costs", [None, [1.0, 8.0, 2.0, 9.0]])
def test_parallel_map_runs_each_task_once(size: int, costs: Sequence[float] | None) -> None:
    """Catches results in another order, and a task that runs on more than one rank."""
    done: list[int] = []

    def program(process_group: ProcessGroup) -> list[Tensor]:
        def task(number: int) -> Tensor:
            done.append(number)
            return torch.full((2,), float(number))

        return process_group.parallel_map((lambda number=number: task(number) for number in range(4)), costs)

    for results in run_on_ranks(size, program):
        assert [result.tolist() for result in results] == [[number] * 2 for number in range(4)]
    assert sorted(done) == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_scatter_keeps_order_and_groups(size: int) -> None:
    """Catches samples in another order, split groups, and indices that start at 0 on every rank."""

    def program(process_group: ProcessGroup) -> tuple[int, list[str]]:
        return process_group.scatter(["a", "bcd", "e", "fg", "h"] if process_group.is_rank0 else [])

    shares = run_on_ranks(size, program)
    assert "".join(item for _, items in shares for item in items) == "abcdefgh"
    for begin, items in shares:
        assert items == list("abcdefgh")[begin : begin + len(items)]
        assert all(("".join(items).count(group) or not set(group) & set(items)) for group in ("bcd", "fg"))


def test_rank0_first() -> None:
    """Catches other ranks that start before rank 0 has filled a cache."""
    order: list[int] = []
    run_on_ranks(4, lambda process_group: process_group.rank0_first(lambda: order.append(process_group.rank)))
    assert order[0] == 0 and sorted(order) == [0, 1, 2, 3]


# ---- serialization ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float64, torch.int64])
def test_tensors_keep_values_strides_and_alignment(dtype: torch.dtype) -> None:
    """Catches values, strides or alignment that change in transit; the results of arithmetic may depend on them."""
    whole = (torch.arange(720).reshape(6, 10, 12) % 5).to(dtype)
    shapes = {
        "whole": whole,
        "transposed": whole.transpose(0, 2),
        "part": whole[1:, ::2, 3:7],
        "expanded": whole[:, :1].expand(-1, 4, -1),
        "empty": whole[:0],
        "scalar": whole[3, 3, 3],
    }
    sent = {"nested": (shapes, [1, "two", None])}
    arrived = received(*dump_with_tensors(sent))
    assert arrived["nested"][1] == [1, "two", None]
    for name, tensor in shapes.items():
        there = arrived["nested"][0][name]
        assert there.dtype == dtype and torch.equal(there, tensor), name
        assert there.stride() == tensor.stride() and there.storage_offset() % 64 == tensor.storage_offset() % 64, name


def test_errors_keep_their_kind_and_faults() -> None:
    """Catches a UserError that becomes an InternalError on the other ranks, or loses its faults."""
    faults = Fault("one", "here", "why", "do"), Fault("two")
    arrived = remote_error(error_state(UserError(*faults)), 3)
    assert isinstance(arrived, UserError) and arrived.faults == faults
    other = remote_error(error_state(ZeroDivisionError("by zero")), 3)
    assert isinstance(other, InternalError) and "rank 3 failed: ZeroDivisionError: by zero" in str(other)
    broken = remote_error(error_state(InternalError("invariant", "see odd:Boom")), 3)
    assert broken.faults == (Fault("rank 3 failed: invariant", fix="see odd:Boom"),)


# ---- initialization --------------------------------------------------------------------------------------------------


def test_single_process_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a single process that waits for others."""
    for size in (None, "1"):
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if size:
            monkeypatch.setenv("RANK", "0")
            monkeypatch.setenv("WORLD_SIZE", size)
        with init_distributed() as process_group:
            assert (process_group.rank, process_group.size, process_group.is_rank0) == (
                0,
                1,
                True,
            ) and current_process_group() is process_group
            assert process_group.broadcast_from_rank0(lambda: "made") == "made" and list(
                process_group.all_gather(7)
            ) == [7]
            assert process_group.should_report(UserError("bad"))


def test_invalid_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback for RANK=x, and for processes that were not started by torchrun."""
    monkeypatch.setenv("RANK", "x")
    for rank, message in (("9" * 20, "RANK is '9999"), ("2", "RANK is 2, WORLD_SIZE 2")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UserError, match=message), init_distributed():
            pass
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(UserError, match="RANK is 'x'"), init_distributed():
        pass
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="torchrun"), init_distributed():
        pass
    assert current_process_group().size == 1


def test_not_enough_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches two processes on one device, and a traceback of the device library for an invalid index."""
    process = TorchProcessGroup.__new__(TorchProcessGroup)
    process.rank, process.size = 1, 2
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="not enough cuda devices"):
        process.local_device(torch.device("cuda"))
    assert process.local_device(torch.device("cpu")) == torch.device("cpu")


# ---- statistics ------------------------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(size=st.integers(2, 5), tokens=st.integers(1, 40))
def test_observations_do_not_depend_on_the_number_of_ranks(size: int, tokens: int) -> None:
    """Catches a row budget per rank, sums in another order, and statistics of one rank only."""

    def observed(process_group: ProcessGroup) -> str:
        stage: Stage = decoder()
        sample_shapes = stage.execution.sample_shapes
        share = contiguous_share(len(stage.execution.calls), process_group.rank, process_group.size)
        stage.execution.calls, stage.execution.shapes, stage.execution.process_group = (
            [stage.execution.calls[number] for number in share],
            sample_shapes,
            process_group,
        )
        InsertObservers(tokens=tokens).run(stage)
        return print_stage(stage)

    one = observed(ProcessGroup())
    assert run_on_ranks(size, observed) == [one] * size


def test_invalid_port_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a wait until the timeout for a port that cannot exist."""
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="65535"), init_distributed():
        pass
