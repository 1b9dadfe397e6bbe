"""Finds what can be rotated in a model: residual streams and the values of attention heads, from recorded graphs.

A rotation replaces values x by x R, R orthogonal, and changes the weights around them so that no output changes. All
values that are added to each other must be rotated together: they share a *basis*. Every input of a graph and every
output of a linear layer, convolution or embedding begins a basis; sums join bases, norms and layout operations keep
them, linear layers read them, and any other operation makes the channels that it reads unrotatable. Attention mixes
rows and keeps channels, so the values of a head can be rotated between the layers before and after it.

Labels are `basis * CHANNELS + channel`. Source: QuaRot (arXiv 2404.00456), without its rotations at run time.
"""

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from vlqc.ir.label_propagation import (
    ATTENTION,
    IN_PLACE,
    LAYOUT,
    LIKE_ANOTHER,
    MATRIX_PRODUCT,
    PASS_THROUGH,
    PRODUCT,
    QUOTIENT,
    READ_NO_VALUES,
    SUM,
    LabelPropagation,
    Rule,
    equal_rows,
    keeps_last,
    operands,
    without_copies,
)
from vlqc.ir.scale_propagation import scales_its_channels

CHANNELS = 1 << 20  # more than any dimension
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ZEROS = frozenset("zeros zeros_like new_zeros".split())
REDUCTION = frozenset("sum mean".split())
WRITES = frozenset("__setitem__ index_add index_add_ index_put index_put_ index_copy index_copy_".split())
RESIZING = frozenset("view reshape repeat expand split split_with_sizes chunk".split())
SELECTION = frozenset("masked_scatter masked_scatter_ where".split())
PARTIAL, REPEATED = "a layer reads a part of it", "a module is called repeatedly"  # reasons
SHARED = "parameters of a layer are read by something else, too"
ROW_MASK_OPERATIONS = frozenset("expand expand_as to contiguous clone detach".split())
KEEPS_VALUES = (LAYOUT | PASS_THROUGH | READ_NO_VALUES | frozenset({"cat"})) - frozenset("neg __neg__".split())
NORM_TOLERANCE = 1e-3  # relative to the largest output of a norm


@dataclass(frozen=True)
class Obstacle:
    """Why values cannot be rotated. path: of the stage, layer or norm of which the reason speaks; "" if of none."""

    reason: str
    path: str = ""

    def text(self, name: Callable[[str], str] = str) -> str:
        """name: path of a module -> how the text names it."""
        return f"{self.reason} ({name(self.path)})" if self.path else self.reason


@dataclass
class Basis:
    """Values that can only be rotated together, or heads of values.

    size: channels of the basis, in the order of the outputs of its writers.
    writers: targets of the layers whose outputs are values of it; tables: those of them that are embeddings.
    readers: targets of linear layers that read it -> channel per column, int64 [K], and the norm in between or None.
    norms: targets of norms that read it; keeps_mean: whether one of them subtracts the mean.
    inputs, outputs: (stage, name of the input or position of the output) of values of it.
    heads: first channels of the heads that attention mixes separately, and their size; None without attention.
    fixed: bool [size], channels that cannot be rotated; obstacle: the first reason, None if there is none.
    norm, base: of the output of a norm, its target and the basis that it reads; None otherwise.
    """

    size: int
    writers: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    readers: dict[str, tuple[Tensor, str | None]] = field(default_factory=dict)
    norms: list[str] = field(default_factory=list)
    keeps_mean: bool = False
    inputs: list[tuple[str, str]] = field(default_factory=list)
    outputs: list[tuple[str, int]] = field(default_factory=list)
    heads: tuple[tuple[int, ...], int] | None = None
    fixed: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    obstacle: Obstacle | None = None
    norm: str | None = None
    base: "int | None" = None

    def __post_init__(self) -> None:
        if not self.fixed.numel():
            self.fixed = torch.zeros(self.size, dtype=torch.bool)

    def fix(self, obstacle: Obstacle, channels: Tensor | None = None) -> None:
        self.fixed[slice(None) if channels is None else channels] = True
        self.obstacle = self.obstacle or obstacle

    def prefixed(self, path: str) -> "Basis":
        """A copy of a basis of a stage, with its targets below `path`."""

        def prefix(targets: Iterable[str]) -> list[str]:
            return [f"{path}.{target}" for target in targets]

        return Basis(
            size=self.size,
            writers=prefix(self.writers),
            tables=prefix(self.tables),
            readers={
                f"{path}.{target}": (columns, None if norm is None else f"{path}.{norm}")
                for target, (columns, norm) in self.readers.items()
            },
            norms=prefix(self.norms),
            keeps_mean=self.keeps_mean,
            inputs=[(path, name) for _, name in self.inputs],
            outputs=[(path, position) for _, position in self.outputs],
            heads=self.heads,
            fixed=self.fixed.clone(),
            obstacle=self.obstacle and replace(self.obstacle, path=f"{path}.{self.obstacle.path}".rstrip(".")),
        )

    def is_stream(self) -> bool:
        """Whether it is a residual stream: values that norms read and that several layers write.

        With an obstacle one layer suffices, as the rest of the stream may not have been recognized.
        """
        return self.heads is None and bool(self.norms) and len(self.writers) > (0 if self.obstacle else 1)


@dataclass
class GraphBases:
    """The bases of one graph. inputs: by name of a placeholder; outputs: per output, None for other values."""

    bases: list[Basis]
    inputs: dict[str, int]
    outputs: list[int | None]


def find_bases(module: nn.Module, graph: fx.Graph, stages: Mapping[str, GraphBases] | None = None) -> GraphBases:
    """All bases of a recorded graph.

    stages: bases of submodules that the graph calls as a whole, by path. A call of one has meta["arguments"], the
    names of its inputs and their nodes.
    """
    analysis = _Analysis(module, graph, stages or {})
    return analysis.run()


def whole_blocks(columns: Tensor, size: int, channels: int) -> bool:
    """Whether the channels of columns int64 [K] are 0 to `channels` - 1 repeatedly, and K a multiple of `size`."""
    return len(columns) % size == 0 and bool((columns == torch.arange(len(columns)) % channels).all())


def subtracts_mean(norm: nn.Module, channels: int) -> bool | None:
    """False if a norm commutes with every rotation, True if with those that keep the mean, None if with neither.

    That is with weight 1 and bias 0; the output with others must be n(x) * weight + bias. Determined by running it:
    n(x R) = n(x) R for reflections R.
    """
    state = {
        name: torch.ones(parameter.shape) if name == "weight" else torch.zeros(parameter.shape)
        for name, parameter in norm.named_parameters()
    }
    generator = torch.Generator().manual_seed(0)
    x, axis = torch.randn(4, channels, generator=generator), torch.randn(channels, generator=generator)
    if not _is_affine(norm, x, state, generator):
        return None

    def commutes(direction: Tensor) -> bool:
        direction = direction / direction.norm()

        def reflect(rows: Tensor) -> Tensor:
            return rows - 2 * (rows @ direction)[:, None] * direction

        try:
            plain, rotated = (functional_call(norm, state, (rows,)) for rows in (x + 1, reflect(x + 1)))
        except (RuntimeError, TypeError):
            return False
        return bool((reflect(plain) - rotated).abs().amax() <= NORM_TOLERANCE * plain.abs().amax())

    if commutes(axis):
        return False
    return True if commutes(axis - axis.mean()) else None


def _keeps_forward(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module has the forward of one of these classes; subclasses may compute something else."""
    return any(type(module).forward is kind.forward for kind in kinds)


def _is_view(value: Any) -> bool:
    """Whether a value may share memory with another one of the graph."""
    return isinstance(value, fx.Node) and getattr(value.target, "__name__", "") in LAYOUT | PASS_THROUGH


def _is_affine(norm: nn.Module, x: Tensor, state: Mapping[str, Tensor], generator: torch.Generator) -> bool:
    """Whether n(x) with any weight and bias is n(x) with those of `state`, times the weight plus the bias."""
    random = {name: torch.randn(value.shape, generator=generator) for name, value in state.items()}
    try:
        plain, other = (functional_call(norm, dict(values), (x,)) for values in (state, random))
    except (RuntimeError, TypeError):
        return False
    expected = plain * random["weight"] + random.get("bias", torch.zeros(()))
    return bool((expected - other).abs().amax() <= NORM_TOLERANCE * expected.abs().amax())


class _Analysis(LabelPropagation):
    """Finds the bases of one graph."""

    label_dtype = torch.int64

    def __init__(self, module: nn.Module, graph: fx.Graph, stages: Mapping[str, GraphBases]) -> None:
        super().__init__(module, graph)
        self.stages = stages
        self.bases: list[Basis] = []
        self._joined: list[int] = []  # per basis, another one that it was joined with, or itself
        self._zeros: set[fx.Node] = set()
        self._called = Counter(node.target for node in graph.nodes if node.op == "call_module")

    def run(self) -> GraphBases:
        inputs, outputs = {}, list[int | None]()
        for node in self.graph.nodes:
            if node.op == "placeholder" and len(node.meta["shape"]) > 1 and node.meta["dtype"].is_floating_point:
                inputs[str(node.target)] = number = self._new(Basis(node.meta["shape"][-1]))
                self.bases[number].inputs.append(("", str(node.target)))
                self.labels[node] = self._channels(number).expand(node.meta["shape"])
            elif node.op == "output":
                outputs = [self._output(leaf, position) for position, leaf in enumerate(node.args[0])]
            elif node.op in ("call_module", "call_function") and node not in self.labels:
                labels = self._value(node)
                if labels is not None:
                    self.labels[node] = labels
        roots = {number for number in range(len(self.bases)) if self._root(number) == number}
        self._check_readers(roots)
        self._check_parameters(roots)
        kept = [number for number in sorted(roots) if self.bases[number].norm is None]
        position = {number: index for index, number in enumerate(kept)}
        return GraphBases(
            [self.bases[number] for number in kept],
            {name: position[self._root(number)] for name, number in inputs.items() if self._root(number) in position},
            [None if number is None else position.get(self._root(number)) for number in outputs],
        )

    # ---- bases -------------------------------------------------------------------------------------------------------

    def _new(self, basis: Basis) -> int:
        self.bases.append(basis)
        self._joined.append(len(self.bases) - 1)
        return len(self.bases) - 1

    def _root(self, number: int) -> int:
        while self._joined[number] != number:
            number = self._joined[number]
        return number

    def _basis(self, number: int) -> Basis:
        return self.bases[self._root(number)]

    def _channels(self, number: int) -> Tensor:
        """Labels int64 [size] of all channels of a basis."""
        return number * CHANNELS + torch.arange(self.bases[number].size)

    def exclude(self, *values: Any, obstacle: Obstacle | None = None) -> None:
        for labels in values:
            if isinstance(labels, Tensor):
                present = torch.unique(without_copies(labels))
                for number in torch.unique(present[present >= 0] // CHANNELS).tolist():
                    self._fix(number, obstacle or self._obstacle, present[present // CHANNELS == number] % CHANNELS)

    def _fix(self, number: int, obstacle: Obstacle, channels: Tensor | None = None) -> None:
        basis = self._basis(number)
        basis.fix(obstacle, channels)
        if basis.base is not None:
            self._basis(basis.base).fix(obstacle)

    def _join(self, first: Any, second: Any) -> Any:
        """Joins the bases of two values with labels of equal shape; returns the labels of the first."""
        left, right = without_copies(first), without_copies(second)
        if left.shape != right.shape:
            left, right = first, second
        if left.shape != right.shape or bool(((left % CHANNELS != right % CHANNELS) | (left < 0) | (right < 0)).any()):
            return self.exclude(first, second)
        pairs = torch.unique(torch.stack([left.flatten() // CHANNELS, right.flatten() // CHANNELS]), dim=1)
        for one, other in pairs.T.tolist():
            self._join_bases(self._root(one), self._root(other))
        return first

    def _join_bases(self, kept: int, other: int) -> None:
        if kept == other:
            return
        one, two = self.bases[kept], self.bases[other]
        if one.norm is not None or two.norm is not None or one.heads != two.heads or one.size != two.size:
            for number in (kept, other):
                self._fix(number, self._obstacle)
            return
        self._joined[other] = kept
        one.fixed |= two.fixed
        one.obstacle = one.obstacle or two.obstacle
        one.keeps_mean |= two.keeps_mean
        one.readers |= two.readers
        for name in ("writers", "tables", "norms", "inputs", "outputs"):
            getattr(one, name).extend(getattr(two, name))

    def _check_readers(self, roots: Iterable[int]) -> None:
        """Moves the readers of norms to the bases that the norms read, and fixes bases that are not read as a whole."""
        for number in roots:
            basis = self.bases[number]
            for target, (columns, norm) in list(basis.readers.items()):
                if basis.base is not None:
                    base = self._basis(basis.base)
                    base.readers[target] = (columns, basis.norm)
                    if not whole_blocks(columns, base.size, basis.size):
                        self._fix(number, Obstacle(PARTIAL, target))
                elif norm is None and basis.heads is None and not whole_blocks(columns, basis.size, basis.size):
                    basis.fix(Obstacle(PARTIAL, target))

    def _check_parameters(self, roots: Iterable[int]) -> None:
        """Fixes bases around layers whose parameters something else than the layer reads."""
        paths = [node.meta.get("path") for node in self.graph.nodes if node.op == "get_attr"]
        used = {str(path).rpartition(".")[0] for path in paths if path}
        named = list(self.module.named_parameters(remove_duplicate=False))
        counts = Counter(id(parameter) for _, parameter in named)
        used |= {path.rpartition(".")[0] for path, parameter in named if counts[id(parameter)] > 1}
        for number in roots:
            basis = self.bases[number]
            for target in (*basis.writers, *basis.readers, *basis.norms):
                if target in used:
                    self._fix(number, Obstacle(SHARED, target))

    # ---- nodes -------------------------------------------------------------------------------------------------------

    @property
    def _obstacle(self) -> Obstacle:
        node = self._node
        if node.op == "call_module":
            target = str(node.target)
            return Obstacle(f"{type(self.module.get_submodule(target)).__name__} is applied to it", target)
        if node.op == "output":
            return Obstacle("some of its channels are an output of the stage")
        return Obstacle(f"{getattr(node.target, '__name__', node.target)} is applied to it")

    def _value(self, node: fx.Node) -> Any:
        self._node = node
        name = getattr(node.target, "__name__", "")
        if node.op == "call_function" and name in ZEROS:
            self._zeros.add(node)
            return None
        try:
            return self._operation(node, name)
        finally:  # it may have been written to, also through a view
            self._zeros.difference_update(node.all_input_nodes)

    def _operation(self, node: fx.Node, name: str) -> Any:
        sources = [source for source in node.all_input_nodes if source in self.labels]
        if node.op == "call_function":
            in_place = name == "__setitem__" or name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))
            if not sources or not (node.users or in_place):
                return None
            if name in LIKE_ANOTHER and node.all_input_nodes[0] not in self.labels:
                return None  # reads the shape of the other tensor only
            if in_place and name != "__setitem__" and _is_view(node.args[0]):
                return self.exclude(*(self.labels[source] for source in sources))
            if name not in KEEPS_VALUES:
                self.exclude(*(self.labels[source] for source in filter(self._is_normalized, sources)))
        return self.step(node)

    def _is_normalized(self, node: fx.Node) -> bool:
        """Whether a value is the output of a norm: only layout operations may come before the layers that read it."""
        labels = torch.unique(without_copies(self.labels[node]))
        return any(self._basis(number).norm for number in torch.unique(labels[labels >= 0] // CHANNELS).tolist())

    def _output(self, node: fx.Node, position: int) -> int | None:
        self._node = node
        labels = self.labels.get(node)
        number = self._whole(labels)
        if number is None or self._basis(number).norm is not None:
            if labels is not None:
                self.exclude(labels)
            return None
        self._basis(number).outputs.append(("", position))
        return number

    def _whole(self, labels: Any) -> int | None:
        """The basis of which every row of a value has all channels in order; None otherwise."""
        if labels is None or labels.numel() == 0 or not equal_rows(labels.reshape(-1, labels.shape[-1])):
            return None
        row = labels.reshape(-1, labels.shape[-1])[0]
        number = int(row[0]) // CHANNELS if int(row[0]) >= 0 else 0
        is_whole = len(row) == self.bases[number].size and bool((row == self._channels(number)).all())
        return number if is_whole else None

    def enter_module(self, node: fx.Node, sources: list[fx.Node]) -> Any:
        target, shape = str(node.target), node.meta.get("shape")
        if target in self.stages:
            return self._enter_stage(node, target)
        module = self.module.get_submodule(target)
        labels = self.labels[sources[0]] if sources else None
        if isinstance(module, nn.Linear) and _keeps_forward(module, nn.Linear):
            self._read(target, labels)
            return self._written(target, module.out_features, shape)
        if isinstance(module, nn.Embedding) and _keeps_forward(module, nn.Embedding):
            return self._written(target, module.embedding_dim, shape, table=True)
        if isinstance(module, CONVOLUTIONS) and _keeps_forward(module, *CONVOLUTIONS) and module.groups == 1:
            self.exclude(labels)
            return self._written(target, module.out_channels, shape, dimension=1)
        if labels is not None and isinstance(module, nn.Identity | nn.Dropout):
            return labels
        if labels is not None and scales_its_channels(module, labels.shape[-1]):
            return self._normalized(target, module, labels)
        return self.exclude(labels)

    def _read(self, target: str, labels: Any) -> None:
        if labels is None:
            return
        rows = labels.reshape(-1, labels.shape[-1])
        numbers = torch.unique(rows[:1] // CHANNELS).tolist() if len(rows) else []
        if len(numbers) != 1 or bool((rows[:1] < 0).any()) or self._called[target] != 1 or not equal_rows(rows):
            self.exclude(labels, obstacle=Obstacle(PARTIAL, target))
        else:
            self._basis(numbers[0]).readers[target] = (rows[0] % CHANNELS, None)

    def _written(self, target: str, size: int, shape: Any, *, dimension: int = -1, table: bool = False) -> Any:
        """Labels of the output of a layer; None if it does not have the shape that the layer's weights imply."""
        if not shape or len(shape) < 2 or shape[dimension] != size:
            return None
        number = self._new(Basis(size, writers=[target], tables=[target] if table else []))
        if self._called[target] != 1:
            self._fix(number, Obstacle(REPEATED, target))
        channels = self._channels(number)
        after = len(shape) - 1 - dimension % len(shape)
        return channels.reshape(-1, *[1] * after).expand(shape)

    def _normalized(self, target: str, norm: nn.Module, labels: Tensor) -> Any:
        channels = labels.shape[-1]
        rows, mean = labels.reshape(-1, channels), subtracts_mean(norm, channels)
        number = int(rows[0, 0]) // CHANNELS
        size = self.bases[number].size
        blocks = number >= 0 and whole_blocks(rows[0] - number * CHANNELS, size, size)
        if not blocks or not equal_rows(rows) or self._basis(number).norm or self._called[target] != 1:
            return self.exclude(labels)
        base = self._basis(number)
        base.norms.append(target)
        if mean is None:
            return self.exclude(labels)
        base.keeps_mean |= mean
        return self._channels(self._new(Basis(channels, norm=target, base=number))).expand(labels.shape)

    def _enter_stage(self, node: fx.Node, path: str) -> Any:
        """Takes over the bases of a stage, joined with those of its arguments. Labels of its output or outputs."""
        found = self.stages[path]
        numbers = [self._new(basis.prefixed(path)) for basis in found.bases]
        arguments: Mapping[str, fx.Node] = node.meta["arguments"]
        for name, argument in arguments.items():
            labels, inner = self.labels.get(argument), found.inputs.get(name)
            if inner is None:
                self.exclude(labels)
                continue
            outer = self._whole(labels)
            if outer is not None:
                self._join_bases(self._root(outer), self._root(numbers[inner]))
            elif argument not in self._zeros:
                self.exclude(labels)
                self._fix(numbers[inner], Obstacle("an input of a stage has an unknown origin", path))
        if self._called[path] != 1:
            for number in numbers:
                self._fix(number, Obstacle(REPEATED, path))
        values = [None if inner is None else self._channels(numbers[inner]) for inner in found.outputs]
        items = [user for user in node.users if user.target is operator.getitem]  # in the order of the outputs
        if node.meta.get("shape") is not None:
            return None if not values or values[0] is None else values[0].expand(node.meta["shape"])
        for item, channels in zip(items, values, strict=False):
            if channels is not None:
                self.labels[item] = channels.expand(item.meta["shape"])
        return None

    # ---- operations --------------------------------------------------------------------------------------------------

    def rules(self) -> Iterator[tuple[frozenset[str], Rule]]:
        yield from super().rules()
        yield PRODUCT | QUOTIENT, self._product
        yield SUM, self._sum
        yield WRITES, self._write
        yield SELECTION, self._select
        yield REDUCTION, self._reduce
        yield ATTENTION, self._attention
        yield MATRIX_PRODUCT, self._matrix_product

    def layout(self, node: fx.Node, name: str) -> Any:
        """As `LabelPropagation.layout`, also for sizes that are tensors: the graph has the resulting shape only."""
        first, *others = node.all_input_nodes
        if (
            name not in RESIZING
            or first not in self.labels
            or not others
            or any(other in self.labels for other in others)
        ):
            return super().layout(node, name)
        rows = self.labels[first].reshape(-1, self.labels[first].shape[-1])
        results = [node] if node.meta.get("shape") else list(node.users)
        if not equal_rows(rows) or any(result.meta["shape"][-1] != rows.shape[-1] for result in results):
            return self.exclude(rows)
        for result in results:
            self.labels[result] = rows[0].expand(result.meta["shape"])
        return self.labels.get(node)

    def _product(self, node: fx.Node, name: str) -> Any:
        """A factor that is the same for all channels keeps the basis."""
        left, right = operands(node)
        first, second = self.labels_of(left), self.labels_of(right)
        if (first is None) == (second is None) or (name in QUOTIENT and second is not None):
            return self.exclude(first, second)
        labels, factor = (first, right) if second is None else (second, left)
        shape: Sequence[int] = factor.meta["shape"] if isinstance(factor, fx.Node) else ()
        if any(size > 1 and self._varies(labels, dimension - len(shape)) for dimension, size in enumerate(shape)):
            return self.exclude(labels)
        return labels.expand(node.meta["shape"])

    @staticmethod
    def _varies(labels: Tensor, dimension: int) -> bool:
        if -dimension > labels.ndim:
            return False
        first = labels.narrow(dimension, 0, 1)
        return bool((without_copies(labels) != without_copies(first)).any())

    def _sum(self, node: fx.Node, name: str) -> Any:
        left, right = operands(node)
        first, second = self.labels_of(left), self.labels_of(right)
        if "alpha" in node.kwargs:
            return self.exclude(first, second)
        if first is None or second is None:
            is_zero = (left if first is None else right) in self._zeros
            labels = second if first is None else first
            return labels.expand(node.meta["shape"]) if is_zero else self.exclude(labels)
        if first.shape != second.shape:
            return self.exclude(first, second)
        return self._join(first, second)

    def _write(self, node: fx.Node, name: str) -> Any:
        """Rows of one value written or added to rows of another."""
        target: Any = node.args[0]
        dimensions = len(target.meta["shape"])
        if name.startswith(("index_add", "index_copy")):
            dimension: Any = node.args[1]
            whole_rows = isinstance(dimension, int) and dimension % dimensions != dimensions - 1
        else:
            whole_rows = keeps_last(node, dimensions)
        value = node.args[-1]
        return self._merge(target, value, node, whole_rows and not node.kwargs)

    def _select(self, node: fx.Node, name: str) -> Any:
        """Rows of two values selected by a mask."""
        if node.kwargs or len(node.args) != 3:
            return self.exclude(*(self.labels_of(argument) for argument in node.all_input_nodes))
        mask = node.args[0] if name == "where" else node.args[1]
        target, value = (node.args[1], node.args[2]) if name == "where" else (node.args[0], node.args[2])
        return self._merge(target, value, node, self._is_row_mask(mask))

    def _merge(self, target: Any, value: Any, node: fx.Node, whole_rows: bool) -> Any:
        into, source = self.labels_of(target), self.labels_of(value)
        known = [labels for labels in (into, source) if labels is not None]
        rows = [labels.reshape(-1, labels.shape[-1]) for labels in known]
        if not whole_rows or not all(len(part) and equal_rows(part) for part in rows):
            return self.exclude(*known)
        if len(rows) == 2:
            self._join(rows[0][0], rows[1][0])
        elif (value if source is None else target) not in self._zeros:
            return self.exclude(*known)
        if into is None and node.meta.get("shape") is None:  # written in place
            self.labels[target] = rows[0][0].expand(target.meta["shape"])
        return rows[0][0].expand(node.meta["shape"]) if node.meta.get("shape") is not None else None

    def _is_row_mask(self, mask: Any) -> bool:
        """Whether a mask has the same value in all channels of a row, as it was expanded from one value per row."""
        while isinstance(mask, fx.Node):
            if mask.meta.get("shape") and mask.meta["shape"][-1] == 1:
                return True
            name = getattr(mask.target, "__name__", "")
            if name not in ROW_MASK_OPERATIONS or not mask.all_input_nodes:
                return False
            mask = mask.all_input_nodes[0]
        return False

    def _reduce(self, node: fx.Node, name: str) -> Any:
        """A sum or mean over another dimension than that of the channels."""
        labels = self.labels_of(node.args[0])
        dim: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        if labels is None or not isinstance(dim, int) or dim % labels.ndim == labels.ndim - 1:
            return self.exclude(labels)
        rows = labels.reshape(-1, labels.shape[-1])
        return rows[0].expand(node.meta["shape"]) if equal_rows(rows) else self.exclude(labels)

    def _attention(self, node: fx.Node, name: str) -> Any:
        named = dict(zip(("query", "key", "value", "attn_mask"), node.args, strict=False)) | node.kwargs
        self.exclude(*(self.labels_of(named.get(part)) for part in ("query", "key", "attn_mask")))
        values = self._mixed(self.labels_of(named["value"]))
        if values is not None and named.get("enable_gqa"):
            query: Any = named["query"]
            values = values.repeat_interleave(query.meta["shape"][-3] // values.shape[-3], -3)
        return None if values is None else values.expand(node.meta["shape"])

    def _matrix_product(self, node: fx.Node, name: str) -> Any:
        left, right = (self.labels_of(value) for value in operands(node))
        self.exclude(left)
        values = None if right is None or right.ndim < 2 else self._mixed(right)
        return values.expand(node.meta["shape"]) if values is not None else self.exclude(right)

    def _mixed(self, values: Any) -> Any:
        """Labels [..., 1, D] of values [..., S, D] whose rows are mixed with weights per leading index: heads."""
        if values is None or not equal_rows(values):
            return self.exclude(values)
        values = values[..., :1, :]
        rows = torch.unique(values.reshape(-1, values.shape[-1]), dim=0)
        size, number = rows.shape[-1], int(rows[0, 0]) // CHANNELS
        starts = rows[:, 0] - number * CHANNELS
        contiguous = bool((rows == rows[:, :1] + torch.arange(size)).all()) and bool((rows // CHANNELS == number).all())
        if number < 0 or not contiguous:
            return self.exclude(values)
        basis, heads = self._basis(number), (tuple(starts.tolist()), size)
        if basis.heads is None:
            basis.heads = heads
        elif basis.heads[1] != size:
            return self.exclude(values)
        else:
            basis.heads = (tuple(sorted({*basis.heads[0], *heads[0]})), size)
        return values
