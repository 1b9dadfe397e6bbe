"""What a compilation would do, from headers alone: `vlqc compile --plan`.

Schemes come from the same decisions as in the real run, sizes from shapes, time from how fast this machine multiplies
and reads just now. No weight is converted, and nothing is written.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from vlqc.emit.atomic_folder import nearest_folder
from vlqc.emit.size_estimate import needed_room, output_bytes, predict_schemes
from vlqc.emit.stage_tensors import emitted_dtype
from vlqc.formatting import escape_control_chars, format_bytes, format_duration
from vlqc.frontend.calibration.dataset import calibrate_on
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.device import resolve_device
from vlqc.frontend.memory import needed_memory, require_memory
from vlqc.frontend.process_memory import peak_memory
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.ir.stage import Site
from vlqc.options.options import Options
from vlqc.pipeline.layer_selection import check_layers
from vlqc.pipeline.registry import pipeline_of
from vlqc.reporting.progress import in_model_order
from vlqc.reporting.tally import target_warnings
from vlqc.targets.engines import ENGINE_TITLES, Scheme, group_faults, part_of
from vlqc.targets.versions import Span, span

PROBE_SIDE = 1024  # of the square matrices that are multiplied
PROBE_BYTES = 64 * 2**20  # read to measure the disk; what the page cache holds comes faster, in the real run, too
PROBE_SECONDS = 0.3
START_SECONDS, STAGE_SECONDS = 5.0, 0.4  # to import, load and verify; to trace, search and prove a stage of any size
OVERHEAD = 2.0  # of a real run over its matrix products and its reading and writing, as measured on 7B shapes
BEFORE_SEARCH = "schemes and size are those before the search that --fallback auto asks for"


@dataclass(frozen=True)
class Preflight:
    """What would come out, and what it would take.

    counts: Linears by (part, scheme); reasons: why layers do not get the asked scheme, with an example; bytes in all
    weight files before and after; tokens, patches: of all calibration samples; memory and disk in bytes; seconds: of
    wall time on this machine; engines: what loads it, in words.
    """

    counts: dict[tuple[str, str], int]
    reasons: dict[str, str]
    bytes_before: int
    bytes_after: int
    tokens: int
    patches: int
    memory: int
    seconds: float
    disk_needed: int
    disk_free: int
    engines: list[str]
    notes: list[str] = field(default_factory=list)

    def described(self) -> dict[str, Any]:
        """The same for JSON."""
        counts = [{"part": part, "scheme": str(it), "linears": count} for (part, it), count in self.counts.items()]
        return {**vars(self), "counts": counts, "fits": self.disk_needed <= self.disk_free}


def preflight(*, samples: Sequence[dict[str, Tensor]] | None = None, **given: Any) -> Preflight:
    """The options of a compilation -> what it would do. UserError for unusable input, as in the real run.

    Without save_directory the room that is told is that of the current folder.
    """
    options = Options.without_saving(**given)
    passes = pipeline_of(options)
    resolve_device(options.device_type)
    checkpoint = Checkpoint(options.model_path)
    model = StreamedModel.of(checkpoint, trust_remote_code=options.trust_remote_code)
    check_layers(model, options)
    calibration = calibrate_on(samples, options, model.module)
    memory = needed_memory(model, calibration.samples, options.memory_budget)
    short: list[str] = []
    require_memory(memory, model.checkpoint.files, short.extend)
    tokens = sum(sample["input_ids"].numel() for sample in calibration.samples)
    patches = sum(len(sample["pixel_values"]) for sample in calibration.samples if "pixel_values" in sample)
    sites = predict_schemes(model, passes)
    schemes = {name: site.scheme or Scheme.FLOAT for name, site in sites.items()}
    dtype = str(emitted_dtype(checkpoint.dtype)).removeprefix("torch.")
    notes = [
        *target_warnings(options, checkpoint.dtype),
        *calibration.notes,
        *short,
        *([BEFORE_SEARCH] if options.fallback == "auto" else []),
    ]
    counts: dict[tuple[str, str], int] = {}
    for name, scheme in (schemes | dict.fromkeys(model.heads, Scheme.FLOAT)).items():
        counts[part_of(name), str(scheme)] = counts.get((part_of(name), str(scheme)), 0) + 1
    after = output_bytes(model, sites, packed=not options.mindie_layout)
    return Preflight(
        counts=counts,
        reasons={site.reason: name for name, site in reversed(sites.items()) if site.reason},
        bytes_before=checkpoint.bytes,
        bytes_after=after,
        tokens=tokens,
        patches=patches,
        memory=peak_memory() + memory,
        seconds=expected_seconds(model, sites, tokens, patches, after),
        disk_needed=needed_room(model, options, passes, calibration.samples),
        disk_free=shutil.disk_usage(nearest_folder(options.save_directory)).free,
        engines=[str(found) for engine in ENGINE_TITLES if (found := loading(engine, schemes, dtype, options))],
        notes=list(dict.fromkeys(notes)),
    )


def expected_seconds(model: StreamedModel, sites: dict[str, Site], tokens: int, patches: int, written: int) -> float:
    """One forward of all samples, the rounding of all quantized weights, one read and one write of all bytes."""
    forward = rounding = 0.0
    for name, stage in model.stages.items():
        rows = tokens if model.reads_text(stage) else patches // (4 if part_of(f"{name}.") == "merger" else 1)
        forward += 2.0 * rows * sum(it.numel() for it in model.parameters(stage).values())
    for site in sites.values():
        if site.scheme not in (None, Scheme.FLOAT):
            rounding += 2.0 * site.shape[0] * site.shape[1] ** 2
    narrow = torch.bfloat16 if model.checkpoint.dtype == torch.bfloat16 else torch.float32
    disk = bytes_per_second(model.checkpoint)
    computing = forward / flops_per_second(narrow) + rounding / flops_per_second(torch.float32)
    fixed = START_SECONDS + STAGE_SECONDS * len(model.stages)
    return fixed + OVERHEAD * (computing + (model.checkpoint.bytes + written) / disk)


def flops_per_second(dtype: torch.dtype) -> float:
    """How fast this machine multiplies matrices just now."""
    matrix = torch.ones(PROBE_SIDE, PROBE_SIDE, dtype=dtype)
    return 2 * PROBE_SIDE**3 * times_per_second(lambda: matrix @ matrix)


def bytes_per_second(checkpoint: Checkpoint) -> float:
    """How fast the checkpoint's first file is read just now."""
    with open(checkpoint.files[0], "rb") as file:
        started, count = time.perf_counter(), len(file.read(PROBE_BYTES))
    return count / max(time.perf_counter() - started, 1e-6)


def times_per_second(work: Callable[[], object]) -> float:
    work()
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < PROBE_SECONDS:
        work()
        done += 1
    return done / (time.perf_counter() - started)


def loading(engine: str, schemes: dict[str, Scheme], dtype: str, options: Options) -> Span | None:
    """The versions of an engine that load the result; None where the layout is another engine's."""
    wanted = options.engine_target.partition("@")[0]
    if wanted not in ("both", engine) or group_faults(engine, schemes):
        return None
    return span(engine, schemes, dtype)


def render(plan: Preflight, console: Console) -> None:
    """The plan as a person reads it."""
    table = Table(title="What would become what", title_justify="left")
    for column in ("part", "scheme", "linears"):
        table.add_column(column, justify="right" if column == "linears" else "left")
    for part, scheme in sorted(plan.counts, key=in_model_order):
        table.add_row(part, scheme, str(plan.counts[part, scheme]))
    console.print(table)
    lacking = " (not enough)" if plan.disk_free < plan.disk_needed else ""
    facts = [
        ("size", f"{format_bytes(plan.bytes_before)} -> {format_bytes(plan.bytes_after)}"),
        ("calibration", f"{plan.tokens} tokens, {plan.patches} picture patches"),
        ("memory", f"about {format_bytes(plan.memory)}"),
        ("time", f"about {format_duration(plan.seconds)} on this machine as it is now"),
        ("disk", f"{format_bytes(plan.disk_needed)} of {format_bytes(plan.disk_free)} free{lacking}"),
        *(("loads in", engine) for engine in plan.engines),
        *(("why", f"{layer}: {reason}") for reason, layer in plan.reasons.items()),
        *(("note", note.split("\n")[0]) for note in plan.notes),
    ]
    for label, text in facts:
        console.print(Text.assemble((f"{label:<12}", "bold"), escape_control_chars(text)), soft_wrap=True)
