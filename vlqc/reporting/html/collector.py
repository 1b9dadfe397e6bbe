"""Looks on while stages are compiled and keeps what the report shows of each: a few numbers per site and input.

It costs two forwards of one sample per stage (for the stage's SQNR), and per channel of an input one number until the
stage is done.
"""

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vlqc.frontend.memory import peak_memory
from vlqc.ir.stage import MODALITIES, Observation, Site, Stage, noise_to_signal
from vlqc.kernels_ref.quantize import INT8_MAX, INT8_MIN
from vlqc.pipeline.pass_api import Pass
from vlqc.pipeline.precision_search import Plan, decibels
from vlqc.reporting.html.schema import SHARES, InputFacts, Modality, SiteFacts, StageFacts, rounded
from vlqc.reporting.html.timings import PassTime, StageTime
from vlqc.targets.schemes import Scheme

NAMES: tuple[Modality, ...] = ("text", "image")
LEAST_SQNR = 10.0  # dB: a tenth of the output's power is noise
SAME = 1e-3  # a scale that near to one is none: ranges are float32 numbers divided by float32 numbers


class StageMetrics:
    """Facts of finished stages, in order, and what they took. Without `active` it keeps nothing: another process does.

    `traced` comes when a stage has its graph, `after` after each pass, `finished` when all have run.
    """

    def __init__(self, *, active: bool = True) -> None:
        self.active = active
        self.stages: list[StageFacts] = []
        self.stage_times: list[StageTime] = []
        self.restored_stages = 0  # stages of which an interrupted run has told
        self.raised: dict[str, int] = {}  # pass -> bytes by which it raised the peak of the process
        self._began = time.perf_counter()
        self._peak = peak_memory()
        self._reference = torch.empty(0, 0)
        self._seen: dict[str, Observation] = {}  # as first observed, without its rows

    def traced(self, stage: Stage) -> None:
        if not self.active:
            return
        self._began, self._seen = time.perf_counter(), {}
        self._reference = stage.probe_rows()
        self._peak = peak_memory()

    def after(self, stage: Stage, number: int, done: Pass) -> None:
        if not self.active:
            return
        peak = peak_memory()
        self.raised[done.name] = self.raised.get(done.name, 0) + peak - self._peak
        self._peak = peak
        for source, seen in stage.observations.items():
            if source not in self._seen:
                self._seen[source] = Observation(seen.channels, seen.ranges)

    def finished(self, stage: Stage) -> None:
        """Before the stage is forgotten."""
        if not self.active:
            return
        sample_shapes = stage.all_sample_shapes()
        rows = {name: sum(visit.of_modality[number] for visit in sample_shapes) for number, name in enumerate(NAMES)}
        self.stages.append(
            StageFacts(
                name=stage.name,
                part=stage.part,
                samples=len(sample_shapes),
                rows={name: count for name, count in rows.items() if count},
                sqnr=self._measured(stage),
                sites=tuple(map(site_facts, stage.sites.values())),
                inputs=tuple(
                    input_facts(members, self._seen[source], stage.observations.get(source, self._seen[source]))
                    for source, members in stage.groups().items()
                    if source in self._seen
                ),
            )
        )
        self._reference, self._seen = torch.empty(0, 0), {}
        self.stage_times.append(StageTime(name=stage.name, seconds=time.perf_counter() - self._began))

    def low_sqnr_warning(self) -> list[str]:
        """A sentence if the stage that finished last returns something else than the float stage does."""
        measured = self.stages[-1].sqnr if self.stages else {}
        if not measured or min(measured.values()) >= LEAST_SQNR:
            return []
        figures = ", ".join(f"{sqnr:.1f} dB for {name}" for name, sqnr in measured.items())
        bound = f"below {LEAST_SQNR:.0f} dB more than a tenth of it is noise"
        return [f"quantization spoils {self.stages[-1].name}: the SQNR of its output is {figures}; {bound}"]

    def last_stage(self) -> dict[str, Any]:
        """Facts of the stage that finished last, in JSON: what a journal keeps of it."""
        return self.stages[-1].model_dump(mode="json")

    def restore(self, kept: Iterable[dict[str, Any]]) -> None:
        """Goes on from what `last_stage` returned of each finished stage."""
        self.stages = [StageFacts.model_validate_json(json.dumps(stage)) for stage in kept]
        self.restored_stages = len(self.stages)

    def apply_search(self, plan: Plan) -> None:
        """The precision search chose: sites get its schemes."""
        chosen = {
            name: (scheme, group.assigned, decibels(group.choices[scheme].noise))
            for group, scheme in zip(plan.groups, plan.schemes, strict=True)
            for name in group.sites
        }
        for number, stage in enumerate(self.stages):
            sites = tuple(_settled(site, *chosen[site.name]) if site.name in chosen else site for site in stage.sites)
            self.stages[number] = stage.model_copy(update={"sites": sites})

    def pass_times(self, seconds: Mapping[str, float]) -> tuple[PassTime, ...]:
        return tuple(
            PassTime(name=name, seconds=took, raised_bytes=self.raised.get(name, 0)) for name, took in seconds.items()
        )

    def _measured(self, stage: Stage) -> dict[Modality, float]:
        """SQNR in dB per modality of what the stage returns for the probe; nothing where no site is quantized."""
        if stage.probe is None or all(site.scheme in (None, Scheme.FLOAT) for site in stage.sites.values()):
            return {}
        reference, made = self._reference, stage.probe_rows()
        modality = stage.probe.modality
        if modality is None or modality.numel() != len(made):
            modality = torch.full((len(made),), MODALITIES.index("image"), dtype=torch.int8)
        modality = modality.flatten().cpu()
        noise = {
            name: noise_to_signal(reference[modality == number], made[modality == number])
            for number, name in enumerate(NAMES)
            if bool((modality == number).any())
        }
        return {name: rounded(decibels(it)) for name, it in noise.items()}


def site_facts(site: Site) -> SiteFacts:
    grid = site.input
    return SiteFacts(
        name=site.name,
        shape=site.shape,
        scheme=str(site.scheme or Scheme.FLOAT),  # type: ignore[arg-type]
        group_size=site.group_size,
        reason=site.reason,
        low=None if grid is None else rounded((INT8_MIN - grid.offset) * grid.scale),
        high=None if grid is None else rounded((INT8_MAX - grid.offset) * grid.scale),
    )


def input_facts(members: list[Site], first: Observation, last: Observation) -> InputFacts:
    scales = smoothing_scales(first, last)
    return InputFacts(
        sites=tuple(site.name for site in members),
        channels=first.channels,
        before=_curves(first),
        after=_curves(last),
        scales=None if bool(((scales - 1).abs() <= SAME).all()) else curve(scales),
    )


def smoothing_scales(first: Observation, last: Observation) -> Tensor:
    """float32 [K]: by what each channel was divided: its range shrank by that, wherever a shift moved it to.

    A channel that never varied shows nothing and counts as left alone.
    """
    before, after = (seen.maximum() - seen.minimum() for seen in (first, last))
    return torch.where((before > 0) & (after > 0), before / after.clamp(min=torch.finfo(torch.float32).tiny), 1.0)


def curve(values: Tensor) -> tuple[float, ...]:
    """[K] of magnitudes -> those at SHARES of the channels, the largest first."""
    ordered = values.double().cpu().sort(descending=True).values
    return tuple(rounded(float(ordered[round(share * (len(ordered) - 1))])) for share in SHARES)


def _curves(seen: Observation) -> dict[Modality, tuple[float, ...]]:
    return {
        name: curve(torch.maximum(it.maximum, -it.minimum))
        for name in NAMES
        if (it := seen.ranges.get(name)) is not None and it.rows
    }


def _settled(site: SiteFacts, scheme: Scheme, assigned: Scheme, predicted: float) -> SiteFacts:
    known = {"predicted": rounded(predicted)}
    if scheme == assigned:
        return site.model_copy(update=known)
    reason = f"the precision search moved it from {assigned}"
    changed = {"scheme": str(scheme), "reason": reason, "low": None, "high": None, "group_size": None}
    return site.model_copy(update=known | changed)
