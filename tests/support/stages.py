"""Stages of a model with their weights, for tests that do not iterate over `SequentialForward.loaded_stages`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from vlqc.frontend.process_group import ProcessGroup
from vlqc.frontend.sequential import StageInputs
from vlqc.frontend.stage_builder import traced_stage
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.ir.stage import Stage


@contextmanager
def materialized_stage(
    model: StreamedModel,
    inputs: StageInputs,
    dtype: torch.dtype,
    read: Callable[[str], Tensor],
    process_group: ProcessGroup | None = None,
) -> Iterator[Stage]:
    """The traced stage with weights from `read`, which are on the meta device again on exit."""
    try:
        model.materialize(inputs.module, read)
        with traced_stage(model, inputs, dtype, process_group) as stage:
            yield stage
    finally:
        model.to_meta(inputs.module)
