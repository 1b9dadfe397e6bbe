"""Stages grouped into towers (vision, merger, language) whose layers have the same roles, and figures per stage."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from vlqc.families.family import part_title
from vlqc.families.layer_names import combine_names
from vlqc.reporting.html.schema import LARGEST, SHARES, InputData, ReportData, SiteData, StageData
from vlqc.targets.schemes import Scheme

MEDIAN = SHARES.index(0.5)


@dataclass
class Tower:
    """Consecutive stages whose names differ in their number only.

    prefix: of the names of its stages. roles: names of linear layers within a stage. input_labels: one per activation
    that linear layers read, made of the names of these layers.
    """

    title: str
    prefix: str
    stages: list[StageData] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        """One per stage: its number, or the last part of its name."""
        return [stage_label(stage.name) for stage in self.stages]

    @property
    def roles(self) -> list[str]:
        return list(dict.fromkeys(site_role(site, stage) for stage in self.stages for site in stage.sites))

    @property
    def input_labels(self) -> list[str]:
        return list(dict.fromkeys(input_label(data, stage) for stage in self.stages for data in stage.inputs))

    def site(self, stage: StageData, role: str) -> SiteData | None:
        return next((site for site in stage.sites if site_role(site, stage) == role), None)

    def inputs(self, label: str) -> list[InputData | None]:
        """The activation with this label, one per stage."""
        return [
            next((data for data in stage.inputs if input_label(data, stage) == label), None) for stage in self.stages
        ]


def group_stages(data: ReportData) -> list[Tower]:
    """All stages in the order of the model."""
    towers: list[Tower] = []
    for stage in data.stages:
        prefix = re.sub(r"\.?\d+$", "", stage.name)
        if not towers or towers[-1].prefix != prefix:
            towers.append(Tower(part_title(stage.part), prefix))
        towers[-1].stages.append(stage)
    return towers


def stage_label(stage: str) -> str:
    """model.layers.12 -> 12; visual.merger -> merger"""
    return stage.rpartition(".")[2]


def site_role(site: SiteData, stage: StageData) -> str:
    """model.layers.3.self_attn.q_proj -> self_attn.q_proj"""
    return site.name.removeprefix(f"{stage.name}.")


def input_label(data: InputData, stage: StageData) -> str:
    """Names of the layers that read an activation, combined: self_attn.{q,k,v}_proj"""
    return combine_names([name.removeprefix(f"{stage.name}.") for name in data.sites])


def largest_magnitude(data: InputData, *, after: bool) -> float | None:
    """Of any channel, before or after smoothing."""
    curves = (data.after if after else data.before).values()
    return max((curve[0] for curve in curves), default=None)


def median_magnitude(data: InputData, *, after: bool) -> float | None:
    """Largest magnitude of the median channel; of the two modalities the larger one."""
    curves = (data.after if after else data.before).values()
    return max((curve[MEDIAN] for curve in curves), default=None)


def outlier_factor(stage: StageData, *, after: bool) -> float | None:
    """Largest magnitude over that of the median channel, at the worst input of a quantized layer; None without any."""
    quantized = {site.name for site in stage.sites if Scheme(site.scheme).is_quantized}
    factors = []
    for data in stage.inputs:
        largest, median = largest_magnitude(data, after=after), median_magnitude(data, after=after)
        if quantized.intersection(data.sites) and largest is not None and median:
            factors.append(max(1.0, min(largest / median, LARGEST)))
    return max(factors, default=None)


def lowest_sqnr(stages: Sequence[StageData]) -> tuple[str, str, float] | None:
    """(stage, modality, dB) with the lowest measured SQNR."""
    measured = [(stage.name, modality, sqnr) for stage in stages for modality, sqnr in stage.sqnr.items()]
    return min(measured, key=lambda row: row[2], default=None)
