"""The result of a compilation, and the object that collects it while the stages are compiled."""

import json
import shlex
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.jupyter import JupyterMixin

from vlqc.errors import Fault, UserError
from vlqc.families.family import Role
from vlqc.files import sha256_of
from vlqc.formatting import format_bytes, format_duration
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.distributed import current_process_group
from vlqc.frontend.emitted_dtype import ENGINE_DTYPES, dtype_name, emitted_dtype
from vlqc.frontend.memory import peak_memory
from vlqc.ir.rotations import RotationPlan
from vlqc.ir.stage import Site, Stage
from vlqc.ir.value_range import FLOAT16_MAX, Peak
from vlqc.options.fields import flag_of
from vlqc.options.options import UNNAMED, Options
from vlqc.pipeline.pass_api import Pass
from vlqc.pipeline.precision_search import GroupPrecision, SearchResult
from vlqc.pipeline.presets import pipeline_text
from vlqc.pipeline.registry import print_pipeline
from vlqc.pipeline.sample_use import uses_samples
from vlqc.reporting.html.collector import StageMetrics, group_data
from vlqc.reporting.html.command_line import command, replace_paths
from vlqc.reporting.html.schema import (
    AdapterData,
    ReportData,
    RotationData,
    Timings,
    installed_version,
    machine,
    rounded,
)
from vlqc.reporting.rotations import RotatedPart, adapter_notes, rotated_parts, rotation_notes, rotation_text
from vlqc.reporting.tables import candidate_table, is_warning, labeled_lines, layer_table
from vlqc.targets.advice import (
    engine_notes,
    grouped_layers,
    incompatibilities,
    missing_rows_fix,
    parallel_notes,
    serve_commands,
)
from vlqc.targets.cache_schemes import CacheScheme
from vlqc.targets.caches import described_caches
from vlqc.targets.schemes import Scheme, option_name
from vlqc.targets.target import parse_target
from vlqc.targets.versions import layer_schemes, loading_ranges, supporting_versions
from vlqc.verify import verify_unfinished
from vlqc.verify.folder.contents import MANIFEST
from vlqc.verify.loader import read_description


@dataclass
class Result(JupyterMixin):
    """A compiled folder and what the compilation did. A notebook shows it as a table.

    folder: the save folder.
    counts: number of linear layers by (part, scheme); part is one of `Part`.
    bytes_before, bytes_after: size of all weight files of the float checkpoint and of the compiled folder.
    seconds: wall time. peak_memory_bytes: largest resident set of this process.
    notes: messages to the user; those of several lines are warnings.
    engines: versions of inference engines that load the folder, as text. serve: one command or setting per engine of
    the target that loads the folder.
    passes: seconds per pass, summed over stages.
    precision: with --fallback auto, the scheme that the search chose for every group of layers, and its candidates.
    predicted_sqnr: with --fallback auto, SQNR of the logits in dB, predicted from the noise of all groups. It is
    measured on calibration inputs, so other inputs come out slightly worse.
    rotations: that the weights contain, by kind and part.
    """

    folder: Path
    counts: dict[tuple[str, str], int]
    bytes_before: int
    bytes_after: int
    seconds: float
    peak_memory_bytes: int
    notes: list[str] = field(default_factory=list)
    engines: list[str] = field(default_factory=list)
    serve: list[str] = field(default_factory=list)
    passes: dict[str, float] = field(default_factory=dict)
    precision: list[GroupPrecision] = field(default_factory=list)
    predicted_sqnr: float | None = None
    rotations: list[RotatedPart] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-compatible values."""
        counts = [
            {"part": part, "scheme": scheme, "linears": count} for (part, scheme), count in sorted(self.counts.items())
        ]
        precision = [asdict(group) for group in self.precision]
        rotations = [asdict(part) for part in self.rotations]
        changed = {"folder": str(self.folder), "counts": counts, "precision": precision, "rotations": rotations}
        return {**vars(self), **changed}

    def described(self) -> dict[str, Any]:
        """`to_dict` under its name in 0.1; removed in the next version."""
        warnings.warn("Result.described is renamed to Result.to_dict", DeprecationWarning, stacklevel=2)
        return self.to_dict()

    def render(self, console: Console) -> None:
        """Prints the summary."""
        console.print(self, soft_wrap=True)  # commands stay on one line

    def __rich__(self) -> RenderableType:
        ratio = f" ({self.bytes_after / self.bytes_before:.0%})" if self.bytes_before else ""
        rows = [
            ("size", f"{format_bytes(self.bytes_before)} -> {format_bytes(self.bytes_after)}{ratio}"),
            *([("rotated", rotation_text(self.rotations))] if self.rotations else []),
            ("time", format_duration(self.seconds)),
            ("peak memory", format_bytes(self.peak_memory_bytes)),
            ("output", str(self.folder)),
            *(("loads in", engine) for engine in self.engines),
            *(("serve", command) for command in self.serve),
            ("report", f"vlqc report {shlex.quote(str(self.folder))}"),
            *(("warning", note.split("\n")[0]) for note in self.notes if is_warning(note)),  # printed in full before
            *(("note", note) for note in self.notes if not is_warning(note)),
        ]
        tables = [layer_table("Schemes", self.counts)]
        if self.precision:
            tables.append(candidate_table(self.precision))
        return Group(*tables, *labeled_lines(rows))


def main_scheme(options: Options, sites: Mapping[str, Site]) -> Scheme:
    """The scheme that the options ask for, or its substitute if no layer has the former.

    sites: by name, with the schemes that they will have; None before a pass that is not known here chooses them.
    """
    asked, used = options.scheme, {site.scheme for site in sites.values()}
    return asked if asked.substitute is None or used & {asked, None} else asked.substitute


def target_warnings(
    options: Options,
    checkpoint: Checkpoint,
    scheme: Scheme,
    cache: CacheScheme | None = None,
    *,
    every_layer: bool = True,
) -> list[str]:
    """Notes on the chosen target: which engines refuse the result, and what they expect of it.

    checkpoint: the float one; scheme: `main_scheme`; cache: scheme of keys and values, None for a cache in float;
    every_layer: whether it is that of all decoder layers, not of some.
    """
    family = checkpoint.family
    name = dtype_name(emitted_dtype(checkpoint.dtype, options.dtype))
    target = (options.engine_target, family, scheme, name)
    chosen: Any = {"scope": options.w4a8_scope, "cache": cache, "float_as": options.float_as}
    refusals = incompatibilities(*target, **chosen)
    why, fix = "the folder is written anyway", missing_rows_fix(family) or "see --target, --strict_target"
    if name != "bfloat16" and not incompatibilities(*target[:3], **chosen):
        fix = "use --dtype bfloat16"
    notes = [str(Fault(sentence, why=why, fix=fix)) for sentence in refusals]
    others = engine_notes(*target, group_size=options.group_size, **chosen, every_layer=every_layer)
    notes += [sentence for sentence in others if sentence not in refusals]
    return notes + dtype_notes(options, checkpoint)


def dtype_notes(options: Options, checkpoint: Checkpoint) -> list[str]:
    """Notes on the dtype of the result's float tensors where it is not that of the float checkpoint, weights and
    config.json."""
    stored, emitted = checkpoint.dtype, emitted_dtype(checkpoint.dtype, options.dtype)
    notes = []
    if stored not in ENGINE_DTYPES:
        engines = "" if options.dtype != "auto" else ", the dtype that engines run"
        notes.append(
            f"the checkpoint is {dtype_name(stored)}; float tensors are emitted as {dtype_name(emitted)}{engines}"
        )
    elif stored != emitted:
        notes.append(f"float tensors are converted from {dtype_name(stored)} to {dtype_name(emitted)} (--dtype)")
    claimed = next(iter(checkpoint.family.dtypes(checkpoint.source_config).values()))
    if claimed in tuple(map(dtype_name, ENGINE_DTYPES)) and claimed != dtype_name(emitted) and options.dtype == "auto":
        notes.append(
            f"config.json says {claimed}, but most weights are {dtype_name(stored)}: the result is "
            f"{dtype_name(emitted)}, config.json too; --dtype {claimed} gives {claimed}"
        )
    return notes


def placement_notes(options: Options) -> list[str]:
    """Notes on where the result is written: folders that an engine of the target does not load it from."""
    if options.save_directory == UNNAMED:
        return []
    faults = [
        fault
        for engine in parse_target(options.engine_target).engines
        for fault in engine.path_faults(options.save_directory)
    ]
    return [f"{fault.what}: {fault.fix} ({fault.where})" for fault in faults]


def unused_notes(names: Sequence[str]) -> list[str]:
    """names: of tensors in the checkpoint that the model does not have."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"tensors that are not part of the model are omitted: {', '.join(names[:3])}{more}"] if names else []


class CompilationSummary:
    """Counts layers by scheme and collects notes and metrics during a compilation, then builds its `Result`.

    scheme: `main_scheme`; show_note: callback for every new note. Each note is shown once, when it is added. cache:
    scheme in which a pass quantizes keys and values, None without such a pass.
    """

    def __init__(
        self,
        options: Options,
        checkpoint: Checkpoint,
        scheme: Scheme,
        show_note: Callable[[str], None],
        cache: CacheScheme | None = None,
    ) -> None:
        self.options, self.checkpoint, self._show_note = options, checkpoint, show_note
        self.counts: dict[tuple[str, str], int] = {}
        self.notes: list[str] = []
        self._run_notes: set[str] = set()
        self.experts: dict[str, tuple[int, int]] = {}  # block -> experts without calibration tokens, all experts
        self.float_caches: dict[str, float] = {}  # attention module whose cache a pass left in float -> its SQNR in dB
        self.caches = 0  # attention modules with a quantized cache
        self.search_result: SearchResult | None = None
        self.rotation_plan = RotationPlan()
        self.peak = Peak()  # the largest value between layers, of a float16 result
        self.metrics = StageMetrics(active=current_process_group().is_rank0)
        self.dtype = emitted_dtype(checkpoint.dtype, options.dtype)
        self._started = time.perf_counter()
        self._cache, self._scheme = cache, scheme
        self._target_notes = target_warnings(options, checkpoint, scheme, cache)
        self.add_notes(self._target_notes)
        self.add_notes(placement_notes(options), of_run=True)

    def add_notes(self, notes: Iterable[str], *, of_run: bool = False) -> None:
        """of_run: the notes are on this run and not on its output, so the save folder must not contain them."""
        for text in notes:
            if text not in self.notes:
                self.notes.append(text)
                self._show_note(text)
            if of_run:
                self._run_notes.add(text)

    def add_stage(self, stage: Stage) -> None:
        """Adds a finished stage: its layers by scheme, its notes, and a warning if its SQNR is low."""
        for site in stage.sites.values():
            self._count(stage.part, site.scheme or Scheme.FLOAT)
        self._count_experts(stage)
        for cache in stage.caches.values():
            self.caches += cache.is_quantized
            if not cache.is_quantized and cache.sqnr is not None:
                self.float_caches[cache.name] = cache.sqnr
        if (recorded := stage.execution.peaks) is not None and recorded.peak.value > self.peak.value:
            self.peak = recorded.peak
        self.add_notes(stage.notes)
        self.metrics.finished(stage)
        if self.options.fallback != "auto":  # the precision search chooses the schemes after the last stage
            self.add_notes(self.metrics.low_sqnr_warning())

    def state(self) -> dict[str, Any]:
        """Counts and notes so far and the metrics of the last stage, as JSON-compatible values."""
        notes = [note for note in self.notes if note not in self._run_notes]
        counts = [[*key, count] for key, count in self.counts.items()]
        return {
            "counts": counts,
            "notes": notes,
            "experts": self.experts,
            "caches": [self.caches, self.float_caches],
            "peak": [self.peak.value, self.peak.where],
            "stage": self.metrics.last_stage(),
        }

    def restore(self, states: Sequence[dict[str, Any]]) -> None:
        """Continues from the `state` of an interrupted run after each of its stages; nothing to do without any."""
        if not states:
            return
        self.counts = {(part, scheme): count for part, scheme, count in states[-1]["counts"]}
        self.experts = {block: (unreached, every) for block, (unreached, every) in states[-1]["experts"].items()}
        self.caches, self.float_caches = states[-1]["caches"]
        self.peak = Peak(*states[-1]["peak"])
        self.add_notes(states[-1]["notes"])
        self.metrics.restore([state["stage"] for state in states])

    def apply_search(self, search_result: SearchResult | None) -> None:
        """Counts the schemes that the precision search chose; None: there was no search.

        UserError if no layer is quantized: the output would be a copy of the float checkpoint.
        """
        if search_result is not None:
            self._apply_search(search_result)
        self._require_quantized()

    def _apply_search(self, search_result: SearchResult) -> None:
        self.search_result = search_result
        self.metrics.apply_search(search_result)
        for group, chosen in zip(search_result.groups, search_result.schemes, strict=True):
            part, sites = group.part, len(group.sites)
            for scheme, change in ((group.assigned, -sites), (chosen, sites)):
                self.counts[part, str(scheme)] = self.counts.get((part, str(scheme)), 0) + change
        self.counts = {key: count for key, count in self.counts.items() if count}
        self.add_notes(search_result.notes())

    def _require_quantized(self) -> None:
        if not any(Scheme(scheme).is_quantized for _, scheme in self.counts):
            why = "no pass assigned a scheme to any layer, or every layer is excluded"
            fix = "check --pipeline and --exclude"
            if self.search_result is not None:
                why = f"the precision search kept all layers in float, at {self.search_result.sqnr:.1f} dB"
                fix = "set a lower --min_sqnr or a lower --max_float_groups"
            raise UserError(Fault("no layer was quantized", why=why, fix=fix))

    def _count_experts(self, stage: Stage) -> None:
        """Counts the experts of a stage by what their first linear layers read: each a selection of rows of its own."""
        family = stage.family
        inputs = {
            site.source: block
            for site in stage.sites.values()
            if family.role(site.name) == Role.EXPERT_UP and (block := family.experts_of(site.name))
        }
        for source, block in inputs.items():
            observation = stage.observations.get(source)
            unreached, every = self.experts.get(block, (0, 0))
            is_unreached = observation is not None and observation.is_empty
            self.experts[block] = unreached + is_unreached, every + 1

    def note_unreached_experts(self) -> None:
        """One note on the experts of all blocks that no calibration token reached."""
        blocks = {block: counts for block, counts in self.experts.items() if counts[0]}
        if not blocks:
            return
        unreached, every = (sum(column) for column in zip(*self.experts.values(), strict=True))
        most, counts = max(blocks.items(), key=lambda item: item[1][0])
        self.add_notes(
            [
                f"{unreached} of {every} experts received no calibration tokens, most of them in {most} "
                f"({counts[0]} of {counts[1]}): their weights are rounded to nearest, without smoothing; "
                "more samples may reach them"
            ]
        )

    def note_float_caches(self) -> None:
        """One note on all layers whose keys and values stay in float because of their error."""
        if not self.float_caches:
            return
        layers = [f"{name} {sqnr:.1f} dB" for name, sqnr in sorted(self.float_caches.items(), key=lambda item: item[1])]
        every = self.caches + len(self.float_caches)
        self.add_notes(
            [
                f"the keys and values of {len(layers)} of {every} layers stay in float, because the SQNR of the "
                f"attention's output would be too low: {', '.join(layers)}"
            ]
        )

    def note_parallel_sizes(self, folder: Path) -> None:
        """Over how many devices engines can shard layers whose weights have groups, by the schemes of the folder."""
        schemes, names = layer_schemes(read_description(folder)), set(self.checkpoint.names)
        stored = {layer: scheme for layer, scheme in schemes.items() if f"{layer}.weight" in names}
        layers = {layer: (scheme, self.checkpoint.shape(f"{layer}.weight")) for layer, scheme in stored.items()}
        grouped = grouped_layers(self.checkpoint.family, layers)
        self.add_notes(parallel_notes(self.options.engine_target, grouped, self.options.group_size))

    def note_target(self, folder: Path) -> None:
        """Replaces the notes on the target, made before the first stage, where the folder lacks what they are about: a
        quantized cache in some or all layers, or the scheme in place of float."""
        description = read_description(folder)
        caches = described_caches(self.checkpoint.family, description)
        cache = self._cache if any(caches.values()) else None
        used, options = set(layer_schemes(description).values()), self.options
        if options.float_as.is_quantized and options.float_as not in used:
            self.add_notes([f"{flag_of('float_as')} {option_name(options.float_as)} changed no layer of this model"])
            options = options.model_copy(update={"float_as": Scheme.FLOAT})
        notes = target_warnings(options, self.checkpoint, self._scheme, cache, every_layer=all(caches.values()))
        self.notes = [note for note in self.notes if note in notes or note not in self._target_notes]
        self.add_notes(notes)

    def note_caches(self, folder: Path) -> None:
        """After a pass that quantizes keys and values: a note if it left all layers in float, and a warning if it left
        some and the target's version cannot."""
        if self._cache is None:
            return
        family, target = self.checkpoint.family, parse_target(self.options.engine_target)
        caches = described_caches(family, read_description(folder))
        if not any(caches.values()):
            self.add_notes(["keys and values stay in float in all layers: engines use no quantized KV cache"])
            return
        if all(caches.values()):
            return
        name = dtype_name(self.dtype)
        every = dict.fromkeys(caches, self._cache)
        for engine in target.engines:
            with_every, versions = (supporting_versions(engine, family, {}, name, each) for each in (every, caches))
            loads = with_every is not None and target.version is not None and target.version in with_every
            if loads and (versions is None or str(target.version) not in versions):
                title, left = target.title(engine), list(caches.values()).count(None)
                what = f"{title} quantizes the keys and values of every layer, and {left} have no scales"
                fix = "in --pipeline, set min_sqnr of the pass for the cache to 0, or use a newer version"
                self.add_notes([str(Fault(what, why=f"they would be rounded to integers; {versions} do not", fix=fix))])

    def note_overflow(self) -> None:
        """A warning if values between layers of a float16 result are beyond float16, a note if they come close."""
        if self.peak.value <= FLOAT16_MAX / 2:
            return
        reached = f"the {self.peak.where} reaches {self.peak.value:.3g} in calibration"
        if self.peak.value <= FLOAT16_MAX:
            self.add_notes([f"{reached}, close to the largest value of float16, {FLOAT16_MAX:.0f}"])
            return
        what = f"values between layers leave float16: {reached}"
        why = f"the largest value of float16 is {FLOAT16_MAX:.0f}, so an engine computes Inf or NaN there"
        rotate = "" if self.rotation_plan else ", or --rotate auto, which spreads such values over all channels"
        self.add_notes([str(Fault(what, why=why, fix=f"use --dtype bfloat16{rotate}"))])

    def note_rotations(self, plan: RotationPlan, passes: Sequence[Pass]) -> None:
        """What rotations and smoothing break, and which streams are not rotated. To be called before the first stage.

        passes: of the pipeline.
        """
        self.rotation_plan = plan
        self.add_notes([*rotation_notes(plan, self.checkpoint.family), *adapter_notes(passes, plan)])

    def require_loadable(self, folder: Path) -> None:
        """With --strict_target, UserError unless the target's engines load the finished folder."""
        if not self.options.strict_target:
            return
        verification = verify_unfinished(
            folder, self.options.engine_target, trust_remote_code=self.options.trust_remote_code
        )
        if not verification.ok:
            what = f"the result does not load in {parse_target(self.options.engine_target).text}"
            why = "; ".join(dict.fromkeys(finding.what for finding in verification.faults))
            fix = "choose another --target, change the scheme, or omit --strict_target"
            raise UserError(Fault(what, "--strict_target", why, fix))

    def write_report_data(self, folder: Path, passes: Sequence[Pass], *, ready_samples: bool) -> None:
        """Writes vlqc_report.json, from which `vlqc report` makes its page.

        ready_samples: whether the samples were passed as tensors through Python.
        """
        text, options = print_pipeline(passes), self.options
        by_options = pipeline_text(options, ready_samples=ready_samples)
        calibrated = ready_samples or uses_samples(options, passes)
        ReportData(
            version=installed_version("vlqc"),
            command=command(
                options, None if text == by_options else text, names_samples=calibrated and not ready_samples
            ),
            ready_samples=ready_samples,
            calibrated=calibrated,
            pipeline=text,
            target=options.engine_target,
            dtype="float16" if self.dtype == torch.float16 else "bfloat16",
            bytes_before=self.checkpoint.bytes,
            heads=self._heads(),
            rotations=tuple(RotationData(**asdict(group)) for group in self.rotation_plan.groups()),
            adapters=tuple(AdapterData(**asdict(adapter)) for adapter in self.checkpoint.adapters),
            notes=replace_paths([note for note in self.notes if note not in self._run_notes], options),
            predicted=rounded(self.search_result.sqnr) if self.search_result else None,
            groups=tuple(map(group_data, self.search_result.table())) if self.search_result else (),
            stages=tuple(self.metrics.stages),
        ).write(folder)

    def _heads(self) -> tuple[str, ...]:
        """The output head, if it has a weight of its own."""
        head = self.checkpoint.family.output_head
        untied = head == self.rotation_plan.untied_head
        return (head,) if untied or f"{head}.weight" in self.checkpoint else ()

    def _count(self, part: str, scheme: Scheme) -> None:
        self.counts[part, str(scheme)] = self.counts.get((part, str(scheme)), 0) + 1

    def result(self, passes: dict[str, float]) -> Result:
        """The result, once the save folder is in place. Writes the file of --timings.

        passes: seconds per pass.
        """
        folder = self.options.save_directory
        for head in self._heads():
            self._count(self.checkpoint.family.part(head), Scheme.FLOAT)
        description = read_description(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        loading = loading_ranges(description, dtype_name(self.dtype), config)
        if self.options.timings is not None:
            self._timings(passes).write(self.options.timings)
        return Result(
            folder=folder,
            counts=self.counts,
            bytes_before=self.checkpoint.bytes,
            bytes_after=weight_bytes(folder),
            seconds=time.perf_counter() - self._started,
            peak_memory_bytes=peak_memory(),
            notes=self.notes,
            engines=list(map(str, loading)),
            serve=serve_commands(self.options.engine_target, folder.resolve(), [each.engine for each in loading]),
            passes=passes,
            precision=self.search_result.table() if self.search_result else [],
            predicted_sqnr=self.search_result.sqnr if self.search_result else None,
            rotations=rotated_parts(self.rotation_plan.groups(), self.checkpoint.family),
        )

    def _timings(self, passes: dict[str, float]) -> Timings:
        system, processors, versions = machine()
        return Timings(
            manifest=sha256_of(self.options.save_directory / MANIFEST),
            kept=self.metrics.restored_stages,
            seconds=time.perf_counter() - self._started,
            peak_bytes=peak_memory(),
            passes=self.metrics.pass_times(passes),
            stages=tuple(self.metrics.stage_times),
            system=system,
            processors=processors,
            versions=versions,
        )


def weight_bytes(folder: Path) -> int:
    """Size of all weight files of a checkpoint in bytes."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
