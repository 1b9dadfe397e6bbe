"""Propagation of channel labels through the recorded graph of a module: from which channel every element comes.

Every value may carry an integer tensor of its shape, the labels of its elements; -1 marks elements without a label.
Layout operations are executed on the labels themselves. `LabelPropagation` implements them; subclasses define what
arithmetic, attention and modules do to labels.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map

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
CONCATENATION = frozenset({"cat"})
ATTENTION = frozenset({"scaled_dot_product_attention"})
NO_LABEL = -1

Rule = Callable[[fx.Node, str], Any]  # (node, name of its operation) -> labels of its value, None without any


def operands(node: fx.Node) -> tuple[Any, Any]:
    """The two operands of an arithmetic operation, positional or by keyword."""
    left, right = [*node.args, *(node.kwargs[name] for name in ("input", "other", "mat2") if name in node.kwargs)][:2]
    return left, right


def keeps_last(node: fx.Node, dimensions: int) -> bool:
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
    return indexed < dimensions or (indexed == dimensions and index[-1] == slice(None))


def without_copies(labels: Tensor) -> Tensor:
    """Labels without the copies that `expand` makes along a dimension, of which there may be one per token."""
    for dimension, stride in enumerate(labels.stride()):
        if stride == 0 and labels.shape[dimension] > 1:
            labels = labels.narrow(dimension, 0, 1)
    return labels


def equal_rows(labels: Tensor) -> bool:
    """Whether the labels along the last dimension are the same at every position of the dimension before it."""
    labels = without_copies(labels)
    return bool((labels == labels[..., :1, :]).all())


class LabelPropagation:
    """Propagates labels through a graph, node by node.

    labels: per node with labels, of the shape of its value, in `label_dtype`.
    """

    label_dtype = torch.int32

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.module, self.graph = module, graph
        self.labels: dict[fx.Node, Any] = {}

    def exclude(self, *values: Any) -> None:
        """Called with the labels that an operation without a rule reads."""
        raise NotImplementedError

    def enter_module(self, node: fx.Node, sources: list[fx.Node]) -> Any:
        """Labels of the output of a leaf module; sources: its inputs that have labels."""
        raise NotImplementedError

    def rules(self) -> Iterable[tuple[frozenset[str], Rule]]:
        """(names of operations, what they do to labels); the first that contains a name applies."""
        return (LAYOUT, self.layout), (PASS_THROUGH, self.keep), (CONCATENATION, self.concatenate)

    def replace_nodes(self, value: Any) -> Any:
        """Replaces nodes by their labels."""
        return tree_map(lambda leaf: self.labels.get(leaf) if isinstance(leaf, fx.Node) else leaf, value)

    def labels_of(self, value: Any) -> Any:
        return self.labels.get(value) if isinstance(value, fx.Node) else None

    def step(self, node: fx.Node) -> Any:
        """Returns the labels of a node's value, or None if it carries none."""
        sources = [source for source in node.all_input_nodes if source in self.labels]
        if node.op == "call_module":
            return self.enter_module(node, sources)
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_function" and name in READ_NO_VALUES:
            return None
        for names, rule in self.rules():
            if node.op == "call_function" and name in names and self.keeps_labels(node, name):
                return rule(node, name)
        self.exclude(*(self.labels[source] for source in sources))
        return None

    def keeps_labels(self, node: fx.Node, name: str) -> bool:
        """Whether a call neither rounds, nor reinterprets bits, nor writes to a tensor whose views have no labels."""
        if node.kwargs.get("rounding_mode") is not None or "out" in node.kwargs:
            return False
        if name in IN_PLACE and self.labels_of(node.args[0]) is None:  # existing views of the target have no labels
            return False
        reinterprets = name == "view" and any(isinstance(leaf, torch.dtype) for leaf in tree_flatten(node.args)[0])
        return not reinterprets and node.meta.get("dtype", torch.float32).is_floating_point

    def layout(self, node: fx.Node, name: str) -> Any:
        first, *others = node.all_input_nodes
        if name in LIKE_ANOTHER:
            shape = node.meta["shape"]
            return getattr(self.labels[first], name.removesuffix("_as"))(shape) if first in self.labels else None
        if any(other not in self.labels for other in others) or first not in self.labels:
            return self.gather(node, name)
        args, kwargs = tree_map(
            lambda leaf: leaf.contiguous() if isinstance(leaf, Tensor) else leaf,
            self.replace_nodes((node.args, node.kwargs)),
        )
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def gather(self, node: fx.Node, name: str) -> Any:
        """Indexing by a tensor keeps labels only if all rows are equal, as the selected rows are unknown."""
        first = node.all_input_nodes[0]
        labels = self.labels.get(first)
        if labels is not None and name in ("__getitem__", "index_select") and keeps_last(node, labels.ndim):
            rows = labels.reshape(-1, labels.shape[-1])
            if equal_rows(rows):
                return rows[0].expand(node.meta["shape"])
        return self.exclude(*(self.labels_of(source) for source in node.all_input_nodes))

    def keep(self, node: fx.Node, name: str) -> Any:
        return self.labels.get(node.all_input_nodes[0])

    def concatenate(self, node: fx.Node, name: str) -> Any:
        arguments: list[Any] = list(node.args) or [node.kwargs["tensors"]]
        parts, *dim = arguments
        options: Any = {key: value for key, value in node.kwargs.items() if key != "tensors"}
        labels = [
            self.labels[part]
            if part in self.labels
            else torch.full(part.meta["shape"], NO_LABEL, dtype=self.label_dtype)
            for part in parts
        ]
        return torch.cat(labels, *dim, **options)
