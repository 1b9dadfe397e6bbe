"""What differs between two states of a stage, in words: per site and tensor, and in the graph."""

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from torch import fx

from vlqc.ir.printer import print_node, print_stage
from vlqc.ir.snapshot import WEIGHT_PARTS, MapSummary, ObservationSummary, StageSnapshot, TensorSummary
from vlqc.ir.stage import Site

T = TypeVar("T")
Changes = dict[str, list[str]]  # what it is about -> sentences
GRAPH, STAGE = "the graph", "the stage"


def changes(before: StageSnapshot, after: StageSnapshot) -> Changes:
    """Two stages that were parsed from text -> what is different, in the order of the text; empty if nothing is.

    The headings are names of sites and of other owners of tensors, `STAGE`, `GRAPH`, and `%NODE` for an observation.
    If the texts differ in a way that has no words here, their lines are shown.
    """
    found: Changes = {}
    for about, sentence in _all(before, after):
        found.setdefault(about, []).append(sentence)
    if not found and print_stage(before) != print_stage(after):
        old, new = print_stage(before).splitlines(), print_stage(after).splitlines()
        moved = [line for line in difflib.ndiff(old, new) if line[0] in "+-"]
        found[STAGE] = ["the same, in another order or notation:", *moved]
    return found


def _all(before: StageSnapshot, after: StageSnapshot) -> Iterator[tuple[str, str]]:
    for what in ("name", "part", "dtype"):
        old, new = getattr(before, what), getattr(after, what)
        if old != new:
            yield STAGE, f"{what}: {old} -> {new}"
    yield from ((GRAPH, line) for line in _graph(before, after))
    for name, old, new in _pairs(before.sites, after.sites):
        if old is None or new is None:
            yield name, f"the site is {'new' if old is None else 'gone'}"
        else:
            yield from ((name, line) for line in _site(old, new))
    for name, old, new in _pairs(before.weights, after.weights):
        parts = zip(WEIGHT_PARTS, _padded(old), _padded(new), strict=True)
        yield from ((name, f"quantized {word}: {said}") for word, was, now in parts for said in _tensor(was, now))
    for name, was, now in _pairs(before.tensors, after.tensors):
        owner, _, parameter = name.rpartition(".")
        yield from ((owner or name, f"{parameter}: {said}") for said in _tensor(was, now))
    yield from _edges(before, after)
    for name, seen, seen_now in _pairs(before.observations, after.observations):
        yield from ((f"%{name}", line) for line in _observation(seen, seen_now))


def _pairs(before: Mapping[str, T], after: Mapping[str, T]) -> Iterator[tuple[str, T | None, T | None]]:
    """Values by name that differ; None where there is none."""
    for name in [*before, *(name for name in after if name not in before)]:
        if before.get(name) != after.get(name):
            yield name, before.get(name), after.get(name)


def _padded(parts: list[TensorSummary] | None) -> list[TensorSummary | None]:
    return [*(parts or []), *[None] * len(WEIGHT_PARTS)][: len(WEIGHT_PARTS)]


# ---- the graph -------------------------------------------------------------------------------------------------------


def _graph(before: StageSnapshot, after: StageSnapshot) -> Iterator[str]:
    old, new = _printed(before), _printed(after)
    for name in [name for name in old if name not in new]:
        yield f"removed {old[name]}"
    for name in [name for name in new if name not in old]:
        yield f"added {new[name]}"
    for name in [name for name in old if name in new and old[name] != new[name]]:
        yield f"was {old[name]}"
        yield f"now {new[name]}"


def _printed(stage: StageSnapshot) -> dict[str, str]:
    return {node.name: print_node(stage, node) for node in stage.graph.nodes if isinstance(node, fx.Node)}


# ---- sites and tensors -----------------------------------------------------------------------------------------------


def _site(before: Site, after: Site) -> Iterator[str]:
    said: tuple[tuple[str, Callable[[Site], Any]], ...] = (
        ("shape", lambda site: list(site.shape)),
        ("reads", lambda site: f"%{site.source}"),
        ("scheme", lambda site: site.scheme),
        ("group size", lambda site: site.group_size),
        ("reason", lambda site: site.reason or None),
    )
    for word, of in said:
        old, new = of(before), of(after)
        if old != new:
            yield f"{word}: {_word(old)} -> {_word(new)}"
    if before.added_bias != after.added_bias:
        yield "it gained a bias" if after.added_bias else "it no longer gains a bias"
    if before.input is None or after.input is None:
        if before.input != after.input:
            yield f"input: {_input(before)} -> {_input(after)}"
        return
    if before.input.scale != after.input.scale:
        yield f"input scale: {_from_to(before.input.scale, after.input.scale)}"
    if before.input.offset != after.input.offset:
        yield f"input offset: {before.input.offset:g} -> {after.input.offset:g}"


def _word(value: object) -> str:
    return "none" if value is None else str(value)


def _input(site: Site) -> str:
    return "none" if site.input is None else f"scale {number(site.input.scale)}, offset {site.input.offset:g}"


def _tensor(before: TensorSummary | None, after: TensorSummary | None) -> Iterator[str]:
    if before is None or after is None:
        if (only := before or after) is not None:
            yield f"{'new' if before is None else 'gone'}, {only.dtype}{list(only.shape)}, absmax {number(only.absmax)}"
        return
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        yield f"{before.dtype}{list(before.shape)} -> {after.dtype}{list(after.shape)}"
    if before.absmax != after.absmax:
        yield f"absmax {_from_to(before.absmax, after.absmax)}"
    elif before.digest != after.digest:
        yield f"other values, the same absmax {number(after.absmax)}"


def number(value: float) -> str:
    """Six digits are enough to look at; the dumps hold all of them."""
    return f"{value:.6g}"


def _from_to(before: float, after: float) -> str:
    alike = number(before) == number(after)
    shown = f"{before!r} -> {after!r}" if alike else f"{number(before)} -> {number(after)}"
    ratio = after / before if before else float("nan")
    return f"{shown} (times {ratio:.3g})" if abs(ratio - 1) >= 0.005 else shown


# ---- edges and observations ------------------------------------------------------------------------------------------


def _edges(before: StageSnapshot, after: StageSnapshot) -> Iterator[tuple[str, str]]:
    old, new = ({it.producer: it for it in stage.edges or ()} for stage in (before, after))
    if (before.edges is None) != (after.edges is None):
        found = f"{len(new)} found" if before.edges is None else "forgotten"
        yield STAGE, f"edges along which scales can be folded: {found}"
        return
    for producer, was, now in _pairs(old, new):
        if was is None or now is None:
            yield producer, f"its edge is {'new' if was is None else 'gone'}"
            continue
        if was.usable != now.usable:
            yield producer, f"usable channels: {_map(was.usable)} -> {_map(now.usable)}"
        for consumer, one, other in _pairs(was.consumers, now.consumers):
            yield producer, f"columns of {consumer}: {_map(one)} -> {_map(other)}"


def _map(summary: MapSummary | None) -> str:
    return "none" if summary is None else f"{summary.used} of {summary.total} ({summary.digest})"


def _observation(before: ObservationSummary | None, after: ObservationSummary | None) -> Iterator[str]:
    if before is None or after is None:
        yield f"its observation is gone: {_range(before)}" if before else f"observed: {_range(after)}"
        return
    if _rows(before) != _rows(after):
        yield f"rows observed: {_rows(before)} -> {_rows(after)}"
    if (before.minimum, before.maximum) != (after.minimum, after.maximum):
        yield f"range: {_span(before)} -> {_span(after)}"
    if before.kept != after.kept:
        yield f"rows kept: {before.kept} -> {after.kept}"
    if before.digest != after.digest and _range(before) == _range(after):
        yield "other statistics, the same range"


def _rows(seen: ObservationSummary) -> str:
    return ", ".join(f"{rows} {modality}" for modality, rows in seen.rows.items()) or "none"


def _span(seen: ObservationSummary) -> str:
    if seen.minimum is None or seen.maximum is None:
        return "none"
    return f"{number(seen.minimum)}..{number(seen.maximum)}"


def _range(seen: ObservationSummary | None) -> str:
    return f"{_rows(seen)} rows, {_span(seen)}, {seen.kept} kept" if seen else "nothing"
