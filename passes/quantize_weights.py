"""quantize-weights: from float weights to integers and scales."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from vlqc.errors import Fault, UserError
from vlqc.ir.stage import Site, Stage, WeightQuantization
from vlqc.kernels_ref.int4_groups import quantize_weight_per_group_absmax
from vlqc.kernels_ref.matmul import smallest_weight_scale_for_bias
from vlqc.kernels_ref.quantize import quantize_weight_per_channel_absmax
from vlqc.passes.algorithms.gptq import compensated, single_threads
from vlqc.passes.algorithms.weight_clipping import GroupGrid, RowGrid, importance_of
from vlqc.passes.insert_observers import observed
from vlqc.pipeline.pass_api import Pass
from vlqc.targets.schemes import Scheme

T = TypeVar("T")
GROUPS_AT_ONCE = 2  # each with a Gram matrix in memory


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Turns the weight of every quantized site into integers; the float weight stays until it is lowered.

    method: `round`, every weight to its nearest step; `clip`, the same with the steps that cost the outputs least;
    `gptq`, every column also makes up for the errors of those before it; `auto`, gptq where inputs were observed, else
    round.

    It comes after the activations: where an input's scale is tiny, a row's scale must not be, or its bias would not
    fit into int32 steps of their product.
    """

    name: ClassVar[str] = "quantize-weights"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    summary: ClassVar[str] = "round the weights of quantized sites to integers, per output channel or group"
    after: ClassVar[tuple[str, ...]] = ("assign-precision",)
    before: ClassVar[tuple[str, ...]] = ("lower-linears",)

    method: Literal["auto", "round", "clip", "gptq"] = "auto"

    def run(self, stage: Stage) -> bool:
        changed = False
        groups = {
            source: [site for site in members if site.scheme not in (None, Scheme.FLOAT)]
            for source, members in stage.groups().items()
        }
        if stage.execution.process_group.size > 1:  # the same, one by one: that gives more processes something to do
            parts = [(source, [site]) for source, sites in groups.items() for site in sites]
        else:
            parts = [(source, sites) for source, sites in groups.items()]
        tasks = [partial(quantized, stage, source, sites, self.method) for source, sites in parts]
        costs = [sum(site.shape[0] * site.shape[1] ** 2 for site in sites) for _, sites in parts]
        with _begun_early(tasks if stage.execution.process_group.size == 1 else []) as begun:
            results = stage.execution.process_group.parallel_map(begun or tasks, costs)
        for (_, sites), made in zip(parts, results, strict=True):
            for site, new in zip(sites, made, strict=True):
                changed |= site.weight is None or not _same(site.weight, new)
                site.weight = new
        return changed


@contextmanager
def _begun_early(tasks: Sequence[Callable[[], T]]) -> Iterator[list[Callable[[], T]]]:
    """The tasks, to be waited for: some parts of each keep one thread busy only, so the next one has begun by then."""
    with single_threads(), ThreadPoolExecutor(GROUPS_AT_ONCE, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield [future.result for future in [pool.submit(torch.no_grad()(task)) for task in tasks]]


def quantized(stage: Stage, source: str, sites: Sequence[Site], method: str) -> list[WeightQuantization]:
    """The weights of quantized sites that read one node, each as its scheme stores it, by one of the pass's methods."""
    if not sites or method == "round" or (method == "auto" and source not in stage.observations):
        return [rounded(stage, site) for site in sites]
    seen = observed(stage, source, QuantizeWeights.name)
    importance = importance_of(seen.second_moment())
    grids = [grid_of(stage, site, importance) for site in sites]
    if method == "clip":
        integers = [grid.nearest() for grid in grids]
    else:
        weights = [stage.linear(site).weight for site in sites]
        integers = compensated(weights, grids, seen.kept, seen.row_weight(), importance)
    return [WeightQuantization(it, *grid.scales()) for it, grid in zip(integers, grids, strict=True)]


def rounded(stage: Stage, site: Site) -> WeightQuantization:
    """The weight of a quantized site, every element at its nearest step, and no step smaller than covers a row."""
    weight = stage.linear(site).weight
    if site.scheme == Scheme.W4A8_DYNAMIC:
        return WeightQuantization(*quantize_weight_per_group_absmax(weight, group_size(stage, site), stage.dtype))
    if site.scheme == Scheme.W8A8_DYNAMIC:
        return WeightQuantization(*quantize_weight_per_channel_absmax(weight, scale_dtype=stage.dtype))
    return WeightQuantization(*quantize_weight_per_channel_absmax(weight, smallest_scale(stage, site)))


def grid_of(stage: Stage, site: Site, importance: Tensor) -> RowGrid | GroupGrid:
    """What the weight of a quantized site may be rounded to; scales are values of the dtype that engines read."""
    weight = stage.linear(site).weight
    if site.scheme == Scheme.W4A8_DYNAMIC:
        return GroupGrid(weight, importance, group_size(stage, site), stage.dtype)
    if site.scheme == Scheme.W8A8_DYNAMIC:
        return RowGrid(weight, importance, None, stage.dtype)
    return RowGrid(weight, importance, smallest_scale(stage, site), torch.float32)


def group_size(stage: Stage, site: Site) -> int:
    if site.group_size is None:
        fix = "let assign-precision choose the scheme"
        raise UserError(Fault(f"{site.name} has no group size", stage.name, fix=fix))
    return site.group_size


def smallest_scale(stage: Stage, site: Site) -> Tensor | None:
    """float32 [N, 1]: the scales of a static site from which on its bias fits into int32; None where any does."""
    bias = emitted_bias(stage, site)
    if site.input is None or bias is None:
        return None
    return smallest_weight_scale_for_bias(bias, site.input.scale, stage.linear(site).in_features)


def emitted_bias(stage: Stage, site: Site) -> Tensor | None:
    """The bias float32 [N] as it is stored, that is rounded to the stage's dtype, or None: what quant_bias is made of.

    One that the layer gained from a pass is stored nowhere else, so it is not rounded.
    """
    bias = stage.linear(site).bias
    if bias is None or site.added_bias:
        return None if bias is None else bias.detach().float()
    return bias.detach().to(stage.dtype).float()


def _same(one: WeightQuantization, other: WeightQuantization) -> bool:
    pairs = zip(one.tensors(), other.tensors(), strict=False)
    return len(one.tensors()) == len(other.tensors()) and all(torch.equal(left, right) for left, right in pairs)
