"""lower-cache: let attention read quantized keys and values."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, fx

from vlqc.ir.stage import CacheSite, Stage
from vlqc.kernels_ref.attention import attention_arguments
from vlqc.kernels_ref.kv_cache import QuantizedCacheAttention, round_cache
from vlqc.pipeline.pass_api import Pass


@dataclass(frozen=True)
class LowerCache(Pass):
    """Wraps the attention modules whose cache is quantized, and rounds keys and values in the graph.

    Keys and values that the attention module repeats for the heads of the query are rounded after that.
    """

    name: ClassVar[str] = "lower-cache"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "rewrite"
    summary: ClassVar[str] = "let attention read quantized keys and values"
    after: ClassVar[tuple[str, ...]] = ("quantize-cache",)
    before: ClassVar[tuple[str, ...]] = ("propagate-quantized",)

    def run(self, stage: Stage) -> bool:
        sites = [site for site in stage.caches.values() if site.is_quantized and not stage.is_lowered_cache(site)]
        for site in sites:
            scales = site.scales()
            attention = stage.module.get_submodule(site.target)
            wrapper = QuantizedCacheAttention(attention, scales["key_scale"], scales["value_scale"], site.heads)
            stage.module.set_submodule(site.target, wrapper)
            _rewrite(stage, site, scales)
        return bool(sites)


def _rewrite(stage: Stage, site: CacheSite, scales: dict[str, Tensor]) -> None:
    """Puts a rounding of keys and of values before the attention call of a site."""
    node = stage.node(site.node)
    arguments = attention_arguments(node.args, node.kwargs)
    for name, scale in scales.items():
        part = name.removesuffix("_scale")
        with stage.graph.inserting_before(node):
            constant = stage.graph.create_node("get_attr", f"{site.name}.{name}", name=name)
            constant.meta.update(constant=scale, path=None, shape=tuple(scale.shape), dtype=scale.dtype)
            rounded: fx.Node = stage.graph.call_function(round_cache, (arguments[part], constant, site.heads))
            rounded.meta.update(shape=arguments[part].meta["shape"], dtype=arguments[part].meta["dtype"])
        arguments[part] = rounded
    positional = [arguments.pop(name) for name in ("query", "key", "value")]
    node.args, node.kwargs = tuple(positional), arguments
