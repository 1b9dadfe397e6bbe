"""How much memory a compilation needs, and whether it may have it: asked before hours of work, not after.

One stage at a time is in memory, so what counts is the largest one, and what all samples hold between two stages.
"""

import resource
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from vlqc.errors import Fault, UserError
from vlqc.frontend.streamed_model import StreamedModel

GIB = 1 << 30
STAGE_BYTES = 9  # per weight of the largest stage: float32, its integers, temporaries; measured at 3B to 72B
OBSERVED_BYTES = 6 * 64 << 20  # kept rows of all groups of a stage, at most
HELD_BYTES = 2 * 4  # per token and channel: what enters a stage and what leaves it, float32
GROUP = Path("/sys/fs/cgroup")
CONTROL_GROUP = (  # (limit, used), of the two versions
    (GROUP / "memory.max", GROUP / "memory.current"),
    (GROUP / "memory" / "memory.limit_in_bytes", GROUP / "memory" / "memory.usage_in_bytes"),
)
UNLIMITED = 1 << 60  # control groups write such numbers for "no limit"


def needed_memory(model: StreamedModel, samples: Sequence[Mapping[str, Tensor]], budget: float | None = None) -> int:
    """Bytes beyond what the process holds before the first stage; an estimate that rather says too much.

    budget: GiB of tensors between stages that stay in memory (--memory_budget), None for all.
    """
    return largest_stage(model) * STAGE_BYTES + OBSERVED_BYTES + _held(model, samples, budget)


def spilled_bytes(model: StreamedModel, samples: Sequence[Mapping[str, Tensor]], budget: float | None) -> int:
    """Bytes of tensors between stages that lie on the disk, for a budget as in `needed_memory`."""
    return _held(model, samples, None) - _held(model, samples, budget)


def largest_stage(model: StreamedModel) -> int:
    """How many weights it has."""
    return max(sum(it.numel() for it in model.parameters(stage).values()) for stage in model.stages.values())


def require_memory(needed: int, files: Sequence[Path], note: Callable[[list[str]], None]) -> None:
    """UserError if `ulimit -v` cannot hold `needed` more bytes; a note if the machine lacks them just now.

    files: of weights; those are mapped, and count for the limit but not for the machine's memory.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    wanted = _now("VmSize") + needed + max((path.stat().st_size for path in files), default=0)
    if limit != resource.RLIM_INFINITY and wanted > limit:
        why = f"the run needs about {wanted / GIB:.1f} GiB of address space, ulimit -v allows {limit / GIB:.1f} GiB"
        raise UserError(Fault("not enough memory is allowed", "ulimit -v", why, "raise the limit, or remove it"))
    available = _available()
    if available is not None and needed > available:
        fix = "close other programs, or bound what samples hold with --memory_budget"
        note([f"the run needs about {needed / GIB:.1f} GiB more, {available / GIB:.1f} GiB are free: {fix}"])


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory could not be had: Python's own, or that of torch's allocators."""
    words = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(it in str(error).lower() for it in words)
    )


def _held(model: StreamedModel, samples: Sequence[Mapping[str, Tensor]], budget: float | None) -> int:
    """Bytes of tensors that all samples hold: as patches in the vision tower, later as tokens."""
    pixels = [sample["pixel_values"] for sample in samples if "pixel_values" in sample]
    widths = [_width(model, text=text) for text in (True, False)]
    tokens = sum(sample["input_ids"].numel() for sample in samples) * widths[0]
    patches = sum(len(it) for it in pixels) * widths[1]
    held = HELD_BYTES * max(tokens, patches)
    if budget is not None:
        held = min(held, int(budget * GIB))
    return held + sum(it.numel() * it.element_size() for it in pixels)


def _width(model: StreamedModel, *, text: bool) -> int:
    """Channels of what passes between stages: what the norms of the first stage of that kind have."""
    stages = [stage for stage in model.stages.values() if model.reads_text(stage) == text]
    norms = [it for stage in stages[:1] for it in stage.modules() if not isinstance(it, nn.Linear)]
    return max((it.numel() for norm in norms for it in norm.parameters(recurse=False) if it.ndim == 1), default=0)


def _now(name: str) -> int:
    """Bytes of a line of /proc/self/status; 0 where there is none."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines[name].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0


def _available() -> int | None:
    """Bytes that the machine, and the control group of this process, have left; None where nobody knows."""
    found = []
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    for most, used in CONTROL_GROUP:
        try:
            limit = int(most.read_text())
            if limit < UNLIMITED:
                found.append(limit - int(used.read_text()))
        except (OSError, ValueError):
            continue
    return min(found, default=None)
