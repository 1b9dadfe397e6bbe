"""Collects metrics of each stage during a compilation: SQNR, ranges, smoothing scales, schemes and times.

It costs two forwards of one sample per stage, for the stage's SQNR, as many of another sample per modality that the
first lacks, and per input a copy of the ranges of its channels until the stage is finished.
"""

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vlqc.frontend.memory import peak_memory
from vlqc.ir.execution import Call
from vlqc.ir.observation import Observation, modality_of_rows, noise_to_signal, of_images
from vlqc.ir.stage import CacheSite, Site, Stage
from vlqc.kernels_ref.quantize import INT8_MAX, INT8_MIN
from vlqc.pipeline.pass_api import Pass
from vlqc.pipeline.precision_search import GroupPrecision, SearchResult, decibels
from vlqc.reporting.html.schema import (
    SHARES,
    CacheData,
    CandidateData,
    GroupData,
    InputData,
    Modality,
    PassTime,
    SiteData,
    StageData,
    StageTime,
    rounded,
)
from vlqc.targets.schemes import Scheme

NAMES: tuple[Modality, ...] = ("text", "image", "video")  # as in MODALITIES
LOW_SQNR = 10.0  # dB: the power of the noise is a tenth of the output's
SCALE_TOLERANCE = 1e-3  # scales this close to 1 are 1: they are quotients of float32 ranges


class StageMetrics:
    """Metrics of finished stages in order. Inactive on all processes but rank 0.

    `traced` is called when a stage has its graph, `after` after each pass, `finished` after the last one.
    """

    def __init__(self, *, active: bool = True) -> None:
        self.active = active
        self.stages: list[StageData] = []
        self.stage_times: list[StageTime] = []
        self.restored_stages = 0
        self.peak_growth: dict[str, int] = {}  # pass -> bytes by which it raised the peak memory of the process
        self._started = time.perf_counter()
        self._peak = peak_memory()
        self._references: list[Tensor] = []  # outputs of the float stage for its probes
        self._rotated = 0  # number of rotations of the stage that are done
        self._first_ranges: dict[str, Observation] = {}  # as first observed, without the kept rows

    def traced(self, stage: Stage) -> None:
        if not self.active:
            return
        self._started, self._first_ranges = time.perf_counter(), {}
        self._rotated = 0
        if not stage.rotations and stage.execution.sample_shapes:
            self._references = _probe_outputs(stage)
        self._peak = peak_memory()

    def after(self, stage: Stage, number: int, done: Pass) -> None:
        if not self.active:
            return
        peak = peak_memory()
        self.peak_growth[done.name] = self.peak_growth.get(done.name, 0) + peak - self._peak
        self._peak = peak
        rotated = sum(rotation.done for rotation in stage.rotations)
        if rotated > self._rotated:  # its inputs are rotated, so the stage could not run on them before
            self._rotated = rotated
            self._references = _probe_outputs(stage, reuse=True) if stage.execution.sample_shapes else []
        for source, observation in stage.observations.items():
            if source not in self._first_ranges and observation.ranges:
                self._first_ranges[source] = Observation(observation.channels, observation.ranges)

    def finished(self, stage: Stage) -> None:
        """Adds the stage, which still has its module and observations."""
        if not self.active:
            return
        shapes = stage.execution.sample_shapes
        rows = {name: sum(shape.rows_per_modality[index] for shape in shapes) for index, name in enumerate(NAMES)}
        self.stages.append(
            StageData(
                name=stage.name,
                part=stage.part,
                samples=len(shapes),
                rows={name: count for name, count in rows.items() if count},
                sqnr=self._sqnr(stage),
                sites=tuple(map(site_data, stage.sites.values())),
                inputs=tuple(
                    input_data(sites, first, stage.observations.get(source, first))
                    for source, sites in stage.groups().items()
                    if (first := self._first_ranges.get(source)) is not None
                ),
                caches=tuple(map(cache_data, stage.caches.values())),
            )
        )
        self._references, self._first_ranges = [], {}
        self.stage_times.append(StageTime(name=stage.name, seconds=time.perf_counter() - self._started))

    def low_sqnr_warning(self) -> list[str]:
        """One sentence if the SQNR of the last stage is below LOW_SQNR, else none."""
        measured = self.stages[-1].sqnr if self.stages else {}
        if not measured or min(measured.values()) >= LOW_SQNR:
            return []
        figures = ", ".join(f"{sqnr:.1f} dB for {name} tokens" for name, sqnr in measured.items())
        bound = f"below {LOW_SQNR:.0f} dB more than a tenth of the output's power is noise"
        return [f"quantization degrades {self.stages[-1].name}: the SQNR of its output is {figures}; {bound}"]

    def last_stage(self) -> dict[str, Any]:
        """Data of the last stage as JSON-compatible values, for the journal."""
        return self.stages[-1].model_dump(mode="json")

    def restore(self, stages: Iterable[dict[str, Any]]) -> None:
        """Continues after stages of an interrupted run. stages: what `last_stage` returned after each of them."""
        self.stages = [StageData.model_validate_json(json.dumps(stage)) for stage in stages]
        self.restored_stages = len(self.stages)

    def apply_search(self, search_result: SearchResult) -> None:
        """Replaces the schemes of sites by those that the precision search chose."""
        chosen = {
            name: (scheme, group.assigned, decibels(group.candidates[scheme].noise))
            for group, scheme in zip(search_result.groups, search_result.schemes, strict=True)
            for name in group.sites
        }
        for index, stage in enumerate(self.stages):
            sites = tuple(
                _with_scheme(site, *chosen[site.name]) if site.name in chosen else site for site in stage.sites
            )
            self.stages[index] = stage.model_copy(update={"sites": sites})

    def pass_times(self, seconds: Mapping[str, float]) -> tuple[PassTime, ...]:
        return tuple(
            PassTime(name=name, seconds=spent, raised_bytes=self.peak_growth.get(name, 0))
            for name, spent in seconds.items()
        )

    def _sqnr(self, stage: Stage) -> dict[Modality, float]:
        """SQNR in dB of the stage's output for the probe, by modality; empty if no site is quantized,
        or without samples.

        Modalities that the probe lacks are measured on other samples.
        """
        is_quantized = any(site.is_quantized for site in stage.sites.values())
        if stage.execution.probe is None or not stage.execution.sample_shapes or not is_quantized:
            return {}
        noise: dict[Modality, float] = {}
        for call, reference, output in zip(_probes(stage), self._references, _probe_outputs(stage), strict=True):
            modality = modality_of_rows(call.modality, len(output))
            modality = of_images(len(output)) if modality is None else modality.flatten().cpu()
            for index, name in enumerate(NAMES):
                rows = modality == index
                if name not in noise and bool(rows.any()):
                    noise[name] = noise_to_signal(reference[rows], output[rows])
        return {name: rounded(decibels(noise[name])) for name in NAMES if name in noise}


def _probes(stage: Stage) -> list[Call]:
    """The calls that SQNR is measured on; the probe is the last one, so that its output is kept for reuse."""
    return [*stage.execution.more_probes, *filter(None, [stage.execution.probe])]


def _probe_outputs(stage: Stage, *, reuse: bool = False) -> list[Tensor]:
    return [stage.execution.probe_output(call, reuse=reuse) for call in _probes(stage)]


def site_data(site: Site) -> SiteData:
    grid = site.input
    return SiteData(
        name=site.name,
        shape=site.shape,
        scheme=site.spec.name,
        group_size=site.group_size,
        reason=site.reason,
        low=None if grid is None else rounded((INT8_MIN - grid.offset) * grid.scale),
        high=None if grid is None else rounded((INT8_MAX - grid.offset) * grid.scale),
    )


def cache_data(cache: CacheSite) -> CacheData:
    return CacheData(
        name=cache.name,
        scheme=cache.scheme and str(cache.scheme),
        reason=cache.reason,
        sqnr=None if cache.sqnr is None else rounded(cache.sqnr),
        key=_scale_figures(cache.key_scale),
        value=_scale_figures(cache.value_scale),
    )


def _scale_figures(scale: Tensor | None) -> tuple[float, float] | None:
    """Root mean square and maximum."""
    return (
        None if scale is None else (rounded(float(scale.double().square().mean().sqrt())), rounded(float(scale.max())))
    )


def input_data(sites: list[Site], first: Observation, last: Observation) -> InputData:
    """sites: that read the input; first, last: its observation before and after smoothing."""
    scales = smoothing_scales(first, last)
    return InputData(
        sites=tuple(site.name for site in sites),
        channels=first.channels,
        before=_curves(first),
        after=_curves(last),
        scales=None if bool(((scales - 1).abs() <= SCALE_TOLERANCE).all()) else curve(scales),
    )


def smoothing_scales(first: Observation, last: Observation) -> Tensor:
    """float32 [K]: divisor of each channel, as the quotient of its ranges, which a shift does not change.

    1 for channels that are constant.
    """
    before, after = (observation.maximum() - observation.minimum() for observation in (first, last))
    return torch.where((before > 0) & (after > 0), before / after.clamp(min=torch.finfo(torch.float32).tiny), 1.0)


def curve(values: Tensor) -> tuple[float, ...]:
    """[K] magnitudes -> those at SHARES of the channels, in descending order."""
    ordered = values.double().cpu().sort(descending=True).values
    return tuple(rounded(float(ordered[round(share * (len(ordered) - 1))])) for share in SHARES)


def _curves(observation: Observation) -> dict[Modality, tuple[float, ...]]:
    return {
        name: curve(torch.maximum(channels.maximum, -channels.minimum))
        for name in NAMES
        if (channels := observation.ranges.get(name)) is not None and channels.rows
    }


def group_data(group: GroupPrecision) -> GroupData:
    candidates = tuple(
        CandidateData(scheme=str(each.scheme), sqnr=rounded(each.sqnr), bytes=each.bytes) for each in group.candidates
    )
    return GroupData(
        sites=group.sites,
        part=str(group.part),
        assigned=str(group.assigned),
        scheme=str(group.scheme),
        noise_share=rounded(group.noise_share),
        candidates=candidates,
    )


def _with_scheme(site: SiteData, scheme: Scheme, assigned: Scheme, predicted: float) -> SiteData:
    """assigned: scheme before the search; predicted: SQNR in dB."""
    prediction = {"predicted": rounded(predicted)}
    if scheme == assigned:
        return site.model_copy(update=prediction)
    reason = f"changed from {assigned} by the precision search"
    changes: dict[str, Any] = {"scheme": str(scheme), "reason": reason}
    if not scheme.spec.activation.is_static:
        changes |= {"low": None, "high": None}
    if not scheme.spec.weight.per_group:
        changes["group_size"] = None
    return site.model_copy(update=prediction | changes)
