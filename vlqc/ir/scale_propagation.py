"""Scale propagation: which linear layers can absorb a per-channel scale of which producer, from the recorded graph.

For each producer (a norm or a Linear) an integer label tensor is propagated through the graph. A label i >= 0 means
that the element is linear in channel i's scale, -1 that it does not depend on it. Layout operations are executed on the
labels themselves, products with an independent tensor keep them, attention keeps those of its values; any other
operation makes the channels that it reads unusable. The labels at the input of a Linear, one per column, form an edge
with its exact column-to-channel map, which covers grouped-query repetition, the v third of a fused qkv, and merged
patches.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from vlqc.ir.label_propagation import (
    ATTENTION,
    MATRIX_PRODUCT,
    PRODUCT,
    QUOTIENT,
    SUM,
    LabelPropagation,
    Rule,
    equal_rows,
    operands,
    without_copies,
)
from vlqc.ir.stage import Edge


def find_edges(module: nn.Module, graph: fx.Graph) -> tuple[Edge, ...]:
    """Returns all foldable edges of a recorded stage, in graph order.

    `passes.algorithms.folding.apply_folds` verifies every fold on the probe.
    """
    called = Counter(node.target for node in graph.nodes if node.op == "call_module")
    edges = []
    for node in graph.nodes:
        if node.op != "call_module" or called[node.target] != 1:
            continue
        producer, shape = module.get_submodule(str(node.target)), node.meta.get("shape")
        if shape and (isinstance(producer, nn.Linear) or scales_its_channels(producer, shape[-1])):
            edge = _Propagation(module, graph, node, called).edge()
            if edge is not None:
                edges.append(edge)
    return tuple(edges)


def scales_its_channels(module: nn.Module, channels: int) -> bool:
    """Whether a module has the parameters of a norm: a weight and at most a bias, one value per output channel."""
    parameters = dict(module.named_parameters(recurse=False))
    has_names = "weight" in parameters and set(parameters) <= {"weight", "bias"}
    return has_names and all(parameter.shape == (channels,) for parameter in parameters.values())


class _Propagation(LabelPropagation):
    """Propagates the labels of one producer.

    unusable: bool [C], channels read by an operation without a rule; columns: per Linear target the
    labels of its input columns, int64 [K].
    """

    def __init__(self, module: nn.Module, graph: fx.Graph, producer: fx.Node, called: Counter[Any]) -> None:
        super().__init__(module, graph)
        self.producer, self.called = producer, called
        shape = producer.meta["shape"]
        self.labels[producer] = torch.arange(shape[-1], dtype=self.label_dtype).expand(shape)
        self.unusable = torch.zeros(shape[-1], dtype=torch.bool)
        self.columns: dict[str, Tensor] = {}

    def rules(self) -> Iterable[tuple[frozenset[str], Rule]]:
        yield from super().rules()
        yield PRODUCT | QUOTIENT, self._product
        yield SUM, self._sum
        yield ATTENTION, self._attention
        yield MATRIX_PRODUCT, self._matrix_product

    def edge(self) -> Edge | None:
        readers = set(self.producer.users)
        for node in self.graph.nodes:
            if node in readers:
                result = self.step(node)
                if result is not None:
                    self.labels[node] = result
                    readers.update(node.users)
        consumers, foldable = {}, torch.zeros_like(self.unusable)
        for target, columns in self.columns.items():
            usable = (columns >= 0) & ~self.unusable[columns.clamp(min=0)]
            if usable.any():
                consumers[target] = torch.where(usable, columns, -1)
                foldable[columns[usable]] = True
        return Edge(str(self.producer.target), foldable, consumers) if consumers else None

    def exclude(self, *values: Any) -> None:
        for labels in tree_flatten(values)[0]:
            if isinstance(labels, Tensor):
                labels = without_copies(labels)
                self.unusable[labels[labels >= 0].long()] = True

    def enter_module(self, node: fx.Node, sources: list[fx.Node]) -> None:
        target, labels = str(node.target), self.labels[sources[0]]
        rows = labels.reshape(-1, labels.shape[-1])
        linear = isinstance(self.module.get_submodule(target), nn.Linear)
        if linear and self.called[target] == 1 and equal_rows(rows):
            self.columns[target] = rows[0].long()
        else:
            self.exclude(*(self.labels[source] for source in sources))

    def _product(self, node: fx.Node, name: str) -> Any:
        left, right = (self.labels_of(value) for value in operands(node))
        if (left is None) == (right is None) or (name in QUOTIENT and right is not None):
            return self.exclude(left, right)
        return (right if left is None else left).expand(node.meta["shape"])

    def _sum(self, node: fx.Node, name: str) -> Any:
        left, right = (self.labels_of(value) for value in operands(node))
        if left is not None and right is not None and left.shape == right.shape and bool((left == right).all()):
            return left
        return self.exclude(left, right)

    def _attention(self, node: fx.Node, name: str) -> Any:
        named = dict(zip(("query", "key", "value", "attn_mask"), node.args, strict=False)) | node.kwargs
        self.exclude(*(self.labels_of(named.get(part)) for part in ("query", "key", "attn_mask")))
        values = self.labels_of(named["value"])
        if values is None or not equal_rows(values):
            return self.exclude(values)
        values = values[..., :1, :]
        if named.get("enable_gqa"):
            query = named["query"]
            assert isinstance(query, fx.Node)
            values = values.repeat_interleave(query.meta["shape"][-3] // values.shape[-3], -3)
        return values.expand(node.meta["shape"])

    def _matrix_product(self, node: fx.Node, name: str) -> Any:
        left, right = (self.labels_of(value) for value in operands(node))
        self.exclude(left)  # summed over its columns
        if right is None or right.ndim < 2 or len(node.meta["shape"]) < 2 or not equal_rows(right):
            return self.exclude(right)
        return right[..., :1, :].expand(node.meta["shape"])
