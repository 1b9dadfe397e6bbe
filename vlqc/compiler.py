"""The whole program: a float checkpoint goes in, a folder that the engine loads comes out.

Every calibration sample is a suspended forward of the real model. They advance together, one stage at a time; at each
stop the stage is traced, the passes run over it, and it is emitted and forgotten.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlqc.calibration import load_samples
from vlqc.checkpoint import Checkpoint
from vlqc.dumps import Dumper, announcer
from vlqc.emit import emitter_for, expected_bytes, stage_entries
from vlqc.emit.folder import appearing_folder, require_space
from vlqc.lockstep import Lockstep
from vlqc.model import FloatModel
from vlqc.options import Options
from vlqc.pipeline import PassManager, parse_pipeline, pipeline_text
from vlqc.progress import Progress
from vlqc.result import Result
from vlqc.samples import check_samples
from vlqc.stages import live_stage
from vlqc.tally import Tally
from vlqc.verify import require_sound


@torch.no_grad()
def compile(
    *, samples: Sequence[dict[str, Tensor]] | None = None, progress: Progress | None = None, **given: Any
) -> Result:
    """Compiles a checkpoint; `Options` explains every option. Nothing appears in save_directory unless all succeeds.

    samples: ready model inputs in place of calib_images: dicts of input_ids and attention_mask int64 [1, S], and with
    pictures pixel_values float32 [P, D] and image_grid_thw int64 [pictures, 3]. UserError for unusable input.
    """
    options, show = Options.from_user(**given), progress or Progress()
    passes, dumps = parse_pipeline(pipeline_text(options)), Dumper(options.dump_ir)
    manager = PassManager(passes, before=announcer(show.step), after=dumps.after)
    checkpoint = Checkpoint(options.model_path)
    tally = Tally(options, checkpoint, show.note)
    model = FloatModel.of(checkpoint, trust_remote_code=options.trust_remote_code)
    if samples is None:
        calibration = load_samples(
            options.model_path,
            options.calib_images,
            trust_remote_code=options.trust_remote_code,
            skip_bad_images=options.skip_bad_images,
        )
        samples = calibration.samples
        tally.note(calibration.notes)
    check_samples(samples, model.module)
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
                    emitter.add(stage_entries(stage))
                    stop.outputs = stage.outputs
                    tally.count(stage)
                show.stage_done(number)
        emitter.copy_rest(model.outside())
        emitter.finish()
        require_sound(folder)
    show.finish()
    return tally.result(manager.seconds)
