"""Traces a stage into a torch.fx.Graph by running it once.

Leaf modules (Linear, norms, activations) are recorded by hooks as `call_module`, all other torch calls by a
TorchFunctionMode as `call_function`; Python control flow just runs. Tensors are on the meta device, except for integer
inputs, whose values determine the attention windows. So tracing computes nothing and needs no weights. Where meta
kernels are missing, the stage runs on its real inputs.
"""

import operator
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from vlqc.errors import Fault, UserError
from vlqc.ir.execution import Call, input_tensors


def trace(module: nn.Module, call: Call, name: str) -> fx.Graph:
    """The graph of `module` for the shapes of the arguments in `call`.

    Node meta: "shape" and "dtype" of tensor values; for get_attr nodes also "constant", the tensor, and "path", its
    name in the module, or None if it was created during the call. name: for the error message.

    Raises UserError if the module runs neither on meta tensors nor on the real ones.
    """
    try:
        return _trace_on_meta(module, call)
    except (RuntimeError, NotImplementedError, TypeError):
        try:
            return _trace(module, call.args, call.kwargs, lambda: module(*call.args, **call.kwargs))
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}"
            fix = "use a checkpoint of a supported model, with the config.json that belongs to it"
            raise UserError(Fault(f"cannot trace {name}", why=why, fix=fix)) from error


def trace_between(model: nn.Module, stages: Mapping[nn.Module, str], kwargs: Mapping[str, Any]) -> fx.Graph:
    """The graph of `model(**kwargs)` in which each stage is one call_module node.

    stages: module -> path. Such a node has meta["arguments"]: name of each tensor among its arguments -> node.
    """
    tracer = _Tracer(model, None, None, stages)
    for name, tensor in input_tensors(model, (), dict(kwargs)):
        tracer.bind(tensor, tracer.graph.placeholder(name))
    with torch.no_grad(), tracer:
        model(**kwargs)
    tracer.graph.output(())
    return tracer.graph


def run_on_meta(module: nn.Module, call: Call) -> Any:
    """The output of `module` for the arguments in `call`, with its shapes and dtypes, on the meta device."""
    state, args, kwargs = _on_meta(module, call)
    with torch.no_grad():
        return functional_call(module, state, args, kwargs)


def _trace_on_meta(module: nn.Module, call: Call) -> fx.Graph:
    state, args, kwargs = _on_meta(module, call)
    device = next((leaf.device for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)), None)
    return _trace(module, args, kwargs, lambda: functional_call(module, state, args, kwargs), state, device)


def _on_meta(module: nn.Module, call: Call) -> tuple[dict[str, Tensor], tuple[Any, ...], dict[str, Any]]:
    """Parameters and buffers by path, and the arguments, on the meta device; integer arguments stay as they are."""

    def to_meta(value: Any) -> Any:
        keep = not isinstance(value, Tensor) or not (value.is_floating_point() or value.dtype == torch.bool)
        return value if keep else value.to("meta")

    state = {path: tensor.to("meta") for path, tensor in [*module.named_parameters(), *module.named_buffers()]}
    args, kwargs = tree_map(to_meta, (call.args, call.kwargs))
    return state, args, kwargs


def _trace(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    run: Callable[[], Any],
    state: dict[str, Tensor] | None = None,
    device: torch.device | None = None,
) -> fx.Graph:
    """state: path -> the tensor that replaces a parameter or buffer during `run`; None if they are not replaced.

    device: of the real inputs, if `run` is on meta.
    """
    tracer = _Tracer(module, state, device)
    for name, tensor in input_tensors(module, args, kwargs):
        tracer.bind(tensor, tracer.graph.placeholder(name))
    with torch.no_grad(), tracer:
        output = run()
    return tracer.finish(output)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one node: it has no children, and either has parameters or is from torch.nn."""
    if any(True for _ in module.children()):
        return False
    return any(True for _ in module.parameters(recurse=False)) or type(module).__module__.startswith("torch.nn.")


def _get_tensor(root: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    value: Tensor = getattr(root.get_submodule(owner), name)
    return value


class _Tracer(TorchFunctionMode):
    """Builds the graph while it is active; its hooks are removed on exit."""

    def __init__(
        self,
        root: nn.Module,
        state: dict[str, Tensor] | None,
        device: torch.device | None,
        stages: Mapping[nn.Module, str] | None = None,
    ) -> None:
        super().__init__()
        self.root, self.device, self.stages = root, device, stages or {}
        self.graph = fx.Graph()
        self._node_of: dict[int, fx.Node] = {}  # by id of the tensor
        self._state = state or {**dict(root.named_parameters()), **dict(root.named_buffers())}
        self._path_of = {id(tensor): path for path, tensor in self._state.items()}
        self._alive: list[Tensor] = []  # keeps ids from being reused
        self._leaf_depth = 0
        self._constants = 0
        self._handles: list[Any] = []

    def __enter__(self) -> "_Tracer":
        inside = {child for stage in self.stages for child in stage.modules() if child is not stage}
        for path, module in self.root.named_modules():
            if module in self.stages or (path and is_leaf(module) and module not in inside):
                self._handles.append(module.register_forward_pre_hook(self._enter_leaf))
                self._handles.append(module.register_forward_hook(self._leave_leaf(path), with_kwargs=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def _enter_leaf(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._leaf_depth += 1

    def _leave_leaf(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            self._leaf_depth -= 1
            if not self._leaf_depth:
                node = self._add_node("call_module", path, args, kwargs, output)
                if module in self.stages:
                    arguments = input_tensors(module, args, dict(kwargs))
                    node.meta["arguments"] = {name: self._node(tensor) for name, tensor in arguments}

        return hook

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._leaf_depth:
            return output
        name = getattr(func, "__name__", "")
        returns_tensor = any(isinstance(leaf, Tensor) for leaf in tree_leaves(output))
        if name == "__get__" and returns_tensor:  # an attribute such as x.T
            self._add_node("call_function", getattr, (args[0], func.__self__.__name__), {}, output)
        elif returns_tensor or name == "__setitem__":
            self._add_node("call_function", func, args, kwargs or {}, output)
        return output

    def bind(self, tensor: Tensor, node: fx.Node) -> None:
        """Makes `node` the value of `tensor`."""
        self._node_of[id(tensor)] = node
        self._alive.append(tensor)
        node.meta["shape"], node.meta["dtype"] = tuple(tensor.shape), tensor.dtype

    def _add_node(self, op: str, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> fx.Node:
        node = self.graph.create_node(op, target, self._to_nodes(tuple(args)), self._to_nodes(dict(kwargs)))
        if isinstance(output, Tensor):
            self.bind(output, node)
        elif isinstance(output, tuple | list):
            for number, item in enumerate(output):
                if isinstance(item, Tensor):
                    self.bind(item, self.graph.call_function(operator.getitem, (node, number)))
        return node

    def _to_nodes(self, value: Any) -> Any:
        """Replaces tensors by nodes, and the meta device by the device of the real inputs."""

        def to_node(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return self._node(leaf)
            return self.device if isinstance(leaf, torch.device) and leaf.type == "meta" else leaf

        return map_aggregate(value, to_node)  # not tree_map, which does not enter slices

    def _node(self, tensor: Tensor) -> fx.Node:
        if id(tensor) not in self._node_of:  # neither input nor result: a constant, or a parameter outside of leaves
            node = self.graph.create_node("get_attr", f"constant_{self._constants}")
            self._constants += 1
            path = self._path_of.get(id(tensor))
            node.meta["constant"] = tensor if path is None else _get_tensor(self.root, path)
            node.meta["path"] = path
            self.bind(tensor, node)
        return self._node_of[id(tensor)]

    def finish(self, output: Any) -> fx.Graph:
        """Adds the output node, a flat tuple of the tensors in `output`, and returns the graph."""
        leaves = tree_leaves(output if isinstance(output, Tensor | tuple | list) else list(output.values()))
        self.graph.output(tuple(self._node(leaf) for leaf in leaves if isinstance(leaf, Tensor)))
        self._alive.clear()
        return self.graph
