"""split-window-attention: attention whose mask lets windows of rows see only themselves runs window by window.

transformers 4.49 builds a mask [1, S, S] for every block of the vision tower and computes all S * S scores, of which
the mask keeps one window's worth per row. Later versions split the rows themselves; this pass makes the earlier ones
cost the same: the sum of squared window lengths. What is a window is read off the values of the mask, in every call.
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
from vlqc.passes.algorithms import folding
from vlqc.pipeline.pass_api import Pass

ATTENTION = torch.nn.functional.scaled_dot_product_attention
PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")  # those that may be given by position


@dataclass(frozen=True)
class SplitWindowAttention(Pass):
    """Splits every attention whose mask is block-diagonal, and proves that the stage still computes the same.

    The proof has two parts: attention as a whole and in windows, on what the probe brings, agree (where its mask is a
    single window, under a mask with several); and so do the stage's outputs before and after.
    """

    name: ClassVar[str] = "split-window-attention"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "rewrite"
    summary: ClassVar[str] = "run attention under a block-diagonal mask window by window"
    before: ClassVar[tuple[str, ...]] = ("insert-observers",)

    def run(self, stage: Stage) -> bool:
        nodes = [node for node in stage.graph.nodes if node.target is ATTENTION]
        if not any(isinstance(_named(node.args, node.kwargs).get("attn_mask"), fx.Node) for node in nodes):
            return False
        trial, before = _tried(stage)
        if len(trial) != len(nodes):  # some attention is hidden in a leaf module
            return False
        chosen = {node: call for node, call in zip(nodes, trial, strict=True) if call.windows and call.path}
        for path in {call.path: None for call in chosen.values()}:
            proven = all(call.difference <= folding.TOLERANCE for call in chosen.values() if call.path == path)
            if not (proven and _swapped(stage, path, before)):
                where = stage.checkpoint_name(path)
                stage.notes.append(f"splitting the attention of {where} into windows changes its output; left out")
                chosen = {node: call for node, call in chosen.items() if call.path != path}
        for node, call in chosen.items():
            _rewrite(stage, node, call.windows)
        return bool(chosen)


# ---- windows ---------------------------------------------------------------------------------------------------------


def windows_of(mask: Tensor) -> list[int]:
    """Lengths of the windows of a mask [..., S, S], in the order of the rows; empty if it is not block-diagonal.

    Boolean masks are true, others 0, where a row may look; elsewhere these are -inf or the dtype's lowest value. Heads
    and samples must share the mask.
    """
    rows = mask.shape[-1]
    if mask.ndim < 2 or mask.shape[-2] != rows or mask.numel() != rows * rows or not rows:
        return []
    allowed = mask.reshape(rows, rows)
    if allowed.dtype != torch.bool:
        seen = allowed == 0
        if not bool((seen | (allowed <= torch.finfo(allowed.dtype).min)).all()):
            return []
        allowed = seen
    ends = (~allowed.diagonal(1)).nonzero().flatten().cpu() + 1  # a row that may not look at the next one
    edges = [0, *ends.tolist(), rows]
    lengths = [end - start for start, end in itertools.pairwise(edges)]
    if int(allowed.count_nonzero()) != sum(length * length for length in lengths):
        return []
    blocks = [allowed[start:end, start:end].all() for start, end in itertools.pairwise(edges)]
    return lengths if bool(torch.stack(blocks).all()) else []


def windowed_attention(query: Tensor, key: Tensor, value: Tensor, windows: Sequence[int], **kwargs: Any) -> Tensor:
    """Attention of [..., heads, S, D] in which the rows of each window, of these lengths in order, see only themselves.

    kwargs: `scale`, `enable_gqa`. Neighbours of one length run as one batch: views, nothing is copied on the way in.
    """
    if query.ndim == 3:
        return windowed_attention(query[None], key[None], value[None], windows, **kwargs).squeeze(0)
    parts, start = [], 0
    for length, alike in itertools.groupby(windows):
        count = len(list(alike))
        end = start + count * length

        def cut(rows: Tensor, start: int = start, end: int = end, count: int = count) -> Tensor:
            """[B, heads, S, D] -> [count * B, heads, length, D]"""
            many, heads, _, depth = rows.shape
            apart = rows[:, :, start:end].reshape(many, heads, count, -1, depth)
            return apart.permute(2, 0, 1, 3, 4).flatten(0, 1)

        seen = ATTENTION(cut(query), cut(key), cut(value), **kwargs)  # [count * B, heads, length, D]
        apart = seen.reshape(count, -1, *seen.shape[1:])
        parts.append(apart.permute(1, 2, 0, 3, 4).flatten(2, 3))
        start = end
    return torch.cat(parts, 2)


class SplitWindows(TorchFunctionMode):
    """Inside, attention whose mask is block-diagonal runs in windows; any other call is as it was."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is ATTENTION:
            given = _named(args, kwargs or {})
            if windows := _windows_of_call(given):
                return windowed_attention(windows=windows, **_without_mask(given))
        return func(*args, **(kwargs or {}))


class Windowed(nn.Module):
    """Stands for a module, with the same parameters, buffers and children under the same names: runs it with its
    attention split."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        shared = {name: whole.__dict__[name] for name in ("_parameters", "_buffers", "_modules", "training")}
        self.__dict__.update(shared, whole=whole)  # not as a child, which would lengthen all names by one step

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["whole"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with SplitWindows():
            return self.__dict__["whole"](*args, **kwargs)


def _named(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call of attention, or of a node that stands for one, by name."""
    return dict(zip(PARAMETERS, args, strict=False)) | dict(kwargs)


def _without_mask(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in PARAMETERS[3:]}


def _windows_of_call(given: Mapping[str, Any]) -> list[int]:
    """The windows of a call of attention; empty where it cannot be split."""
    query, mask = given["query"], given.get("attn_mask")
    if not isinstance(mask, Tensor) or given.get("dropout_p") or query.ndim not in (3, 4):
        return []
    fits = query.shape[-2] == given["key"].shape[-2] == mask.shape[-1]
    return windows_of(mask) if fits else []


# ---- the proof -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """One call of attention by the probe. path: of the module that made it; windows: empty if it cannot be split;
    difference: between the whole and the split, as `folding.difference` counts."""

    path: str
    windows: list[int]
    difference: float


class _Trial(TorchFunctionMode):
    """Inside, attention runs as asked, and beside it in windows, to compare."""

    def __init__(self, running: Sequence[str]) -> None:
        super().__init__()
        self.running, self.calls = running, list[_Call]()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is ATTENTION:
            given, whole = _named(args, kwargs or {}), output
            windows = tried = _windows_of_call(given)
            if len(windows) == 1:  # proves nothing of several: other samples may have them
                tried = _made_up(windows[0])
                whole = ATTENTION(**_without_mask(given), attn_mask=_mask(tried, output.device))
            split = windowed_attention(windows=tried, **_without_mask(given)) if windows else whole
            difference = folding.difference(whole.float().flatten(), split.float().flatten())
            self.calls.append(_Call(self.running[-1], windows, difference))
        return output


def _made_up(rows: int) -> list[int]:
    """Lengths of windows that fill so many rows: one row, twice a third of the rest, what is left."""
    third = (rows - 1) // 3
    return [length for length in (1, third, third, rows - 1 - 2 * third) if length]


def _mask(windows: Sequence[int], device: torch.device) -> Tensor:
    """bool [S, S]: true within the windows."""
    number = torch.repeat_interleave(torch.arange(len(windows)), torch.tensor(windows)).to(device)
    return number[:, None] == number[None, :]


def _tried(stage: Stage) -> tuple[list[_Call], Tensor]:
    """Every call of attention in the stage's run of its probe, and what the stage returned."""
    with _running(stage.module) as running, _Trial(running) as trial:
        return trial.calls, stage.execution.probe_output().flatten()


@contextmanager
def _running(root: nn.Module) -> Iterator[list[str]]:
    """Inside, the list holds the paths of the modules that are running, the innermost last."""
    running: list[str] = []
    handles: list[Any] = []

    def leave(*unused: Any) -> None:
        running.pop()

    for path, module in root.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, path=path: running.append(path)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


def _swapped(stage: Stage, path: str, before: Tensor) -> bool:
    """Puts a `Windowed` in the place of a module. Whether the stage's output stayed: if not, all is as it was."""
    whole = stage.module.get_submodule(path)
    stage.module.set_submodule(path, Windowed(whole))
    holds = folding.difference(before, stage.execution.probe_output().flatten()) <= folding.TOLERANCE
    if not holds:
        stage.module.set_submodule(path, whole)
    return holds


# ---- the graph -------------------------------------------------------------------------------------------------------


def _rewrite(stage: Stage, node: fx.Node, windows: Sequence[int]) -> None:
    """In place of attention under a mask: one without for each window, on rows cut apart, and the outputs joined.

    The operations that make the mask stay: they still run, and say what the windows are.
    """
    given = _without_mask(_named(node.args, node.kwargs))
    rows = [given.pop(name) for name in PARAMETERS[:3]]
    if len(windows) == 1:
        node.args, node.kwargs = tuple(rows), given
        return
    graph, meta = stage.graph, node.meta

    def emit(function: Any, *args: Any, like: fx.Node | None = None, length: int = 0, **kwargs: Any) -> fx.Node:
        """like: a node with the same shape and dtype, but for its rows, of which there are `length`."""
        made: fx.Node = graph.call_function(function, args, kwargs)
        if like is not None:
            shape = like.meta["shape"]
            made.meta.update(dtype=like.meta["dtype"], shape=(*shape[:-2], length, shape[-1]))
        return made

    with graph.inserting_before(node):
        parts = [(part, emit(torch.Tensor.split, part, list(windows), -2)) for part in rows]
        seen = []
        for number, length in enumerate(windows):
            cut = [emit(operator.getitem, apart, number, like=part, length=length) for part, apart in parts]
            seen.append(emit(ATTENTION, *cut, like=node, length=length, **given))
        joined = emit(torch.cat, seen, -2, like=node, length=meta["shape"][-2])
    node.replace_all_uses_with(joined)
    graph.erase_node(node)
    for site in stage.sites.values():
        if site.source == node.name:
            site.source = joined.name
