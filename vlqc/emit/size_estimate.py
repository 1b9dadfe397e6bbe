"""What a compilation will write, before it writes: the scheme of every layer, and bytes on the disk."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vlqc.emit import kept_bytes, waiting_bytes
from vlqc.emit.stage_tensors import emitted_dtype, header_bytes
from vlqc.families.qwen2_5_vl import fused_group
from vlqc.frontend.memory import offloaded_bytes
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.ir.stage import Site
from vlqc.options.options import Options
from vlqc.pipeline.pass_api import Pass
from vlqc.targets.schemes import Scheme


def needed_room(
    model: StreamedModel, options: Options, passes: Sequence[Pass], samples: Sequence[Mapping[str, Tensor]]
) -> int:
    """Bytes that a compilation takes on the disk of the save folder, where most lies there.

    The result, while it is made; what is kept to go on from; what samples hold beyond --memory_budget.
    """
    result = output_bytes(model, predict_schemes(model, passes), packed=not options.mindie_layout)
    if options.fallback == "auto":
        result = max(result, waiting_bytes(model))
    return result + kept_bytes(model, samples) + offloaded_bytes(model, samples, options.memory_budget)


def predict_schemes(model: StreamedModel, passes: Sequence[Pass]) -> dict[str, Site]:
    """Every Linear of the stages by name, with the scheme that one of these passes would give it."""
    assign: Any = next((step for step in passes if hasattr(step, "choose")), None)
    sites, layers = {}, set(model.layers)
    for stage in model.stages.values():
        for name, parameter in model.parameters(stage).items():
            layer = name.removesuffix(".weight")
            if layer in layers:
                sites[layer] = Site(layer, layer, fused_group(layer)[0], (parameter.shape[0], parameter.shape[1]))
    for layer, site in sites.items():
        members = [sites[member] for member in fused_group(layer) if member in sites]
        if assign is not None and site is members[0]:
            decision = assign.choose(members)
            for member in members:
                member.scheme, member.reason = decision.scheme, decision.reason
                member.group_size = assign.group_size if decision.scheme == Scheme.W4A8_DYNAMIC else None
    return sites


def output_bytes(model: StreamedModel, sites: dict[str, Site], *, packed: bool) -> int:
    """Of all tensors of the result. packed: two 4-bit weights per byte, with the correction that this needs."""
    wide = emitted_dtype(model.checkpoint.dtype).itemsize
    total = header_bytes(model.checkpoint)
    for name, parameter in model.parameters(model.module).items():
        site = sites.get(name.removesuffix(".weight"))
        if site is None or site.scheme in (None, Scheme.FLOAT):
            total += parameter.numel() * wide
            continue
        outputs, inputs = site.shape
        total += 8 * outputs  # scale and offset
        if site.scheme == Scheme.W8A8:
            total += inputs * outputs + (8 if wide == 2 else 12) * outputs + 8
        elif site.scheme == Scheme.W8A8_DYNAMIC:
            total += inputs * outputs
        else:
            groups = inputs // (site.group_size or inputs)
            total += inputs * outputs // (2 if packed else 1) + 8 * groups * outputs + (4 * outputs if packed else 0)
    return total
