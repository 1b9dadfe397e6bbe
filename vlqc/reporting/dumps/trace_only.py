"""Dumps without a compiled folder: `vlqc dump` traces stages, `vlqc compile --stop_after` runs their first passes."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlqc.errors import Fault, UserError
from vlqc.frontend.calibration.dataset import CalibrationDataset, load_calibration
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.distributed import current_process_group
from vlqc.frontend.stage_builder import traced_stages
from vlqc.frontend.streamed_model import StreamedModel, open_model
from vlqc.ir.stage import Stage
from vlqc.options.options import Options
from vlqc.options.paths import dump_faults
from vlqc.pipeline.layer_selection import check_globs, check_layers
from vlqc.pipeline.manager import PassManager
from vlqc.pipeline.ordering import passes_for_stage_outputs
from vlqc.pipeline.pass_api import Pass
from vlqc.pipeline.presets import build_pipeline
from vlqc.pipeline.rotation_plan import rotate_model
from vlqc.pipeline.sample_use import calibration_data, require_samples
from vlqc.reporting.dumps.writer import Dumper, require_pass
from vlqc.reporting.progress import Progress


@dataclass(frozen=True)
class TraceResult:
    """Result of a command that only dumps stages.

    stages: names of the dumped stages.
    total: number of stages of the model.
    folder: of the dump, None if printed.
    """

    stages: tuple[str, ...]
    total: int
    folder: Path | None

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-compatible values."""
        return {"stages": list(self.stages), "total": self.total, "folder": self.folder and str(self.folder)}


@torch.no_grad()
def trace(
    model_path: Path,
    dumper: Dumper,
    *,
    samples: Sequence[dict[str, Tensor]] | None = None,
    calib_images: Path | None = None,
    lora: Sequence[Path] = (),
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> TraceResult:
    """Dumps stages as traced; no pass runs. The weights of one stage are in memory at a time.

    Args:
        model_path: folder of the float checkpoint.
        dumper: selects the stages and writes or prints them.
        samples: model inputs; without samples and calib_images, random text and an image of noise.
        calib_images: folder or file of images.
        lora: folders of adapters to merge into the checkpoint, in order.

    Raises:
        UserError: for unusable input, as from `compile`.
    """
    if faults := dump_faults("--output", dumper.folder, model=model_path) if dumper.folder is not None else []:
        raise UserError(*faults)
    checkpoint = Checkpoint(model_path, lora)
    model = StreamedModel.open(checkpoint, trust_remote_code=trust_remote_code)
    check_globs(model.stages, what="stage", stages=dumper.stages)
    if samples is None and calib_images is None:
        samples = [model.family.inputs.synthetic_sample(model.module.config)]
    paths = {} if calib_images is None else {"calib_images": calib_images}
    options = Options.without_paths(model_path=model_path, trust_remote_code=trust_remote_code, **paths)
    dataset = load_calibration(options, model, samples)
    return _run_stages(model, dataset, [], 0, dumper, progress or Progress())


@torch.no_grad()
def run_until(
    stop_after: str,
    *,
    samples: Sequence[dict[str, Tensor]] | None = None,
    progress: Progress | None = None,
    **user_options: Any,
) -> TraceResult:
    """Runs the passes of a compilation up to and including `stop_after` on the selected stages; writes no folder.

    After the last selected stage nothing runs. All other stages run only the passes that change the inputs of later
    stages. Without --dump_ir the texts after `stop_after` are printed.

    Args:
        stop_after: name of a pass.
        samples, user_options: as for `vlqc.compile`.

    Raises:
        UserError: as from `vlqc.compile`.
    """
    if current_process_group().size > 1:
        why, fix = "it runs in one process only", "run without torchrun"
        raise UserError(Fault(f"--stop_after {stop_after}", why=why, fix=fix))
    if user_options.get("dump_ir") is None:
        user_options.setdefault("print_after", stop_after)
    options = Options.without_saving(occupied=True, **user_options)  # the save folder may have content, which stays
    pipeline = build_pipeline(options, ready_samples=samples is not None)
    require_pass("--stop_after", stop_after, pipeline)
    last = max(number for number, step in enumerate(pipeline) if step.name == stop_after)
    dumper = Dumper.from_options(options, pipeline, active=True)
    require_samples(options, pipeline, samples)
    model = open_model(options)
    check_layers(model, options)
    rotate_model(model, pipeline)
    dataset = calibration_data(options, pipeline, model, samples)
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
    selected = [name for name in model.stages if dumper.selects(name)]
    finished: list[str] = []
    progress.begin(len(selected), len(dataset.samples))
    read, dtype = model.tensors.tensor, model.emitted_dtype
    traced = traced_stages(
        model, dataset.samples, dtype, read=read, probe=dataset.probe, vision_probe=dataset.vision_probe
    )
    with closing(traced) as stages:
        for stage in stages:
            progress.stage(len(finished), stage.name)
            stage.execution.after_sample = lambda done, *values: progress.sample(done)
            if stage.name in selected:
                dumper.traced(stage)
                dumped.run(stage)
                finished.append(stage.name)
                progress.stage_done(len(finished) - 1)
            if finished == selected:
                break
            (remaining if stage.name in selected else skipped).run(stage)
    progress.finish()
    return TraceResult(tuple(finished), len(model.stages), dumper.folder)
