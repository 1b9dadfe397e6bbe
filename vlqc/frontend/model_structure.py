"""The parameters of a model and the scales that cancel between its layers, from config.json alone.

The model is built without weights and run once on a small sample. Every stage is traced as in a compilation, and
`find_edges` follows the data through its graph; so no table of layers is needed, and the names of modules do not
matter. Stages with the same modules and shapes have the same edges, so that one of them is traced.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from vlqc.errors import Fault, UserError
from vlqc.families.family import ModelFamily
from vlqc.families.linear import Linear, Shape
from vlqc.frontend.streamed_model import StreamedModel, build_meta_model, find_stages, model_inputs
from vlqc.frontend.tracing import run_on_meta, trace, trace_between
from vlqc.ir.execution import Call
from vlqc.ir.rotatable import find_rotatable
from vlqc.ir.rotation_analysis import GraphBases, find_bases
from vlqc.ir.rotations import Rotatable, RotatableParts
from vlqc.ir.scale_propagation import find_edges
from vlqc.ir.stage import Edge


@dataclass(frozen=True)
class ModelStructure:
    """A model under checkpoint names.

    parameters: name -> shape of every parameter, without the weight of a tied output head. linears: its linear layers.
    edges: producer -> edge, with names of layers in place of targets. embedding: of the tokens; output_head: the layer
    that computes the logits; tied: whether both share the embedding's weight; rotatable: what can be rotated.
    """

    family: ModelFamily
    parameters: Mapping[str, Shape]
    linears: Mapping[str, Linear]
    edges: Mapping[str, Edge]
    embedding: str
    output_head: str
    tied: bool
    rotatable: tuple[Rotatable, ...] = ()

    @property
    def rotatable_parts(self) -> RotatableParts:
        shared = self.embedding if self.tied else self.output_head
        size = math.prod(self.parameters[f"{shared}.weight"])
        return RotatableParts(self.rotatable, self.embedding, self.output_head, size, self.tied)

    @cached_property
    def norms(self) -> dict[str, int]:
        """Norms that can absorb a scale -> channels. Those without an edge, such as the final one, never change."""
        return {name: self.parameters[f"{name}.weight"][0] for name in self.edges if name not in self.linears}

    @cached_property
    def other_parameters(self) -> dict[str, Shape]:
        """Parameters that no pass changes, besides those of linear layers: name -> shape."""
        changing = self.linears.keys() | self.norms.keys()
        return {name: shape for name, shape in self.parameters.items() if name.rpartition(".")[0] not in changing}

    @cached_property
    def producers(self) -> dict[str, list[tuple[str, Tensor]]]:
        """Linear layer -> each producer that can absorb a scale of its input, and the map of that edge, int64 [K]."""
        producers: dict[str, list[tuple[str, Tensor]]] = {layer: [] for layer in self.linears}
        for name, edge in self.edges.items():
            for consumer, channel in edge.consumers.items():
                producers[consumer].append((name, channel))
        return producers

    @property
    def layers_with_matrices(self) -> list[str]:
        """Linear layers, embeddings and convolutions: engines look up their `.weight` in the description."""
        others = [name for name, shape in self.other_parameters.items() if len(shape) > 1 and name.endswith(".weight")]
        return [name.removesuffix(".weight") for name in others] + list(self.linears)

    def has_bias(self, norm: str) -> bool:
        """Whether a norm has a bias of its own. Otherwise a stored bias is a folded shift."""
        return f"{norm}.bias" in self.parameters

    def norm_before(self, layer: str) -> tuple[str, Tensor] | None:
        """The norm with an edge to a linear layer, and its map, int64 [K]."""
        return next(((name, channel) for name, channel in self.producers[layer] if name in self.norms), None)


def model_structure(
    folder: Path, family: ModelFamily, config: Mapping[str, Any], *, trust_remote_code: bool = False
) -> ModelStructure:
    """The structure of the model in a checkpoint folder; the same object for the same config.

    config: content of config.json in the form of `ModelFamily.engine_config`, within the bounds of `config_faults`.
    Code in the folder runs only with `trust_remote_code`. Raises UserError if the model cannot be created or run.
    """
    trusted = str(folder) if trust_remote_code else ""
    return _structure(_Request(family, json.dumps(config, sort_keys=True), trusted, folder))


def rotatable_parts(model: StreamedModel) -> RotatableParts:
    """What can be rotated in a model. Raises UserError if it cannot be run."""
    checkpoint, trust = model.checkpoint, model.trust_remote_code
    structure = model_structure(checkpoint.folder, model.family, checkpoint.config, trust_remote_code=trust)
    return structure.rotatable_parts


@dataclass(frozen=True)
class _Request:
    """Arguments of `model_structure`. trusted: the folder whose code may run, or ""."""

    family: ModelFamily
    config: str
    trusted: str
    folder: Path = field(compare=False)


@lru_cache(maxsize=32)
def _structure(request: _Request) -> ModelStructure:
    config = json.loads(request.config)
    model = build_meta_model(request.folder, config, trust_remote_code=bool(request.trusted))
    where = str(request.folder / "config.json")
    tied = request.family.is_tied(config)
    return structure_of(model, request.family, lambda: _inputs(model, request.family), where, tied=tied)


def _inputs(model: nn.Module, family: ModelFamily) -> dict[str, Any]:
    """Arguments of the model's forward for the smallest synthetic sample."""
    return model_inputs(model, family, family.inputs.synthetic_sample(model.config, smallest=True))


@torch.no_grad()
def structure_of(
    model: nn.Module,
    family: ModelFamily,
    inputs: Callable[[], Mapping[str, Any]],
    where: str,
    canonical: Callable[[str], str] | None = None,
    *,
    tied: bool = False,
) -> ModelStructure:
    """The structure of a transformers model whose parameters are on the meta device. The model is unusable afterwards.

    inputs: returns the arguments of its forward for a sample that passes all stages; where: path of config.json, for
    messages; canonical: name in the module tree -> checkpoint name, the family's by default; tied: whether the output
    head shares the embedding's weight. Raises UserError if the
    model cannot be run.
    """
    canonical = canonical or family.checkpoint_name
    paths = {module: path for path, module in model.named_modules()}

    def name(path: str) -> str:
        return canonical(f"{path}.").removesuffix(".")

    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    shared = {f"{paths[head]}.weight"} if tied else set()
    parameters = {
        canonical(path): tuple(parameter.shape)
        for path, parameter in model.named_parameters(remove_duplicate=False)
        if path not in shared
    }
    several = _with_shared_parameters(model, paths[head] if tied else None)
    linears = {
        name(path): Linear(
            module.out_features, module.in_features, family.is_row_parallel(name(path)), module.bias is not None
        )
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not (tied and module is head)
    }
    tracer = _StageTracer({stage: paths[stage] for stage in find_stages(model) if stage is not model})
    between = tracer.run(model, inputs, where)
    edges: dict[str, Edge] = {}
    for stage, path in tracer.stages.items():
        for edge in tracer.edges.get(_kind(stage), ()):
            consumers = {name(f"{path}.{target}"): channel for target, channel in edge.consumers.items()}
            producer = name(f"{path}.{edge.producer}")
            edges[producer] = Edge(producer, edge.usable, consumers)
    stage_bases = {
        path: tracer.bases[kind] for stage, path in tracer.stages.items() if (kind := _kind(stage)) in tracer.bases
    }
    rotatable = find_rotatable(model, between, stage_bases, name, several)
    return ModelStructure(
        family, parameters, linears, edges, name(paths[embedding]), name(paths[head]), tied, rotatable
    )


def _with_shared_parameters(model: nn.Module, tied_head: str | None) -> set[str]:
    """Paths of modules that share a parameter with another one, apart from the tied output head."""
    named = [
        (path, id(parameter))
        for path, parameter in model.named_parameters(remove_duplicate=False)
        if path.rpartition(".")[0] != tied_head
    ]
    counts = Counter(number for _, number in named)
    return {path.rpartition(".")[0] for path, number in named if counts[number] > 1}


def _kind(stage: nn.Module) -> tuple[Any, ...]:
    """Equal for stages that have the same edges: their classes, parameters and shapes are equal."""
    modules = tuple((path, type(module)) for path, module in stage.named_modules())
    return modules, tuple((path, tuple(parameter.shape)) for path, parameter in stage.named_parameters())


class _StageTracer:
    """Stands in for all stages while the model runs: traces one of each kind, and returns zeros.

    stages: stage -> path in the module tree; edges, bases: by kind, with targets in the stage.
    """

    def __init__(self, stages: Mapping[nn.Module, str]) -> None:
        self.stages = stages
        self.edges: dict[Any, tuple[Edge, ...]] = {}
        self.bases: dict[Any, GraphBases] = {}
        self._outputs: dict[Any, Any] = {}  # by kind and shapes of the inputs, on meta

    def run(self, model: nn.Module, inputs: Callable[[], Mapping[str, Any]], where: str) -> fx.Graph:
        """Runs the model once -> what it does between the stages. UserError if it cannot be run."""
        try:
            with self.replaced_forwards(model):
                return trace_between(model, self.stages, inputs())
        except UserError:
            raise
        except Exception as error:  # raised by the model's code, for which any config.json is possible
            why, fix = f"{type(error).__name__}: {error}", "check config.json"
            raise UserError(Fault("the model cannot be run", where, why, fix)) from error

    @contextmanager
    def replaced_forwards(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model runs without weights: stages as described, all others with zeros that take no memory."""
        inside = {child for stage in self.stages for child in stage.modules()}
        outside = [module for module in model.modules() if module not in inside]
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        forwards: dict[nn.Module, Callable[..., Any]] = {stage: self._forward(stage) for stage in self.stages}
        channels = embedding.get_parameter("weight").shape[1]
        forwards[embedding] = lambda ids: torch.zeros(*ids.shape, channels)
        forwards[head] = lambda x: x  # nothing reads the logits
        for module in outside:
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                    module._parameters[key] = nn.Parameter(zeros, requires_grad=False)
        for module, forward in forwards.items():
            module.forward = forward
        try:
            yield
        finally:
            for module in forwards:
                module.__dict__.pop("forward", None)

    def _forward(self, stage: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            replacement = stage.__dict__.pop("forward")
            try:
                output = self._run(stage, Call(0, args, kwargs))
            finally:
                stage.forward = replacement
            return tree_map(lambda leaf: torch.zeros_like(leaf, device="cpu") if _is_tensor(leaf) else leaf, output)

        return forward

    def _run(self, stage: nn.Module, call: Call) -> Any:
        """Traces the stage if it is the first of its kind -> its output for these shapes, on meta."""
        kind = _kind(stage)
        if kind not in self.edges:
            graph = trace(stage, call, self.stages[stage])
            self.edges[kind], self.bases[kind] = find_edges(stage, graph), find_bases(stage, graph)
        shapes = tuple(tuple(leaf.shape) for leaf in tree_leaves((call.args, call.kwargs)) if _is_tensor(leaf))
        if (kind, shapes) not in self._outputs:
            self._outputs[kind, shapes] = run_on_meta(stage, call)
        return self._outputs[kind, shapes]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
