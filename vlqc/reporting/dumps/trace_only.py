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
from vlqc.frontend.distributed import current_process_group
from vlqc.frontend.sequential import SequentialForward
from vlqc.frontend.stage_builder import traced_stage
from vlqc.frontend.streamed_model import StreamedModel, open_model
from vlqc.ir.stage import Stage
from vlqc.options.options import Options
from vlqc.options.paths import dump_faults
from vlqc.pipeline.layer_selection import check_globs, check_layers
from vlqc.pipeline.manager import PassManager
from vlqc.pipeline.ordering import passes_for_stage_outputs
from vlqc.pipeline.pass_api import Pass
from vlqc.pipeline.presets import build_pipeline
from vlqc.reporting.dumps.writer import Dumper, require_pass
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
    dataset = load_calibration(options, model.module, samples)
    return _run_stages(model, dataset, [], 0, dumper, progress or Progress())


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
    model = open_model(options)
    check_layers(model, options)
    dataset = load_calibration(options, model.module, samples)
    return _run_stages(model, dataset, pipeline, last + 1, dumper, progress or Progress())


def _run_stages(
    model: StreamedModel,
    dataset: CalibrationDataset,
    pipeline: Sequence[Pass],
    count: int,
    dumper: Dumper,
    progress: Progress,
) -> TraceResult:
    """Runs the first `count` passes on the stages that the dumper selects, and on all stages what later ones need."""

    def before_pass(stage: Stage, step: Pass) -> None:
        progress.step(step.name)

    required = passes_for_stage_outputs(pipeline)
    dumped = PassManager(pipeline[:count], before=before_pass, after=dumper.after)
    remaining = PassManager(required[count:], before=before_pass)
    skipped = PassManager(required, before=before_pass)
    selected = [name for name in model.stages if dumper.wants(name)]
    finished: list[str] = []
    progress.begin(len(selected), len(dataset.samples))
    forward = SequentialForward(model, dataset.samples, probe=dataset.probe, share_images=True)
    with model.non_stage_weights(model.checkpoint.tensor), forward:
        for inputs in forward.loaded_stages():
            progress.stage(len(finished), inputs.name)
            with traced_stage(model, inputs, emitted_dtype(model.checkpoint.dtype)) as stage:
                stage.execution.after_sample = lambda done, *values: progress.sample(done)
                if stage.name in selected:
                    dumper.traced(stage)
                    dumped.run(stage)
                    finished.append(stage.name)
                    progress.stage_done(len(finished) - 1)
                if finished == selected:
                    break
                (remaining if stage.name in selected else skipped).run(stage)
                if not stage.execution.outputs:
                    stage.execution.forward()
                inputs.outputs = stage.execution.next_inputs()
    progress.finish()
    return TraceResult(tuple(finished), len(model.stages), dumper.folder)
