"""Finds the keys and values of a decoder layer that an engine caches, from the recorded graph.

The inputs of an attention call are followed back to the linear layers that they come from. Labels of the outputs of
these layers are then propagated to the call: for keys the number of the head, because a rotary embedding mixes channels
of a head, for values the channel. They show how many key-value heads there are before these are repeated for the heads
of the query, and that the model computes with them as engines do.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from vlqc.families.layer_names import layer_pattern, matches_any
from vlqc.ir.label_propagation import PRODUCT, QUOTIENT, SUM, LabelPropagation, Rule, operands
from vlqc.ir.scale_propagation import scales_its_channels
from vlqc.ir.stage import CacheSite, Site, Stage
from vlqc.kernels_ref.attention import ATTENTION, attention_arguments


@dataclass(frozen=True)
class FoundCaches:
    """caches: by name of the attention module; obstacles: why keys and values of others cannot be quantized; partners:
    by name, see `rotary_partners`."""

    caches: dict[str, CacheSite]
    obstacles: tuple[str, ...] = ()
    partners: Mapping[str, Tensor] = field(default_factory=dict)


def find_caches(stage: Stage) -> FoundCaches:
    """The cached keys and values of a stage; nothing for stages without the projections that the family names."""
    sites = {site.target: site for site in stage.sites.values()}
    if stage.family.in_vision_tower(stage.name) or not _projections(stage, sites.values()):
        return FoundCaches({})
    caches, obstacles = dict[str, CacheSite](), list[str]()
    partners = dict[str, Tensor]()

    def leave_out(name: str, reason: str) -> None:
        layers = layer_pattern(f"{name}.").removesuffix(".")  # one text for all layers
        obstacles.append(f"the keys and values of {layers} are not quantized: {reason}")

    nodes = [node for node in stage.graph.nodes if node.target is ATTENTION]
    for node in nodes:
        found = _cache_at(stage, node, sites)
        if isinstance(found, str):
            leave_out(stage.name, found)
        elif found.name in caches:
            leave_out(found.name, "it computes attention twice")
            del caches[found.name]
        else:
            caches[found.name] = found
            partners[found.name] = rotary_partners(stage, node, found)
    if not nodes:
        leave_out(stage.name, "their attention is not computed by scaled_dot_product_attention")
    return FoundCaches(caches, tuple(obstacles), partners)


def rotary_partners(stage: Stage, node: fx.Node, cache: CacheSite) -> Tensor:
    """int64 [C]: the channel of the keys with which the rotary embedding rotates each channel, by an angle that depends
    on the position; the channel itself where none is known.

    node: of the attention call.
    """
    sites = {site.target: site for site in stage.sites.values()}
    keys = attention_arguments(node.args, node.kwargs)["key"]
    ((_, call),) = _origins(keys, sites)
    propagation = _PartnerPropagation(stage.module, stage.graph, cache.channels)
    propagation.run(call, torch.arange(cache.channels))
    partners = propagation.partners
    mutual = partners[partners] == torch.arange(cache.channels)
    own_head = partners // cache.head_size == torch.arange(cache.channels) // cache.head_size
    return torch.where(mutual & own_head, partners, torch.arange(cache.channels))


def _projections(stage: Stage, sites: Iterable[Site]) -> list[Site]:
    return [site for site in sites if matches_any(site.name, stage.family.key_value)]


def _cache_at(stage: Stage, node: fx.Node, sites: dict[str, Site]) -> CacheSite | str:
    """The keys and values that an attention call reads, or why they are not quantized."""
    arguments = attention_arguments(node.args, node.kwargs)
    projections = list[tuple[Site, fx.Node, fx.Node]]()  # the layer, its call, the argument
    for name, pattern in zip(("key", "value"), stage.family.key_value, strict=True):
        origins = _origins(arguments[name], sites)
        if len(origins) != 1:
            layers = ", ".join(layer_pattern(site.name) for site, _ in origins) or "no linear layer"
            return f"the {name}s come from {layers}"
        ((site, call),) = origins
        if not matches_any(site.name, (pattern,)):
            return f"the {name}s come from {layer_pattern(site.name)}"
        projections.append((site, call, arguments[name]))
    (key, key_call, keys), (value, value_call, values) = projections
    size = int(keys.meta["shape"][-1])
    if key.shape[0] != value.shape[0] or key.shape[0] % size or values.meta["shape"][-1] != size:
        return f"keys have {key.shape[0]} channels in heads of {size}, and values {value.shape[0]}"
    channels = torch.arange(key.shape[0])
    labels = _labels_at(stage, key_call, channels // size, keys)
    if not _is_in_heads(labels, key.shape[0], size, per_channel=False):
        return "what happens to the keys between their projection and the attention is not known"
    labels = _labels_at(stage, value_call, channels, values)
    if not _is_in_heads(labels, key.shape[0], size, per_channel=True):
        return "what happens to the values between their projection and the attention is not known"
    target = _common_parent(key.target, value.target)
    if not target:
        return "the projections of keys and values are in different modules"
    name = stage.checkpoint_name(target)
    return CacheSite(name, target, key.name, value.name, node.name, key.shape[0] // size, size)


def _origins(value: Any, sites: dict[str, Site]) -> list[tuple[Site, fx.Node]]:
    """The linear layers from which a value is computed without another one in between, with their calls."""
    found, stack, seen = [], [value], set[fx.Node]()
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.op == "call_module" and str(node.target) in sites:
            found.append((sites[str(node.target)], node))
        else:
            stack += node.all_input_nodes
    return found


def _common_parent(first: str, second: str) -> str:
    parts = zip(first.split(".")[:-1], second.split(".")[:-1], strict=False)
    common = []
    for one, other in parts:
        if one != other:
            break
        common.append(one)
    return ".".join(common)


# ---- labels ----------------------------------------------------------------------------------------------------------


def _labels_at(stage: Stage, producer: fx.Node, labels: Tensor, consumer: fx.Node) -> Any:
    """Labels of `consumer` if the channels of `producer` have the labels [channels]; None without any."""
    propagation = _Propagation(stage.module, stage.graph)
    propagation.run(producer, labels)
    return propagation.labels.get(consumer)


def _is_in_heads(labels: Any, channels: int, size: int, *, per_channel: bool) -> bool:
    """Whether head h of [..., heads, S, size] has the labels of key-value head h // group in every row."""
    if not isinstance(labels, Tensor) or labels.ndim < 3 or labels.shape[-1] != size:
        return False
    heads, kv_heads = labels.shape[-3], channels // size
    if heads % kv_heads:
        return False
    numbers = torch.arange(kv_heads).repeat_interleave(heads // kv_heads)[:, None, None]
    expected = numbers * size + torch.arange(size) if per_channel else numbers
    return bool((labels == expected).all())


class _Propagation(LabelPropagation):
    """Propagates labels through layout operations, sums and products of values with equal labels, and norms.

    derived: the nodes whose values depend on the producer, with labels or without.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph)
        self.derived: set[fx.Node] = set()

    def run(self, producer: fx.Node, labels: Tensor) -> None:
        """Propagates the labels [channels] of `producer` through the graph."""
        self.labels[producer] = labels.int().expand(producer.meta["shape"])
        self.derived.add(producer)
        for node in self.graph.nodes:
            if any(read in self.derived for read in node.all_input_nodes):
                self.derived.add(node)
                if any(read in self.labels for read in node.all_input_nodes):
                    result = self.step(node)
                    if result is not None:
                        self.labels[node] = result

    def rules(self) -> Iterable[tuple[frozenset[str], Rule]]:
        yield from super().rules()
        yield PRODUCT | QUOTIENT | SUM, self._combine

    def exclude(self, *values: Any) -> None:
        pass

    def enter_module(self, node: fx.Node, sources: list[fx.Node]) -> Any:
        module, labels = self.module.get_submodule(str(node.target)), self.labels[sources[0]]
        if isinstance(module, nn.Identity | nn.Dropout):
            return labels
        is_norm = scales_its_channels(module, labels.shape[-1]) and node.meta.get("shape") == tuple(labels.shape)
        return labels if is_norm and bool((labels == labels[..., :1]).all()) else None

    def _combine(self, node: fx.Node, name: str) -> Any:
        left, right = (self.labels_of(value) for value in operands(node))
        shape = node.meta["shape"]
        if any(value in self.derived and value not in self.labels for value in node.all_input_nodes):
            return None
        if left is None or right is None:
            return (right if left is None else left).expand(shape)
        same = left.ndim == right.ndim == len(shape) and bool((left == right).all())
        return left.expand(shape) if same else None


class _PartnerPropagation(_Propagation):
    """Propagates channels, and finds which two of them a rotary embedding adds.

    partners: int64 [channels], the other channel of a sum; the channel itself where no sum adds two.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph, channels: int) -> None:
        super().__init__(module, graph)
        self.partners = torch.arange(channels)

    def enter_module(self, node: fx.Node, sources: list[fx.Node]) -> Any:
        module, labels = self.module.get_submodule(str(node.target)), self.labels[sources[0]]
        keeps = isinstance(module, nn.Identity | nn.Dropout) or scales_its_channels(module, labels.shape[-1])
        return labels if keeps and node.meta.get("shape") == tuple(labels.shape) else None

    def _combine(self, node: fx.Node, name: str) -> Any:
        left, right = (self.labels_of(value) for value in operands(node))
        if left is None or right is None or name not in SUM or left.shape != right.shape:
            return super()._combine(node, name)
        self.partners[left.flatten().long()] = right.flatten().long()
        return left.expand(node.meta["shape"])
