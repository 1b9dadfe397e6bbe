"""From a stop of the lockstep to a stage that passes can work on, and back to nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn

from vlqc.errors import Fault, UserError
from vlqc.families.qwen2_5_vl import model_part
from vlqc.frontend.calibration.probe import PROBE, choose_probe
from vlqc.frontend.process_group import ProcessGroup
from vlqc.frontend.sequential import Stop
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.frontend.tracing import trace
from vlqc.ir.execution import Call, SampleShape, StageRun
from vlqc.ir.stage import Site, Stage


@contextmanager
def materialized_stage(
    model: StreamedModel,
    stop: Stop,
    dtype: torch.dtype,
    read: Callable[[str], Tensor],
    process_group: ProcessGroup | None = None,
) -> Iterator[Stage]:
    """Inside, the stage that all samples stand before: traced, with its weights in float32, sites found.

    dtype: in which float tensors are to be emitted; read: checkpoint name -> tensor. Afterwards its weights are gone.
    """
    process_group = process_group or ProcessGroup()
    calls = [call for call in stop.calls if call.sample != PROBE]
    shapes_by_process = list(process_group.all_gather([SampleShape.from_call(call) for call in calls]))
    if not any(shapes_by_process):
        why = "what passes through it cannot be measured"
        raise UserError(Fault(f"no calibration sample reaches {stop.name}", why=why, fix="add a sample with a picture"))
    sample_shapes = [visit for of_one in shapes_by_process for visit in of_one]
    separate_probe = next((call for call in stop.calls if call.sample == PROBE), None)
    probe = separate_probe or _probe(
        process_group, shapes_by_process, sample_shapes[choose_probe([visit.rows for visit in sample_shapes])], calls
    )
    before = [(module, dict(module._modules), dict(module._parameters)) for module in stop.module.modules()]
    stage = None
    try:
        model.materialize(stop.module, read)
        model.prefetch_after(stop.name)
        graph = trace(stop.module, probe, stop.name)
        stage = Stage(
            name=stop.name,
            part=model_part(f"{stop.name}."),
            dtype=dtype,
            module=stop.module,
            graph=graph,
            sites=find_sites(stop.module, graph, lambda target: checkpoint_name(model, stop, target)),
            execution=StageRun(
                module=stop.module,
                process_group=process_group,
                calls=calls,
                probe=probe,
                probe_is_separate=separate_probe is not None,
                shapes=sample_shapes,
                name=stop.name,
            ),
            checkpoint_name=lambda target: checkpoint_name(model, stop, target),
        )
        yield stage
    finally:
        if stage is not None:
            _release(stage)
        for module, modules, parameters in before:  # passes have put others in their places
            module._modules.update(modules)
            module._parameters.clear()
            module._parameters.update(parameters)
        model.to_meta(stop.module)


def _release(stage: Stage) -> None:
    """Drops results of passes, so that references to the stage hold little memory."""
    stage.execution.release()
    stage.observations.clear()
    stage.sensitivities.clear()
    for site in stage.sites.values():
        site.weight = None


def checkpoint_name(model: StreamedModel, stop: Stop, target: str) -> str:
    """Path of a module or parameter in the stage -> its checkpoint name."""
    return model.canonical(f"{model.path(stop.module)}.{target}.").removesuffix(".")


def _probe(
    process_group: ProcessGroup, shapes_by_process: list[list[SampleShape]], chosen: SampleShape, calls: list[Call]
) -> Call:
    """The call of the chosen visit, from the process that has its sample."""
    owner = next(rank for rank, sample_shapes in enumerate(shapes_by_process) if chosen in sample_shapes)
    return process_group.broadcast(owner, next((call for call in calls if call.sample == chosen.sample), None))


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
