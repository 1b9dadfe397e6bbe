"""Exports the graph of a stage as an ONNX model, node by node."""

import operator
from collections.abc import Iterator
from typing import Any

import onnx
import torch
from onnx import helper
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from vlqc.errors import Fault, UserError
from vlqc.ir.execution import input_tensors
from vlqc.ir.stage import Stage
from vlqc.kernels_ref.attention import attention_arguments
from vlqc.kernels_ref.kv_cache import round_cache
from vlqc.reporting.onnx.builder import IR_VERSION, OPSET, Builder, type_of
from vlqc.reporting.onnx.functions import RULES, NodeExporter, Value
from vlqc.reporting.onnx.kv_cache import export_rounded_cache
from vlqc.reporting.onnx.modules import UnsupportedOperation, export_module

IN_PLACE = ("__setitem__",)
# Functions that are called on constants only, beside those with a rule. Others are refused: a graph may be untrusted.
COMPUTED = frozenset(
    "zeros ones full eye arange tril triu zeros_like ones_like full_like __setitem__ masked_fill where cumsum diff "
    "max min sum amax amin all any eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __and__ __or__ "
    "__invert__ logical_and logical_or logical_not repeat_interleave repeat pad tolist item long int bool stack "
    "floordiv __floordiv__ __mod__ getattr".split()
)


@torch.no_grad()
def export(stage: Stage) -> onnx.ModelProto:
    """A stage with a probe -> the ONNX model. UserError if an operation is not supported."""
    exporter = _Exporter(stage)
    for node in stage.graph.nodes:
        try:
            exporter.add(node)
        except UnsupportedOperation as error:
            what = f"cannot export %{node.name} of {stage.name} to ONNX"
            fix = "remove onnx from --dump_formats, or add a rule to vlqc/reporting/onnx"
            raise UserError(Fault(what, stage.name, f"unsupported: {error}", fix)) from error
    return exporter.model()


class _Exporter:
    """Values of the nodes exported so far: `Value`, a list of them, or a constant."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.builder = stage, Builder()
        self.values: dict[fx.Node, Any] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.scale_names = dict(_scale_names(stage))  # node that rounds -> name of its scale in the checkpoint
        call = stage.execution.probe
        self.probe_inputs = {} if call is None else dict(input_tensors(stage.module, call.args, call.kwargs))

    def add(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.values[node] = self._input(node)
        elif node.op == "get_attr":
            self.values[node] = self._constant(node)
        elif node.op == "output":
            self._output(node)
        elif node.op == "call_module":
            self.values[node] = self._module(node)
        elif node.op == "call_function":
            self.values[node] = self._function(node)
        else:
            raise UnsupportedOperation(f"a call of the method {node.target}")

    def _input(self, node: fx.Node) -> Any:
        """An input of the model; an integer input is the constant of the probe."""
        shape, dtype = node.meta["shape"], node.meta["dtype"]
        if not dtype.is_floating_point:
            if str(node.target) not in self.probe_inputs:
                raise UnsupportedOperation("an integer input that the probe does not have")
            return self.probe_inputs[str(node.target)].cpu()
        name = self.builder.name(str(node.target))
        self.inputs.append(helper.make_tensor_value_info(name, type_of(dtype), list(shape)))
        return Value(name, shape, dtype)

    def _constant(self, node: fx.Node) -> Any:
        constant = node.meta.get("constant")
        if not isinstance(constant, Tensor) or constant.is_meta:
            raise UnsupportedOperation("a tensor without values")
        return constant.detach().cpu()

    def _output(self, node: fx.Node) -> None:
        for number, node_out in enumerate(node.args[0]):  # type: ignore[arg-type]
            value = self.values[node_out]
            exporter = NodeExporter(self.builder, f"output_{number}", None, None)
            name = self.builder.op("Identity", exporter.input(value), output=f"output_{number}")
            self.outputs.append(helper.make_tensor_value_info(name, type_of(value.dtype), list(value.shape)))

    def _module(self, node: fx.Node) -> Value:
        target, x = str(node.target), self.values[node.all_input_nodes[0]]
        if len(node.args) != 1 or node.kwargs or not isinstance(x, Value):
            raise UnsupportedOperation("a module with other arguments than one value")
        name = self.stage.checkpoint_name(target)
        output = export_module(self.builder, self.stage.module.get_submodule(target), name, x.name, x.shape, node.name)
        return Value(output, node.meta["shape"], node.meta["dtype"])

    def _rounded_cache(self, node: fx.Node, x: Any, scale: Tensor, kv_heads: int) -> Value:
        """Keys or values of an attention call, quantized and back."""
        if not isinstance(x, Value):
            raise UnsupportedOperation("keys or values that are constant")
        name = self.scale_names.get(node, f"{node.name}_scale")
        return export_rounded_cache(self.builder, x, scale, kv_heads, name, node.name)

    def _function(self, node: fx.Node) -> Any:
        args, kwargs = self._arguments(node)
        name = str(getattr(node.target, "__name__", node.target))
        if node.target is round_cache:
            return self._rounded_cache(node, *args, **kwargs)
        if not _holds_value((args, kwargs)):  # constant
            if (name not in RULES and name not in COMPUTED) or not callable(node.target):
                raise UnsupportedOperation(f"a call of {name}")
            return node.target(*args, **kwargs)
        if name in IN_PLACE or name not in RULES:
            raise UnsupportedOperation(f"a call of {name}")
        exporter = NodeExporter(self.builder, node.name, node.meta.get("shape"), node.meta.get("dtype"))
        if node.target is operator.getitem and isinstance(args[0], list | tuple):
            return args[0][args[1]]
        if args and isinstance(args[0], Tensor) and name not in _TAKES_TENSORS:
            raise UnsupportedOperation(f"a call of {name} on a constant")
        kwargs.pop("inplace", None)
        if "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        try:
            return RULES[name](exporter, *args, **kwargs)
        except TypeError as error:
            raise UnsupportedOperation(f"a call of {name} with these arguments: {error}") from error

    def _arguments(self, node: fx.Node) -> tuple[Any, dict[str, Any]]:
        def replace_leaf(leaf: Any) -> Any:
            if isinstance(leaf, torch.device):
                return torch.device("cpu")
            return _Wrapped(self.values[leaf]) if isinstance(leaf, fx.Node) else leaf

        # `map_aggregate` would descend into a list in place of a node, so values are wrapped.
        args, kwargs = map_aggregate((node.args, node.kwargs), replace_leaf)
        return _unwrap(tuple(args)), _unwrap(dict(kwargs))

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.builder.nodes, self.stage.name, self.inputs, self.outputs, initializer=self.builder.initializers
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="vlqc"
        )
        schemes = {site.name: str(site.scheme or "none") for site in self.stage.sites.values()}
        schemes |= {cache.name: str(cache.scheme) for cache in self.stage.caches.values() if cache.is_quantized}
        helper.set_model_props(model, {"stage": self.stage.name, "part": self.stage.part, **schemes})
        return model


_TAKES_TENSORS = frozenset(
    "cat concat add __add__ __radd__ mul __mul__ __rmul__ sub __sub__ __rsub__ div __truediv__ matmul".split()
)


def _scale_names(stage: Stage) -> Iterator[tuple[fx.Node, str]]:
    for cache in stage.caches.values():
        node = stage.node(cache.node)
        arguments = attention_arguments(node.args, node.kwargs)
        yield from ((arguments[part], f"{getattr(cache, part)}.kv_cache_scale") for part in ("key", "value"))


class _Wrapped:
    def __init__(self, value: Any) -> None:
        self.value = value


def _unwrap(value: Any) -> Any:
    if isinstance(value, _Wrapped):
        return value.value
    if isinstance(value, slice):
        return slice(*(_unwrap(part) for part in (value.start, value.stop, value.step)))
    if isinstance(value, dict):
        return {key: _unwrap(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unwrap(part) for part in value]
    if isinstance(value, tuple):
        return tuple(_unwrap(part) for part in value)
    return value


def _holds_value(value: Any) -> bool:
    if isinstance(value, Value):
        return True
    if isinstance(value, slice):
        return any(_holds_value(part) for part in (value.start, value.stop, value.step))
    if isinstance(value, dict):
        return any(_holds_value(item) for item in value.values())
    return isinstance(value, list | tuple) and any(_holds_value(part) for part in value)
