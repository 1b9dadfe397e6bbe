"""The compiler: a float checkpoint in, a folder that the inference engine loads out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlqc.emit.size_estimate import check_size
from vlqc.frontend.calibration.samples import reject_conflicting_arguments
from vlqc.frontend.distributed import init_distributed
from vlqc.frontend.streamed_model import open_model
from vlqc.options.options import Options
from vlqc.pipeline.layer_selection import check_engines, check_layers
from vlqc.pipeline.pass_api import Pass
from vlqc.pipeline.presets import build_pipeline, resolve_target
from vlqc.pipeline.rotation_plan import rotate_model
from vlqc.pipeline.sample_use import calibration_data, require_samples
from vlqc.reporting.progress import Progress
from vlqc.reporting.summary import Result
from vlqc.run import open_run


@torch.no_grad()
@init_distributed()
def compile(
    *,
    samples: Sequence[dict[str, Tensor]] | None = None,
    passes: Sequence[Pass] | None = None,
    progress: Progress | None = None,
    **user_options: Any,
) -> Result:
    """Compiles a checkpoint. The save folder appears only when the whole result is complete and verified.

    Args:
        samples: model inputs, as `CalibrationDataset.samples`, instead of calib_images.
        passes: pipeline, instead of the one that the options select.
        progress: default: a progress bar in notebooks, otherwise none.
        user_options: values by name, see `Options`; or options=Options.from_user(...).

    Raises:
        UserError: for invalid input.
    """
    options = Options.from_user(**user_options)
    reject_conflicting_arguments(options, samples=samples, passes=passes)
    pipeline = build_pipeline(options, passes, ready_samples=samples is not None)
    options = resolve_target(options, pipeline)
    require_samples(options, pipeline, samples)  # unless no pass needs any
    model = open_model(options)  # parameters on the meta device
    check_layers(model, options)
    rotate_model(model, pipeline)  # streams and heads that the passes rotate; tensors outside the stages at once
    check_engines(model, options)
    check_size(model, options, pipeline)
    dataset = calibration_data(options, pipeline, model, samples)
    # folder, journal, progress, summary; renames the result on exit
    with open_run(options, pipeline, model, dataset, progress) as run:
        for stage in run.stages():  # sequential calibration: one stage's weights in memory
            run.apply_passes(stage)
            run.emit(stage)
        run.complete(ready_samples=samples is not None)
    return run.result()
