"""One run of a stage: the inputs of all samples, the probe, the outputs, and how the module is executed.

Two changes of the execution save time and memory. Both are exact up to rounding and are undone afterwards:

* attention in three dimensions runs through the fused kernel. transformers 4.49 calls the attention of the vision tower
  with queries [heads, S, D], for which PyTorch has no fused kernel and writes out all scores: heads * S * S float32
  numbers, tens of GiB for an image of three megapixels. With a batch dimension of one the fused kernel is used.
* Linear layers multiply in bfloat16 where samples are only observed (`bfloat16_linears`). Proofs never run in bfloat16.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from vlqc.errors import InternalError
from vlqc.ir.bfloat16_linears import bfloat16_linears
from vlqc.ir.observation import MODALITIES
from vlqc.ir.tensor_cache import ModuleVersion
from vlqc.ir.value_range import PeakRecorder
from vlqc.kernels_ref.attention import ATTENTION, attention_arguments

T = TypeVar("T")


class ProcessGroup(Protocol):
    """What passes use of the processes of a compilation; `frontend.distributed` implements it."""

    rank: int
    size: int

    @property
    def is_rank0(self) -> bool:
        """Whether this process reports and writes."""
        ...

    def broadcast(self, source: int, value: T | None) -> T:
        """The value that rank `source` passes, on every rank."""
        ...

    def all_gather(self, value: T) -> Iterator[T]:
        """The values of all ranks in the order of ranks, one at a time."""
        ...

    def parallel_map(self, tasks: Iterable[Callable[[], T]], costs: Sequence[float] | None = None) -> list[T]:
        """Results of all tasks in order, each computed by one rank. costs: relative cost of each task."""
        ...


@dataclass(frozen=True)
class Call:
    """Arguments of the stage for one sample.

    modality: int8 [rows], an index into `MODALITIES` per row of the inputs, -1 for padding; None if all rows are
    patches of images. rows: where an observer gets only some of the rows, their positions, int64 [n]; `modality` then
    has theirs.
    """

    sample: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    modality: Tensor | None = None
    rows: Tensor | None = None

    def of_rows(self, rows: Tensor) -> "Call":
        """The call for an observer of these rows."""
        rows = rows.cpu()
        return replace(self, modality=None if self.modality is None else self.modality[rows], rows=rows)


@dataclass(frozen=True)
class SampleShape:
    """Rows of one sample at a stage, in total and per modality. Known on all ranks, whichever rank holds the sample."""

    sample: int
    rows: int
    rows_per_modality: tuple[int, ...]

    @classmethod
    def from_call(cls, call: Call) -> "SampleShape":
        rows = first_tensor((*call.args, *call.kwargs.values())).shape[-2]
        if call.modality is None:
            return cls(call.sample, rows, tuple(rows * (name == "image") for name in MODALITIES))
        counts = (int((call.modality == index).sum()) for index in range(len(MODALITIES)))
        return cls(call.sample, rows, tuple(counts))


@dataclass(frozen=True)
class _ProbeResult:
    """The output of a stage for one call and the state of the stage in that run."""

    call: Call
    version: ModuleVersion
    output: Tensor


@dataclass
class StageRun:
    """Inputs and outputs of one stage in one run.

    module: the module of the stage; calls: one per sample of this rank; probe: the call that proofs use, the same on
    all ranks; probe_is_separate: whether the probe is none of the calibration samples, so that `forward` runs it in
    addition and does not observe it; more_probes: calls of samples with modalities that the probe lacks, for
    measurements; shapes: of the samples of all ranks, None if `calls` are all of them;
    rounds_weights: whether `forward` rounds weights to bfloat16 for its products, as the engine rounds them: set for
    stages of a bfloat16 checkpoint that passes rotate, which leaves their weights with more bits;
    peaks: if set, `forward` records the largest values between layers, of all ranks;
    after_sample: called after each sample with the number of finished samples and all values that it used; outputs:
    return values per call, filled by `forward`; probe_outputs: of a separate probe, at most one; name: of the stage.
    """

    module: nn.Module
    process_group: ProcessGroup
    calls: Sequence[Call] = ()
    probe: Call | None = None
    probe_is_separate: bool = False
    more_probes: Sequence[Call] = ()
    shapes: Sequence[SampleShape] | None = None
    rounds_weights: bool = False
    peaks: PeakRecorder | None = None
    after_sample: Callable[..., None] = lambda done, *values: None
    outputs: list[Any] = field(default_factory=list)
    probe_outputs: list[Any] = field(default_factory=list)
    name: str = ""
    _has_outputs: bool = field(default=False, init=False, repr=False, compare=False)
    _last_probe: _ProbeResult | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def sample_shapes(self) -> Sequence[SampleShape]:
        """Of the samples of all ranks, in their order."""
        return [SampleShape.from_call(call) for call in self.calls] if self.shapes is None else self.shapes

    @torch.no_grad()
    def forward(
        self,
        observers: "Mapping[str, Callable[[Tensor, Call], None]] | None" = None,
        attention_observers: "Mapping[str, Callable[[Mapping[str, Any], Call], None]] | None" = None,
    ) -> None:
        """Runs every sample through the stage once and keeps the outputs.

        observers: per path of a submodule, called with its first argument and the sample's call. attention_observers:
        per path of a submodule, called with the arguments of every attention call in it, by name, and the sample's
        call.
        Weights that bfloat16 represents exactly, with `rounds_weights` all, are multiplied in bfloat16 where that is
        faster.
        """
        self.outputs = []
        last = self._last_probe if self._last_probe and self._last_probe.version.matches(self.module) else None
        fast = bfloat16_linears(self.module, round_weights=self.rounds_weights)
        with fast if self.sample_shapes else nullcontext():  # converting the weights takes longer than a probe alone
            for done, call in enumerate(self.calls):
                with (
                    observing(self.module, observers or {}, call),
                    observing_attention(self.module, attention_observers or {}, call),
                    self._recording(),
                    FusedAttention(),
                ):
                    self.outputs.append(self.module(*call.args, **call.kwargs))
                self.after_sample(done + 1, call.args, call.kwargs, self.outputs[-1])
            if self.probe is not None and self.probe_is_separate:
                with FusedAttention():
                    self.probe_outputs = [self.module(*self.probe.args, **self.probe.kwargs)]
        self._has_outputs = True
        if self.peaks is not None:
            self.peaks.peak = max(self.process_group.all_gather(self.peaks.peak))
        if last is not None:  # the weights have new memory, but the same bits
            self._last_probe = replace(last, version=ModuleVersion.of(self.module))

    def _recording(self) -> AbstractContextManager[None]:
        return nullcontext() if self.peaks is None else self.peaks.watching(self.module, self.name)

    def ensure_outputs(self) -> None:
        """Runs `forward`, unless it has run before. On all ranks alike."""
        if not self._has_outputs:
            self.forward()

    def next_inputs(self) -> list[Any]:
        """What the suspended forwards resume with: one output per call, then that of a separate probe."""
        return [*self.outputs, *self.probe_outputs]

    @torch.no_grad()
    def probe_output(self, call: Call | None = None, *, reuse: bool = False) -> Tensor:
        """Runs the probe in float32 and returns the first output tensor, float32 [rows, K], on the CPU.

        call: run this call instead of `probe`. reuse: return the last result instead if it is of the same call and no
        parameter, buffer or submodule of the stage has changed since. Writes through `Tensor.data` go unnoticed:
        `forget_probe_output` after them.
        """
        call = call or self.probe
        if call is None:
            raise InternalError(f"stage {self.name} has no probe")
        last = self._last_probe
        if reuse and last is not None and last.call is call and last.version.matches(self.module):
            return last.output
        with FusedAttention():
            output = first_tensor(self.module(*call.args, **call.kwargs))
        output = output.float().reshape(-1, output.shape[-1]).cpu()
        self._last_probe = _ProbeResult(call, ModuleVersion.of(self.module), output)
        return output

    def forget_probe_output(self) -> None:
        """Makes the next `probe_output` run, for after changes that its check does not notice."""
        self._last_probe = None

    def release(self) -> None:
        """Drops all inputs and outputs."""
        self.calls, self.probe, self.more_probes, self.outputs, self.probe_outputs = (), None, (), [], []
        self.forget_probe_output()


@contextmanager
def observing(root: nn.Module, observers: Mapping[str, Callable[[Tensor, Call], None]], call: Call) -> Iterator[None]:
    """Registers forward pre-hooks that pass the first argument of each named submodule to its observer."""

    def hook_for(path: str, observer: Callable[[Tensor, Call], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        owner = _row_owner(root, path)

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows = None if owner is None else owner.row_positions
            observer(args[0], call.of_rows(rows) if isinstance(rows, Tensor) else call)

        return hook

    handles = [
        root.get_submodule(path).register_forward_pre_hook(hook_for(path, observer))
        for path, observer in observers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def observing_attention(
    root: nn.Module, observers: Mapping[str, Callable[[Mapping[str, Any], Call], None]], call: Call
) -> Iterator[None]:
    """Passes the arguments of every attention call in each named submodule to its observer."""
    handles: list[Any] = []

    def register(path: str, observer: Callable[[Mapping[str, Any], Call], None]) -> None:
        modes: list[_ObserveAttention] = []  # a stack, for a module that calls itself

        def enter(*unused: Any) -> None:
            modes.append(_ObserveAttention(observer, call))
            modes[-1].__enter__()  # type: ignore[no-untyped-call]

        def leave(*unused: Any) -> None:
            modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

        module = root.get_submodule(path)
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))

    for path, observer in observers.items():
        register(path, observer)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _ObserveAttention(TorchFunctionMode):
    """Mode that passes the arguments of attention calls to an observer."""

    def __init__(self, observer: Callable[[Mapping[str, Any], Call], None], call: Call) -> None:
        super().__init__()
        self.observer, self.call = observer, call

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is ATTENTION:
            self.observer(attention_arguments(args, kwargs or {}), self.call)
        return func(*args, **(kwargs or {}))


def _row_owner(root: nn.Module, path: str) -> nn.Module | None:
    """The innermost module around a submodule that runs on some of the rows only, such as an expert.

    It has `row_positions`: while it runs, their positions among the rows of the stage.
    """
    while path:
        path = path.rpartition(".")[0]
        module = root.get_submodule(path)
        if hasattr(module, "row_positions"):
            return module
    return None


def input_tensors(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """(name, tensor) of each distinct tensor in the arguments; in a tuple of several as `position_embeddings_0`."""
    parameters = [p.name for p in inspect.signature(type(module).forward).parameters.values()][1:]
    by_name = {**dict(zip(parameters, args, strict=False)), **kwargs}
    inputs: dict[int, tuple[str, Tensor]] = {}
    for name, value in by_name.items():
        leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        for number, leaf in enumerate(leaves):
            inputs.setdefault(id(leaf), (name if len(leaves) == 1 else f"{name}_{number}", leaf))
    return list(inputs.values())


def first_tensor(output: Any) -> Tensor:
    """The hidden states in what a block returns: the tensor itself, or the first one of a tuple or a mapping."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    return next(value for value in values if isinstance(value, Tensor))


class FusedAttention(TorchFunctionMode):
    """Runs attention over [heads, S, D] as attention over [1, heads, S, D]: equal up to the rounding of sums."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is ATTENTION and isinstance(args[0] if args else kwargs["query"], Tensor):
            query = args[0] if args else kwargs["query"]
            if query.ndim == 3:
                args = tuple(_batched(value) for value in args)
                kwargs = {name: _batched(value) for name, value in kwargs.items()}
                return func(*args, **kwargs).squeeze(0)
        return func(*args, **kwargs)


def _batched(value: Any) -> Any:
    """[heads, S, ...] -> [1, heads, S, ...]; a mask [S, S] broadcasts over heads already; other values unchanged."""
    return value.unsqueeze(0) if isinstance(value, Tensor) and value.ndim == 3 else value
