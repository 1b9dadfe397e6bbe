"""What a compilation will write, estimated before it runs: the scheme of every layer, and bytes on the disk."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlqc.emit.shard_writer import LENGTH_FIELD
from vlqc.emit.stage_tensors import header_bytes
from vlqc.families.linear import Linear
from vlqc.frontend.emitted_dtype import dtype_name
from vlqc.frontend.memory import expert_file_bytes, offloaded_bytes, stage_values
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.ir.stage import Site
from vlqc.options.options import Options
from vlqc.pipeline.pass_api import Pass
from vlqc.targets.cache_schemes import CacheScheme
from vlqc.targets.caches import projections
from vlqc.targets.engine import Engine
from vlqc.targets.schemes import Scheme, StorageFormat, stored_tensors, tensors_bytes


def required_disk_space(
    model: StreamedModel, options: Options, passes: Sequence[Pass], samples: Sequence[Mapping[str, Tensor]]
) -> int:
    """Bytes that a compilation needs on the disk of the save folder at one time.

    The sum of the result (under --fallback auto with all candidates to choose from), the stage outputs kept for
    --resume, the weights of experts, and what samples hold beyond --memory_budget.
    """
    sites, cache = predict_schemes(model, passes), predict_cache(passes)
    search = predict_search(model, sites, passes) if options.fallback == "auto" else None
    result = output_bytes(model, sites, options.layout, search, cache)
    temporary = expert_file_bytes(model) + offloaded_bytes(model, samples, options.memory_budget)
    return result + stage_output_bytes(model, samples) + temporary


def predict_schemes(
    model: StreamedModel, passes: Sequence[Pass], note: Callable[[str], object] = lambda text: None
) -> dict[str, Site]:
    """Every Linear of the stages by checkpoint name, with the scheme that the first pass with a `choose`
    method will give it. note: receives that pass's messages for the user, some more than once."""
    assign: Any = next((step for step in passes if hasattr(step, "choose")), None)
    sites, layers = {}, set(model.linear_layers)
    for stage in model.stages.values():
        for name, parameter in model.parameters(stage).items():
            layer = name.removesuffix(".weight")
            if layer in layers:
                sites[layer] = Site(
                    layer, layer, model.family.fused_group(layer)[0], (parameter.shape[0], parameter.shape[1])
                )
    for group in model.family.scheme_groups(sites) if assign is not None else ():
        members = [sites[member] for member in group]
        if members:
            decision = assign.choose(members, model.family)
            if decision.note:
                note(decision.note)
            for member in members:
                member.scheme, member.reason = decision.scheme, decision.reason
                member.group_size = assign.group_size if decision.scheme.spec.weight.per_group else None
    return sites


def predict_cache(passes: Sequence[Pass]) -> CacheScheme | None:
    """The scheme in which a pass quantizes keys and values; None if they stay float. Layers may be left out."""
    schemes = (getattr(step, "scheme", None) for step in passes)
    return next((scheme for scheme in schemes if isinstance(scheme, CacheScheme)), None)


@dataclass(frozen=True)
class SearchSpace:
    """What the precision search will choose from. candidates: schemes per group of layers, by checkpoint names, the
    assigned one first; group_size: of weights with groups."""

    candidates: Mapping[tuple[str, ...], Sequence[Scheme]]
    group_size: int


def predict_search(model: StreamedModel, sites: Mapping[str, Site], passes: Sequence[Pass]) -> SearchSpace:
    """The candidates that the first pass with a `candidates` method will measure for every quantized group.

    sites: from `predict_schemes`. A pass that adds a bias to a norm leaves fewer.
    """
    measure: Any = next((step for step in passes if hasattr(step, "candidates")), None)
    candidates: dict[tuple[str, ...], Sequence[Scheme]] = {}
    for group in model.family.scheme_groups(sites) if measure is not None else ():
        members = [sites[member] for member in group]
        if members and members[0].is_quantized:
            schemes = measure.candidates(members, model.family, dtype_name(model.emitted_dtype))
            candidates[tuple(group)] = schemes
    return SearchSpace(candidates, getattr(measure, "group_size", 0))


def output_bytes(
    model: StreamedModel,
    sites: Mapping[str, Site],
    layout: Engine,
    search: SearchSpace | None = None,
    cache: CacheScheme | None = None,
) -> int:
    """Bytes of the weight file of the result, exact but for --part_file_size and --shift.

    sites: from `predict_schemes`; search: adds what `DeferredStages` stores besides, the tensors of every other scheme
    that the precision search may choose for a Linear, equal ones once; cache: scheme of keys and values in every
    decoder layer, None for a cache in float.
    """
    total = LENGTH_FIELD + header_bytes(model.checkpoint)
    candidates = {layer: schemes for group, schemes in search.candidates.items() for layer in group} if search else {}
    for name, parameter in model.parameters(model.module).items():
        layer = name.removesuffix(".weight")
        site = sites.get(layer)
        schemes = candidates.get(layer, [(site.scheme if site else None) or Scheme.FLOAT])
        if site is None or not any(scheme.is_quantized for scheme in schemes):
            total += parameter.numel() * model.emitted_dtype.itemsize
        else:
            total += layer_bytes(model, layout, site, schemes, search.group_size if search else 0)
    if cache is not None:
        form = StorageFormat(_dtype_code(model))
        for pair in projections(model.family, sites).values():
            linears = (Linear(*sites[layer].shape, row_parallel=False) for layer in pair)
            total += sum(tensors_bytes(cache.spec.stored, linear, form) for linear in linears)
    return total


def layer_bytes(
    model: StreamedModel, layout: Engine, site: Site, schemes: Iterable[Scheme], group_size: int = 0
) -> int:
    """Bytes of the tensors of a Linear in all these schemes, equal ones once, its bias aside.

    group_size: of weights with groups where the site has none.
    """
    outputs, inputs = site.shape
    linear = Linear(outputs, inputs, model.family.is_row_parallel(site.name))
    form = StorageFormat(_dtype_code(model), layout.packs_int4, site.group_size or group_size or inputs)
    different = {
        (scheme.spec.weight, tensor.suffix): tensors_bytes([tensor], linear, form)
        for scheme in schemes
        for tensor in stored_tensors(scheme, form)
    }
    return sum(different.values())


def _dtype_code(model: StreamedModel) -> str:
    return "F16" if model.emitted_dtype == torch.float16 else "BF16"


def stage_output_bytes(model: StreamedModel, samples: Sequence[Mapping[str, Tensor]]) -> int:
    """Bytes of the outputs of two stages for all samples, in float32: those of a stage are deleted once those of the
    next are complete."""
    return 2 * 4 * stage_values(model, samples)
