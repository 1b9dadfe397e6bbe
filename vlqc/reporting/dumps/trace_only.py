"""Stages to look at, without a result: `vlqc dump` traces them, `vlqc compile --stop_after` runs passes over them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlqc.emit.stage_tensors import emitted_dtype
from vlqc.errors import Fault, UserError
from vlqc.frontend.calibration.dataset import CalibrationDataset, load_calibration
from vlqc.frontend.calibration.probe import synthetic_sample
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.device import resolve_device
from vlqc.frontend.distributed import current_process_group
from vlqc.frontend.sequential import SequentialForward
from vlqc.frontend.stage_builder import materialized_stage
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.options.options import Options
from vlqc.options.paths import dump_faults
from vlqc.pipeline.layer_selection import check_globs, check_layers
from vlqc.pipeline.manager import PassManager
from vlqc.pipeline.ordering import passes_for_stage_outputs
from vlqc.pipeline.pass_api import Pass
from vlqc.pipeline.presets import build_pipeline
from vlqc.reporting.dumps.writer import Dumper, progress_callback, require_pass
from vlqc.reporting.progress import Progress


@dataclass(frozen=True)
class TraceResult:
    """stages: names of those that were looked at; of: how many the model has; folder: of the dump, if one was made."""

    stages: tuple[str, ...]
    of: int
    folder: Path | None

    def to_dict(self) -> dict[str, Any]:
        """As a value of JSON."""
        return {"stages": list(self.stages), "of": self.of, "folder": self.folder and str(self.folder)}


@torch.no_grad()
def trace(
    model_path: Path,
    dumper: Dumper,
    *,
    samples: Sequence[dict[str, Tensor]] | None = None,
    calib_images: Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> TraceResult:
    """Every stage that the dumper wants, as traced; no pass runs. Without samples or pictures noise is looked at.

    One stage's weights are in memory at a time. UserError as from a compilation.
    """
    if faults := dump_faults("--output", dumper.folder, model=model_path) if dumper.folder is not None else []:
        raise UserError(*faults)
    checkpoint = Checkpoint(model_path)
    model = StreamedModel.open(checkpoint, trust_remote_code=trust_remote_code)
    check_globs(model.stages, what="stage", stages=dumper.stages)
    config: Any = model.module.config
    if samples is None and calib_images is None:
        samples = [synthetic_sample(config)]
    # Only the model's folder and the pictures are read of them; nothing is saved.
    paths = {} if calib_images is None else {"calib_images": calib_images}
    options = Options.without_paths(model_path=model_path, trust_remote_code=trust_remote_code, **paths)
    calibration = load_calibration(options, model.module, samples)
    return _look(model, calibration, [], 0, dumper, progress or Progress())


@torch.no_grad()
def run_until(
    stop_after: str,
    *,
    samples: Sequence[dict[str, Tensor]] | None = None,
    progress: Progress | None = None,
    **given: Any,
) -> TraceResult:
    """The passes of a compilation up to and with `stop_after`, on every stage that its dump wants; no folder appears.

    given: as `vlqc.compile` takes it. Behind the last stage that is wanted nothing runs, and on those that are not
    wanted only the passes on which later stages depend; they run behind `stop_after`, too. Without a folder
    to dump into, the texts are printed.
    UserError as from a compilation.
    """
    if current_process_group().size > 1:
        fix = "leave torchrun out"
        raise UserError(Fault(f"--stop_after {stop_after}", why="stages are looked at by one process", fix=fix))
    if given.get("dump_ir") is None:
        given.setdefault("print_after", stop_after)
    options = Options.without_saving(occupied=True, **given)  # the save folder stays as it is, whatever is in it
    pipeline = build_pipeline(options)
    require_pass("--stop_after", stop_after, pipeline)
    last = max(number for number, step in enumerate(pipeline) if step.name == stop_after)
    dumper = Dumper.of(options, pipeline, active=True)
    checkpoint = Checkpoint(options.model_path)
    device, trust = resolve_device(options.device_type), options.trust_remote_code
    model = StreamedModel.open(checkpoint, trust_remote_code=trust, device=device)
    check_layers(model, options)
    calibration = load_calibration(options, model.module, samples)
    return _look(model, calibration, pipeline, last + 1, dumper, progress or Progress())


def _look(
    model: StreamedModel,
    calibration: CalibrationDataset,
    pipeline: Sequence[Pass],
    count: int,
    dumper: Dumper,
    show: Progress,
) -> TraceResult:
    """count: of passes that are looked at; of the others those run that decide what later stages are given."""
    checkpoint = model.checkpoint
    dtype = emitted_dtype(checkpoint.dtype)
    wanted = [name for name in model.stages if dumper.wants(name)]
    before = progress_callback(show.step)
    needed = passes_for_stage_outputs(pipeline)
    manager = PassManager(pipeline[:count], before=before, after=dumper.after)
    rest, elsewhere = PassManager(needed[count:], before=before), PassManager(needed, before=before)
    show.begin(len(wanted), len(calibration.samples))
    lockstep = SequentialForward(model, calibration.samples, probe=calibration.probe, share_images=True)
    looked: list[str] = []
    with model.non_stage_weights(checkpoint.tensor), lockstep:
        for stop in lockstep:
            show.stage(len(looked), stop.name)
            with materialized_stage(model, stop, dtype, checkpoint.tensor) as stage:
                stage.execution.after_sample = lambda done, *values: show.sample(done)
                if dumper.wants(stage.name):
                    dumper.traced(stage)
                    manager.run(stage)
                    looked.append(stage.name)
                    show.stage_done(len(looked) - 1)
                if looked == wanted:
                    break
                (rest if dumper.wants(stage.name) else elsewhere).run(stage)
                if not stage.execution.outputs:
                    stage.execution.forward()
                stop.outputs = stage.execution.next_inputs()
    show.finish()
    return TraceResult(tuple(looked), len(model.stages), dumper.folder)
