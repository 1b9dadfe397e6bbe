"""Bundles: one state of one stage as a folder, from which passes can be run again on another machine.

    graph.vlqc                 text: graph, sites with their schemes, rotations, summaries of all tensors
    config.json                of the checkpoint; the installed transformers builds the stage's module from it
    bundle.json                BundleMetadata: everything that is not in the other files
    weights.safetensors        parameters and buffers by path in the stage; quantized weights of sites; edges; scales of
                               keys and values
    observations.safetensors   ranges and kept rows
    inputs.safetensors         arguments of the probe and, if the samples have not run through the stage, of all samples

A bundle is untrusted input: reading it executes and unpickles nothing, and it never contains code of a checkpoint.
`torch.load(weights_only=True)` is no substitute for safetensors: it is safe from torch 2.6 on only (CVE-2025-32434),
and in one file the states of a stage could not share unchanged tensors as hard links.
"""

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlqc.errors import Fault, UserError
from vlqc.families.family import ModelFamily
from vlqc.families.registry import family_of
from vlqc.files import parse_json, read_json_object
from vlqc.frontend.checkpoint.config_schema import config_faults
from vlqc.frontend.checkpoint.files import outside_links
from vlqc.frontend.process_group import ProcessGroup
from vlqc.frontend.streamed_model import build_meta_model
from vlqc.ir.bfloat16_linears import exact_bfloat16
from vlqc.ir.cache_observation import CacheObservation, KeptAttention
from vlqc.ir.execution import Call, StageRun
from vlqc.ir.observation import ChannelRange, Observation
from vlqc.ir.printer import print_stage
from vlqc.ir.serialization import NotSerializable, deserialize, serialize, span
from vlqc.ir.snapshot import SCALES, WEIGHT_PARTS, StageSnapshot
from vlqc.ir.stage import Edge, Stage, WeightQuantization
from vlqc.ir.tensor_cache import TensorCache
from vlqc.ir.tensor_digest import digest, fingerprint
from vlqc.ir.verifier import check
from vlqc.kernels_ref.kv_cache import QuantizedCacheAttention
from vlqc.kernels_ref.norm import ShiftedNorm
from vlqc.kernels_ref.quant_linear import QuantLinear
from vlqc.pipeline.registry import WRAPPERS, load_wrapper
from vlqc.reporting.dumps.diff import BUNDLE_GRAPH, read_stage_text
from vlqc.reporting.dumps.writer import DumpContext, add_suffix, write_or_link
from vlqc.targets.schemes import quant_linears

CONFIG, METADATA = "config.json", "bundle.json"
WEIGHTS, OBSERVATIONS, INPUTS = "weights.safetensors", "observations.safetensors", "inputs.safetensors"
# Key in the header of a tensor file: names of float32 tensors stored as bfloat16 without loss.
HALVED = "float32 tensors that are stored in bfloat16, which holds them"
RANGE_PARTS = ("minimum", "maximum", "sum", "sum_of_squares")
KEPT_PARTS = ("kept", "kept_modality", "kept_energy")
ABSMAX_PARTS = ("key_absmax", "value_absmax")
PACKAGES = ("vlqc", "torch", "transformers", "numpy")
LARGEST_SIZE = 2**20  # limit of all dimensions in config.json; the largest vocabularies have some 150 000 entries
MOST_TENSORS = 10_000  # limit of the tensors of a model, and so of the blocks that are built
FIX = "write the bundle again: vlqc compile --dump_ir FOLDER --dump_formats bundle"

Tensors = dict[str, Tensor]
_FINGERPRINT = TensorCache(fingerprint)


# ---- bundle.json -----------------------------------------------------------------------------------------------------


class _StrictModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ReplacedModule(_StrictModel):
    """A module that a pass put in the place of the model's own. kind: class name; flags: attributes of type bool."""

    path: str
    kind: str
    flags: dict[str, bool] = {}


class ObservationMetadata(_StrictModel):
    """An observation without its tensors. rows: by modality."""

    node: str
    channels: int
    rows: dict[str, int]
    balance: bool
    samples: int


class CacheMetadata(_StrictModel):
    """A cache without its tensors. target: path in the stage; scaling, rows, kept, balance, samples: as in
    `CacheObservation`, kept is the number of samples; rows is None if nothing was observed."""

    name: str
    target: str
    scaling: float = 1.0
    rows: dict[str, int] | None = None
    kept: int = 0
    balance: bool = True
    samples: int = 0


class SerializedCall(_StrictModel):
    """A `Call`. args, kwargs: from `ir.serialization.serialize`; modality: number of its tensor, or None."""

    sample: int
    args: Any
    kwargs: Any
    modality: int | None


class BundleMetadata(_StrictModel):
    """Content of bundle.json.

    stage: checkpoint name. versions: of the packages that wrote the bundle. names: path in the stage -> checkpoint
    name, where it is not the stage's name plus the path. replaced: outer modules first. constants: node -> path of the
    parameter that it reads, or None. edges: (producer, consumers), None if edges were not computed. probe: index into
    calls, or a call. before_run: whether the samples have not run through the stage, so that calls has all of them.
    rounds_weights: as in `StageRun`.
    """

    format: Literal[1] = 1
    stage: str
    versions: dict[str, str]
    names: dict[str, str]
    replaced: tuple[ReplacedModule, ...]
    constants: dict[str, str | None]
    edges: tuple[tuple[str, tuple[str, ...]], ...] | None
    observations: tuple[ObservationMetadata, ...]
    caches: tuple[CacheMetadata, ...] = ()
    calls: tuple[SerializedCall, ...]
    probe: int | SerializedCall | None
    before_run: bool
    rounds_weights: bool = False


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_bundle(stage: Stage, path: Path, context: DumpContext) -> None:
    """Writes PATH.bundle. UserError for a stage that is not from a checkpoint or has unknown types of arguments."""
    if context.model_path is None:
        raise UserError(Fault("cannot write a bundle", stage.name, "the stage is not from a checkpoint"))
    folder = add_suffix(path, ".bundle")
    folder.mkdir()
    inputs = _SerializedInputs(stage)
    metadata = BundleMetadata(
        stage=stage.name,
        versions=dict(_versions()),
        names=dict(_checkpoint_names(stage)),
        replaced=tuple(_replaced_modules(stage.module)),
        constants={node.name: node.meta.get("path") for node in stage.graph.nodes if node.op == "get_attr"},
        edges=None if stage.edges is None else tuple((edge.producer, tuple(edge.consumers)) for edge in stage.edges),
        observations=tuple(_observation_metadata(stage)),
        caches=tuple(_cache_metadata(stage)),
        calls=tuple(inputs.calls),
        probe=inputs.probe,
        before_run=inputs.before_run,
        rounds_weights=stage.execution.rounds_weights,
    )
    (folder / BUNDLE_GRAPH).write_text(print_stage(stage), encoding="utf-8")
    (folder / METADATA).write_text(metadata.model_dump_json(indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(context.model_path / "config.json", folder / CONFIG)
    for name, tensors in (
        (WEIGHTS, dict(_weight_tensors(stage))),
        (OBSERVATIONS, dict(_observation_tensors(stage))),
        (INPUTS, inputs.tensors),
    ):
        content = " ".join(f"{key} {digest(tensor, fingerprint_of=_FINGERPRINT)}" for key, tensor in tensors.items())
        write_or_link(name, content, folder / name, context, _tensor_writer(tensors))


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # vlqc from a checkout
            continue


def _tensor_writer(tensors: Tensors) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        stored, halved = {}, []
        for name, tensor in tensors.items():
            half = exact_bfloat16(tensor) if tensor.dtype == torch.float32 and tensor.ndim else None
            if half is not None:
                halved.append(name)
            stored[name] = (tensor.detach().clone() if half is None else half).contiguous().cpu()
        save_file(stored, path, {HALVED: json.dumps(halved)})

    return write


def _checkpoint_names(stage: Stage) -> Iterator[tuple[str, str]]:
    paths = [path for path, _ in stage.module.named_modules() if path]
    paths += [path for path, _ in (*stage.module.named_parameters(), *stage.module.named_buffers())]
    for path in paths:
        if (name := stage.checkpoint_name(path)) != f"{stage.name}.{path}":
            yield path, name


def _replaced_modules(module: nn.Module) -> Iterator[ReplacedModule]:
    for path, child in module.named_modules():
        kind = type(child).__name__
        if isinstance(child, QuantLinear):
            yield ReplacedModule(path=path, kind=kind, flags={name: getattr(child, name) for name in child.settings})
        elif isinstance(child, ShiftedNorm | QuantizedCacheAttention) or kind in WRAPPERS:
            yield ReplacedModule(path=path, kind=kind)


def _observation_metadata(stage: Stage) -> Iterator[ObservationMetadata]:
    for node, observation in stage.observations.items():
        yield ObservationMetadata(
            node=node,
            channels=observation.channels,
            rows={name: channels.rows for name, channels in observation.ranges.items()},
            balance=observation.balance,
            samples=observation.samples,
        )


def _cache_metadata(stage: Stage) -> Iterator[CacheMetadata]:
    for name, site in stage.caches.items():
        observation = stage.cache_observations.get(name)
        if observation is None:
            yield CacheMetadata(name=name, target=site.target)
            continue
        yield CacheMetadata(
            name=name,
            target=site.target,
            scaling=observation.scaling,
            rows=dict(observation.rows),
            kept=len(observation.kept),
            balance=observation.balance,
            samples=observation.samples,
        )


def _weight_tensors(stage: Stage) -> Iterator[tuple[str, Tensor]]:
    for path, tensor in (*stage.module.named_parameters(), *stage.module.named_buffers()):
        yield f"module/{path}", tensor
    for site in stage.sites.values():
        if site.weight is not None:
            parts = zip(WEIGHT_PARTS, site.weight.tensors(), strict=False)
            yield from ((f"site/{site.name}/{part}", tensor) for part, tensor in parts)
    for name, cache in stage.caches.items():
        yield from ((f"cache/{name}/{part}", scale) for part, scale in cache.scales().items())
    for node in stage.graph.nodes:
        constant = node.meta.get("constant")
        is_computed = node.op == "get_attr" and node.meta.get("path") is None  # and not a parameter
        if is_computed and isinstance(constant, Tensor) and not constant.is_meta:
            yield f"constant/{node.name}", constant
    for index, edge in enumerate(stage.edges or ()):
        yield f"edge/{index}/usable", edge.usable
        yield from ((f"edge/{index}/{target}", columns) for target, columns in edge.consumers.items())


def _observation_tensors(stage: Stage) -> Iterator[tuple[str, Tensor]]:
    for node, observation in stage.observations.items():
        for modality, channels in observation.ranges.items():
            yield from ((f"{node}/{modality}/{part}", getattr(channels, part)) for part in RANGE_PARTS)
        yield from ((f"{node}/{part}", getattr(observation, part)) for part in KEPT_PARTS)
    for name, cache in stage.cache_observations.items():
        yield from ((f"cache/{name}/{part}", getattr(cache, part)) for part in ABSMAX_PARTS)
        for number, sample in enumerate(cache.kept):
            yield from ((f"cache/{name}/{number}/{part}", tensor) for part, tensor in sample.tensors().items())


class _SerializedInputs:
    """Arguments of the probe and, before they have run, of all samples. Shared tensors are stored once."""

    def __init__(self, stage: Stage) -> None:
        run = stage.execution
        self.tensors: Tensors = {}
        self._numbers: dict[int, int] = {}  # id of a tensor -> its number
        self.before_run = not run.outputs and run.process_group.size == 1
        self.calls = [self._call(stage.name, call) for call in run.calls] if self.before_run else []
        indices = [index for index, call in enumerate(run.calls) if call is run.probe]
        self.probe: int | SerializedCall | None = None
        if run.probe is not None:
            self.probe = indices[0] if indices and self.before_run else self._call(stage.name, run.probe)

    def _call(self, stage: str, call: Call) -> SerializedCall:
        try:
            args, kwargs = serialize(call.args, self._add), serialize(call.kwargs, self._add)
        except NotSerializable as error:
            why, fix = f"an argument has type {error}, which cannot be serialized", "remove bundle from --dump_formats"
            raise UserError(Fault("cannot write a bundle", stage, why, fix)) from error
        modality = None if call.modality is None else self._add(call.modality.contiguous())
        return SerializedCall(sample=call.sample, args=args, kwargs=kwargs, modality=modality)

    def _add(self, tensor: Tensor) -> int:
        """Number of a tensor. Stored is the part of its storage from its first to its last element, flat."""
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self.tensors)
            length: Any = span(tensor.shape, tensor.stride())
            self.tensors[str(len(self.tensors))] = tensor.detach().as_strided((length,), (1,)).cpu()
        return self._numbers[id(tensor)]


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_bundle(folder: Path) -> Stage:
    """The stage of a bundle on the CPU, with the same text as when it was written.

    UserError for a folder that is not a bundle, whose files do not match, or whose model class has other tensors in the
    installed transformers.
    """
    if not folder.is_dir() or not (folder / METADATA).is_file():
        why = f"it has no {METADATA}" if folder.is_dir() else "no such folder"
        raise UserError(Fault(f"{folder} is not a bundle", why=why, fix="pass a folder NN-STATE.bundle of a dump"))
    with _user_errors(folder):
        if links := outside_links(folder):
            what = f"{', '.join(links)}: {'a link' if len(links) == 1 else 'links'} out of the bundle"
            raise UserError(Fault(what, str(folder), fix="copy the files themselves into the folder"))
        metadata = BundleMetadata.model_validate(read_json_object(folder / METADATA))
        snapshot = read_stage_text(folder / BUNDLE_GRAPH)
        text = print_stage(snapshot)
        weights, statistics = _read_tensors(folder / WEIGHTS), _read_tensors(folder / OBSERVATIONS)
        config = read_json_object(folder / CONFIG)
        family = family_of(config, str(folder / CONFIG))
        module = _restore_module(folder, family, family.engine_config(config), metadata, weights)
        _wrap_attention(module, metadata, snapshot, weights)
        execution = _restore_execution(module, metadata, _read_tensors(folder / INPUTS))
        stage = _restore_stage(snapshot, metadata, family, module, execution, weights, statistics)
        if invalid := check(stage):
            raise ValueError("; ".join(invalid))
        if print_stage(stage) != text:
            raise ValueError(f"its tensors do not match {BUNDLE_GRAPH}")
        if execution.probe is None:
            raise ValueError("it has no probe")
        output = execution.probe_output()  # its arguments may be anything, so that only a run shows whether they fit
        for rotation in stage.rotations:
            if 0 in rotation.outputs and rotation.rotation.size != output.shape[1]:
                raise ValueError(f"its output has {output.shape[1]} channels, and is rotated by {rotation.rotation}")
    return stage


@contextmanager
def _user_errors(folder: Path) -> Iterator[None]:
    """Turns all errors that a damaged or hostile bundle can raise into UserError."""
    try:
        yield
    except ValidationError as error:
        why = "; ".join(f"{'.'.join(map(str, row['loc']))}: {row['msg']}" for row in error.errors()[:3])
        raise UserError(Fault(f"{METADATA} is invalid", str(folder), why, FIX)) from error
    except (
        SafetensorError, OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, StopIteration,
        ArithmeticError, AssertionError,
    ) as error:  # fmt: skip
        first_line = str(error).splitlines()[0] if str(error) else ""
        raise UserError(Fault("invalid bundle", str(folder), f"{type(error).__name__}: {first_line}", FIX)) from error


def _read_tensors(path: Path) -> Tensors:
    """Copies of all tensors of a file."""
    with safe_open(str(path), "pt") as file:
        halved = set(parse_json((file.metadata() or {}).get(HALVED, "[]")))
        tensors: Tensors = {}
        for name in file.keys():  # noqa: SIM118 - safe_open is not iterable
            tensor = file.get_tensor(name)
            tensors[name] = tensor.to(torch.float32 if name in halved else tensor.dtype, copy=True)
    return tensors


def _restore_module(
    folder: Path,
    family: ModelFamily,
    config: dict[str, Any],
    metadata: BundleMetadata,
    weights: Mapping[str, Tensor],
) -> nn.Module:
    """The stage's module from the installed transformers, with the modules that passes replaced and all tensors."""
    if faults := config_faults(family, config, str(folder / CONFIG), LARGEST_SIZE, MOST_TENSORS):
        raise UserError(*faults)
    model = build_meta_model(folder, config)
    modules = {family.module_name(path): child for path, child in model.named_modules()}
    if metadata.stage not in modules:
        raise ValueError(f"the model of {CONFIG} has no module {metadata.stage}")
    module: nn.Module = modules[metadata.stage]
    values = {name.removeprefix("module/"): value for name, value in weights.items() if name.startswith("module/")}
    for replaced in metadata.replaced:
        if replaced.kind == QuantizedCacheAttention.__name__:
            continue
        original = module.get_submodule(replaced.path)
        module.set_submodule(replaced.path, _restore_replaced(replaced, original, values))
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for path, value in values.items():
        owner_path, _, name = path.rpartition(".")
        owner = module.get_submodule(owner_path)
        if name == "bias" and isinstance(owner, nn.Linear):  # a pass may have added it
            tensors[path] = value
        if path not in tensors or tensors[path].shape != value.shape:
            expected = list(tensors[path].shape) if path in tensors else "no such tensor"
            raise ValueError(f"{path} has shape {list(value.shape)}; the installed transformers has {expected}")
        if isinstance(owner, QuantLinear):
            continue
        setattr(owner, name, value if name in owner._buffers else nn.Parameter(value, requires_grad=False))
    if missing := sorted(tensors.keys() - values.keys()):
        raise ValueError(f"{missing[0]} is missing")
    return module


def _wrap_attention(
    module: nn.Module, metadata: BundleMetadata, snapshot: StageSnapshot, weights: Mapping[str, Tensor]
) -> None:
    """Wraps the attention modules that were lowered to read quantized keys and values."""
    wrapped = {replaced.path for replaced in metadata.replaced if replaced.kind == QuantizedCacheAttention.__name__}
    for cache in metadata.caches:
        if cache.target in wrapped:
            key, value = (weights[f"cache/{cache.name}/{part}"] for part in SCALES)
            attention = module.get_submodule(cache.target)
            wrapper = QuantizedCacheAttention(attention, key, value, snapshot.caches[cache.name].heads)
            module.set_submodule(cache.target, wrapper)


def _restore_replaced(replaced: ReplacedModule, original: nn.Module, values: Tensors) -> nn.Module:
    prefix = f"{replaced.path}."
    tensors = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    quantized = {kind.__name__: kind for kind in quant_linears()}
    if replaced.kind in quantized:
        module = quantized[replaced.kind](**tensors)  # type: ignore[arg-type]
        for flag, value in replaced.flags.items():
            if flag not in module.settings:
                raise ValueError(f"{replaced.kind} has no flag {flag}")
            setattr(module, flag, value)
        return module
    if replaced.kind == ShiftedNorm.__name__:
        return ShiftedNorm(original, tensors["bias"])
    wrapper: nn.Module = load_wrapper(replaced.kind)(original)
    return wrapper


def _restore_stage(
    snapshot: StageSnapshot,
    metadata: BundleMetadata,
    family: ModelFamily,
    module: nn.Module,
    execution: StageRun,
    weights: Mapping[str, Tensor],
    statistics: Tensors,
) -> Stage:
    """Joins the parsed graph and sites with the module and all tensors."""
    prefix = f"{metadata.stage}."
    paths = {name: path for path, name in metadata.names.items()}

    def target_of(name: str) -> str:
        return paths.get(name, name.removeprefix(prefix))

    stage = Stage(
        name=snapshot.name,
        part=snapshot.part,
        family=family,
        dtype=snapshot.dtype,
        module=module,
        graph=snapshot.graph,
        sites=snapshot.sites,
        caches=snapshot.caches,
        execution=execution,
        rotations=snapshot.rotations,
        checkpoint_name=lambda path: metadata.names.get(path, prefix + path),
    )
    for node in stage.graph.nodes:
        node.meta.pop("summary", None)
        if node.op == "call_module":
            node.target = target_of(str(node.target))
        elif node.op == "get_attr":
            path = metadata.constants[node.name]
            node.meta["path"] = path
            constant = weights.get(f"constant/{node.name}") if path is None else module.get_parameter(path)
            if constant is None:
                constant = torch.empty(node.meta["shape"], dtype=node.meta["dtype"], device="meta")
            node.meta["constant"] = constant
    for site in stage.sites.values():
        site.target = target_of(site.name)
        integers, scale, group_scale = (weights.get(f"site/{site.name}/{part}") for part in WEIGHT_PARTS)
        if integers is not None and scale is not None:
            site.weight = WeightQuantization(integers, scale, group_scale)
    if metadata.edges is not None:
        stage.edges = tuple(
            Edge(
                producer,
                weights[f"edge/{index}/usable"],
                {target: weights[f"edge/{index}/{target}"] for target in consumers},
            )
            for index, (producer, consumers) in enumerate(metadata.edges)
        )
    for row in metadata.caches:
        cache = stage.caches[row.name]
        cache.target = row.target
        cache.key_scale, cache.value_scale = (weights.get(f"cache/{row.name}/{part}") for part in SCALES)
        if row.rows is not None:
            stage.cache_observations[row.name] = _restore_cache_observation(row, row.rows, statistics)
    stage.observations = {row.node: _restore_observation(row, statistics) for row in metadata.observations}
    return stage


def _restore_cache_observation(metadata: CacheMetadata, rows: dict[str, int], statistics: Tensors) -> CacheObservation:
    prefix = f"cache/{metadata.name}"
    parts = [part.name for part in fields(KeptAttention)]
    kept = [
        KeptAttention(**{part: statistics[f"{prefix}/{number}/{part}"] for part in parts})
        for number in range(metadata.kept)
    ]
    key, value = (statistics[f"{prefix}/{part}"] for part in ABSMAX_PARTS)
    return CacheObservation(metadata.scaling, key, value, rows, tuple(kept), metadata.balance, metadata.samples)


def _restore_observation(metadata: ObservationMetadata, statistics: Tensors) -> Observation:
    def channel_range(modality: str, rows: int) -> ChannelRange:
        return ChannelRange(rows, *(statistics[f"{metadata.node}/{modality}/{part}"] for part in RANGE_PARTS))

    return Observation(
        metadata.channels,
        {modality: channel_range(modality, rows) for modality, rows in metadata.rows.items()},
        **{part: statistics[f"{metadata.node}/{part}"] for part in KEPT_PARTS},
        balance=metadata.balance,
        samples=metadata.samples,
    )


def _restore_execution(module: nn.Module, metadata: BundleMetadata, tensors: Tensors) -> StageRun:
    def fill(data: Tensor, number: int) -> None:
        data.copy_(tensors[str(number)].view(torch.uint8))

    def restore_call(call: SerializedCall) -> Call:
        args, kwargs = (deserialize(value, fill, torch.device("cpu")) for value in (call.args, call.kwargs))
        if not isinstance(args, tuple) or not isinstance(kwargs, dict):
            raise ValueError("the arguments of a call are not a tuple and a dict")
        return Call(call.sample, args, kwargs, None if call.modality is None else tensors[str(call.modality)])

    calls = [restore_call(call) for call in metadata.calls]
    probe = None
    if isinstance(metadata.probe, int):
        probe = calls[metadata.probe]
    elif metadata.probe is not None:
        probe = restore_call(metadata.probe)
    return StageRun(module, ProcessGroup(), calls, probe, rounds_weights=metadata.rounds_weights, name=metadata.stage)
