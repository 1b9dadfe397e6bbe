"""One page of HTML out of what was gathered: it loads nothing, runs without scripts, and escapes every string."""

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined

from vlqc.formatting import format_bytes, format_duration
from vlqc.reporting.html.charts import Chart
from vlqc.reporting.html.command_line import shell_text
from vlqc.reporting.html.overview import channel_charts, depth_charts, range_charts, scale_charts, time_chart
from vlqc.reporting.html.schema import Facts, SiteFacts, StageFacts
from vlqc.reporting.html.timings import Timings
from vlqc.reporting.html.towers import Tower, label_of, role_of, towers, worst
from vlqc.reporting.html.verification import Verification
from vlqc.reporting.tables import is_warning, part_order

# Scheme -> class of its colour, letter that stands for it, name.
SCHEMES = {
    "W8A8": ("static", "8", "W8A8, static"),
    "W8A8_DYNAMIC": ("dynamic", "d", "W8A8, dynamic per token"),
    "W4A8_DYNAMIC": ("four", "4", "W4A8, 4-bit weights per group"),
    "FLOAT": ("float", "f", "float"),
}
LOWEST = 5  # stages that the overview names


@dataclass(frozen=True)
class Made:
    """What the folder itself says. name: of the folder; kind: the model in words; engines: that load it, in words;
    serve: commands; bytes: of its weight files."""

    name: str
    kind: str
    engines: Sequence[str]
    serve: Sequence[str]
    bytes: int


@dataclass(frozen=True)
class Cell:
    """One Linear in the precision map; told: everything about it."""

    kind: str
    letter: str
    told: str


@dataclass(frozen=True)
class Row:
    """One layer of the precision map; None: it has no Linear in that role."""

    label: str
    cells: list[Cell | None]


@dataclass(frozen=True)
class Map:
    title: str
    roles: list[str]
    rows: list[Row]


@dataclass(frozen=True)
class Share:
    """A part of a whole: percent of it, and what it is."""

    kind: str
    percent: float
    label: str
    count: str


def render(made: Made, facts: Facts, timings: Timings | None, verification: Verification | None) -> str:
    """The page, the same text for the same arguments."""
    every = towers(facts)
    resources = files("vlqc.reporting.html") / "templates"
    style = (resources / "style.css").read_text(encoding="utf-8")
    script = (resources / "script.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=PackageLoader("vlqc.reporting.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": format_bytes, "duration": format_duration, "short_role": short_role}
    return environment.get_template("page.html").render(
        made=made,
        facts=facts,
        timings=timings,
        verification=verification,
        style=style,
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        schemes=SCHEMES,
        shares=scheme_shares(facts),
        parts=part_counts(facts),
        warnings=[note.split("\n") for note in facts.notes if is_warning(note)],
        notes=[note for note in facts.notes if not is_warning(note)],
        worst=worst(facts.stages),
        lowest=sorted((it for it in facts.stages if it.sqnr), key=lambda it: min(it.sqnr.values()))[:LOWEST],
        depth=depth_charts(every),
        maps=[precision_map(tower) for tower in every],
        ranges=_titled(every, range_charts),
        scales=_titled(every, scale_charts),
        towers=every,
        chips=scheme_chips,
        role=role_of,
        channel_charts=channel_charts,
        command=shell_text(facts.command),
        steps=re.split(r",(?![^{]*\})", facts.pipeline),  # commas outside braces
        samples=max((stage.samples for stage in facts.stages), default=0),
        rows=next((stage.rows for stage in facts.stages if stage.part == "language"), {}),
        pass_bars=pass_bars(timings) if timings else [],
        stage_times=time_chart(every, timings) if timings else None,
    )


def scheme_shares(facts: Facts) -> list[Share]:
    """Of all Linears, by scheme, in the order of SCHEMES."""
    counts = facts.counts()
    total = sum(counts.values())
    sums = {scheme: sum(it for (_, of), it in counts.items() if of == scheme) for scheme in SCHEMES}
    return [Share(SCHEMES[it][0], 100 * n / total, SCHEMES[it][2], str(n)) for it, n in sums.items() if n]


def part_counts(facts: Facts) -> list[tuple[str, str, int]]:
    """(part, scheme, Linears) in the model's order."""
    counts = facts.counts()
    return [(*key, counts[key]) for key in sorted(counts, key=part_order)]


def precision_map(tower: Tower) -> Map:
    rows = []
    for stage in tower.stages:
        sites = (tower.site(stage, role) for role in tower.roles)
        cells = [None if site is None else _cell(site) for site in sites]
        rows.append(Row(label_of(stage.name), cells))
    return Map(tower.title, tower.roles, rows)


def short_role(role: str) -> str:
    """self_attn.q_proj -> q_proj; mlp.0 -> mlp.0: a number alone says nothing."""
    last = role.rpartition(".")[2]
    return role if last.isdigit() else last


def scheme_chips(stage: StageFacts) -> list[Share]:
    """Of the sites of one stage, by scheme."""
    counts = {scheme: sum(site.scheme == scheme for site in stage.sites) for scheme in SCHEMES}
    return [Share(SCHEMES[it][0], 0.0, it, str(count)) for it, count in counts.items() if count]


def pass_bars(timings: Timings) -> list[tuple[str, float, float, int]]:
    """(name, seconds, percent of the longest, bytes by which it raised the peak); at the end what no pass took."""
    rest = max(0.0, timings.seconds - sum(it.seconds for it in timings.passes))
    rows = [(it.name, it.seconds, it.raised_bytes) for it in timings.passes]
    rows.append(("reading, tracing, checking, writing", rest, 0))
    longest = max(seconds for _, seconds, _ in rows) or 1.0
    return [(name, seconds, 100 * seconds / longest, raised) for name, seconds, raised in rows]


def _titled(every: Sequence[Tower], charts_of: Callable[[Tower], list[Chart]]) -> list[tuple[str, list[Chart]]]:
    return [(tower.title, charts) for tower in every if (charts := charts_of(tower))]


def _cell(site: SiteFacts) -> Cell:
    kind, letter, title = SCHEMES[site.scheme]
    facts = [title + (f" of {site.group_size}" if site.group_size else "")]
    facts += [site.reason] if site.reason else []
    facts += [f"input from {site.low:.3g} to {site.high:.3g}"] if site.low is not None and site.high is not None else []
    facts += [f"predicted SQNR {site.predicted:.1f} dB on its own"] if site.predicted is not None else []
    return Cell(kind, letter, f"{site.name}: {'; '.join(facts)}")
