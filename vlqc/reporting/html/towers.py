"""The stages of a model as a reader sees them: towers of layers, each with the same roles."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from vlqc.reporting.html.schema import LARGEST, SHARES, Facts, InputFacts, SiteFacts, StageFacts

MIDDLE = SHARES.index(0.5)
TITLES = {"vision": "Vision tower", "merger": "Merger", "language": "Language model"}


@dataclass
class Tower:
    """Consecutive stages of one kind. stem: what their names begin with; roles: of their sites, in order; readers: of
    their inputs, each named after the sites that read it."""

    title: str
    stem: str
    stages: list[StageFacts] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        """Of the stages: their numbers, or what else their names end with."""
        return [label_of(stage.name) for stage in self.stages]

    @property
    def roles(self) -> list[str]:
        return list(dict.fromkeys(role_of(site, stage) for stage in self.stages for site in stage.sites))

    @property
    def readers(self) -> list[str]:
        return list(dict.fromkeys(reader_of(it, stage) for stage in self.stages for it in stage.inputs))

    def site(self, stage: StageFacts, role: str) -> SiteFacts | None:
        return next((site for site in stage.sites if role_of(site, stage) == role), None)

    def inputs(self, reader: str) -> list[InputFacts | None]:
        """One per stage."""
        return [next((it for it in stage.inputs if reader_of(it, stage) == reader), None) for stage in self.stages]


def towers(facts: Facts) -> list[Tower]:
    """All stages, in the order of the model."""
    found: list[Tower] = []
    for stage in facts.stages:
        stem = re.sub(r"\.?\d+$", "", stage.name)
        if not found or found[-1].stem != stem:
            found.append(Tower(TITLES.get(stage.part, stage.part), stem))
        found[-1].stages.append(stage)
    return found


def label_of(stage: str) -> str:
    """model.layers.12 -> 12; visual.merger -> merger"""
    return stage.rpartition(".")[2]


def role_of(site: SiteFacts, stage: StageFacts) -> str:
    """model.layers.3.self_attn.q_proj -> self_attn.q_proj"""
    return site.name.removeprefix(f"{stage.name}.")


def reader_of(read: InputFacts, stage: StageFacts) -> str:
    """Names of the sites that read an input, what they share written once: self_attn.{q,k,v}_proj"""
    return folded([name.removeprefix(f"{stage.name}.") for name in read.sites])


def folded(names: Sequence[str]) -> str:
    """mlp.gate_proj, mlp.up_proj -> mlp.{gate,up}_proj"""
    if len(names) == 1:
        return names[0]
    parents = {name.rpartition(".")[0] for name in names}
    members = [name.rpartition(".")[2] for name in names]
    if len(parents) > 1:
        return ", ".join(names)
    end = "_proj" if all(member.endswith("_proj") for member in members) else ""
    parent = parents.pop()
    return f"{parent}{'.' if parent else ''}{{{','.join(member.removesuffix(end) for member in members)}}}{end}"


def peak(read: InputFacts, *, after: bool) -> float | None:
    """The largest magnitude of any channel."""
    curves = (read.after if after else read.before).values()
    return max((curve[0] for curve in curves), default=None)


def typical(read: InputFacts, *, after: bool) -> float | None:
    """The largest magnitude of the channel in the middle; of the modality where it is larger."""
    curves = (read.after if after else read.before).values()
    return max((curve[MIDDLE] for curve in curves), default=None)


def outlier_factor(stage: StageFacts, *, after: bool) -> float | None:
    """How many times the typical channel the largest one is, at the worst input of a quantized site; None: no such."""
    quantized = {site.name for site in stage.sites if site.scheme != "FLOAT"}
    factors = []
    for read in stage.inputs:
        large, middle = peak(read, after=after), typical(read, after=after)
        if quantized.intersection(read.sites) and large is not None and middle:
            factors.append(max(1.0, min(large / middle, LARGEST)))
    return max(factors, default=None)


def worst(stages: Sequence[StageFacts]) -> tuple[str, str, float] | None:
    """(stage, modality, dB) with the lowest measured SQNR."""
    known = [(stage.name, modality, value) for stage in stages for modality, value in stage.sqnr.items()]
    return min(known, key=lambda it: it[2], default=None)
