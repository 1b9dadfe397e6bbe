"""The whole program: a float checkpoint goes in, a folder that the engine loads comes out.

Every calibration sample is a suspended forward of the real model. They advance together, one stage at a time; at each
stop the stage is traced, the passes run over it, and it is emitted and forgotten.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlqc.calibration import load_calibration
from vlqc.checkpoint import Checkpoint
from vlqc.device import resolve_device
from vlqc.dumps import Dumper, announcer
from vlqc.emit import emitter_for, expected_bytes
from vlqc.emit.folder import appearing_folder, require_space
from vlqc.layer_globs import check_globs, check_plan
from vlqc.lockstep import Lockstep
from vlqc.model import FloatModel
from vlqc.options import Options
from vlqc.pipeline import Pass, PassManager, check_order, parse_pipeline, pipeline_text
from vlqc.progress import Progress
from vlqc.result import Result
from vlqc.samples import checked_samples, refuse_both
from vlqc.stages import live_stage
from vlqc.tally import Tally
from vlqc.verify import require_sound


@torch.no_grad()
def compile(
    *,
    samples: Sequence[dict[str, Tensor]] | None = None,
    passes: Sequence[Pass] | None = None,
    progress: Progress | None = None,
    **given: Any,
) -> Result:
    """Compiles a checkpoint; `Options` explains every option. Nothing appears in save_directory unless all succeeds.

    samples: ready model inputs in place of calib_images: dicts of input_ids and attention_mask int64 [1, S], and with
    pictures pixel_values float32 [P, D] and image_grid_thw int64 [pictures, 3]. passes: in place of those that the
    options build. UserError for unusable input.
    """
    refuse_both(samples=samples, passes=passes, **given)
    options, show = Options.from_user(**given), progress or Progress()
    pipeline = list(passes) if passes is not None else parse_pipeline(pipeline_text(options))
    check_order(pipeline)
    dumps = Dumper(options.dump_ir)
    manager = PassManager(pipeline, before=announcer(show.step), after=dumps.after)
    checkpoint = Checkpoint(options.model_path)
    tally = Tally(options, checkpoint, show.note)
    device = resolve_device(options.device_type)
    model = FloatModel.of(checkpoint, trust_remote_code=options.trust_remote_code, device=device)
    tally.note_unknown(model.unknown_tensors())
    check_globs([*model.layers, *model.heads], exclude=options.exclude)
    check_globs(model.layers, include=options.include)
    check_plan(model.layers, options)
    if samples is None:
        calibration = load_calibration(options)
        samples = calibration.samples
        tally.note(calibration.notes)
    samples = checked_samples(samples, model.module)
    require_space(options.save_directory, expected_bytes(model))
    show.begin(len(model.stages), len(samples))
    with appearing_folder(options.save_directory, overwrite=options.overwrite) as folder:
        emitter = emitter_for(options, folder, checkpoint)
        with model.ready_outside(emitter.copy), Lockstep(model, samples) as lockstep:
            for number, stop in enumerate(lockstep):
                show.stage(number, stop.name)
                with live_stage(model, stop, emitter.dtype, checkpoint.tensor) as stage:
                    stage.on_sample = show.sample
                    dumps.traced(stage)
                    manager.run(stage)
                    emitter.add_stage(stage)
                    stop.outputs = stage.outputs
                    tally.count(stage)
                checkpoint.release()
                show.stage_done(number)
        tally.require_quantized()
        emitter.copy_rest(model.outside())
        emitter.finish()
        require_sound(folder)
        tally.require_loaded(folder)
    show.finish()
    return tally.result(manager.seconds)
