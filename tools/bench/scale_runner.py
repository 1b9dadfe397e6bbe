"""Runs one compilation and measures time, memory and disk access per phase.

    python -m tools.bench.scale_runner MODEL SAVE SAMPLES RESULT [NAME=VALUE ...]

Time is assigned to the innermost running phase. Memory is the resident set size of the process, sampled every 20 ms,
and the kernel's high-water mark.
"""

import functools
import inspect
import json
import pkgutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()
OTHER, IMPORTS = "other", "imports"
INTERVAL = 0.02  # seconds between two samples of the memory
PAGE = 4096


class Phases:
    """Per phase of one thread: seconds, CPU seconds of all threads, peak memory."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {IMPORTS: 0.0}
        self.cpu: dict[str, float] = {}
        self.peak: dict[str, int] = {}
        self.per_stage: dict[str, dict[str, float]] = {}
        self.thread = threading.get_ident()
        self._stack = [IMPORTS]
        self._since, self._cpu_since = STARTED, 0.0

    def _switch(self) -> None:
        now, cpu, name = time.perf_counter(), time.process_time(), self._stack[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self.cpu[name] = self.cpu.get(name, 0.0) + cpu - self._cpu_since
        self._since, self._cpu_since = now, cpu

    def enter(self, name: str) -> None:
        self._switch()
        self._stack.append(name)

    def leave(self) -> None:
        self._switch()
        self._stack.pop()

    def stage(self, name: str) -> None:
        """Starts a stage: phases up to `stage_done` are counted for it."""
        self._switch()
        self.per_stage[name] = {phase: -seconds for phase, seconds in self.seconds.items()}

    def stage_done(self) -> None:
        self._switch()
        stage = list(self.per_stage.values())[-1]
        for phase, seconds in self.seconds.items():
            stage[phase] = stage.get(phase, 0.0) + seconds

    def imported(self) -> None:
        self._switch()
        self._stack[0] = OTHER

    def sample_memory(self) -> None:
        """Updates the peak memory of the running phase."""
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
        name = self._stack[-1]
        self.peak[name] = max(self.peak.get(name, 0), resident)

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Assigns the time in this function of a module or class to the phase `name`."""
        function: Callable[..., Any] = getattr(owner, attribute)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self.thread:
                return function(*args, **kwargs)
            self.enter(name)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        is_static = isinstance(inspect.getattr_static(owner, attribute), staticmethod)
        setattr(owner, attribute, staticmethod(timed) if is_static else timed)


PHASES = {  # "module:attribute" of the functions of a compilation -> phase; the module is the one that calls them
    "vlqc.frontend.streamed_model:StreamedModel.materialize": "reading",
    "vlqc.frontend.checkpoint.checkpoint:Checkpoint.rows": "reading",
    "vlqc.frontend.checkpoint.checkpoint:Checkpoint.tensor": "reading",
    "vlqc.frontend.sequential:SequentialForward._resume": "model code",
    "vlqc.frontend.stage_builder:trace": "tracing",
    "vlqc.ir.execution:StageRun.forward": "forward",
    "vlqc.ir.execution:StageRun.probe_output": "proofs",
    "vlqc.passes.algorithms.observer:Observer.__call__": "observing",
    "vlqc.passes.algorithms.folding:apply_folds": "folding",
    "vlqc.pipeline.manager:_check_valid": "checks",
    "vlqc.pipeline.manager:_State.of": "checks",
    "vlqc.compiler:rotate_model": "rotation",
    "vlqc.passes.rotate_residual:rotate_stage": "rotation",
    "vlqc.passes.rotate_heads:rotate_stage": "rotation",
    "vlqc.frontend.rotated_tensors:RotatedTensors.tensor": "rotation",
    "vlqc.passes.split_window_attention:SplitWindowAttention.run": "proofs",
    "vlqc.passes.insert_observers:InsertObservers.run": "observing",
    "vlqc.passes.shift_norms:ShiftNorms.run": "smoothing",
    "vlqc.passes.smooth_m2:SmoothM2.run": "smoothing",
    "vlqc.passes.smooth_m4:SmoothM4.run": "smoothing",
    "vlqc.passes.quantize_activations:QuantizeActivations.run": "activation ranges",
    "vlqc.passes.quantize_weights:QuantizeWeights.run": "weights",
    "vlqc.passes.lower_linears:LowerLinears.run": "lowering",
    "vlqc.emit.folder_writer:FolderWriter.add_stage": "writing",
    "vlqc.emit.folder_writer:FolderWriter.resolve_schemes": "writing",
    "vlqc.emit.folder_writer:FolderWriter.copy_rest": "writing",
    "vlqc.emit.folder_writer:FolderWriter.finish": "writing",
    "vlqc.run:require_valid": "verifying",
    "vlqc.emit.atomic_folder:WorkFolder.publish": "publishing",
    "vlqc.emit.resume.journal:Journal.record_stage": "journal",
    "vlqc.reporting.html.collector:StageMetrics.traced": "report",
    "vlqc.reporting.html.collector:StageMetrics.finished": "report",
}


def watch_compiler(phases: Phases) -> None:
    """Wraps the functions of each phase of a compilation."""
    for name, phase in PHASES.items():
        module, _, path = name.partition(":")
        parent, _, attribute = path.rpartition(".")
        phases.watch(pkgutil.resolve_name(f"{module}:{parent}" if parent else module), attribute, phase)


def kernel_counters() -> dict[str, int]:
    """Bytes read and written by this process, on disk and by system calls; peak resident set size."""
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    counters = {name: int(io[name]) for name in ("rchar", "wchar", "read_bytes", "write_bytes")}
    return counters | {"peak_bytes": int(status["VmHWM"].split()[0]) * 1024}


def main(arguments: list[str]) -> None:
    model, save, samples, result, *rest = arguments
    phases, done = Phases(), threading.Event()

    def sample() -> None:
        while not done.wait(INTERVAL):
            phases.sample_memory()

    threading.Thread(target=sample, daemon=True).start()
    import torch

    import vlqc
    from vlqc.reporting.progress import Progress

    watch_compiler(phases)
    phases.imported()

    class Stages(Progress):
        def stage(self, number: int, name: str) -> None:
            phases.stage(name)

        def stage_done(self, number: int) -> None:
            phases.stage_done()

    options: dict[str, Any] = dict(option.split("=", 1) for option in rest)
    inputs = torch.load(samples, weights_only=True)
    vlqc.compile(model_path=model, save_directory=save, samples=inputs, overwrite=True, progress=Stages(), **options)
    phases.enter("end")
    done.set()
    measured = {
        "seconds": time.perf_counter() - STARTED,
        "cpu_seconds": time.process_time(),
        "phases": phases.seconds,
        "phases_cpu": phases.cpu,
        "stages": phases.per_stage,
        "peaks": phases.peak,
        "kernel": kernel_counters(),
    }
    Path(result).write_text(json.dumps(measured, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
