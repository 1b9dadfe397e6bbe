"""The whole program: a float checkpoint goes in, a folder that the engine loads comes out.

Every calibration sample is a suspended forward of the real model. They advance together, one stage at a time; at each
stop the stage is traced, the passes run over it, and it is emitted and forgotten.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlqc.emit.folder_writer import FolderWriter, committed_plan
from vlqc.emit.resume.journal import open_journal
from vlqc.emit.stage_tensors import emitted_dtype
from vlqc.frontend.activation_offload import ActivationOffload
from vlqc.frontend.calibration.dataset import CalibrationDataset, load_calibration
from vlqc.frontend.calibration.samples import group_by_images, reject_conflicting_arguments
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.device import resolve_device
from vlqc.frontend.distributed import current_process_group, init_distributed
from vlqc.frontend.sequential import SequentialForward
from vlqc.frontend.stage_builder import materialized_stage
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.ir.memory import release_unused_memory
from vlqc.options.options import Options
from vlqc.pipeline.layer_selection import check_layers
from vlqc.pipeline.manager import PassManager
from vlqc.pipeline.pass_api import Pass
from vlqc.pipeline.presets import build_pipeline
from vlqc.reporting.dumps.writer import Dumper, PassCallbacks, progress_callback
from vlqc.reporting.progress import Progress, resolve_progress
from vlqc.reporting.summary import CompilationSummary, Result
from vlqc.verify import require_valid


@torch.no_grad()
@init_distributed()
def compile(
    *,
    samples: Sequence[dict[str, Tensor]] | None = None,
    passes: Sequence[Pass] | None = None,
    progress: Progress | None = None,
    **given: Any,
) -> Result:
    """Compiles a checkpoint; `Options` explains every option. Nothing appears in save_directory unless all succeeds.

    samples: ready model inputs, as `CalibrationDataset.samples`, in place of calib_images. passes: in place of those
    that the options build. UserError for unusable input.
    """
    reject_conflicting_arguments(samples=samples, passes=passes, **given)
    options, process_group = Options.from_user(**given), current_process_group()
    show = resolve_progress(progress, first=process_group.is_rank0)
    pipeline = build_pipeline(options, passes)
    checkpoint = Checkpoint(options.model_path)
    summary = CompilationSummary(options, checkpoint, show.note)
    onlookers = PassCallbacks(Dumper.of(options, pipeline, active=process_group.is_rank0), summary.metrics)
    manager = PassManager(pipeline, before=progress_callback(show.step), after=onlookers.after)
    device, trust = process_group.local_device(resolve_device(options.device_type)), options.trust_remote_code
    model = process_group.rank0_first(lambda: StreamedModel.open(checkpoint, trust_remote_code=trust, device=device))
    summary.note_unused_tensors(model.unused_tensors())
    check_layers(model, options)
    calibration = load_calibration(options, model.module, samples) if process_group.is_rank0 else CalibrationDataset([])
    summary.add_notes(calibration.notes)
    begin, mine = process_group.scatter(
        group_by_images(calibration.samples)
    )  # each process has its own; the first one writes
    probe = process_group.broadcast(0, calibration.probe)
    with open_journal(
        options,
        pipeline,
        model,
        calibration.samples,
        process_group,
        lambda text: summary.add_notes([text], of_run=True),
    ) as journal:
        writer = FolderWriter(journal.result, checkpoint, options) if journal.writes else None
        dtype = emitted_dtype(checkpoint.dtype)
        offload = ActivationOffload(journal.folder, options.memory_budget)
        known = journal.restore(writer, checkpoint, range(begin, begin + len(mine)), offload.offload)
        summary.restore(journal.summary_states)
        show.begin(len(model.stages), len(mine), done=len(known.stages))
        lockstep = SequentialForward(model, mine, first=begin, probe=probe, known=known, share_images=True)
        with model.non_stage_weights(writer.copy if writer else checkpoint.tensor), lockstep:
            for number, stop in enumerate(lockstep, len(known.stages)):
                show.stage(number, stop.name)
                with materialized_stage(model, stop, dtype, checkpoint.tensor, process_group) as stage:

                    def after_sample(done: int, *values: Any) -> None:
                        offload.offload(*values)
                        release_unused_memory()
                        show.sample(done)

                    stage.execution.after_sample = after_sample
                    onlookers.traced(stage)
                    manager.run(stage)
                    if writer:
                        writer.add_stage(stage)
                    stop.outputs = stage.execution.next_inputs()
                    summary.add_stage(stage)
                    journal.record_stage(stage, summary.state)
                show.stage_done(number)
        if process_group.is_rank0:
            if writer:
                summary.apply_search(writer.resolve_schemes())
                writer.copy_rest(model.non_stage_parameters())
                writer.finish()
            else:  # resumed after the result was complete
                summary.apply_search(committed_plan(journal.result, options, journal.commits))
            summary.write_report_data(journal.result, pipeline, ready_samples=samples is not None)
            require_valid(journal.result)
            summary.require_loadable(journal.result)
    show.finish()
    return process_group.broadcast_from_rank0(lambda: summary.result(manager.seconds))
