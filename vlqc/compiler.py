"""The whole program: a float checkpoint goes in, a folder that the engine loads comes out.

Every calibration sample is a suspended forward of the real model. They advance together, one stage at a time; at each
stop the stage is traced, the passes run over it, and it is emitted and forgotten.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlqc.emit import emitter_for
from vlqc.emit.resume.journal import journaled
from vlqc.frontend.activation_offload import Spilling
from vlqc.frontend.calibration.dataset import Calibration, calibrate_on
from vlqc.frontend.calibration.samples import by_pictures, refuse_both
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.device import resolve_device
from vlqc.frontend.distributed import here, joined
from vlqc.frontend.sequential import Lockstep
from vlqc.frontend.stage_builder import live_stage
from vlqc.frontend.streamed_model import FloatModel
from vlqc.options.options import Options
from vlqc.pipeline.layer_selection import check_layers
from vlqc.pipeline.registry import Pass, PassManager, pipeline_of
from vlqc.reporting.dumps.writer import Dumper, Onlookers, announcer
from vlqc.reporting.progress import Progress, heard
from vlqc.reporting.summary import Result
from vlqc.reporting.tally import Tally
from vlqc.verify import require_sound


@torch.no_grad()
@joined()
def compile(
    *,
    samples: Sequence[dict[str, Tensor]] | None = None,
    passes: Sequence[Pass] | None = None,
    progress: Progress | None = None,
    **given: Any,
) -> Result:
    """Compiles a checkpoint; `Options` explains every option. Nothing appears in save_directory unless all succeeds.

    samples: ready model inputs, as `Calibration.samples`, in place of calib_images. passes: in place of those that the
    options build. UserError for unusable input.
    """
    refuse_both(samples=samples, passes=passes, **given)
    options, world = Options.from_user(**given), here()
    show = heard(progress, first=world.first)
    pipeline = pipeline_of(options, passes)
    checkpoint = Checkpoint(options.model_path)
    tally = Tally(options, checkpoint, show.note)
    onlookers = Onlookers(Dumper.of(options, pipeline, active=world.first), tally.gathering)
    manager = PassManager(pipeline, before=announcer(show.step), after=onlookers.after)
    device, trust = world.place(resolve_device(options.device_type)), options.trust_remote_code
    model = world.after_first(lambda: FloatModel.of(checkpoint, trust_remote_code=trust, device=device))
    tally.note_unknown(model.unknown_tensors())
    check_layers(model, options)
    calibration = calibrate_on(samples, options, model.module) if world.first else Calibration([])
    tally.note(calibration.notes)
    begin, mine = world.dealt(by_pictures(calibration.samples))  # each process has its own; the first one writes
    probe = world.of(0, calibration.probe)
    with journaled(options, pipeline, model, calibration.samples, tally, world) as journal:
        emitter = emitter_for(options, journal.result, checkpoint, writes=journal.writes)
        spilling = Spilling(journal.folder, options.memory_budget)
        known = journal.restore(emitter, checkpoint, range(begin, begin + len(mine)), spilling.settle)
        show.begin(len(model.stages), len(mine), done=len(known.stages))
        lockstep = Lockstep(model, mine, first=begin, probe=probe, known=known, look_once=True)
        with model.ready_outside(emitter.copy), lockstep:
            for number, stop in enumerate(lockstep, len(known.stages)):
                show.stage(number, stop.name)
                with live_stage(model, stop, emitter.dtype, checkpoint.tensor, world) as stage:
                    stage.on_sample, stage.settle = show.sample, spilling.settle
                    onlookers.traced(stage)
                    manager.run(stage)
                    emitter.add_stage(stage)
                    stop.outputs = stage.answers()
                    journal.finished(stage)
                show.stage_done(number)
        if world.first:
            tally.settle(emitter.settle())
            emitter.copy_rest(model.outside())
            emitter.finish()
            tally.write_facts(journal.result, pipeline, ready_samples=samples is not None)
            require_sound(journal.result)
            tally.require_loaded(journal.result)
    show.finish()
    return world.of_first(lambda: tally.result(manager.seconds))
