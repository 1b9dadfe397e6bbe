"""Renders the report page: one HTML file that loads nothing, works without scripts and escapes every string."""

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import get_args

from jinja2 import Environment, PackageLoader, StrictUndefined

from vlqc.families.family import Part
from vlqc.formatting import format_bytes, format_duration, format_sqnr
from vlqc.pipeline.precision_search import group_title
from vlqc.reporting.html.charts import channel_charts, depth_charts, range_charts, scale_charts, time_chart
from vlqc.reporting.html.command_line import shell_text
from vlqc.reporting.html.schema import CandidateData, GroupData, Modality, ReportData, SiteData, Timings
from vlqc.reporting.html.svg import Chart
from vlqc.reporting.html.towers import Tower, group_stages, lowest_sqnr, site_role, stage_label
from vlqc.reporting.html.verification import Verification
from vlqc.reporting.tables import is_warning, part_order
from vlqc.targets.cache_schemes import CacheScheme
from vlqc.targets.caches import describe_caches
from vlqc.targets.schemes import Scheme

LISTED_STAGES = 5  # stages in the table of the lowest SQNR


@dataclass(frozen=True)
class FolderInfo:
    """What the page takes from the folder itself.

    name: of the folder. model: architecture and sizes. engines: versions of inference engines that load the folder.
    serve: commands. bytes: size of the weight files. rotations: in words.
    """

    name: str
    model: str
    engines: Sequence[str]
    serve: Sequence[str]
    bytes: int
    rotations: str


@dataclass(frozen=True)
class MapCell:
    """One linear layer in the precision map. tooltip: scheme, reason and range."""

    css: str
    letter: str
    tooltip: str


@dataclass(frozen=True)
class MapRow:
    """One stage in the precision map; a cell is None where the stage has no layer with that role."""

    label: str
    cells: list[MapCell | None]


@dataclass(frozen=True)
class PrecisionMap:
    title: str
    roles: list[str]
    rows: list[MapRow]


@dataclass(frozen=True)
class CandidateCell:
    """A scheme that a group could have, and whether the search chose it."""

    data: CandidateData
    is_chosen: bool


@dataclass(frozen=True)
class CandidateRow:
    """A group in the table of candidates. share: of the noise; cells: by scheme, None where it is no candidate."""

    title: str
    share: str
    cells: list[CandidateCell | None]


@dataclass(frozen=True)
class SchemeCount:
    """Number of linear layers with a scheme, and their share of all layers in percent."""

    scheme: Scheme
    count: int
    percent: float


@dataclass(frozen=True)
class CacheRow:
    """The cache of one layer. title: how keys and values are stored; bar: SQNR in percent of the highest."""

    name: str
    title: str
    sqnr: float | None
    bar: float
    reason: str


@dataclass(frozen=True)
class ModalityRow:
    """Statistics of the tokens of one modality. tokens: in the language model. sqnr: lowest of a stage, in dB. before,
    after: largest magnitude at an input of a linear layer, before and after smoothing."""

    modality: Modality
    tokens: int
    sqnr: float | None
    stage: str
    before: float | None
    after: float | None


def render(folder: FolderInfo, data: ReportData, timings: Timings | None, verification: Verification | None) -> str:
    """The HTML text, which depends on the arguments only."""
    towers = group_stages(data)
    templates = files("vlqc.reporting.html") / "templates"
    style = (templates / "style.css").read_text(encoding="utf-8") + scheme_style()
    script = (templates / "script.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=PackageLoader("vlqc.reporting.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": format_bytes,
        "sqnr": format_sqnr,
        "duration": format_duration,
        "short_role": short_role,
    }
    heads = [str(Scheme.FLOAT)] * len(data.heads)
    measured = sorted((stage for stage in data.stages if stage.sqnr), key=lambda stage: min(stage.sqnr.values()))
    return environment.get_template("page.html").render(
        folder=folder,
        data=data,
        timings=timings,
        verification=verification,
        style=style,
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        schemes={str(scheme): scheme_marks(scheme) for scheme in Scheme},
        scheme_counts=count_schemes([*(site.scheme for stage in data.stages for site in stage.sites), *heads]),
        part_counts=[(*key, count) for key, count in sorted(data.counts().items(), key=lambda row: part_order(row[0]))],
        warnings=[note.split("\n") for note in data.notes if is_warning(note)],
        notes=[note for note in data.notes if not is_warning(note)],
        modality_rows=modality_rows(data),
        lowest=lowest_sqnr(data.stages),
        per_token=schemes_with_both(data),
        lowest_stages=measured[:LISTED_STAGES],
        observed=any(stage.sqnr or stage.inputs for stage in data.stages),
        depth_charts=depth_charts(towers),
        candidates=candidate_rows(data.groups),
        candidate_schemes=candidate_columns(data.groups),
        maps=[precision_map(tower) for tower in towers],
        cache_rows=cache_rows(data),
        cache_summary=describe_caches(_cache_schemes(data)),
        range_charts=_by_tower(towers, range_charts),
        scale_charts=_by_tower(towers, scale_charts),
        towers=towers,
        stage_schemes=lambda stage: count_schemes([site.scheme for site in stage.sites]),
        site_role=site_role,
        channel_charts=channel_charts,
        command=shell_text(data.command),
        passes=re.split(r",(?![^{]*\})", data.pipeline),  # at commas outside braces
        samples=max((stage.samples for stage in data.stages), default=0),
        tokens=next((stage.rows for stage in data.stages if stage.part == Part.LANGUAGE), {}),
        pass_times=pass_times(timings) if timings else [],
        time_chart=time_chart(towers, timings) if timings else None,
    )


def _cache_schemes(data: ReportData) -> dict[str, CacheScheme | None]:
    return {
        cache.name: None if cache.scheme is None else CacheScheme(cache.scheme)
        for stage in data.stages
        for cache in stage.caches
    }


def schemes_with_both(data: ReportData) -> list[str]:
    """The schemes of layers that can be run in two kinds of arithmetic; stages were measured in the dynamic one."""
    used = {site.scheme for stage in data.stages for site in stage.sites}
    return [str(scheme) for scheme in Scheme if scheme in used and not scheme.spec.has_one_arithmetic]


def cache_rows(data: ReportData) -> list[CacheRow]:
    """One row per layer whose keys and values were observed."""
    caches = [cache for stage in data.stages for cache in stage.caches]
    highest = max((cache.sqnr or 0.0 for cache in caches), default=0.0) or 1.0
    return [
        CacheRow(
            cache.name,
            "float" if cache.scheme is None else CacheScheme(cache.scheme).spec.option,
            cache.sqnr,
            max(0.0, 100 * (cache.sqnr or 0.0) / highest),
            cache.reason,
        )
        for cache in caches
    ]


def modality_rows(data: ReportData) -> list[ModalityRow]:
    """One row per modality that occurs in the data."""
    tokens = next((stage.rows for stage in data.stages if stage.part == Part.LANGUAGE), {})
    rows = []
    for name in get_args(Modality):
        measured = [(stage.sqnr[name], stage.name) for stage in data.stages if name in stage.sqnr]
        inputs = [each for stage in data.stages for each in stage.inputs]
        before = max((each.before[name][0] for each in inputs if name in each.before), default=None)
        after = max((each.after[name][0] for each in inputs if name in each.after), default=None)
        sqnr, stage = min(measured, default=(None, ""))
        if tokens.get(name) or before is not None or sqnr is not None:
            rows.append(ModalityRow(name, tokens.get(name, 0), sqnr, stage, before, after))
    return rows


def candidate_columns(groups: Sequence[GroupData]) -> list[str]:
    """The schemes of all candidates, in the order of `Scheme`."""
    offered = {each.scheme for group in groups for each in group.candidates}
    return [str(scheme) for scheme in Scheme if scheme in offered]


def candidate_rows(groups: Sequence[GroupData]) -> list[CandidateRow]:
    """One row per group, in the model's order."""
    return [
        CandidateRow(
            group_title(group.sites),
            f"{group.noise_share:.1%}",
            [_candidate_cell(group, scheme) for scheme in candidate_columns(groups)],
        )
        for group in groups
    ]


def _candidate_cell(group: GroupData, scheme: str) -> CandidateCell | None:
    offered = {each.scheme: each for each in group.candidates}
    return CandidateCell(offered[scheme], scheme == group.scheme) if scheme in offered else None


def scheme_marks(scheme: Scheme) -> tuple[str, str, str]:
    """CSS class, letter in the precision map, title."""
    return scheme.lower(), scheme.spec.report.letter, scheme.spec.report.title


def scheme_style() -> str:
    """The colors of the schemes, in CSS. Float layers are hatched; their rule is in style.css."""
    specs = {scheme.lower(): scheme.spec for scheme in Scheme}
    light = "".join(_color_variables(name, spec.report.light) for name, spec in specs.items())
    dark = "".join(_color_variables(name, spec.report.dark) for name, spec in specs.items())
    rules = "".join(
        f".scheme.{name} {{ background: var(--{name}); color: var(--on-{name}); }}\n"
        for name, spec in specs.items()
        if spec.is_quantized
    )
    return f":root {{{light} }}\n@media (prefers-color-scheme: dark) {{ :root {{{dark} }} }}\n{rules}"


def _color_variables(name: str, colors: tuple[str, str]) -> str:
    background, text = colors
    return f" --{name}: {background}; --on-{name}: {text};"


def count_schemes(layers: Sequence[str]) -> list[SchemeCount]:
    """layers: scheme of each linear layer -> schemes that occur, in the order of `Scheme`."""
    counts = {scheme: layers.count(scheme) for scheme in Scheme}
    return [SchemeCount(scheme, count, 100 * count / len(layers)) for scheme, count in counts.items() if count]


def precision_map(tower: Tower) -> PrecisionMap:
    rows = []
    for stage in tower.stages:
        sites = (tower.site(stage, role) for role in tower.roles)
        rows.append(MapRow(stage_label(stage.name), [None if site is None else _map_cell(site) for site in sites]))
    return PrecisionMap(tower.title, tower.roles, rows)


def _map_cell(site: SiteData) -> MapCell:
    css, letter, title = scheme_marks(Scheme(site.scheme))
    texts = [title + (f" of {site.group_size}" if site.group_size else "")]
    if site.reason:
        texts.append(site.reason)
    if site.low is not None and site.high is not None:
        texts.append(f"input range {site.low:.3g} to {site.high:.3g}")
    if site.predicted is not None:
        texts.append(f"predicted SQNR {site.predicted:.1f} dB if only its group is quantized")
    return MapCell(css, letter, f"{site.name}: {'; '.join(texts)}")


def short_role(role: str) -> str:
    """self_attn.q_proj -> q_proj; mlp.0 stays, because "0" alone is not clear."""
    last = role.rpartition(".")[2]
    return role if last.isdigit() else last


def pass_times(timings: Timings) -> list[tuple[str, float, float, int]]:
    """(pass, seconds, percent of the longest, bytes by which the peak memory grew); the last row is all other time."""
    rest = max(0.0, timings.seconds - sum(step.seconds for step in timings.passes))
    rows = [(step.name, step.seconds, step.raised_bytes) for step in timings.passes]
    rows.append(("reading, tracing, checking, writing", rest, 0))
    longest = max(seconds for _, seconds, _ in rows) or 1.0
    return [(name, seconds, 100 * seconds / longest, raised) for name, seconds, raised in rows]


def _by_tower(towers: Sequence[Tower], charts_of: Callable[[Tower], list[Chart]]) -> list[tuple[str, list[Chart]]]:
    return [(tower.title, charts) for tower in towers if (charts := charts_of(tower))]
