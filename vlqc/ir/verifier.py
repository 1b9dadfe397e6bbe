"""Invariants of a stage, checked after every pass. All violations are collected; each names its node, site or tensor.

The checks are cheap: weights are read once without temporaries, everything else is metadata.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

from vlqc.ir.execution import StageRun, input_tensors
from vlqc.ir.memory import release_pages
from vlqc.ir.observation import MODALITIES, ChannelRange, Observation
from vlqc.ir.rotations import AppliedRotation
from vlqc.ir.snapshot import StageSnapshot
from vlqc.ir.stage import CacheSite, Edge, Site, Stage, WeightQuantization, observe
from vlqc.ir.tensor_cache import TensorCache
from vlqc.ir.tensor_digest import is_finite
from vlqc.kernels_ref.attention import ATTENTION
from vlqc.kernels_ref.kv_cache import QuantizedCacheAttention

T = TypeVar("T")
_Type = tuple[torch.dtype, tuple[int, ...]]  # of a tensor: dtype and shape
OPS = ("placeholder", "get_attr", "call_function", "call_module", "call_method", "output")


def check(stage: Stage | StageSnapshot) -> list[str]:
    """Describes every violated invariant; empty if the stage is valid. A snapshot is checked without its tensors."""
    modules = dict(stage.module.named_modules()) if isinstance(stage, Stage) else {}
    faults = [*_graph(stage), *_unique(stage), *_groups(stage)]
    calls: dict[str, list[fx.Node]] = {}
    for node in stage.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    faults += _rotations(stage, modules)
    for name, site in stage.sites.items():
        faults += _site(calls.get(site.target, []), modules, name, site)
    for name, cache in stage.caches.items():
        faults += _cache(stage, name, cache)
    if isinstance(stage, Stage):
        faults += [*_outputs(stage.execution), *_targets(stage, modules), *_finite(stage.module)]
        faults += [fault for edge in stage.edges or () for fault in _edge(stage, edge)]
        shapes = {node.name: node.meta.get("shape") for node in stage.graph.nodes}
        for name, observation in stage.observations.items():
            faults += _observation(shapes, name, observation)
    return [f"{stage.name}: {fault}" for fault in faults]


# ---- the graph -------------------------------------------------------------------------------------------------------


def _graph(stage: Stage | StageSnapshot) -> Iterator[str]:
    defined: set[fx.Node] = set()
    nodes = list(stage.graph.nodes)
    for node in nodes:
        if node.op not in OPS or (node.op == "call_function" and not callable(node.target)):
            yield f"%{node.name} has the unusable operation {node.op} {node.target}"
        for used in node.all_input_nodes:
            if used.graph is not stage.graph:
                yield f"%{node.name} reads %{used.name}, which is a node of another graph"
            elif used not in defined:
                yield f"%{node.name} reads %{used.name} before it is defined"
        if node.target is observe and node.users:
            users = ", ".join(f"%{user.name}" for user in node.users)
            yield f"%{node.name} is an observer but is read by {users}"
        defined.add(node)
    for name, count in Counter(node.name for node in nodes).items():
        if count > 1:
            yield f"{count} nodes are called %{name}"
    if [node.op for node in nodes].count("output") != 1 or nodes[-1].op != "output":
        yield "the graph does not end in exactly one output"


def _targets(stage: Stage, modules: dict[str, nn.Module]) -> Iterator[str]:
    at = {site.target for site in stage.sites.values()}
    for node in stage.graph.nodes:
        target = str(node.target)
        if node.op == "call_module" and target not in modules:
            yield f"%{node.name} calls {stage.checkpoint_name(target)}, which the module does not have"
        elif node.op == "call_module" and isinstance(modules[target], nn.Linear) and target not in at:
            yield f"%{node.name} calls the Linear {stage.checkpoint_name(target)}, which is not a site"
        elif node.op == "get_attr" and "constant" not in node.meta and not _has(stage.module, target):
            yield f"%{node.name} reads {target}, which the module does not have"


def _has(module: nn.Module, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    try:
        return hasattr(module.get_submodule(owner), name)
    except AttributeError:
        return False


def _outputs(execution: StageRun) -> Iterator[str]:
    if execution.outputs and len(execution.outputs) != len(execution.calls):
        yield f"{len(execution.outputs)} outputs are kept of {len(execution.calls)} calls"


def _finite(module: nn.Module) -> Iterator[str]:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and not is_finite(tensor):
            yield f"{name} has NaN or infinite values"
        release_pages(tensor)


# ---- sites -----------------------------------------------------------------------------------------------------------


def _unique(stage: Stage | StageSnapshot) -> Iterator[str]:
    for what in ("name", "target"):
        for value, count in Counter(getattr(site, what) for site in stage.sites.values()).items():
            if count > 1:
                yield f"{count} sites have the {what} {value}"


def _site(calls: list[fx.Node], modules: dict[str, nn.Module], key: str, site: Site) -> Iterator[str]:
    outputs, inputs = site.shape
    if key != site.name:
        yield f"site {site.name} is listed as {key}"
    if not calls:
        yield f"site {site.name} is not called by the graph"
    for call in calls:
        read = call.all_input_nodes[0] if call.all_input_nodes else None
        if read is None or read.name != site.source:
            yield f"site {site.name} reads %{read.name if read else '?'} in the graph, but its source is %{site.source}"
        for node, size in ((call, outputs), (read, inputs)):
            shape = node.meta.get("shape") if node is not None else None
            if node is not None and shape is not None and (not shape or shape[-1] != size):
                yield f"site {site.name} is [{outputs}, {inputs}], but %{node.name} has the shape {list(shape)}"
    module = modules.get(site.target)
    if isinstance(module, nn.Linear) and tuple(module.weight.shape) != site.shape:
        yield f"site {site.name} is [{outputs}, {inputs}], but its weight is {list(module.weight.shape)}"
    lowered = module is not None and not isinstance(module, nn.Linear)
    if lowered and (site.weight is None or not site.is_quantized):
        yield f"site {site.name} is lowered to {type(module).__name__} without a scheme and a quantized weight"
    if lowered and site.spec.activation.is_static and site.input is None:
        yield f"site {site.name} is lowered as {site.scheme} without an input scale"
    if site.scheme is not None and not site.is_quantized and (site.weight is not None or site.input is not None):
        yield f"site {site.name} is {site.scheme} but has quantization parameters"
    if site.input is not None:
        scale, offset = site.input.scale, site.input.offset
        if not (math.isfinite(scale) and scale > 0):
            yield f"site {site.name} has the input scale {scale}: it must be positive and finite"
        if not (-128 <= offset <= 127 and offset == int(offset)):
            yield f"site {site.name} has the input offset {offset}: it must be a whole number from -128 to 127"
    if site.weight is not None:
        yield from _quantized(site, site.weight)


def _quantized(site: Site, weight: WeightQuantization) -> Iterator[str]:
    integers, scale, group_scale = weight.integers, weight.scale, weight.group_scale
    if integers.dtype != torch.int8 or tuple(integers.shape) != site.shape:
        actual = f"{integers.dtype} {list(integers.shape)}"
        yield f"site {site.name} has integers {actual}: expected int8 {list(site.shape)}"
    elif integers.numel() and site.is_quantized:
        smallest, largest, form = int(integers.min()), int(integers.max()), site.spec.weight
        if smallest < form.smallest or largest > form.largest:
            limits = f"{site.scheme} has {form.smallest} to {form.largest}"
            yield f"site {site.name} has integers from {smallest} to {largest}: {limits}"
    if scale.dtype != torch.float32 or tuple(scale.shape) != (site.shape[0], 1):
        yield f"site {site.name} has scales {scale.dtype} {list(scale.shape)}: expected float32 [{site.shape[0]}, 1]"
    elif scale.numel() and not (is_finite(scale) and float(scale.min()) > 0):
        yield f"site {site.name} has weight scales that are not positive and finite"
    if (group_scale is None) != (site.group_size is None):
        yield f"site {site.name} has group scales or a group size, but not both"
    elif group_scale is not None and site.group_size is not None:
        if site.group_size < 1 or site.shape[1] % site.group_size:
            yield f"site {site.name} has {site.shape[1]} inputs, which groups of {site.group_size} do not divide"
            return
        expected = (site.shape[0], site.shape[1] // site.group_size)
        if group_scale.dtype != torch.float32 or tuple(group_scale.shape) != expected:
            actual = f"{group_scale.dtype} {list(group_scale.shape)}"
            yield f"site {site.name} has group scales {actual}: expected float32 {list(expected)}"
        elif group_scale.numel() and not (is_finite(group_scale) and float(group_scale.min()) > 0):
            yield f"site {site.name} has group scales that are not positive and finite"


def _groups(stage: Stage | StageSnapshot) -> Iterator[str]:
    nodes = {node.name for node in stage.graph.nodes}
    for source, members in stage.groups().items():
        if source not in nodes:
            yield f"sites {_names(members)} read %{source}, which does not exist"
        if len({site.scheme for site in members}) > 1:
            schemes = ", ".join(f"{site.name} {site.scheme}" for site in members)
            yield f"the group that reads %{source} has several schemes: {schemes}"
        if len({site.input for site in members}) > 1:
            yield f"the group that reads %{source} has several input quantizations: {_names(members)}"


def _names(sites: list[Site]) -> str:
    return ", ".join(site.name for site in sites)


# ---- rotations -------------------------------------------------------------------------------------------------------


def _rotations(stage: Stage | StageSnapshot, modules: dict[str, nn.Module]) -> Iterator[str]:
    if not stage.rotations:
        return
    shapes = _weight_shapes(stage)
    names = Counter(f"{rotation.kind} {rotation.rotation.name}" for rotation in stage.rotations)
    yield from (f"{count} rotations of the {name}" for name, count in names.items() if count > 1)
    layers = {stage.checkpoint_name(path): module for path, module in modules.items()}
    inputs, outputs = _input_types(stage), _output_types(stage.graph)
    for rotation in stage.rotations:
        faults = [*_rotated_layers(shapes, rotation), *_rotated_values(rotation, inputs, outputs)]
        if not rotation.done:
            faults += [*_unrotated(layers, rotation)]
            if stage.observations:
                faults.append("inputs are observed before layers are rotated")
        yield from (f"rotation of the {rotation.kind} {rotation.rotation.name}: {fault}" for fault in faults)


def _weight_shapes(stage: Stage | StageSnapshot) -> dict[str, tuple[int, ...]]:
    """Checkpoint name of a layer -> shape of its weight, of a site that of the float weight."""
    if isinstance(stage, Stage):
        named = [*stage.module.named_parameters(), *stage.module.named_buffers()]
        shapes = {stage.checkpoint_name(path): tuple(tensor.shape) for path, tensor in named}
    else:
        shapes = {name: summary.shape for name, summary in stage.tensors.items()}
    weights = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}
    return weights | {name: site.shape for name, site in stage.sites.items()}


def _rotated_layers(shapes: Mapping[str, tuple[int, ...]], rotation: AppliedRotation) -> Iterator[str]:
    size = rotation.rotation.size
    if not (rotation.changed_layers or rotation.inputs or rotation.outputs):
        yield "it changes nothing in the stage"
    if missing := [layer for layer in rotation.changed_layers if layer not in shapes]:
        yield f"the stage has no {', '.join(f'{layer}.weight' for layer in missing)}"
        return
    for layer in rotation.norms:
        if len(shapes[layer]) != 1:
            yield f"{layer} is not a norm: its weight is {list(shapes[layer])}"
    for layer, norm in rotation.readers.items():
        columns = shapes[layer][1] if len(shapes[layer]) == 2 else 0
        if not columns or columns % size:
            yield f"{layer} has a weight {list(shapes[layer])}: expected a multiple of {size} columns"
        if norm is not None and norm not in rotation.norms:
            yield f"{layer} reads {norm}, which is not one of its norms"
        elif norm is not None and (not math.prod(shapes[norm]) or columns % math.prod(shapes[norm])):
            yield f"{layer} has {columns} columns, and {norm} a weight {list(shapes[norm])}"
    for layer, starts in rotation.writers.items():
        rows = shapes[layer][0] if shapes[layer] else 0
        if layer in rotation.tables and shapes[layer][1:] != (size,):
            yield f"{layer} is a table {list(shapes[layer])}: expected {size} columns"
        elif layer not in rotation.tables and not _are_blocks(starts, size, rows):
            yield f"{layer} has {rows} rows: expected separate blocks of {size} rows at {', '.join(map(str, starts))}"


def _are_blocks(starts: Sequence[int], size: int, rows: int) -> bool:
    """Whether blocks of `size` rows do not overlap and are within all rows."""
    ends = [0, *(start + size for start in starts)]
    return bool(starts) and all(end <= start for end, start in zip(ends, [*starts, rows], strict=True))


def _unrotated(layers: Mapping[str, nn.Module], rotation: AppliedRotation) -> Iterator[str]:
    """layers: by checkpoint name; empty for a snapshot."""
    for layer in (layer for layer in rotation.changed_layers if layer in layers):
        parameters = dict(layers[layer].named_parameters(recurse=False))
        if "weight" not in parameters or any(parameter.dtype != torch.float32 for parameter in parameters.values()):
            yield f"{layer} has no float32 weight that can still be rotated"


def _rotated_values(
    rotation: AppliedRotation, inputs: Mapping[str, _Type], outputs: Mapping[int, _Type]
) -> Iterator[str]:
    """inputs: of the stage, by name; outputs: by position."""
    size = rotation.rotation.size
    types = {f"input {name}": inputs.get(name) for name in rotation.inputs}
    types |= {f"output {position}": outputs.get(position) for position in rotation.outputs}
    for name, (dtype, shape) in ((name, type_ or (None, ())) for name, type_ in types.items()):
        if dtype is None or not dtype.is_floating_point or shape[-1:] != (size,):
            actual = "not a tensor of the stage" if dtype is None else f"{dtype} {list(shape)}"
            yield f"{name} is {actual}: expected float [..., {size}]"


def _input_types(stage: Stage | StageSnapshot) -> dict[str, _Type]:
    """Of the probe, or as recorded in the graph if there is none."""
    if isinstance(stage, Stage) and (probe := stage.execution.probe) is not None:
        tensors = input_tensors(stage.module, probe.args, probe.kwargs)
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors}
    return dict(_types((str(node.target), node) for node in stage.graph.nodes if node.op == "placeholder"))


def _output_types(graph: fx.Graph) -> dict[int, _Type]:
    returned = next((node.args[0] for node in graph.nodes if node.op == "output"), ())
    return dict(_types(enumerate(returned if isinstance(returned, tuple) else ())))


def _types(values: Iterable[tuple[T, object]]) -> Iterator[tuple[T, _Type]]:
    for key, node in values:
        if isinstance(node, fx.Node) and "shape" in node.meta:
            yield key, (node.meta["dtype"], node.meta["shape"])


# ---- keys and values -------------------------------------------------------------------------------------------------


def _cache(stage: Stage | StageSnapshot, key: str, cache: CacheSite) -> Iterator[str]:
    where = f"the cache of {cache.name}"
    if key != cache.name:
        yield f"{where} is listed as {key}"
    for projection in (cache.key, cache.value):
        site = stage.sites.get(projection)
        if site is None:
            yield f"{where}: {projection} is not a site"
        elif site.shape[0] != cache.channels:
            yield f"{where}: {projection} has {site.shape[0]} outputs, expected {cache.heads} x {cache.head_size}"
    node = next((node for node in stage.graph.nodes if node.name == cache.node), None)
    if node is None or node.target is not ATTENTION:
        yield f"{where}: %{cache.node} is not an attention call of the graph"
    if isinstance(stage, Stage):
        yield from (f"{where}: {fault}" for fault in _cache_tensors(stage, cache))


def _cache_tensors(stage: Stage, cache: CacheSite) -> Iterator[str]:
    scales = cache.scales()
    if len(scales) != (2 if cache.is_quantized else 0):
        yield f"it has {len(scales)} scales with the scheme {cache.scheme}"
    for name, scale in scales.items():
        if scale.dtype != torch.float32 or tuple(scale.shape) != (cache.channels,):
            yield f"{name} is {scale.dtype} {list(scale.shape)}, expected float32 [{cache.channels}]"
        elif not (is_finite(scale) and float(scale.min()) > 0):
            yield f"{name} is not positive and finite"
        elif not torch.equal(scale, scale.to(stage.dtype).float()):
            yield f"{name} has values that {stage.dtype} does not have"
    module = stage.module.get_submodule(cache.target)
    if isinstance(module, QuantizedCacheAttention):
        wrapped = {"key_scale": module.key_scale, "value_scale": module.value_scale}
        if scales.keys() != wrapped.keys() or any(not torch.equal(scales[name], wrapped[name]) for name in scales):
            yield "attention reads keys and values with other scales"
    observation = stage.cache_observations.get(cache.name)
    for absmax in () if observation is None else (observation.key_absmax, observation.value_absmax):
        if tuple(absmax.shape) != (cache.channels,) or not is_finite(absmax):
            yield f"it observed {list(absmax.shape)} channels, expected {cache.channels} with finite values"


# ---- edges and observations ------------------------------------------------------------------------------------------


def _edge(stage: Stage, edge: Edge) -> Iterator[str]:
    name = f"edge from {stage.checkpoint_name(edge.producer)}"
    channels = edge.usable.numel()
    produced = _channels(stage, edge.producer)
    if produced is None:
        yield f"{name}: the graph does not call it"
    elif edge.usable.dtype != torch.bool or edge.usable.shape != (produced,):
        yield f"{name}: usable is {edge.usable.dtype} {list(edge.usable.shape)}, expected bool [{produced}]"
    if not edge.consumers:
        yield f"{name}: it has no consumer"
    inputs = {site.target: site.shape[1] for site in stage.sites.values()}
    for target, columns in edge.consumers.items():
        consumer = f"{name} to {stage.checkpoint_name(target)}"
        if target not in inputs:
            yield f"{consumer}: the consumer is not a site"
        elif columns.dtype != torch.int64 or columns.shape != (inputs[target],):
            yield f"{consumer}: the map is {columns.dtype} {list(columns.shape)}, expected int64 [{inputs[target]}]"
        if not columns.numel():
            continue
        if int(columns.min()) < -1 or int(columns.max()) >= channels:
            yield f"{consumer}: columns refer to channels outside -1 to {channels - 1}"
        elif not bool(edge.usable.flatten()[columns[columns >= 0].long()].all()):
            yield f"{consumer}: columns refer to channels that are not usable"


def _channels(stage: Stage, target: str) -> int | None:
    """Last dimension of what a module returns in the graph; None if it is not called."""
    shapes = [
        node.meta.get("shape") for node in stage.graph.nodes if node.op == "call_module" and node.target == target
    ]
    return int(shapes[0][-1]) if shapes and shapes[0] else None


def _observation(shapes: Mapping[str, tuple[int, ...] | None], name: str, observation: Observation) -> Iterator[str]:
    """shapes: of all nodes, by name."""
    where, shape = f"observation of %{name}", shapes.get(name)
    if name not in shapes:
        yield f"{where}: the node does not exist"
    elif shape is not None and (not shape or shape[-1] != observation.channels):
        yield f"{where}: it counts {observation.channels} channels, but the node has the shape {list(shape)}"
    for modality, span in observation.ranges.items():
        yield from (f"{where}, {modality}: {fault}" for fault in _range(modality, span, observation.channels))
    kept = observation.kept
    if kept.numel() and (kept.dtype != torch.float32 or kept.shape[1:] != (observation.channels,)):
        yield f"{where}: kept rows are {kept.dtype} {list(kept.shape)}, expected float32 [T, {observation.channels}]"
        return
    if len(kept) != len(observation.kept_modality):
        yield f"{where}: {len(kept)} rows are kept, but {len(observation.kept_modality)} modalities"
        return
    for modality, (rows, low, high) in _KEPT_RANGES(kept, observation.kept_modality).items():
        known = observation.ranges.get(modality)
        if rows > (known.rows if known else 0):
            yield f"{where}, {modality}: {rows} rows are kept of {known.rows if known else 0}"
        elif known is not None and not _within(known, low, high):
            yield f"{where}, {modality}: kept rows lie outside its range"


def _within(span: ChannelRange, low: Tensor, high: Tensor) -> bool:
    fits = span.minimum.shape == span.maximum.shape == low.shape  # else reported by `_range`
    return not fits or bool(((low >= span.minimum) & (high <= span.maximum)).all())


def _kept_ranges(kept: Tensor, modality: Tensor) -> dict[str, tuple[int, Tensor, Tensor]]:
    """(number of rows, minimum [K], maximum [K]) of the kept rows [T, K] of each modality that has any."""
    rows_of = {name: kept[modality == number] for number, name in enumerate(MODALITIES)}
    # aminmax along a dimension is slower by an order of magnitude
    return {name: (len(rows), rows.amin(0), rows.amax(0)) for name, rows in rows_of.items() if len(rows)}


_KEPT_RANGES = TensorCache(_kept_ranges)


def _range(modality: str, span: ChannelRange, channels: int) -> Iterator[str]:
    parts = {
        "minimum": span.minimum,
        "maximum": span.maximum,
        "sum": span.sum,
        "sum of squares": span.sum_of_squares,
    }
    if modality not in MODALITIES:
        yield f"it is none of {', '.join(MODALITIES)}"
    if span.rows < 1:
        yield f"it counts {span.rows} rows: a modality that never appeared is left out"
    for what, part in parts.items():
        expected = torch.float64 if what.startswith("sum") else torch.float32
        if part.dtype != expected or part.shape != (channels,):
            yield f"{what} is {part.dtype} {list(part.shape)}, expected {expected} [{channels}]"
        elif not is_finite(part):
            yield f"{what} has NaN or infinite values"
    if span.minimum.shape == span.maximum.shape and bool((span.minimum > span.maximum).any()):
        yield "the minimum is above the maximum"
    if bool((span.sum_of_squares < 0).any()):
        yield "the sum of squares is negative"
