"""Syntax of functions, arguments and strings in the text of a stage, for printing and parsing.

The syntax is Python's, with `%name` for the value of a node. Parsing uses Python's `ast` and executes nothing;
functions are looked up in `NAMESPACES`, never imported.
"""

import ast
import builtins
import math
import operator
import re
import types
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.overrides import resolve_name

import vlqc.families.experts
import vlqc.ir.stage
import vlqc.kernels_ref.kv_cache
from vlqc.errors import UserError
from vlqc.formatting import did_you_mean

STRING = r'"(?:[^"\\]|\\.)*"'

# Functions that a text can name. A function is printed with the first namespace that contains it.
NAMESPACES: dict[str, Any] = {
    "torch.Tensor": torch.Tensor,
    "torch.nn.functional": torch.nn.functional,
    "torch": torch,
    "operator": operator,
    "math": math,
    "builtins": types.SimpleNamespace(getattr=builtins.getattr),
    "vlqc.families.experts": types.SimpleNamespace(chosen_rows=vlqc.families.experts.chosen_rows),
    "vlqc.kernels_ref.kv_cache": types.SimpleNamespace(round_cache=vlqc.kernels_ref.kv_cache.round_cache),
    "vlqc.ir.stage": types.SimpleNamespace(observe=vlqc.ir.stage.observe),
}


@dataclass(frozen=True)
class Unknown:
    """A function outside `NAMESPACES` or a value without syntax, of which the text contains only the name."""

    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{self.name} was parsed from text and cannot be called")


# ---- printing -------------------------------------------------------------------------------------------------------


def function_name(function: Any) -> str:
    """E.g. `torch.Tensor.reshape`; `unknown("module.name")` for functions outside `NAMESPACES`."""
    own = str(getattr(function, "__name__", ""))
    for candidate in (*(f"{space}.{own}" for space in NAMESPACES), resolve_name(function) or ""):
        if find_function(candidate) is function:
            return candidate
    return _print_unknown(function)


def find_function(name: str) -> Callable[..., Any] | None:
    """The function with a dotted name in `NAMESPACES`; None for anything else, including classes and modules."""
    space, _, attribute = name.rpartition(".")
    function = getattr(NAMESPACES.get(space), attribute, None) if space in NAMESPACES else None
    return function if callable(function) and not isinstance(function, type) else None


def literal(value: Any) -> str:
    """Python syntax of an argument; nodes as `%name`; floats round-trip exactly."""
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if value is None or value is Ellipsis or isinstance(value, bool):
        return "..." if value is Ellipsis else str(value)
    if isinstance(value, str):
        return quote(str(value))
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        return float.__repr__(value)
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        return str(value)
    if isinstance(value, torch.device):
        return f"torch.device({quote(str(value))})"
    if isinstance(value, slice):
        return f"slice({literal(value.start)}, {literal(value.stop)}, {literal(value.step)})"
    if isinstance(value, tuple):
        return f"({', '.join(map(literal, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{literal(key)}: {literal(held)}' for key, held in value.items())}}}"
    return _print_unknown(value)


def quote(text: str) -> str:
    """Python syntax of a string, always in double quotes and on one line."""
    escaped = repr(text + '"')[1:-2]  # repr uses single quotes for a string with a double quote
    return '"' + escaped.replace("\\'", "'").replace('"', '\\"') + '"'


def _print_unknown(value: Any) -> str:
    if isinstance(value, Unknown):
        return f"unknown({quote(value.name)})"
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"unknown({quote(f'{named.__module__}.{named.__qualname__}')})"


# ---- parsing --------------------------------------------------------------------------------------------------------


def unquote(quoted: str) -> str:
    """Inverse of `quote`. Raises ValueError or SyntaxError for anything but a string."""
    return str(ast.literal_eval(_tree(quoted)))


def _tree(source: str) -> ast.expr:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # warnings, such as for "\d" or 1if, become errors
        return ast.parse(source, mode="eval").body


class Expression:
    """A parsed expression.

    written: its text; nodes: by name; fault: creates the error from (what is wrong, column, how to fix it).
    """

    def __init__(self, written: str, nodes: Mapping[str, fx.Node], fault: Callable[[str, int, str], UserError]) -> None:
        self.nodes, self._fault = nodes, fault
        self.node_columns: set[int] = set()  # columns of `%`, which is replaced by `_`
        self.source = re.sub(rf"({STRING})|%(?=[A-Za-z_])", self._replace_percent, written)
        try:
            self.tree = _tree(self.source)
        except SyntaxError as error:
            raise fault(f"this is not an expression: {error.msg}", (error.offset or 1) - 1, "") from None
        except (ValueError, RecursionError, MemoryError) as error:
            raise fault(f"this is not an expression: {error or type(error).__name__}", 0, "") from None

    def _replace_percent(self, match: re.Match[str]) -> str:
        if match[1] is None:
            self.node_columns.add(match.start())
        return match[1] or "_"

    def fault(self, at: ast.AST, what: str, fix: str = "") -> UserError:
        return self._fault(what, self._column(at), fix)

    def _column(self, at: ast.AST) -> int:
        offset = getattr(at, "col_offset", 0)  # in bytes
        return len(self.source.encode()[:offset].decode())

    def value(self) -> Any:
        return self._literal(self.tree)

    def operation(self) -> tuple[str, Any, tuple[Any, ...], dict[str, Any]]:
        """(op, target, args, kwargs) for `fx.Graph.create_node`."""
        called = self.tree
        if not isinstance(called, ast.Call):
            raise self.fault(called, 'expected an operation, such as torch.relu(%x) or module("NAME")(%x)')
        if isinstance(called.func, ast.Name) and called.func.id in ("input", "constant"):
            return ("placeholder" if called.func.id == "input" else "get_attr"), self._one_string(called), (), {}
        args = tuple(self._literal(argument) for argument in called.args)
        kwargs: dict[str, Any] = {}
        for keyword in called.keywords:
            value = self._literal(keyword.value)
            new = value if keyword.arg is None else {keyword.arg: value}
            if not isinstance(new, dict) or not all(isinstance(key, str) and key not in kwargs for key in new):
                raise self.fault(keyword, "expected NAME=VALUE, each name once")
            kwargs |= new
        return *self._callee(called.func), args, kwargs

    def _callee(self, func: ast.expr) -> tuple[str, Any]:
        if isinstance(func, ast.Call) and isinstance(func.func, ast.Name):
            kinds: dict[str, tuple[str, Callable[[str], Any]]] = {
                "module": ("call_module", str),
                "method": ("call_method", str),
                "unknown": ("call_function", Unknown),
            }
            if func.func.id in kinds:
                op, make = kinds[func.func.id]
                return op, make(self._one_string(func))
        name = self._dotted(func)
        if (function := find_function(name)) is None:
            space, _, attribute = name.rpartition(".")
            close = did_you_mean(attribute, dir(NAMESPACES[space])) if space in NAMESPACES else ""
            fix = close or f'functions come from {", ".join(NAMESPACES)}; others are written unknown("NAME")'
            raise self.fault(func, f"unknown function {name}", fix)
        return "call_function", function

    def _one_string(self, called: ast.Call) -> str:
        match called:
            case ast.Call(args=[ast.Constant(value=str(name))], keywords=[]):
                return name
        raise self.fault(called, "expected one string in parentheses")

    def _dotted(self, tree: ast.expr) -> str:
        try:
            return ast.unparse(tree) if isinstance(tree, ast.Attribute | ast.Name) else "?"
        except RecursionError:
            return "?"

    def _literal(self, tree: ast.expr) -> Any:
        match tree:
            case ast.Constant(value=None | bool() | int() | float() | str() as value):
                return value
            case ast.Constant(value=value) if value is Ellipsis:
                return value
            case ast.Name(id="inf" | "nan" as word):
                return float(word)
            case ast.Name(id=word) if self._column(tree) in self.node_columns:
                if word[1:] not in self.nodes:
                    raise self.fault(tree, f"%{word[1:]} is not defined above", did_you_mean(word[1:], self.nodes))
                return self.nodes[word[1:]]
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant() | ast.Name() as operand):
                if isinstance(value := self._literal(operand), int | float):
                    return -value
            case ast.Tuple(elts=elements):
                return tuple(self._literal(element) for element in elements)
            case ast.List(elts=elements):
                return [self._literal(element) for element in elements]
            case ast.Dict(keys=keys, values=values) if None not in keys:
                with suppress(TypeError):  # an unhashable key
                    return {self._literal(k): self._literal(v) for k, v in zip(keys, values, strict=True) if k}
            case ast.Attribute():
                value = getattr(torch, self._dotted(tree).removeprefix("torch."), None)
                if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
                    return value
            case ast.Call(func=ast.Name(id="slice"), args=[start, stop, step], keywords=[]):
                return slice(self._literal(start), self._literal(stop), self._literal(step))
            case ast.Call(func=ast.Name(id="unknown")):
                return Unknown(self._one_string(tree))
            case ast.Call(func=ast.Attribute() as func) if self._dotted(func) == "torch.device":
                with suppress(RuntimeError):
                    return torch.device(self._one_string(tree))
        raise self.fault(tree, "expected a value: number, string, None, %NODE, slice, dtype, tuple, list or dict")
