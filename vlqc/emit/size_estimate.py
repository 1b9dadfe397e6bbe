"""What a compilation will write, estimated before it runs: the scheme of every layer, and bytes on the disk."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlqc.emit.shard_writer import LENGTH_FIELD
from vlqc.emit.stage_tensors import header_bytes
from vlqc.families.linear import Linear
from vlqc.frontend.memory import expert_file_bytes, offloaded_bytes, stage_values
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.ir.stage import Site
from vlqc.options.options import Options
from vlqc.pipeline.pass_api import Pass
from vlqc.targets.cache_schemes import CacheScheme
from vlqc.targets.caches import projections
from vlqc.targets.engine import Engine
from vlqc.targets.schemes import Scheme, StorageFormat, linear_bytes, tensors_bytes


def required_disk_space(
    model: StreamedModel, options: Options, passes: Sequence[Pass], samples: Sequence[Mapping[str, Tensor]]
) -> int:
    """Bytes that a compilation needs on the disk of the save folder at one time.

    The sum of the result (under --fallback auto with the alternatives to choose from), the stage outputs kept for
    --resume, the weights of experts, and what samples hold beyond --memory_budget.
    """
    sites, cache = predict_schemes(model, passes), predict_cache(passes)
    result = output_bytes(model, sites, options.layout, with_alternatives=options.fallback == "auto", cache=cache)
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


def output_bytes(
    model: StreamedModel,
    sites: Mapping[str, Site],
    layout: Engine,
    *,
    with_alternatives: bool = False,
    cache: CacheScheme | None = None,
) -> int:
    """Bytes of the weight file of the result, exact but for --part_file_size and --shift.

    sites: from `predict_schemes`; with_alternatives: adds what `DeferredStages` stores besides, the tensors of every
    other scheme that the precision search may choose for a Linear; cache: scheme of keys and values in every decoder
    layer, None for a cache in float.
    """
    dtype = model.emitted_dtype
    code = "F16" if dtype == torch.float16 else "BF16"
    total = LENGTH_FIELD + header_bytes(model.checkpoint)
    for name, parameter in model.parameters(model.module).items():
        layer = name.removesuffix(".weight")
        site = sites.get(layer)
        scheme = (site.scheme if site else None) or Scheme.FLOAT
        if site is None or not scheme.is_quantized:
            total += parameter.numel() * dtype.itemsize
            continue
        outputs, inputs = site.shape
        linear = Linear(outputs, inputs, model.family.is_row_parallel(layer))
        form = StorageFormat(code, layout.packs_int4, site.group_size or inputs)
        stored = [scheme, *scheme.alternatives] if with_alternatives else [scheme]
        total += sum(linear_bytes(each, linear, form) for each in stored)
    if cache is not None:
        form = StorageFormat(code)
        for pair in projections(model.family, sites).values():
            linears = (Linear(*sites[layer].shape, row_parallel=False) for layer in pair)
            total += sum(tensors_bytes(cache.spec.stored, linear, form) for linear in linears)
    return total


def stage_output_bytes(model: StreamedModel, samples: Sequence[Mapping[str, Tensor]]) -> int:
    """Bytes of the outputs of two stages for all samples, in float32: those of a stage are deleted once those of the
    next are complete."""
    return 2 * 4 * stage_values(model, samples)
