"""From a stop of the lockstep to a stage that passes can work on, and back to nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn

from vlqc.engines import part_of
from vlqc.errors import Fault, UserError
from vlqc.ir import Call, Site, Stage, first_tensor
from vlqc.lockstep import Stop
from vlqc.model import FloatModel
from vlqc.trace import record

PROBE_ROWS = 512  # proofs run on the largest sample of at most this many rows: enough to tell, quick to run


@contextmanager
def live_stage(model: FloatModel, stop: Stop, dtype: torch.dtype, read: Callable[[str], Tensor]) -> Iterator[Stage]:
    """Inside, the stage that all samples stand before: traced, with its weights in float32, sites found.

    dtype: in which float tensors are to be emitted; read: checkpoint name -> tensor. Afterwards its weights are gone.
    """
    if not stop.calls:
        why = "what passes through it cannot be measured"
        raise UserError(Fault(f"no calibration sample reaches {stop.name}", why=why, fix="add a sample with a picture"))
    probe = choose_probe(stop.calls)
    before = [(module, dict(module._modules), dict(module._parameters)) for module in stop.module.modules()]
    try:
        model.fill(stop.module, read)
        graph = record(stop.module, probe, stop.name)
        yield Stage(
            name=stop.name,
            part=part_of(f"{stop.name}."),
            dtype=dtype,
            module=stop.module,
            graph=graph,
            sites=find_sites(stop.module, graph, lambda target: checkpoint_name(model, stop, target)),
            calls=stop.calls,
            probe=probe,
            checkpoint_name=lambda target: checkpoint_name(model, stop, target),
        )
    finally:
        for module, modules, parameters in before:  # passes have put others in their places
            module._modules.update(modules)
            module._parameters.clear()
            module._parameters.update(parameters)
        model.empty(stop.module)


def checkpoint_name(model: FloatModel, stop: Stop, target: str) -> str:
    """Path of a module or parameter in the stage -> its checkpoint name."""
    return model.canonical(f"{model.path(stop.module)}.{target}.").removesuffix(".")


def choose_probe(calls: list[Call]) -> Call:
    """The call with most rows among those of at most PROBE_ROWS, otherwise the one with fewest."""
    rows = [first_tensor((*call.args, *call.kwargs.values())).shape[-2] for call in calls]
    small = [number for number, count in enumerate(rows) if count <= PROBE_ROWS]
    if small:
        return calls[max(small, key=lambda number: rows[number])]
    return calls[min(range(len(calls)), key=lambda number: rows[number])]


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
