"""quantize-cache: choose the scales of cached keys and values, and the layers whose cache stays in float.

The first error from quantized keys and values appears in decoding, with a cached prefix, and in the chunks of a long
prompt after the first. Here all keys and values are quantized in every call, which is the largest error that can occur.
"""

import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from vlqc.errors import Fault, UserError
from vlqc.ir.cache_analysis import find_caches
from vlqc.ir.stage import CacheSite, Stage
from vlqc.passes.algorithms.cache_scales import CacheScales, choose_head_scales, join_scales
from vlqc.pipeline.pass_api import Pass, require
from vlqc.targets.cache_schemes import CacheScheme

OBSERVED_BY = "insert-observers{caches=true}"


@dataclass(frozen=True)
class QuantizeCache(Pass):
    """Sets scheme and scales of the keys and values of decoder layers.

    scheme: the cache scheme of all layers.
    min_sqnr: dB; a layer stays in float if its attention's output would have a lower signal-to-noise ratio. With the
        weights of SmolLM2-135M, whose layers have 27 to 46 dB, the perplexity grows by 0.2 %. Large biases of the keys,
        like those of Qwen2.5, take up the range of a channel: with 50 in the channels that the rotary embedding hardly
        rotates it is 21 to 43 dB and 0.8 %, with 200 it is 12 to 35 dB, below 20 dB in 16 of 30 layers.
    search: whether scales cover less or more than the largest observed magnitudes, where that reduces the error on
        samples held out; see `vlqc/passes/algorithms/cache_scales.py`. It gains up to 2 dB of the logits on other
        samples than those of the calibration.
    """

    name: ClassVar[str] = "quantize-cache"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    summary: ClassVar[str] = "choose scales of cached keys and values by the error of the attention's output"
    after: ClassVar[tuple[str, ...]] = ("insert-observers",)
    before: ClassVar[tuple[str, ...]] = ("lower-cache",)

    scheme: CacheScheme = CacheScheme.C8
    min_sqnr: float = 20.0
    search: bool = True

    def __post_init__(self) -> None:
        require(self.scheme in tuple(CacheScheme), f"scheme must be one of {', '.join(CacheScheme)}")
        object.__setattr__(self, "scheme", CacheScheme(self.scheme))
        require(not math.isnan(self.min_sqnr), "min_sqnr must be a number")

    def run(self, stage: Stage) -> bool:
        if not stage.caches and find_caches(stage).caches:
            why = f"nothing was observed at the attention of {stage.name}"
            raise UserError(Fault(f"{self.name} needs observations", "--pipeline", why, f"put {OBSERVED_BY} before it"))
        scheme, before = self.scheme, _state(stage)
        tasks = [
            partial(
                choose_head_scales,
                stage.cache_observations[name],
                site.heads,
                head,
                scheme.spec.largest,
                stage.dtype,
                search=self.search,
            )
            for name, site in stage.caches.items()
            for head in range(site.heads)
        ]
        chosen = iter(stage.execution.process_group.parallel_map(tasks))
        for site in stage.caches.values():
            self._assign(site, join_scales(list(itertools.islice(chosen, site.heads))), scheme)
        return _state(stage) != before

    def _assign(self, site: CacheSite, scales: CacheScales, scheme: CacheScheme) -> None:
        site.sqnr = round(scales.sqnr, 2)  # the last digits depend on the processor
        if site.sqnr >= self.min_sqnr:
            site.scheme, site.reason = scheme, ""
            site.key_scale, site.value_scale = scales.key, scales.value
        else:
            site.scheme, site.reason = None, f"less than {self.min_sqnr:g} dB"
            site.key_scale = site.value_scale = None


def _state(stage: Stage) -> list[tuple[object, ...]]:
    """A value that is equal for equal scales."""
    return [
        (site.scheme, site.reason, site.sqnr, *(scale.tolist() for scale in site.scales().values()))
        for site in stage.caches.values()
    ]
