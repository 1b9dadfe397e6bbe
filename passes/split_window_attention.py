"""split-window-attention: compute attention under a block-diagonal mask window by window.

transformers 4.49 builds a mask [1, S, S] for every block of the vision tower and computes all S * S scores, of which
the mask keeps one window's worth per row. Later versions split the rows themselves. With this pass the cost is the same
as there: the sum of squared window lengths. The windows are read from the values of the mask in every call.
"""

import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from vlqc.ir.stage import Stage
from vlqc.ir.tensor_digest import TOLERANCE, max_relative_error
from vlqc.kernels_ref.attention import ATTENTION, PARAMETERS, attention_arguments
from vlqc.pipeline.pass_api import Pass

TENSOR_PARAMETERS, MASK_PARAMETERS = PARAMETERS[:3], PARAMETERS[3:]


@dataclass(frozen=True)
class SplitWindowAttention(Pass):
    """Splits every attention call with a block-diagonal mask and verifies that the stage's output is unchanged.

    On the probe call, each attention is computed as a whole and in windows, and the results are compared (if its mask
    has a single window, under a made-up mask with several). Then the stage's outputs before and after are compared.
    """

    name: ClassVar[str] = "split-window-attention"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "rewrite"
    summary: ClassVar[str] = "run attention under a block-diagonal mask window by window"
    before: ClassVar[tuple[str, ...]] = ("insert-observers",)

    def run(self, stage: Stage) -> bool:
        nodes = [node for node in stage.graph.nodes if node.target is ATTENTION]
        if not any(isinstance(attention_arguments(node.args, node.kwargs).get("attn_mask"), fx.Node) for node in nodes):
            return False
        calls, before = _compare_on_probe(stage)
        if len(calls) != len(nodes):  # some attention calls are inside a leaf module of the graph
            return False
        chosen = {node: call for node, call in zip(nodes, calls, strict=True) if call.windows and call.path}
        for path in {call.path: None for call in chosen.values()}:
            equal = all(call.error <= TOLERANCE for call in chosen.values() if call.path == path)
            if not (equal and _wrap(stage, path, before)):
                where = stage.checkpoint_name(path)
                stage.notes.append(f"splitting the attention of {where} into windows changes its output; left out")
                chosen = {node: call for node, call in chosen.items() if call.path != path}
        for node, call in chosen.items():
            _rewrite(stage, node, call.windows)
        return bool(chosen)


# ---- windows ---------------------------------------------------------------------------------------------------------


def mask_windows(mask: Tensor) -> list[int]:
    """Lengths of the windows of a mask [..., S, S], in the order of the rows; empty if it is not block-diagonal.

    A boolean mask is True, a float mask 0, where a row may attend; elsewhere a float mask is -inf or the lowest value
    of its dtype. Heads and samples must share the mask.
    """
    rows = mask.shape[-1]
    if mask.ndim < 2 or mask.shape[-2] != rows or mask.numel() != rows * rows or not rows:
        return []
    allowed = mask.reshape(rows, rows)
    if allowed.dtype != torch.bool:
        zero = allowed == 0
        if not bool((zero | (allowed <= torch.finfo(allowed.dtype).min)).all()):
            return []
        allowed = zero
    ends = (~allowed.diagonal(1)).nonzero().flatten().cpu() + 1  # after rows that may not attend to the next one
    bounds = [0, *ends.tolist(), rows]
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    if int(allowed.count_nonzero()) != sum(length * length for length in lengths):
        return []
    blocks = [allowed[start:end, start:end].all() for start, end in itertools.pairwise(bounds)]
    return lengths if bool(torch.stack(blocks).all()) else []


def windowed_attention(query: Tensor, key: Tensor, value: Tensor, windows: Sequence[int], **kwargs: Any) -> Tensor:
    """Attention of [..., heads, S, D] restricted to consecutive windows of rows.

    windows: their lengths, which sum to S; kwargs: `scale`, `enable_gqa`. Adjacent windows of equal length are computed
    as one batch, of views of the inputs.
    """
    if query.ndim == 3:
        return windowed_attention(query[None], key[None], value[None], windows, **kwargs).squeeze(0)
    outputs, start = [], 0
    for length, run in itertools.groupby(windows):
        count = len(list(run))
        end = start + count * length

        def to_batch(rows: Tensor, start: int = start, end: int = end, count: int = count) -> Tensor:
            """[B, heads, S, D] -> [count * B, heads, length, D]"""
            batch, heads, _, depth = rows.shape
            split = rows[:, :, start:end].reshape(batch, heads, count, -1, depth)
            return split.permute(2, 0, 1, 3, 4).flatten(0, 1)

        attended = ATTENTION(to_batch(query), to_batch(key), to_batch(value), **kwargs)  # [count * B, heads, length, D]
        split = attended.reshape(count, -1, *attended.shape[1:])
        outputs.append(split.permute(1, 2, 0, 3, 4).flatten(2, 3))
        start = end
    return torch.cat(outputs, 2)


class SplitWindows(TorchFunctionMode):
    """Mode in which attention calls with a block-diagonal mask are computed in windows."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is ATTENTION:
            arguments = attention_arguments(args, kwargs or {})
            if windows := _windows_of_call(arguments):
                return windowed_attention(windows=windows, **_without_mask(arguments))
        return func(*args, **(kwargs or {}))


class Windowed(nn.Module):
    """Wraps a module and runs it with its attention split into windows.

    It has the parameters, buffers and children of the wrapped module under the same names.
    """

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        shared = {name: whole.__dict__[name] for name in ("_parameters", "_buffers", "_modules", "training")}
        self.__dict__.update(shared, whole=whole)  # not as a child, which would add a level to all names

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["whole"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with SplitWindows():
            return self.__dict__["whole"](*args, **kwargs)


def _without_mask(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in MASK_PARAMETERS}


def _windows_of_call(arguments: Mapping[str, Any]) -> list[int]:
    """The windows of an attention call; empty if it cannot be split."""
    query, mask = arguments["query"], arguments.get("attn_mask")
    if not isinstance(mask, Tensor) or arguments.get("dropout_p") or query.ndim not in (3, 4):
        return []
    fits = query.shape[-2] == arguments["key"].shape[-2] == mask.shape[-1]
    return mask_windows(mask) if fits else []


# ---- verification ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _AttentionCall:
    """One attention call of the probe.

    path: of the calling module; windows: empty if the call cannot be split; error: `max_relative_error` between whole
    and split computation.
    """

    path: str
    windows: list[int]
    error: float


class _CompareWindows(TorchFunctionMode):
    """Mode in which attention is computed as usual and, for comparison, in windows."""

    def __init__(self, module_stack: Sequence[str]) -> None:
        super().__init__()
        self.module_stack, self.calls = module_stack, list[_AttentionCall]()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is ATTENTION:
            arguments, whole = attention_arguments(args, kwargs or {}), output
            windows = compared = _windows_of_call(arguments)
            if len(windows) == 1:  # verifies nothing about several windows, which other samples may have
                compared = _windows_of_different_lengths(windows[0])
                whole = ATTENTION(**_without_mask(arguments), attn_mask=_window_mask(compared, output.device))
            split = windowed_attention(windows=compared, **_without_mask(arguments)) if windows else whole
            error = max_relative_error(whole.float().flatten(), split.float().flatten())
            self.calls.append(_AttentionCall(self.module_stack[-1], windows, error))
        return output


def _windows_of_different_lengths(rows: int) -> list[int]:
    """Window lengths that sum to `rows`: one row, two thirds of the rest in two equal windows, and the remainder."""
    third = (rows - 1) // 3
    return [length for length in (1, third, third, rows - 1 - 2 * third) if length]


def _window_mask(windows: Sequence[int], device: torch.device) -> Tensor:
    """bool [S, S]: True within the windows."""
    number = torch.repeat_interleave(torch.arange(len(windows)), torch.tensor(windows)).to(device)
    return number[:, None] == number[None, :]


def _compare_on_probe(stage: Stage) -> tuple[list[_AttentionCall], Tensor]:
    """Runs the probe; returns its attention calls in order and the stage's output."""
    with _module_stack(stage.module) as stack, _CompareWindows(stack) as comparison:
        return comparison.calls, stage.execution.probe_output()


@contextmanager
def _module_stack(root: nn.Module) -> Iterator[list[str]]:
    """Context that yields a list of the paths of all modules whose forward is running, the innermost last."""
    stack: list[str] = []
    handles: list[Any] = []

    def leave(*unused: Any) -> None:
        stack.pop()

    for path, module in root.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, path=path: stack.append(path)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def _wrap(stage: Stage, path: str, before: Tensor) -> bool:
    """Wraps a module in `Windowed`; undoes that and returns False if the stage's output changes."""
    whole = stage.module.get_submodule(path)
    stage.module.set_submodule(path, Windowed(whole))
    equal = max_relative_error(before, stage.execution.probe_output()) <= TOLERANCE
    if not equal:
        stage.module.set_submodule(path, whole)
    return equal


# ---- the graph -------------------------------------------------------------------------------------------------------


def _rewrite(stage: Stage, node: fx.Node, windows: Sequence[int]) -> None:
    """Replaces masked attention by one attention per window without a mask, on split inputs, and concatenates.

    The operations that create the mask stay in the graph: they still run and determine the windows.
    """
    options = _without_mask(attention_arguments(node.args, node.kwargs))
    inputs = [options.pop(name) for name in TENSOR_PARAMETERS]
    if len(windows) == 1:
        node.args, node.kwargs = tuple(inputs), options
        return
    graph, meta = stage.graph, node.meta

    def call(function: Any, *args: Any, like: fx.Node | None = None, length: int = 0, **kwargs: Any) -> fx.Node:
        """Adds a call node; like: a node with the same dtype and the same shape, but for its number of rows."""
        created: fx.Node = graph.call_function(function, args, kwargs)
        if like is not None:
            shape = like.meta["shape"]
            created.meta.update(dtype=like.meta["dtype"], shape=(*shape[:-2], length, shape[-1]))
        return created

    with graph.inserting_before(node):
        splits = [(value, call(torch.Tensor.split, value, list(windows), -2)) for value in inputs]
        outputs = []
        for number, length in enumerate(windows):
            parts = [call(operator.getitem, split, number, like=value, length=length) for value, split in splits]
            outputs.append(call(ATTENTION, *parts, like=node, length=length, **options))
        joined = call(torch.cat, outputs, -2, like=node, length=meta["shape"][-2])
    node.replace_all_uses_with(joined)
    graph.erase_node(node)
    for site in stage.sites.values():
        if site.source == node.name:
            site.source = joined.name
