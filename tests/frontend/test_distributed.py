"""vlqc.frontend.distributed and what rests on it: several processes are threads here, which meet as processes do."""

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
from vlqc.frontend.distributed import ProcessGroup, balance_load, current_process_group, init_distributed, share_of
from vlqc.frontend.processes import TorchProcessGroup, _error_of, _Packed, _Received, _report
from vlqc.ir.printer import print_stage
from vlqc.ir.stage import Stage
from vlqc.passes.insert_observers import InsertObservers

T = TypeVar("T")


class Meeting(ProcessGroup):
    """One of several threads, each of which takes part in every `of`; what is sent is packed as between processes."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, table: list[Any]) -> None:
        self.rank, self.size, self._barrier, self._table = rank, size, barrier, table

    def broadcast(self, owner: int, value: T | None) -> T:
        if self.rank == owner:
            self._table[:] = [_Packed(value)]
        self._barrier.wait()
        packed = self._table[0]
        made: T = value if self.rank == owner else received(packed)  # type: ignore[assignment]
        self._barrier.wait()
        return made


def received(packed: _Packed) -> Any:
    """What arrives on a process without a device."""
    arriving = _Received(packed.skeleton, None)
    made = arriving.load()
    for mine, theirs in zip(arriving.tensors, packed.tensors, strict=True):
        mine.copy_(theirs)
    return made


def everywhere(size: int, program: Callable[[ProcessGroup], T]) -> list[T]:
    """What a program returns on each of so many processes."""
    barrier, table, results = threading.Barrier(size, timeout=60), list[Any](), dict[int, T]()

    def run(rank: int) -> None:
        try:
            results[rank] = program(Meeting(rank, size, barrier, table))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(size)]


# ---- who has what ----------------------------------------------------------------------------------------------------


@given(total=st.integers(0, 300), size=st.integers(1, 40))
def test_shares_are_neighbours_in_order(total: int, size: int) -> None:
    """Catches a sample that no process has or two have, an unfair split, and a first process without any sample."""
    shares = [share_of(total, rank, size) for rank in range(size)]
    assert [number for share in shares for number in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1 and len(shares[0]) == max(map(len, shares))


@given(costs=st.lists(st.integers(1, 1000), max_size=30), size=st.integers(1, 8))
def test_balanced(costs: list[int], size: int) -> None:
    """Catches a process that does all the work: longest first is at most 4/3 of the best, which no bound undercuts."""
    owners = balance_load(costs, size)
    load = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(size)]
    assert sum(load) == sum(costs)
    bound = max([sum(costs) / size, *costs, *([sum(sorted(costs)[-size - 1 :][:2])] if len(costs) > size else [])])
    assert max(load) <= bound * 4 / 3 + 1e-9


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("costs", [None, [1.0, 8.0, 2.0, 9.0]])
def test_tasks_are_done_once_each(size: int, costs: Sequence[float] | None) -> None:
    """Catches a result at the wrong place, and a task that two processes do, or all of them."""
    done: list[int] = []

    def program(process_group: ProcessGroup) -> list[Tensor]:
        def task(number: int) -> Tensor:
            done.append(number)
            return torch.full((2,), float(number))

        return process_group.parallel_map((lambda number=number: task(number) for number in range(4)), costs)

    for results in everywhere(size, program):
        assert [result.tolist() for result in results] == [[number] * 2 for number in range(4)]
    assert sorted(done) == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_items_are_dealt_in_order(size: int) -> None:
    """Catches samples in another order, groups torn apart, numbers from nought on every process; few samples, too."""

    def program(process_group: ProcessGroup) -> tuple[int, list[str]]:
        return process_group.scatter(["a", "bcd", "e", "fg", "h"] if process_group.is_rank0 else [])

    scatter = everywhere(size, program)
    assert "".join(item for _, items in scatter for item in items) == "abcdefgh"
    for begin, items in scatter:
        assert items == list("abcdefgh")[begin : begin + len(items)]
        assert all(("".join(items).count(group) or not set(group) & set(items)) for group in ("bcd", "fg"))


def test_the_first_one_goes_first() -> None:
    """Catches several processes that fill a cache of all of them at the same time."""
    order: list[int] = []
    everywhere(4, lambda process_group: process_group.rank0_first(lambda: order.append(process_group.rank)))
    assert order[0] == 0 and sorted(order) == [0, 1, 2, 3]


# ---- what is sent ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float64, torch.int64])
def test_tensors_arrive_as_they_were(dtype: torch.dtype) -> None:
    """Catches values, strides or an alignment that change on the way: the arithmetic may depend on each of them."""
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
    arrived = received(_Packed(sent))
    assert arrived["nested"][1] == [1, "two", None]
    for name, tensor in shapes.items():
        there = arrived["nested"][0][name]
        assert there.dtype == dtype and torch.equal(there, tensor), name
        assert there.stride() == tensor.stride() and there.storage_offset() % 64 == tensor.storage_offset() % 64, name


def test_errors_arrive_as_they_were() -> None:
    """Catches a user's error that becomes a fault of vlqc on the other processes, or loses its faults."""
    import pickle

    faults = Fault("one", "here", "why", "do"), Fault("two")
    arrived = _error_of(pickle.dumps(_report(UserError(*faults))), 3)
    assert isinstance(arrived, UserError) and arrived.faults == faults
    other = _error_of(pickle.dumps(_report(ZeroDivisionError("by nought"))), 3)
    assert isinstance(other, InternalError) and "process 3 ended: ZeroDivisionError: by nought" in str(other)
    broken = _error_of(pickle.dumps(_report(InternalError("a promise", "look at odd:Boom"))), 3)
    assert broken.faults == (Fault("process 3 ended: a promise", fix="look at odd:Boom"),)


# ---- joining ---------------------------------------------------------------------------------------------------------


def test_alone_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a process that waits for others where nobody started any."""
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


def test_a_broken_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback for RANK=x, and one for processes that were not started by torchrun."""
    monkeypatch.setenv("RANK", "x")
    for rank, said in (("9" * 20, "RANK is '9999"), ("2", "RANK is 2, WORLD_SIZE 2")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UserError, match=said), init_distributed():
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


def test_too_few_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches two processes on one device, or an index that the device's library refuses with a traceback."""
    process = TorchProcessGroup.__new__(TorchProcessGroup)
    process.rank, process.size = 1, 2
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="too few devices"):
        process.local_device(torch.device("cuda"))
    assert process.local_device(torch.device("cpu")) == torch.device("cpu")


# ---- statistics ------------------------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(size=st.integers(2, 5), tokens=st.integers(1, 40))
def test_observations_do_not_depend_on_who_has_the_samples(size: int, tokens: int) -> None:
    """Catches a budget per process, sums in another order, and statistics of one process only."""

    def observed(process_group: ProcessGroup) -> str:
        stage: Stage = decoder()
        sample_shapes = stage.all_sample_shapes()
        share = share_of(len(stage.calls), process_group.rank, process_group.size)
        stage.calls, stage.sample_shapes, stage.process_group = (
            [stage.calls[number] for number in share],
            sample_shapes,
            process_group,
        )
        InsertObservers(tokens=tokens).run(stage)
        return print_stage(stage)

    one = observed(ProcessGroup())
    assert everywhere(size, observed) == [one] * size


def test_a_port_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches minutes of waiting for what can never answer."""
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="65535 is the last one"), init_distributed():
        pass
