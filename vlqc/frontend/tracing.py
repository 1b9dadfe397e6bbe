"""Recorded graph: one run of a stage becomes a torch.fx.Graph.

Leaf modules (Linear, norms, activations) are recorded by hooks as `call_module`, every other torch call by a
TorchFunctionMode as `call_function`. Nothing is re-implemented and Python control flow just runs. The run happens on
the meta device (integer inputs stay real, because blocks cut their windows by them), so it costs no arithmetic and
needs no weights; where meta kernels are missing it runs on the real values.
"""

import inspect
import operator
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from vlqc.errors import Fault, UserError
from vlqc.ir.execution import Call


def record(module: nn.Module, call: Call, name: str) -> fx.Graph:
    """The graph of `module` for the shapes of `call`.

    Node meta: shape (tuple) and dtype of tensor values; of a get_attr node also `constant`, its value, and `path`,
    where the module holds it (None: it was made on the way).

    Raises UserError if the module cannot be recorded on meta tensors nor on real ones.
    """
    try:
        return _record_on_meta(module, call)
    except (RuntimeError, NotImplementedError, TypeError):
        try:
            return _record(module, call.args, call.kwargs, lambda: module(*call.args, **call.kwargs))
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}"
            raise UserError(
                Fault(f"{name} cannot be traced", why=why, fix="vlqc compiles Qwen2.5-VL blocks")
            ) from error


def _record_on_meta(module: nn.Module, call: Call) -> fx.Graph:
    def to_meta(value: Any) -> Any:
        real = not isinstance(value, Tensor) or not (value.is_floating_point() or value.dtype == torch.bool)
        return value if real else value.to("meta")

    args, kwargs = tree_map(to_meta, (call.args, call.kwargs))
    device = next((leaf.device for leaf in tree_flatten((call.args, call.kwargs))[0] if isinstance(leaf, Tensor)), None)
    state = {path: tensor.to("meta") for path, tensor in [*module.named_parameters(), *module.named_buffers()]}
    return _record(module, args, kwargs, lambda: functional_call(module, state, args, kwargs), state, device)


def _record(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    run: Callable[[], Any],
    own: dict[str, Tensor] | None = None,
    device: torch.device | None = None,
) -> fx.Graph:
    """own: path -> the tensor that stands for a parameter or buffer of the module while it runs; None: itself.

    device: where the inputs really are, if this run is on meta.
    """
    recorder = _Recorder(module, own, device)
    for name, tensor in input_tensors(module, args, kwargs):
        recorder.bind(tensor, recorder.graph.placeholder(name))
    with torch.no_grad(), recorder:
        output = run()
    return recorder.finish(output)


def input_tensors(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """Every distinct tensor among the arguments with a readable name (position_embeddings_0)."""
    parameters = [p.name for p in inspect.signature(type(module).forward).parameters.values()][1:]
    by_name = {**dict(zip(parameters, args, strict=False)), **kwargs}
    found: dict[int, tuple[str, Tensor]] = {}
    for name, value in by_name.items():
        leaves = [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]
        for number, leaf in enumerate(leaves):
            found.setdefault(id(leaf), (name if len(leaves) == 1 else f"{name}_{number}", leaf))
    return list(found.values())


def is_leaf(module: nn.Module) -> bool:
    """Recorded as one node: what has no children and owns parameters, or comes from torch.nn itself."""
    if any(True for _ in module.children()):
        return False
    return any(True for _ in module.parameters(recurse=False)) or type(module).__module__.startswith("torch.nn.")


def _attribute(root: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    value: Tensor = getattr(root.get_submodule(owner), name)
    return value


class _Recorder(TorchFunctionMode):
    """Builds the graph while active; hooks live exactly as long as the mode."""

    def __init__(self, root: nn.Module, own: dict[str, Tensor] | None, device: torch.device | None) -> None:
        super().__init__()
        self.root, self.device = root, device
        self.graph = fx.Graph()
        self._node_of: dict[int, fx.Node] = {}
        self._own = own or {**dict(root.named_parameters()), **dict(root.named_buffers())}
        self._path_of = {id(tensor): path for path, tensor in self._own.items()}
        self._alive: list[Tensor] = []  # an id is only a name while its tensor lives
        self._inside_leaf = 0
        self._constants = 0
        self._handles: list[Any] = []

    def __enter__(self) -> "_Recorder":
        for path, module in self.root.named_modules():
            if path and is_leaf(module):
                self._handles.append(module.register_forward_pre_hook(self._enter_leaf))
                self._handles.append(module.register_forward_hook(self._leave_leaf(path), with_kwargs=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def _enter_leaf(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._inside_leaf += 1

    def _leave_leaf(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            self._inside_leaf -= 1
            if not self._inside_leaf:
                self._emit("call_module", path, args, kwargs, output)

        return hook

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._inside_leaf:
            return output
        name = getattr(func, "__name__", "")
        gives_tensor = any(isinstance(leaf, Tensor) for leaf in tree_flatten(output)[0])
        if name == "__get__" and gives_tensor:  # an attribute such as x.T
            self._emit("call_function", getattr, (args[0], func.__self__.__name__), {}, output)
        elif gives_tensor or name == "__setitem__":
            self._emit("call_function", func, args, kwargs or {}, output)
        return output

    def bind(self, tensor: Tensor, node: fx.Node) -> None:
        self._node_of[id(tensor)] = node
        self._alive.append(tensor)
        node.meta["shape"], node.meta["dtype"] = tuple(tensor.shape), tensor.dtype

    def _emit(self, op: str, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        node = self.graph.create_node(op, target, self._as_nodes(tuple(args)), self._as_nodes(dict(kwargs)))
        if isinstance(output, Tensor):
            self.bind(output, node)
        elif isinstance(output, tuple | list):
            for number, part in enumerate(output):
                if isinstance(part, Tensor):
                    self.bind(part, self.graph.call_function(operator.getitem, (node, number)))

    def _as_nodes(self, value: Any) -> Any:
        """Nodes in place of tensors; what was made on the meta device will be made where the inputs really are."""

        def in_graph(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return self._node(leaf)
            return self.device if isinstance(leaf, torch.device) and leaf.type == "meta" else leaf

        # Not tree_map: windows are cut by slices, and it does not look into those.
        return map_aggregate(value, in_graph)

    def _node(self, tensor: Tensor) -> fx.Node:
        if id(tensor) not in self._node_of:  # neither input nor result: a constant or a parameter outside the leaves
            node = self.graph.create_node("get_attr", f"constant_{self._constants}")
            self._constants += 1
            path = self._path_of.get(id(tensor))
            node.meta["constant"] = tensor if path is None else _attribute(self.root, path)
            node.meta["path"] = path
            self.bind(tensor, node)
        return self._node_of[id(tensor)]

    def finish(self, output: Any) -> fx.Graph:
        leaves = tree_flatten(output if isinstance(output, Tensor | tuple | list) else list(output.values()))[0]
        self.graph.output(tuple(self._node(leaf) for leaf in leaves if isinstance(leaf, Tensor)))
        self._alive.clear()
        return self.graph
