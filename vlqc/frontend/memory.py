"""Estimates the main memory that a compilation needs, and checks it before hours of work.

One stage at a time is in memory, so the largest stage counts, and the activations of all samples between two stages.
"""

import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from vlqc.errors import Fault, UserError
from vlqc.frontend.streamed_model import StreamedModel

GIB = 1 << 30
EXPERT_BYTES = 2  # per weight of an expert: its integers, twice; the float32 weights are in files
STAGE_BYTES = 9  # per weight of the largest stage: float32, its integers, temporaries; measured at 3B to 72B
OBSERVED_BYTES = 6 * 64 << 20  # upper bound of the rows that observers keep of all groups of a stage
ACTIVATION_BYTES = 2 * 4  # per token and channel: input and output of a stage, float32
CGROUP = Path("/sys/fs/cgroup")
CGROUP_FILES = (  # (limit, usage) of cgroup v2 and v1
    (CGROUP / "memory.max", CGROUP / "memory.current"),
    (CGROUP / "memory" / "memory.limit_in_bytes", CGROUP / "memory" / "memory.usage_in_bytes"),
)
UNLIMITED = 1 << 60  # cgroup v1 reports a number above this for "no limit"
OUT_OF_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory")


def estimate_memory(model: StreamedModel, samples: Sequence[Mapping[str, Tensor]], budget: float | None = None) -> int:
    """Bytes needed beyond what the process uses before the first stage, rounded up rather than down.

    budget: GiB of activations between stages that stay in memory (--memory_budget); None for all.
    """
    largest = max(_stage_bytes(model, stage) for stage in model.stages.values())
    return largest + OBSERVED_BYTES + _activation_bytes(model, samples, budget)


def _stage_bytes(model: StreamedModel, stage: nn.Module) -> int:
    """Bytes of the weights of a stage while it is compiled, and of the rows that observers of experts keep."""
    total, observed = 0, 0
    for name, parameter in model.parameters(stage).items():
        is_expert = model.family.experts_of(name.rpartition(".")[0]) is not None
        total += parameter.numel() * (EXPERT_BYTES if is_expert else STAGE_BYTES)
        observed = OBSERVED_BYTES if is_expert else observed
    return total + observed


def expert_file_bytes(model: StreamedModel) -> int:
    """Bytes on the disk of the float32 weights of all experts of one stage, and of the copies that prove folds."""
    family = model.family
    return (
        2
        * 4
        * max(
            sum(
                parameter.numel()
                for name, parameter in model.parameters(stage).items()
                if family.experts_of(name.rpartition(".")[0])
            )
            for stage in model.stages.values()
        )
    )


def offloaded_bytes(model: StreamedModel, samples: Sequence[Mapping[str, Tensor]], budget: float | None) -> int:
    """Bytes of activations between stages that are kept on disk; budget as in `estimate_memory`."""
    return _activation_bytes(model, samples, None) - _activation_bytes(model, samples, budget)


def check_memory(needed: int, files: Sequence[Path], note: Callable[[str], None]) -> None:
    """Raises UserError if `ulimit -v` does not allow `needed` more bytes; calls `note` if they are not available now.

    files: weight files. They are mapped, so the largest one counts as address space, but not as memory.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    address_space = _virtual_memory() + needed + max((path.stat().st_size for path in files), default=0)
    if limit != resource.RLIM_INFINITY and address_space > limit:
        why = f"about {address_space / GIB:.1f} GiB of address space are needed, the limit is {limit / GIB:.1f} GiB"
        raise UserError(Fault("memory limit too low", "ulimit -v", why, "raise or remove the limit"))
    available = _available_memory()
    if available is not None and needed > available:
        fix = "close other programs, or keep fewer activations in memory with --memory_budget"
        note(f"about {needed / GIB:.1f} GiB more memory are needed, {available / GIB:.1f} GiB are available: {fix}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is a failed allocation, of Python or of a PyTorch allocator."""
    message = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in message for phrase in OUT_OF_MEMORY)
    )


def peak_memory() -> int:
    """Peak resident set size of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _activation_bytes(model: StreamedModel, samples: Sequence[Mapping[str, Tensor]], budget: float | None) -> int:
    """Bytes of the activations of all samples between two stages (patches in the vision tower, later tokens), and of
    their images."""
    inputs = model.family.inputs
    activations = ACTIVATION_BYTES * stage_values(model, samples)
    if budget is not None:
        activations = min(activations, int(budget * GIB))
    return activations + sum(inputs.image_bytes(sample) for sample in samples)


def stage_values(model: StreamedModel, samples: Sequence[Mapping[str, Tensor]]) -> int:
    """Number of values between two stages for all samples, where it is largest: rows times channels."""
    tokens = sum(sample["input_ids"].numel() for sample in samples)
    patches = sum(model.family.inputs.patches(sample) for sample in samples)
    return max(tokens * _hidden_size(model, language=True), patches * _hidden_size(model, language=False))


def _hidden_size(model: StreamedModel, *, language: bool) -> int:
    """Number of channels between stages, which is the size of the norms in the first stage of that tower."""
    stages = [stage for stage in model.stages.values() if model.is_language(stage) == language]
    norms = [module for stage in stages[:1] for module in stage.modules() if not isinstance(module, nn.Linear)]
    sizes = (weight.numel() for norm in norms for weight in norm.parameters(recurse=False) if weight.ndim == 1)
    return max(sizes, default=0)


def _virtual_memory() -> int:
    """Bytes of address space that this process uses; 0 where /proc does not exist."""
    return _proc_bytes(Path("/proc/self/status"), "VmSize") or 0


def _available_memory() -> int | None:
    """Bytes available on the machine and in the cgroup of this process; None if unknown."""
    available = [_proc_bytes(Path("/proc/meminfo"), "MemAvailable")]
    for limit_file, usage_file in CGROUP_FILES:
        try:
            limit = int(limit_file.read_text())
            if limit < UNLIMITED:
                available.append(limit - int(usage_file.read_text()))
        except (OSError, ValueError):
            continue
    return min((size for size in available if size is not None), default=None)


def _proc_bytes(path: Path, key: str) -> int | None:
    """A value in KiB of a file of lines `key: value kB`, in bytes; None if there is none."""
    try:
        lines = dict(line.split(":", 1) for line in path.read_text().splitlines())
        return int(lines[key].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
