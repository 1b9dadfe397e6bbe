"""quantize-weights: quantize the float weights of sites to integers and scales."""

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from vlqc.errors import Fault, UserError
from vlqc.ir.memory import release_pages
from vlqc.ir.observation import Observation
from vlqc.ir.stage import Site, Stage, WeightQuantization, group_by_source
from vlqc.kernels_ref.int4_groups import quantize_weight_per_group_absmax
from vlqc.kernels_ref.matmul import smallest_weight_scale_for_bias
from vlqc.kernels_ref.quantize import quantize_weight_per_channel_absmax
from vlqc.passes.algorithms.gptq import gptq_quantize, single_threaded_pool
from vlqc.passes.algorithms.observer import require_observation
from vlqc.passes.algorithms.weight_clipping import ChannelScaleGrid, GroupScaleGrid, column_importance
from vlqc.pipeline.pass_api import Pass
from vlqc.targets.schemes import Scheme

T = TypeVar("T")
MIN_EXPERT_ROWS = 32
CONCURRENT_GROUPS = 2  # each holds a Gram matrix


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Sets `weight` of every quantized site; the float weight stays in the module until lower-linears replaces it.

    method: `round` rounds every weight to nearest with absmax scales; `clip` searches the scales that minimize the
        error of the outputs; `gptq` also compensates each column's error in later columns; `auto` is `gptq` where
        inputs were observed, else `round`.

    It runs after quantize-activations: with a tiny input scale, the weight scale needs a lower bound so that the bias,
    stored in steps of their product, fits into int32.
    """

    name: ClassVar[str] = "quantize-weights"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    summary: ClassVar[str] = "round the weights of quantized sites to integers, per output channel or group"
    after: ClassVar[tuple[str, ...]] = ("assign-precision",)
    before: ClassVar[tuple[str, ...]] = ("lower-linears",)

    method: Literal["auto", "round", "clip", "gptq"] = "auto"

    def needs_samples(self, schemes: Collection[Scheme]) -> bool:
        return self.method in ("clip", "gptq")

    def run(self, stage: Stage) -> bool:
        parts = work_items(stage, [site for site in stage.sites.values() if site.is_quantized])
        results = quantize_parts(stage, parts, self.method)
        changed = False
        for (_, sites), weights in zip(parts, results, strict=True):
            for site, weight in zip(sites, weights, strict=True):
                changed |= site.weight is None or not _equal(site.weight, weight)
                site.weight = weight
        return changed


def work_items(stage: Stage, sites: Sequence[Site]) -> list[tuple[str, list[Site]]]:
    """(source, sites that read it). With several processes one item per site, to occupy more of them."""
    groups = group_by_source(sites)
    if stage.execution.process_group.size > 1:
        return [(source, [site]) for source, members in groups.items() for site in members]
    return list(groups.items())


def quantize_parts(
    stage: Stage, parts: Sequence[tuple[str, Sequence[Site]]], method: str
) -> list[list[WeightQuantization]]:
    """Quantizes the weights of each of the `work_items`, in its sites' schemes, and returns them on all processes.

    Float weights that lie in files leave the memory. method: as `QuantizeWeights`.
    """
    tasks = [partial(_quantize_and_release, stage, source, sites, method) for source, sites in parts]
    costs = [sum(site.shape[0] * site.shape[1] ** 2 for site in sites) for _, sites in parts]
    with _started(tasks if stage.execution.process_group.size == 1 else []) as started:
        return stage.execution.process_group.parallel_map(started or tasks, costs)


@contextmanager
def _started(tasks: Sequence[Callable[[], T]]) -> Iterator[list[Callable[[], T]]]:
    """Starts tasks in a thread pool; yields functions that wait for their results.

    Parts of every task use one thread only, so the next task runs at the same time.
    """
    with (
        single_threaded_pool(),
        ThreadPoolExecutor(CONCURRENT_GROUPS, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        yield [future.result for future in [pool.submit(torch.no_grad()(task)) for task in tasks]]


def _quantize_and_release(stage: Stage, source: str, sites: Sequence[Site], method: str) -> list[WeightQuantization]:
    weights = quantize_site_weights(stage, source, sites, method)
    release_pages(*(stage.linear(site).weight for site in sites))
    return weights


def quantize_site_weights(stage: Stage, source: str, sites: Sequence[Site], method: str) -> list[WeightQuantization]:
    """Quantizes the weights of sites that read the node `source`, each in its scheme; method: as `QuantizeWeights`.

    Those of an expert that hardly any row reaches are rounded to nearest.
    """
    observed = stage.observations.get(source)
    too_few = method == "auto" if observed is None else _too_few_rows(stage, sites, observed)
    if not sites or method == "round" or too_few:
        return [round_weight(stage, site) for site in sites]
    observation = require_observation(stage, source, QuantizeWeights.name)
    importance = column_importance(observation.second_moment())
    grids = [scale_grid(stage, site, importance) for site in sites]
    if method == "clip":
        integers = [grid.round_to_nearest() for grid in grids]
    else:
        weights = [stage.linear(site).weight for site in sites]
        integers = gptq_quantize(weights, grids, observation.kept, observation.row_weight(), importance)
    return [WeightQuantization(values, *grid.stored_scales()) for values, grid in zip(integers, grids, strict=True)]


def _too_few_rows(stage: Stage, sites: Sequence[Site], observation: Observation) -> bool:
    """Whether the weights are of an expert that few rows reach: it would only be fitted to these."""
    is_expert = any(stage.family.experts_of(site.name) for site in sites)
    return observation.is_empty or (is_expert and observation.rows < MIN_EXPERT_ROWS)


def round_weight(stage: Stage, site: Site) -> WeightQuantization:
    """Rounds the weight of a quantized site to nearest, with the absmax scale of each row or group."""
    weight, dtype = stage.linear(site).weight, scale_dtype(stage, site)
    if site.spec.weight.per_group:
        return WeightQuantization(*quantize_weight_per_group_absmax(weight, group_size(stage, site), dtype))
    return WeightQuantization(*quantize_weight_per_channel_absmax(weight, min_weight_scale(stage, site), dtype))


def scale_grid(stage: Stage, site: Site, importance: Tensor) -> ChannelScaleGrid | GroupScaleGrid:
    """Returns the quantization grid of a site's scheme, with scales in the dtype in which engines read them."""
    weight, dtype = stage.linear(site).weight, scale_dtype(stage, site)
    if site.spec.weight.per_group:
        return GroupScaleGrid(weight, importance, group_size(stage, site), dtype)
    return ChannelScaleGrid(weight, importance, min_weight_scale(stage, site), dtype)


def scale_dtype(stage: Stage, site: Site) -> torch.dtype:
    """The dtype in which engines read the scales of a site's weight."""
    return torch.float32 if site.spec.weight.float32_scale else stage.dtype


def group_size(stage: Stage, site: Site) -> int:
    if site.group_size is None:
        fix = "let assign-precision choose the scheme"
        raise UserError(Fault(f"{site.name} has no group size", stage.name, fix=fix))
    return site.group_size


def min_weight_scale(stage: Stage, site: Site) -> Tensor | None:
    """Smallest weight scales float32 [N, 1] with which the bias of a static site fits into int32; None for any."""
    bias = emitted_bias(stage, site)
    if not site.spec.activation.is_static or site.input is None or bias is None:
        return None
    return smallest_weight_scale_for_bias(bias, site.input.scale, stage.linear(site).in_features)


def emitted_bias(stage: Stage, site: Site) -> Tensor | None:
    """The bias float32 [N] from which quant_bias is computed, or None.

    It is rounded to the stage's dtype, in which it is stored. A bias that a pass added is stored in quant_bias only,
    so it is not rounded.
    """
    bias = stage.linear(site).bias
    if bias is None or site.added_bias:
        return None if bias is None else bias.detach().float()
    return bias.detach().to(stage.dtype).float()


def _equal(first: WeightQuantization, second: WeightQuantization) -> bool:
    pairs = zip(first.tensors(), second.tensors(), strict=False)
    return len(first.tensors()) == len(second.tensors()) and all(torch.equal(left, right) for left, right in pairs)
