"""Builds the IR of a stage from the inputs of all samples."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn

from vlqc.errors import Fault, UserError
from vlqc.frontend.calibration.probe import choose_probe, missing_modalities
from vlqc.frontend.process_group import ProcessGroup
from vlqc.frontend.sequential import CachedOutputs, SequentialForward, StageInputs
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.frontend.tracing import trace
from vlqc.ir.execution import Call, SampleShape, StageRun
from vlqc.ir.stage import Site, Stage
from vlqc.ir.value_range import PeakRecorder


def traced_stages(
    model: StreamedModel,
    samples: Sequence[dict[str, Tensor]],
    dtype: torch.dtype,
    *,
    read: Callable[[str], Tensor],
    process_group: ProcessGroup | None = None,
    first: int = 0,
    probe: dict[str, Tensor] | None = None,
    vision_probe: dict[str, Tensor] | None = None,
    cached: CachedOutputs | None = None,
) -> Generator[Stage, None, None]:
    """The stages of the model in order, each traced and with its weights while the caller works on it.

    The next stage gets the outputs that `stage.execution` has when it is requested.

    samples, first, probe, vision_probe, cached: see `SequentialForward`; dtype, process_group: see `traced_stage`;
    read: loads the parameters outside the stages, by checkpoint name.
    """
    forward = SequentialForward(
        model, samples, first=first, probe=probe, vision_probe=vision_probe, cached=cached, share_images=True
    )
    with model.non_stage_weights(read), forward:
        for inputs in forward.loaded_stages():
            with traced_stage(model, inputs, dtype, process_group) as stage:
                yield stage
                stage.execution.ensure_outputs()
                inputs.outputs = stage.execution.next_inputs()


@contextmanager
def traced_stage(
    model: StreamedModel, inputs: StageInputs, dtype: torch.dtype, process_group: ProcessGroup | None = None
) -> Iterator[Stage]:
    """The stage that `inputs` are of, whose weights are loaded: traced, with its sites.

    On exit, modules that passes replaced are restored and results of passes are dropped.

    dtype: of float tensors when they are emitted. UserError if no sample of any rank reaches the stage, or if it cannot
    be traced.
    """
    process_group = process_group or ProcessGroup()
    module = inputs.module
    before = [(child, dict(child._modules), dict(child._parameters)) for child in module.modules()]
    stage = None
    try:
        execution = _stage_run(inputs, process_group)
        rotations = model.rotation_plan.stages.get(inputs.name, ())
        # A rotated weight has more bits than the bfloat16 of the checkpoint, in which an engine runs the float model.
        execution.rounds_weights = bool(rotations) and model.checkpoint.dtype == dtype == torch.bfloat16
        execution.peaks = PeakRecorder() if dtype == torch.float16 else None
        assert execution.probe is not None
        graph = trace(module, execution.probe, inputs.name)
        stage = Stage(
            name=inputs.name,
            part=model.family.part(inputs.name),
            family=model.family,
            dtype=dtype,
            module=module,
            graph=graph,
            sites=find_sites(module, graph, lambda target: checkpoint_name(model, module, target)),
            execution=execution,
            checkpoint_name=lambda target: checkpoint_name(model, module, target),
            rotations=rotations,
        )
        yield stage
    finally:
        if stage is not None:
            _release(stage)
        for child, modules, parameters in before:
            child._modules.update(modules)
            child._parameters.clear()
            child._parameters.update(parameters)


def _stage_run(inputs: StageInputs, process_group: ProcessGroup) -> StageRun:
    """Chooses the probe among the samples of all ranks, unless there is a separate one."""
    calls = [call for call in inputs.calls if call.sample >= 0]
    shapes_by_rank = list(process_group.all_gather([SampleShape.from_call(call) for call in calls]))
    shapes = [shape for shapes in shapes_by_rank for shape in shapes]
    separate_probe = next((call for call in inputs.calls if call.sample < 0), None)
    if not shapes and separate_probe is None:
        why = "there are no activations to calibrate on"
        raise UserError(
            Fault(f"no calibration sample reaches {inputs.name}", why=why, fix="add a sample with an image")
        )
    probe = separate_probe
    if probe is None:
        probe = _call_of(shapes[choose_probe([shape.rows for shape in shapes])], calls, shapes_by_rank, process_group)
    missing = missing_modalities(SampleShape.from_call(probe), shapes)
    return StageRun(
        module=inputs.module,
        process_group=process_group,
        calls=calls,
        probe=probe,
        probe_is_separate=separate_probe is not None,
        more_probes=[_call_of(shape, calls, shapes_by_rank, process_group) for shape in missing],
        shapes=shapes,
        name=inputs.name,
    )


def _call_of(
    chosen: SampleShape,
    calls: Sequence[Call],
    shapes_by_rank: Sequence[Sequence[SampleShape]],
    process_group: ProcessGroup,
) -> Call:
    """The call of a sample, on all ranks. calls: of this rank."""
    rank = next(rank for rank, shapes in enumerate(shapes_by_rank) if chosen in shapes)
    own: Call | None = next((call for call in calls if call.sample == chosen.sample), None)
    return process_group.broadcast(rank, own)


def _release(stage: Stage) -> None:
    """Drops results of passes, so that references to the stage hold little memory."""
    stage.execution.release()
    stage.observations.clear()
    stage.cache_observations.clear()
    stage.sensitivities.clear()
    for site in stage.sites.values():
        site.weight = None


def checkpoint_name(model: StreamedModel, module: nn.Module, target: str) -> str:
    """Path of a submodule or parameter of a stage -> its checkpoint name."""
    return model.canonical(f"{model.path(module)}.{target}.").removesuffix(".")


def find_sites(module: nn.Module, graph: fx.Graph, name: Callable[[str], str]) -> dict[str, Site]:
    """Every Linear that the graph calls, by checkpoint name, in the order of the graph."""
    sites = {}
    for node in graph.nodes:
        if node.op == "call_module":
            target = str(node.target)
            linear = module.get_submodule(target)
            if isinstance(linear, nn.Linear):
                shape = (linear.out_features, linear.in_features)
                sites[name(target)] = Site(name(target), target, node.all_input_nodes[0].name, shape)
    return sites
