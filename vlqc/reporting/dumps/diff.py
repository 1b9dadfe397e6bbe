"""Differences between two dumps (`vlqc diff`) and between two states of a stage, as sentences per site and tensor."""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import fx

from vlqc.errors import Fault, UserError
from vlqc.formatting import pluralize
from vlqc.ir.parser import parse_stage
from vlqc.ir.printer import print_node, print_stage
from vlqc.ir.rotations import AppliedRotation
from vlqc.ir.snapshot import (
    WEIGHT_PARTS,
    CacheObservationSummary,
    CacheSummary,
    MapSummary,
    ObservationSummary,
    StageSnapshot,
    TensorSummary,
)
from vlqc.ir.stage import CacheSite, Site

T = TypeVar("T")
Changes = dict[str, list[str]]  # heading -> sentences
GRAPH, STAGE = "the graph", "the stage"  # headings
BUNDLE_GRAPH = "graph.vlqc"  # the text in a bundle
LARGEST_TEXT = 64 * 2**20  # bytes: 100 times the text of a stage of a large model
TITLE = re.compile(r"\d\d-(.+)")


# ---- two dumps -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StateDiff:
    """One state of a stage that differs between the dumps, or that only one of them has.

    title: STAGE/STATE. changes: differences that no earlier state of the stage has. repeated: number of differences
    that an earlier state has. only: "first" or "second" if the other dump lacks the state.
    """

    title: str
    changes: Changes
    repeated: int = 0
    only: str = ""


@dataclass(frozen=True)
class DumpDiff:
    """Result of `diff_dumps`: the states that differ, in order, and the number of equal states."""

    states: list[StateDiff]
    equal: int

    @property
    def differs(self) -> bool:
        return bool(self.states)

    def to_dict(self) -> dict[str, Any]:
        """The differences as JSON-compatible values."""
        states = [
            {"title": state.title, "changes": state.changes, "repeated": state.repeated, "only_in": state.only}
            for state in self.states
        ]
        return {"states": states, "equal": self.equal}

    def lines(self) -> Iterator[str]:
        """The differences as text."""
        for state in self.states:
            if state.only:
                yield f"{state.title}: only in the {state.only} dump"
                continue
            yield f"{state.title}:"
            for heading, sentences in state.changes.items():
                yield f"  {heading}"
                yield from (f"    {sentence}" for sentence in sentences)
            if state.repeated:
                yield f"  and {pluralize(state.repeated, 'difference')} of an earlier state of this stage"
        yield f"{pluralize(self.equal, 'state')} equal, {len(self.states)} different"


def diff_dumps(first: Path, second: Path) -> DumpDiff:
    """Compares two dumps: folders of --dump_ir, folders of one stage, bundles or texts.

    States are matched by stage and pass, so that pipelines may differ. UserError if a path is not a dump.
    """
    old, new = _state_files(first), _state_files(second)
    if len(old) == len(new) == 1:  # two files are compared whatever their names are
        title = " and ".join(dict.fromkeys([*old, *new]))
        old, new = ({title: path} for files in (old, new) for path in files.values())
    states, equal = [], 0
    listed: dict[str, set[tuple[str, str]]] = {}  # stage -> differences of its earlier states
    for title in _merge_titles(list(old), list(new)):
        if title not in old or title not in new:
            states.append(StateDiff(title, {}, only="first" if title in old else "second"))
            continue
        changes = diff_stages(read_stage_text(old[title]), read_stage_text(new[title]))
        if not changes:
            equal += 1
            continue
        earlier = listed.setdefault(title.rpartition("/")[0], set())
        current = {(heading, sentence) for heading, sentences in changes.items() for sentence in sentences}
        new_changes = {
            heading: kept
            for heading, sentences in changes.items()
            if (kept := [sentence for sentence in sentences if (heading, sentence) not in earlier])
        }
        repeated = sum(map(len, changes.values())) - sum(map(len, new_changes.values()))
        earlier |= current
        states.append(StateDiff(title, new_changes, repeated))
    return DumpDiff(states, equal)


def read_stage_text(path: Path) -> StageSnapshot:
    """A stage from a .vlqc file. UserError if it cannot be read or parsed."""
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_TEXT:
            why = "it is not a regular file, or too large"
            raise UserError(Fault("not the text of a stage", str(path), why))
        return parse_stage(path.read_text(encoding="utf-8"))
    except UserError as error:
        raise UserError(*error.faults, Fault("cannot read the text of a stage", str(path))) from None
    except (OSError, ValueError) as error:
        raise UserError(Fault("cannot read the text of a stage", str(path), str(error))) from error


def _state_files(dump: Path) -> dict[str, Path]:
    """STAGE/STATE without the number of the pass -> its text file, in order."""
    if not dump.exists():
        raise UserError(Fault(f"{dump} is not a dump", why="no such file or folder"))
    if dump.is_file() and dump.suffix in (".json", ".onnx"):
        why = f"only texts of stages can be compared, not {dump.suffix.removeprefix('.')} files"
        raise UserError(Fault(f"cannot compare {dump}", why=why, fix="pass the .vlqc file of the same state"))
    if dump.is_file():
        return {dump.name: dump}
    if (dump / BUNDLE_GRAPH).is_file():
        return {dump.name: dump / BUNDLE_GRAPH}
    texts = {path.parent.with_suffix(""): path for path in dump.rglob(f"*.bundle/{BUNDLE_GRAPH}")}
    texts |= {path.with_suffix(""): path for path in dump.rglob("*.vlqc") if path.name != BUNDLE_GRAPH}
    files: dict[str, Path] = {}
    for stem in sorted(texts):
        stage, state = stem.relative_to(dump).parent.as_posix(), stem.name
        if (numbered := TITLE.fullmatch(state)) is not None:
            state = numbered[1]
        title, count = f"{stage}/{state}".removeprefix("./"), 1  # "./" in the folder of a single stage
        while title in files:  # a pass that runs twice
            count += 1
            title = f"{stage}/{state} ({count})".removeprefix("./")
        files[title] = texts[stem]
    if not files:
        fix = "dump with text or bundle in --dump_formats"
        raise UserError(Fault(f"{dump} is not a dump", why="it does not contain the text of a stage", fix=fix))
    return files


def _merge_titles(old: list[str], new: list[str]) -> list[str]:
    """Titles of both dumps in the order of the first; titles of the second only come after their predecessors."""
    merged = list(old)
    position = 0
    for title in new:
        if title in merged:
            position = merged.index(title) + 1
        else:
            merged.insert(position, title)
            position += 1
    return merged


# ---- two states of a stage -------------------------------------------------------------------------------------------


def diff_stages(before: StageSnapshot, after: StageSnapshot) -> Changes:
    """Differences of two parsed stages in the order of the text; empty if their texts are equal.

    Headings are the names of sites and other owners of tensors, STAGE, GRAPH, and %NODE for an observation. If the
    texts differ in another way, the differing lines are returned.
    """
    changes: Changes = {}
    for heading, sentence in _differences(before, after):
        changes.setdefault(heading, []).append(sentence)
    if not changes and print_stage(before) != print_stage(after):
        old, new = print_stage(before).splitlines(), print_stage(after).splitlines()
        lines = [line for line in difflib.ndiff(old, new) if line[0] in "+-"]
        changes[STAGE] = ["equal except for order or notation:", *lines]
    return changes


def _differences(before: StageSnapshot, after: StageSnapshot) -> Iterator[tuple[str, str]]:
    """(heading, sentence)"""
    for attribute in ("name", "part", "dtype"):
        old, new = getattr(before, attribute), getattr(after, attribute)
        if old != new:
            yield STAGE, f"{attribute}: {old} -> {new}"
    yield from ((GRAPH, sentence) for sentence in _diff_graphs(before, after))
    for name, old_site, new_site in _pairs(before.sites, after.sites):
        if old_site is None or new_site is None:
            yield name, f"site {'added' if old_site is None else 'removed'}"
        else:
            yield from ((name, sentence) for sentence in _diff_sites(old_site, new_site))
    for name, old_weight, new_weight in _pairs(before.weights, after.weights):
        for part, old_part, new_part in zip(WEIGHT_PARTS, _padded(old_weight), _padded(new_weight), strict=True):
            yield from ((name, f"quantized {part}: {sentence}") for sentence in _diff_tensors(old_part, new_part))
    yield from _diff_caches(before, after)
    for name, old_tensor, new_tensor in _pairs(before.tensors, after.tensors):
        owner, _, parameter = name.rpartition(".")
        yield from ((owner or name, f"{parameter}: {sentence}") for sentence in _diff_tensors(old_tensor, new_tensor))
    yield from _diff_edges(before, after)
    yield from _diff_rotations(before, after)
    for name, old_observation, new_observation in _pairs(before.observations, after.observations):
        yield from ((f"%{name}", sentence) for sentence in _diff_observations(old_observation, new_observation))


def _pairs(before: Mapping[str, T], after: Mapping[str, T]) -> Iterator[tuple[str, T | None, T | None]]:
    """(name, old value, new value) of values that differ; None for a value that does not exist."""
    for name in [*before, *(name for name in after if name not in before)]:
        if before.get(name) != after.get(name):
            yield name, before.get(name), after.get(name)


def _padded(parts: list[TensorSummary] | None) -> list[TensorSummary | None]:
    return [*(parts or []), *[None] * len(WEIGHT_PARTS)][: len(WEIGHT_PARTS)]


# ---- the graph -------------------------------------------------------------------------------------------------------


def _diff_graphs(before: StageSnapshot, after: StageSnapshot) -> Iterator[str]:
    old, new = _printed_nodes(before), _printed_nodes(after)
    for name in [name for name in old if name not in new]:
        yield f"removed {old[name]}"
    for name in [name for name in new if name not in old]:
        yield f"added {new[name]}"
    for name in [name for name in old if name in new and old[name] != new[name]]:
        yield f"was {old[name]}"
        yield f"now {new[name]}"


def _printed_nodes(stage: StageSnapshot) -> dict[str, str]:
    return {node.name: print_node(stage, node) for node in stage.graph.nodes if isinstance(node, fx.Node)}


# ---- sites and tensors -----------------------------------------------------------------------------------------------


def _diff_sites(before: Site, after: Site) -> Iterator[str]:
    attributes: tuple[tuple[str, Callable[[Site], Any]], ...] = (
        ("shape", lambda site: list(site.shape)),
        ("reads", lambda site: f"%{site.source}"),
        ("scheme", lambda site: site.scheme),
        ("group size", lambda site: site.group_size),
        ("reason", lambda site: site.reason or None),
    )
    for name, value_of in attributes:
        old, new = value_of(before), value_of(after)
        if old != new:
            yield f"{name}: {_format(old)} -> {_format(new)}"
    if before.added_bias != after.added_bias:
        yield "a bias was added" if after.added_bias else "the added bias was removed"
    if before.input is None or after.input is None:
        if before.input != after.input:
            yield f"input: {_format_input(before)} -> {_format_input(after)}"
        return
    if before.input.scale != after.input.scale:
        yield f"input scale: {_from_to(before.input.scale, after.input.scale)}"
    if before.input.offset != after.input.offset:
        yield f"input offset: {before.input.offset:g} -> {after.input.offset:g}"


def _diff_caches(before: StageSnapshot, after: StageSnapshot) -> Iterator[tuple[str, str]]:
    attributes: tuple[tuple[str, Callable[[CacheSite], Any]], ...] = (
        ("heads", lambda site: f"{site.heads} x {site.head_size}"),
        ("keys from", lambda site: site.key),
        ("values from", lambda site: site.value),
        ("attention", lambda site: f"%{site.node}"),
        ("cache scheme", lambda site: site.scheme),
        ("cache reason", lambda site: site.reason or None),
        ("SQNR of the attention", lambda site: None if site.sqnr is None else f"{number(site.sqnr)} dB"),
    )
    for name, old, new in _pairs(before.caches, after.caches):
        if old is None or new is None:
            yield name, f"cache {'added' if old is None else 'removed'}"
            continue
        values = [(label, value_of(old), value_of(new)) for label, value_of in attributes]
        yield from (
            (name, f"{label}: {_format(one)} -> {_format(other)}") for label, one, other in values if one != other
        )
    for name, old_summary, new_summary in _pairs(before.cache_summaries, after.cache_summaries):
        old_summary, new_summary = old_summary or CacheSummary(), new_summary or CacheSummary()
        for scale, one, other in _pairs(old_summary.scales, new_summary.scales):
            yield from ((name, f"{scale}: {sentence}") for sentence in _diff_tensors(one, other))
        if old_summary.observation != new_summary.observation:
            observed = (_format_cache(summary.observation) for summary in (old_summary, new_summary))
            yield name, f"keys and values: {' -> '.join(observed)}"


def _format_cache(observation: CacheObservationSummary | None) -> str:
    if observation is None:
        return "not observed"
    rows = ", ".join(f"{rows} {modality}" for modality, rows in observation.rows.items())
    ranges = f"keys up to {number(observation.key_absmax)}, values up to {number(observation.value_absmax)}"
    return f"{rows} rows, {ranges}, {observation.kept} kept ({observation.digest})"


def _format(value: object) -> str:
    return "none" if value is None else str(value)


def _format_input(site: Site) -> str:
    return "none" if site.input is None else f"scale {number(site.input.scale)}, offset {site.input.offset:g}"


def _diff_tensors(before: TensorSummary | None, after: TensorSummary | None) -> Iterator[str]:
    if before is None or after is None:
        if (only := before or after) is not None:
            change = "added" if before is None else "removed"
            yield f"{change}, {only.dtype}{list(only.shape)}, absmax {number(only.absmax)}"
        return
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        yield f"{before.dtype}{list(before.shape)} -> {after.dtype}{list(after.shape)}"
    if before.absmax != after.absmax:
        yield f"absmax {_from_to(before.absmax, after.absmax)}"
    elif before.digest != after.digest:
        yield f"different values, equal absmax {number(after.absmax)}"


def number(value: float) -> str:
    """Six significant digits; the dumps have all of them."""
    return f"{value:.6g}"


def _from_to(before: float, after: float) -> str:
    equal = number(before) == number(after)
    shown = f"{before!r} -> {after!r}" if equal else f"{number(before)} -> {number(after)}"
    ratio = after / before if before else float("nan")
    return f"{shown} (times {ratio:.3g})" if abs(ratio - 1) >= 0.005 else shown


# ---- edges, rotations and observations -------------------------------------------------------------------------------


def _diff_edges(before: StageSnapshot, after: StageSnapshot) -> Iterator[tuple[str, str]]:
    old, new = ({edge.producer: edge for edge in stage.edges or ()} for stage in (before, after))
    if (before.edges is None) != (after.edges is None):
        yield STAGE, "edges removed" if after.edges is None else f"{pluralize(len(new), 'edge')} computed"
        return
    for producer, old_edge, new_edge in _pairs(old, new):
        if old_edge is None or new_edge is None:
            yield producer, f"edge {'added' if old_edge is None else 'removed'}"
            continue
        if old_edge.usable != new_edge.usable:
            yield producer, f"usable channels: {_format_map(old_edge.usable)} -> {_format_map(new_edge.usable)}"
        for consumer, old_map, new_map in _pairs(old_edge.consumers, new_edge.consumers):
            yield producer, f"columns of {consumer}: {_format_map(old_map)} -> {_format_map(new_map)}"


def _diff_rotations(before: StageSnapshot, after: StageSnapshot) -> Iterator[tuple[str, str]]:
    old_named, new_named = (
        {f"{rotation.kind} {rotation.rotation.name}": rotation for rotation in stage.rotations}
        for stage in (before, after)
    )
    for name, old, new in _pairs(old_named, new_named):
        if old is None or new is None:
            yield STAGE, f"rotation of the {name} {'added' if old is None else 'removed'}"
            continue
        yield from ((STAGE, f"{name}: {sentence}") for sentence in _diff_settings(old, new))
        for layer, old_role, new_role in _pairs(_roles(old), _roles(new)):
            yield layer, f"{name}: {_format(old_role)} -> {_format(new_role)}"
        for tensor, old_pair, new_pair in _pairs(old.absmax, new.absmax) if old.done and new.done else ():
            owner, _, parameter = tensor.rpartition(".")
            pairs = zip(("before", "after"), old_pair or (), new_pair or (), strict=False)
            yield from (
                (owner, f"{parameter} {when} the rotation of the {name}: absmax {_from_to(old_value, new_value)}")
                for when, old_value, new_value in pairs
                if old_value != new_value
            )


def _diff_settings(before: AppliedRotation, after: AppliedRotation) -> Iterator[str]:
    attributes: tuple[tuple[str, Callable[[AppliedRotation], Any]], ...] = (
        ("size", lambda rotation: rotation.rotation.size),
        ("seed", lambda rotation: rotation.rotation.seed),
        ("keeps the mean", lambda rotation: rotation.rotation.keeps_mean),
        ("inputs", lambda rotation: ", ".join(rotation.inputs) or None),
        ("outputs", lambda rotation: ", ".join(map(str, rotation.outputs)) or None),
        ("norms", lambda rotation: ", ".join(rotation.norms) or None),
    )
    for name, value_of in attributes:
        old, new = value_of(before), value_of(after)
        if old != new:
            yield f"{name}: {_format(old)} -> {_format(new)}"
    if before.done != after.done:
        yield "rotated" if after.done else "no longer rotated"


def _roles(rotation: AppliedRotation) -> dict[str, str]:
    """Layer -> what is rotated of it."""
    roles = {layer: "columns" + (f" after {norm}" if norm else "") for layer, norm in rotation.readers.items()}
    for layer, starts in rotation.writers.items():
        rows = "table" if layer in rotation.tables else f"rows at {', '.join(map(str, starts))}"
        roles[layer] = f"{roles[layer]}, {rows}" if layer in roles else rows
    return roles


def _format_map(summary: MapSummary | None) -> str:
    return "none" if summary is None else f"{summary.used} of {summary.total} ({summary.digest})"


def _diff_observations(before: ObservationSummary | None, after: ObservationSummary | None) -> Iterator[str]:
    if before is None or after is None:
        change = "observed" if before is None else "observation removed"
        yield f"{change}: {_format_observation(before or after)}"
        return
    if _format_rows(before) != _format_rows(after):
        yield f"rows observed: {_format_rows(before)} -> {_format_rows(after)}"
    if (before.minimum, before.maximum) != (after.minimum, after.maximum):
        yield f"range: {_format_range(before)} -> {_format_range(after)}"
    if before.kept != after.kept:
        yield f"rows kept: {before.kept} -> {after.kept}"
    if before.digest != after.digest and _format_observation(before) == _format_observation(after):
        yield "different statistics, equal range"


def _format_rows(observation: ObservationSummary) -> str:
    return ", ".join(f"{rows} {modality}" for modality, rows in observation.rows.items()) or "none"


def _format_range(observation: ObservationSummary) -> str:
    if observation.minimum is None or observation.maximum is None:
        return "none"
    return f"{number(observation.minimum)}..{number(observation.maximum)}"


def _format_observation(observation: ObservationSummary | None) -> str:
    if observation is None:
        return "nothing"
    return f"{_format_rows(observation)} rows, {_format_range(observation)}, {observation.kept} kept"
