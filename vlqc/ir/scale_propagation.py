"""Scale propagation: which linear layers can absorb a per-channel scale of which producer, from the recorded graph.

For each producer (a norm or a Linear) an integer label tensor is propagated through the graph. A label i >= 0 means
that the element is linear in channel i's scale, -1 that it does not depend on it. Layout operations are executed on the
labels themselves, products with an independent tensor keep them, attention keeps those of its values; any other
operation makes the channels that it reads unusable. The labels at the input of a Linear, one per column, form an edge
with its exact column-to-channel map, which covers grouped-query repetition, the v third of a fused qkv, and merged
patches.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map

from vlqc.ir.stage import Edge

LAYOUT = frozenset(
    "view reshape transpose permute unbind chunk split split_with_sizes expand expand_as contiguous clone unsqueeze "
    "squeeze flatten unflatten movedim swapaxes swapdims t __getitem__ getitem narrow select repeat repeat_interleave "
    "tile detach view_as reshape_as index_select hsplit tensor_split getattr".split()
)
PASS_THROUGH = frozenset("to float double half bfloat16 type_as type neg __neg__ dropout alias".split())
PRODUCT = frozenset("mul __mul__ __rmul__ multiply mul_ __imul__".split())
QUOTIENT = frozenset("div __truediv__ true_divide divide div_ __itruediv__".split())
SUM = frozenset("add __add__ __radd__ add_ __iadd__ sub __sub__".split())
IN_PLACE = frozenset("mul_ __imul__ div_ __itruediv__ add_ __iadd__".split())
LIKE_ANOTHER = frozenset("expand_as view_as reshape_as".split())  # use the other tensor only for its shape
READ_NO_VALUES = frozenset(
    "observe zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty".split()
)
MATRIX_PRODUCT = frozenset("matmul __matmul__ bmm".split())


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


def _operands(node: fx.Node) -> tuple[Any, Any]:
    """The two operands of an arithmetic operation, positional or by keyword."""
    left, right = [*node.args, *(node.kwargs[name] for name in ("input", "other", "mat2") if name in node.kwargs)][:2]
    return left, right


def _keeps_last(node: fx.Node, dimensions: int) -> bool:
    """Whether indexing by a tensor leaves the last of `dimensions` dimensions unchanged."""
    if node.target is torch.Tensor.index_select or node.target is torch.index_select:
        dim = node.kwargs["dim"] if "dim" in node.kwargs else node.args[1]
        return isinstance(dim, int) and dim % dimensions != dimensions - 1
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    indexed = 0
    for number, part in enumerate(index):
        if part is Ellipsis and number + 1 < len(index):
            return False
        if isinstance(part, fx.Node) and part.meta["dtype"] == torch.bool:
            indexed += len(part.meta["shape"])
        elif part is not None and part is not Ellipsis:
            indexed += 1
    return indexed < dimensions


def _without_copies(labels: Tensor) -> Tensor:
    """Labels without the copies that `expand` makes along a dimension, of which there may be one per token."""
    for dimension, stride in enumerate(labels.stride()):
        if stride == 0 and labels.shape[dimension] > 1:
            labels = labels.narrow(dimension, 0, 1)
    return labels


class _Propagation:
    """Propagates the labels of one producer.

    labels: per node; unusable: bool [C], channels read by an operation without a rule; columns: per Linear target the
    labels of its input columns, int64 [K].
    """

    def __init__(self, module: nn.Module, graph: fx.Graph, producer: fx.Node, called: Counter[Any]) -> None:
        self.module, self.graph, self.producer, self.called = module, graph, producer, called
        shape = producer.meta["shape"]
        self.labels: dict[fx.Node, Any] = {producer: torch.arange(shape[-1], dtype=torch.int32).expand(shape)}
        self.unusable = torch.zeros(shape[-1], dtype=torch.bool)
        self.columns: dict[str, Tensor] = {}

    def edge(self) -> Edge | None:
        readers = set(self.producer.users)
        for node in self.graph.nodes:
            if node in readers:
                result = self._step(node)
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

    def _exclude(self, *values: Any) -> None:
        for labels in tree_flatten(values)[0]:
            if isinstance(labels, Tensor):
                labels = _without_copies(labels)
                self.unusable[labels[labels >= 0].long()] = True

    def _replace_nodes(self, value: Any) -> Any:
        """Replaces nodes by their labels."""
        return tree_map(lambda leaf: self.labels.get(leaf) if isinstance(leaf, fx.Node) else leaf, value)

    def _labels(self, value: Any) -> Any:
        return self.labels.get(value) if isinstance(value, fx.Node) else None

    def _step(self, node: fx.Node) -> Any:
        """Returns the labels of a node's value, or None if it carries none."""
        sources = [source for source in node.all_input_nodes if source in self.labels]
        if node.op == "call_module":
            return self._enter_module(node, sources)
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_function" and name in READ_NO_VALUES:
            return None
        for names, rule in self._rules:
            if node.op == "call_function" and name in names and self._keeps_scales(node, name):
                return rule(self, node, name)
        self._exclude(*(self.labels[source] for source in sources))
        return None

    @staticmethod
    def _equal_rows(rows: Tensor) -> bool:
        rows = _without_copies(rows)
        return bool((rows == rows[..., :1, :]).all())

    def _keeps_scales(self, node: fx.Node, name: str) -> bool:
        """Whether a call neither rounds, nor reinterprets bits, nor writes to a tensor whose views have no labels."""
        if node.kwargs.get("rounding_mode") is not None or "out" in node.kwargs:
            return False
        if name in IN_PLACE and self._labels(node.args[0]) is None:  # existing views of the target have no labels
            return False
        reinterprets = name == "view" and any(isinstance(leaf, torch.dtype) for leaf in tree_flatten(node.args)[0])
        return not reinterprets and node.meta.get("dtype", torch.float32).is_floating_point

    def _enter_module(self, node: fx.Node, sources: list[fx.Node]) -> None:
        target, labels = str(node.target), self.labels[sources[0]]
        rows = labels.reshape(-1, labels.shape[-1])
        linear = isinstance(self.module.get_submodule(target), nn.Linear)
        if linear and self.called[target] == 1 and self._equal_rows(rows):
            self.columns[target] = rows[0].long()
        else:
            self._exclude(*(self.labels[source] for source in sources))

    def _layout(self, node: fx.Node, name: str) -> Any:
        first, *others = node.all_input_nodes
        if name in LIKE_ANOTHER:
            shape = node.meta["shape"]
            return getattr(self.labels[first], name.removesuffix("_as"))(shape) if first in self.labels else None
        if any(other not in self.labels for other in others) or first not in self.labels:
            return self._gather(node, name)
        args, kwargs = tree_map(
            lambda leaf: leaf.contiguous() if isinstance(leaf, Tensor) else leaf,
            self._replace_nodes((node.args, node.kwargs)),
        )
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _gather(self, node: fx.Node, name: str) -> Any:
        """Indexing by a tensor keeps labels only if all rows are equal, as the selected rows are unknown."""
        first = node.all_input_nodes[0]
        labels = self.labels.get(first)
        if labels is not None and name in ("__getitem__", "index_select") and _keeps_last(node, labels.ndim):
            rows = labels.reshape(-1, labels.shape[-1])
            if self._equal_rows(rows):
                return rows[0].expand(node.meta["shape"])
        return self._exclude(*(self._labels(source) for source in node.all_input_nodes))

    def _keep(self, node: fx.Node, name: str) -> Any:
        return self.labels.get(node.all_input_nodes[0])

    def _product(self, node: fx.Node, name: str) -> Any:
        left, right = (self._labels(value) for value in _operands(node))
        if (left is None) == (right is None) or (name in QUOTIENT and right is not None):
            return self._exclude(left, right)
        return (right if left is None else left).expand(node.meta["shape"])

    def _sum(self, node: fx.Node, name: str) -> Any:
        left, right = (self._labels(value) for value in _operands(node))
        if left is not None and right is not None and left.shape == right.shape and bool((left == right).all()):
            return left
        return self._exclude(left, right)

    def _attention(self, node: fx.Node, name: str) -> Any:
        named = dict(zip(("query", "key", "value", "attn_mask"), node.args, strict=False)) | node.kwargs
        self._exclude(*(self._labels(named.get(part)) for part in ("query", "key", "attn_mask")))
        values = self._labels(named["value"])
        if values is None or not self._equal_rows(values):
            return self._exclude(values)
        values = values[..., :1, :]
        if named.get("enable_gqa"):
            query = named["query"]
            assert isinstance(query, fx.Node)
            values = values.repeat_interleave(query.meta["shape"][-3] // values.shape[-3], -3)
        return values.expand(node.meta["shape"])

    def _matrix_product(self, node: fx.Node, name: str) -> Any:
        left, right = (self._labels(value) for value in _operands(node))
        self._exclude(left)  # summed over its columns
        if right is None or right.ndim < 2 or len(node.meta["shape"]) < 2 or not self._equal_rows(right):
            return self._exclude(right)
        return right[..., :1, :].expand(node.meta["shape"])

    def _concatenate(self, node: fx.Node, name: str) -> Any:
        arguments: list[Any] = list(node.args) or [node.kwargs["tensors"]]
        parts, *dim = arguments
        options: Any = {key: value for key, value in node.kwargs.items() if key != "tensors"}
        labels = [
            self.labels[part] if part in self.labels else torch.full(part.meta["shape"], -1, dtype=torch.int32)
            for part in parts
        ]
        return torch.cat(labels, *dim, **options)

    _rules: tuple[tuple[frozenset[str], Callable[["_Propagation", fx.Node, str], Any]], ...] = (
        (LAYOUT, _layout),
        (PASS_THROUGH, _keep),
        (PRODUCT | QUOTIENT, _product),
        (SUM, _sum),
        (frozenset({"scaled_dot_product_attention"}), _attention),
        (MATRIX_PRODUCT, _matrix_product),
        (frozenset({"cat"}), _concatenate),
    )
