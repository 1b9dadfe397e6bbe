"""What a compilation would produce and cost, from checkpoint headers alone: `vlqc compile --plan`.

Schemes are those that the compilation would choose. Sizes follow from tensor shapes, the time from how fast this
machine multiplies matrices and reads the checkpoint. No weight is converted and nothing is written.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from vlqc.emit.atomic_folder import nearest_folder
from vlqc.emit.size_estimate import (
    check_size,
    output_bytes,
    predict_schemes,
    predict_search,
    required_disk_space,
    size_range,
)
from vlqc.families.family import ModelFamily, Part, Role
from vlqc.formatting import format_bytes, format_duration, pluralize
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.device import resolve_device
from vlqc.frontend.emitted_dtype import dtype_name
from vlqc.frontend.memory import check_memory, estimate_memory, peak_memory
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.ir.stage import Site
from vlqc.kernels_ref.quantize import quantize_weight_per_channel_absmax
from vlqc.options.options import Options
from vlqc.pipeline.layer_selection import check_engines, check_layers
from vlqc.pipeline.pass_api import Pass
from vlqc.pipeline.presets import build_pipeline, predict_cache, resolve_target
from vlqc.pipeline.rotation_plan import rotate_model
from vlqc.pipeline.sample_use import calibration_data, require_samples
from vlqc.reporting.rotations import RotatedPart, adapter_notes, rotated_parts, rotation_notes, rotation_text
from vlqc.reporting.summary import main_scheme, placement_notes, target_warnings, unused_notes
from vlqc.reporting.tables import labeled_lines, layer_table
from vlqc.targets.advice import grouped_layers, parallel_notes
from vlqc.targets.caches import CacheSchemes, bytes_per_token, projections
from vlqc.targets.engine import Engine
from vlqc.targets.rules import group_faults
from vlqc.targets.schemes import Scheme
from vlqc.targets.target import ENGINES, parse_target
from vlqc.targets.versions import VersionRange, supporting_versions

PROBE_SIDE = 1024  # rows and columns of the matrices that are multiplied to measure speed
PROBE_BYTES = 64 * 2**20  # read to measure the disk; the page cache counts, because the compilation profits from it too
PROBE_SECONDS = 0.3
START_SECONDS = 5.0  # imports, loading and verification
STAGE_SECONDS = 0.4  # tracing, searching and checking one stage, whatever its size
NEGLIGIBLE_FLOPS = 1e11  # of attention: less than a few seconds on any machine
LONG_ATTENTION = 60.0  # seconds from which on a note says what takes the time
SWEEPS = 3.0  # time of compiling weights without samples over that of rounding them; measured on 7B shapes
OVERHEAD = 2.0  # time of a compilation over that of its matrix products, reading and writing; measured on 7B shapes
BEFORE_SEARCH = "schemes and size are those before the search of --fallback auto"


@dataclass(frozen=True)
class CompilationPlan:
    """Predicted output and cost of a compilation.

    counts: number of linear layers by (part, scheme). reasons: why layers do not get the requested scheme -> name of
    one such layer. bytes_before, bytes_after: size of all weight files. bytes_range: the smallest and the largest size
    among which --fallback auto chooses, None without it. tokens, patches: total over all calibration samples. memory,
    disk_needed, disk_free: bytes. seconds: wall time on this machine. engines: versions of inference engines that load
    the result, as text. rotations: by kind and part. cache_before, cache_after: bytes of the keys and values of one
    token in the caches of all decoder layers; 0 if vlqc does not know these.
    """

    counts: dict[tuple[str, str], int]
    reasons: dict[str, str]
    bytes_before: int
    bytes_after: int
    tokens: int
    patches: int
    with_videos: bool
    memory: int
    seconds: float
    disk_needed: int
    disk_free: int
    engines: list[str]
    notes: list[str] = field(default_factory=list)
    rotations: list[RotatedPart] = field(default_factory=list)
    cache_before: int = 0
    cache_after: int = 0
    bytes_range: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-compatible values."""
        counts = [
            {"part": part, "scheme": str(scheme), "linears": count} for (part, scheme), count in self.counts.items()
        ]
        rotations = [asdict(part) for part in self.rotations]
        return {**vars(self), "counts": counts, "rotations": rotations, "fits": self.disk_needed <= self.disk_free}

    def _range_text(self, smallest: int, largest: int) -> str:
        return f"{format_bytes(smallest)} to {format_bytes(largest)}, by the schemes that the search chooses"

    def _cache_text(self) -> str:
        """Which layers stay in float is known only when they were measured."""
        sizes = f"{format_bytes(self.cache_before)} -> {format_bytes(self.cache_after)}"
        return f"{sizes} per token, if no layer stays in float"

    def render(self, console: Console) -> None:
        """Prints the plan."""
        console.print(layer_table("Planned schemes", self.counts))
        too_small = " (not enough)" if self.disk_free < self.disk_needed else ""
        kind = "patches of images and videos" if self.with_videos else "image patches"
        patches = f", {self.patches} {kind}" if self.patches else ""
        rows = [
            ("size", f"{format_bytes(self.bytes_before)} -> {format_bytes(self.bytes_after)}"),
            *([("sizes", self._range_text(*self.bytes_range))] if self.bytes_range else []),
            *([("rotated", rotation_text(self.rotations))] if self.rotations else []),
            *([("KV cache", self._cache_text())] if self.cache_after != self.cache_before else []),
            ("calibration", f"{pluralize(self.tokens, 'token')}{patches}" if self.tokens else "none"),
            ("memory", f"about {format_bytes(self.memory)}"),
            ("time", f"about {format_duration(self.seconds)} on this machine at its current load"),
            ("disk", f"{format_bytes(self.disk_needed)} of {format_bytes(self.disk_free)} free{too_small}"),
            *(("loads in", engine) for engine in self.engines),
            *(("reason", f"{layer}: {reason}") for reason, layer in self.reasons.items()),
            *(("note", note.split("\n")[0]) for note in self.notes),
        ]
        for line in labeled_lines(rows):
            console.print(line, soft_wrap=True)


def plan_compilation(
    *, samples: Sequence[dict[str, Tensor]] | None = None, options: Options | None = None, **user_options: Any
) -> CompilationPlan:
    """Predicts what `vlqc.compile` would produce with the same arguments.

    options: of `Options.without_saving`, instead of user_options. Without save_directory, disk_free is that of the
    current folder. UserError for unusable input, as from `compile`.
    """
    options = options or Options.without_saving(**user_options)
    passes = build_pipeline(options, ready_samples=samples is not None)
    options = resolve_target(options, passes)
    resolve_device(options.device_type)
    require_samples(options, passes, samples)
    checkpoint = Checkpoint(options.model_path, options.lora)
    model = StreamedModel.open(checkpoint, trust_remote_code=options.trust_remote_code, dtype=options.dtype)
    check_layers(model, options)
    rotations = rotate_model(model, passes)
    check_engines(model, options)
    check_size(model, options, passes)
    calibration = calibration_data(options, passes, model, samples)
    memory = estimate_memory(model, calibration.samples, options.memory_budget)
    memory_notes: list[str] = []
    check_memory(memory, model.checkpoint.files, memory_notes.append)
    tokens = sum(sample["input_ids"].numel() for sample in calibration.samples)
    patches = sum(model.family.inputs.patches(sample) for sample in calibration.samples)
    scheme_notes: list[str] = []
    sites = predict_schemes(model, passes, scheme_notes.append)
    schemes = {name: site.scheme or Scheme.FLOAT for name, site in sites.items()}
    layers = {name: (schemes[name], site.shape) for name, site in sites.items()}
    dtype = dtype_name(model.emitted_dtype)
    cache = predict_cache(passes)
    caches = dict.fromkeys(projections(model.family, sites), cache)
    notes = [
        *checkpoint.notes,
        *target_warnings(options, checkpoint, main_scheme(options, sites), cache),
        *placement_notes(options),
        *rotation_notes(rotations, model.family),
        *adapter_notes(passes, rotations),
        *unused_notes(model.unused_tensors()),
        *checkpoint.side_files(code=options.trust_remote_code).notes(),
        *calibration.notes,
        *memory_notes,
        *scheme_notes,
        *parallel_notes(options.engine_target, grouped_layers(model.family, layers), options.group_size),
        *([BEFORE_SEARCH] if options.fallback == "auto" else []),
    ]
    counts: dict[tuple[str, str], int] = {}
    heads = [] if model.tied else model.heads
    for name, scheme in (schemes | dict.fromkeys(heads, Scheme.FLOAT)).items():
        part = model.family.part(name)
        counts[part, str(scheme)] = counts.get((part, str(scheme)), 0) + 1
    after = output_bytes(model, sites, options.layout, cache=cache)
    channels = sum(sites[key].shape[0] for key, _ in projections(model.family, sites).values())
    item_bytes = model.emitted_dtype.itemsize
    roundings = roundings_per_layer(model, options, sites, passes)
    seconds = estimate_seconds(model, sites, tokens, patches, after, roundings)
    attention = attention_seconds(model, calibration.samples)
    if attention > max(seconds, LONG_ATTENTION):
        longest = max(sample["input_ids"].shape[1] for sample in calibration.samples)
        has_videos = any(map(model.family.inputs.has_videos, calibration.samples))
        media, by = (
            ("images and videos", "fewer or smaller frames and images") if has_videos else ("images", "smaller images")
        )
        notes.append(
            f"attention takes {format_duration(attention)} of the time, which grows with the square of the size of "
            f"{media}; the longest sample has {pluralize(longest, 'token')}: --max_tokens limits it, by {by}"
        )
    return CompilationPlan(
        counts=counts,
        reasons={site.reason: name for name, site in reversed(sites.items()) if site.reason},
        bytes_before=checkpoint.bytes,
        bytes_after=after,
        bytes_range=size_range(model, options, passes),
        tokens=tokens,
        patches=patches,
        with_videos=any(map(model.family.inputs.has_videos, calibration.samples)),
        memory=peak_memory() + memory,
        seconds=seconds + attention,
        disk_needed=required_disk_space(model, options, passes, calibration.samples),
        disk_free=shutil.disk_usage(nearest_folder(options.save_directory)).free,
        engines=[
            str(versions)
            for engine in ENGINES
            if (versions := loadable_versions(engine, model.family, schemes, dtype, options, caches)) is not None
        ],
        notes=list(dict.fromkeys(notes)),
        rotations=rotated_parts(rotations.groups(), model.family),
        cache_before=bytes_per_token(channels, item_bytes),
        cache_after=bytes_per_token(channels, item_bytes if cache is None else cache.spec.bits / 8),
    )


def roundings_per_layer(
    model: StreamedModel, options: Options, sites: dict[str, Site], passes: Sequence[Pass]
) -> dict[str, int]:
    """How many times a layer's weights are rounded, in different formats for the precision search; without it once."""
    search = predict_search(model, sites, passes) if options.fallback == "auto" else None
    formats = {
        layer: {scheme.spec.weight for scheme in schemes if scheme.is_quantized}
        for group, schemes in (search.candidates.items() if search else ())
        for layer in group
    }
    return {layer: len(different) for layer, different in formats.items()}


def estimate_seconds(
    model: StreamedModel,
    sites: dict[str, Site],
    tokens: int,
    patches: int,
    written: int,
    roundings: Mapping[str, int] | None = None,
) -> float:
    """Seconds to run all samples once, round all quantized weights, read the checkpoint and write the output.

    tokens: 0 without samples, where weights are rounded to nearest; written: bytes of the output; roundings: how many
    times a layer's weights are rounded, where it is not once.
    """
    forward_flops = rounding_flops = 0.0
    merged = patches // model.family.inputs.patches_per_token(model.module.config)
    for name, stage in model.stages.items():
        is_merger = model.family.part(name) == Part.MERGER
        rows = tokens if model.is_language(stage) else merged if is_merger else patches
        forward_flops += 2.0 * rows * sum(tensor.numel() for tensor in model.parameters(stage).values())
    for site in sites.values():
        if site.is_quantized and tokens:
            rounding_flops += 2.0 * site.shape[0] * site.shape[1] ** 2 * (roundings or {}).get(site.name, 1)
    forward_dtype = torch.bfloat16 if model.checkpoint.dtype == torch.bfloat16 else torch.float32
    disk = bytes_per_second(model.checkpoint)
    computing = forward_flops / flops_per_second(forward_dtype) + rounding_flops / flops_per_second(torch.float32)
    fixed = START_SECONDS + STAGE_SECONDS * len(model.stages)
    if not tokens:
        weights = sum(tensor.numel() for stage in model.stages.values() for tensor in model.parameters(stage).values())
        computing = SWEEPS * weights / roundings_per_second()
    return fixed + OVERHEAD * (computing + (model.checkpoint.bytes + written) / disk)


def attention_seconds(model: StreamedModel, samples: Sequence[dict[str, Tensor]]) -> float:
    """Seconds of the scores and weighted sums of attention, which grow with the square of the length of a sample or of
    the size of an image."""
    family, config = model.family, model.module.config
    causal = sum(sample["input_ids"].shape[1] ** 2 / 2 for sample in samples)
    image = {
        windowed: sum(family.inputs.attention_pairs(sample, config, windowed=windowed) for sample in samples)
        for windowed in (False, True)
    }
    flops = 0.0
    for name, stage in model.stages.items():
        layers = {path.removesuffix(".weight"): tensor for path, tensor in model.parameters(stage).items()}
        rows = {Role.VISION_QKV: [0], Role.QKV: [0]}
        for layer, tensor in layers.items():
            if (role := family.role(layer)) in rows:
                rows[role].append(tensor.shape[0])
        pairs = image[family.attends_in_windows(name, config)]
        flops += 4 * (pairs * max(rows[Role.VISION_QKV]) / 3 + causal * max(rows[Role.QKV]))
    if flops < NEGLIGIBLE_FLOPS:
        return 0.0
    heads = torch.ones(1, 8, PROBE_SIDE, 64)
    speed = (
        4
        * heads.numel()
        * PROBE_SIDE
        * calls_per_second(lambda: torch.nn.functional.scaled_dot_product_attention(heads, heads, heads))
    )
    return flops / speed


def flops_per_second(dtype: torch.dtype) -> float:
    """Measured speed of this machine's matrix products."""
    matrix = torch.ones(PROBE_SIDE, PROBE_SIDE, dtype=dtype)
    return 2 * PROBE_SIDE**3 * calls_per_second(lambda: matrix @ matrix)


def roundings_per_second() -> float:
    """Measured number of weights that this machine rounds to 8 bits."""
    weight = torch.ones(PROBE_SIDE, PROBE_SIDE)
    return weight.numel() * calls_per_second(lambda: quantize_weight_per_channel_absmax(weight))


def bytes_per_second(checkpoint: Checkpoint) -> float:
    """Measured speed of reading the checkpoint's first file."""
    with open(checkpoint.files[0], "rb") as file:
        started, count = time.perf_counter(), len(file.read(PROBE_BYTES))
    return count / max(time.perf_counter() - started, 1e-6)


def calls_per_second(function: Callable[[], object]) -> float:
    function()  # warm-up
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < PROBE_SECONDS:
        function()
        calls += 1
    return calls / (time.perf_counter() - started)


def loadable_versions(
    engine: Engine, family: ModelFamily, schemes: dict[str, Scheme], dtype: str, options: Options, caches: CacheSchemes
) -> VersionRange | None:
    """Versions of an engine that load the result; None if none does or the layout is that of the other engine.

    schemes: by layer; dtype: of the emitted float tensors; caches: by attention module.
    """
    if engine not in parse_target(options.engine_target).engines or group_faults(engine, family, schemes):
        return None
    return supporting_versions(engine, family, schemes, dtype, caches)
