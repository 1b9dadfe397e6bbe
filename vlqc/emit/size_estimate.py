"""What a compilation will write, estimated before it runs: the scheme of every layer, and bytes on the disk."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlqc.emit.folder_writer import file_limit
from vlqc.emit.shard_writer import LENGTH_FIELD, most_header_bytes
from vlqc.emit.stage_tensors import header_bytes
from vlqc.errors import Fault, UserError
from vlqc.families.linear import Linear
from vlqc.formatting import format_bytes
from vlqc.frontend.emitted_dtype import dtype_name
from vlqc.frontend.memory import expert_file_bytes, offloaded_bytes, stage_values
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.ir.stage import Site
from vlqc.options.fields import flag_of
from vlqc.options.options import Options
from vlqc.pipeline.pass_api import Pass
from vlqc.pipeline.precision_search import Candidate, SearchGroup
from vlqc.pipeline.precision_search import size_range as group_size_range
from vlqc.pipeline.presets import predict_cache
from vlqc.targets.cache_schemes import CacheScheme
from vlqc.targets.caches import projections
from vlqc.targets.engine import Engine
from vlqc.targets.schemes import Scheme, StorageFormat, stored_tensors, tensors_bytes
from vlqc.targets.target import parse_target


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


@dataclass(frozen=True)
class SearchSpace:
    """What the precision search will choose from. candidates: schemes per group of layers, by checkpoint names, the
    assigned one first; group_size: of weights with groups."""

    candidates: Mapping[tuple[str, ...], Sequence[Scheme]]
    group_size: int


def predict_search(model: StreamedModel, sites: Mapping[str, Site], passes: Sequence[Pass]) -> SearchSpace:
    """The candidates that the first pass with a `search_candidates` method will measure for every quantized group.

    sites: from `predict_schemes`. A pass that adds a bias to a norm leaves fewer.
    """
    measure: Any = next((step for step in passes if hasattr(step, "search_candidates")), None)
    candidates: dict[tuple[str, ...], Sequence[Scheme]] = {}
    for group in model.family.scheme_groups(sites) if measure is not None else ():
        members = [sites[member] for member in group]
        if members and members[0].is_quantized:
            schemes = measure.search_candidates(members, model.family, dtype_name(model.emitted_dtype))
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


def other_bytes(model: StreamedModel) -> int:
    """Bytes of the tensors outside the stages in the result."""
    parameters = model.parameters(model.module)
    return sum(parameters[name].numel() for name in model.non_stage_parameters()) * model.emitted_dtype.itemsize


def size_range(model: StreamedModel, options: Options, passes: Sequence[Pass]) -> tuple[int, int] | None:
    """The smallest and the largest size of all weight files that the precision search can choose, exact but for
    --part_file_size and --shift; None without a search, or without a group that is known to have candidates."""
    sites = predict_schemes(model, passes)
    search = predict_search(model, sites, passes)
    if options.fallback != "auto" or not search.candidates:
        return None
    groups = []
    for group, schemes in search.candidates.items():
        members = [sites[layer] for layer in group]
        candidates = {
            scheme: Candidate(
                0.0, sum(layer_bytes(model, options.layout, site, [scheme], search.group_size) for site in members)
            )
            for scheme in schemes
        }
        groups.append(SearchGroup(model.family.part(group[0]), group, schemes[0], candidates))
    total = output_bytes(model, sites, options.layout, cache=predict_cache(passes))
    fixed = total - sum(group.candidates[group.assigned].bytes for group in groups)
    header = header_bytes(model.checkpoint)
    if options.max_bytes is not None and options.part_file_size is not None:
        fixed += most_header_bytes(options.max_bytes, header, file_limit(options)) - LENGTH_FIELD - header
    smallest, largest = group_size_range(groups, options.engine_target, model.family)
    return fixed + smallest, fixed + largest


def check_size(model: StreamedModel, options: Options, passes: Sequence[Pass]) -> None:
    """UserError for a --max_bytes that no choice of schemes meets, or that every choice meets."""
    sizes = size_range(model, options, passes)
    if options.max_bytes is None or sizes is None:
        return
    flag, target = f"{flag_of('max_bytes')} {options.max_bytes}", parse_target(options.engine_target)
    runs = f"{target.text} {'run' if len(target.engines) > 1 else 'runs'} it"
    smallest, largest = sizes
    if options.max_bytes < smallest:
        why = (
            f"the smallest weight files have {smallest} bytes ({format_bytes(smallest)}): every layer in the smallest "
            f"scheme in which {runs}, and what is always float"
        )
        fix = f"use {flag_of('max_bytes')} {smallest} or more, exclude fewer layers, or use another --target"
        raise UserError(Fault(f"{flag} cannot be met", why=why, fix=fix))
    if options.max_bytes >= largest:
        why = f"the largest weight files that the search can choose have {largest} bytes ({format_bytes(largest)})"
        fix = f"use less than that, or {flag_of('min_sqnr')} DB"
        raise UserError(Fault(f"{flag} is no limit", why=why, fix=fix))


def stage_output_bytes(model: StreamedModel, samples: Sequence[Mapping[str, Tensor]]) -> int:
    """Bytes of the outputs of two stages for all samples, in float32: those of a stage are deleted once those of the
    next are complete."""
    return 2 * 4 * stage_values(model, samples)
