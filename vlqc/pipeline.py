"""Passes and the manager that runs them; a pipeline as text and back.

A pipeline text is a comma-separated list of pass names, each with its options in braces, as in MLIR:

    insert-observers{tokens=4096},assign-precision{fallback=seed},smooth-m2,quantize-activations{method=histogram}
"""

import dataclasses
import importlib
import time
import types
import typing
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from vlqc.errors import Fault, InternalError, UserError, near_miss
from vlqc.invariants import check
from vlqc.ir import Stage, fingerprint
from vlqc.memory import return_memory
from vlqc.options import Options
from vlqc.printer import print_stage

REGISTRY: dict[str, str] = {
    "split-window-attention": "vlqc.passes.split_window_attention:SplitWindowAttention",
    "insert-observers": "vlqc.passes.insert_observers:InsertObservers",
    "assign-precision": "vlqc.passes.assign_precision:AssignPrecision",
    "shift-norms": "vlqc.passes.shift_norms:ShiftNorms",
    "smooth-m2": "vlqc.passes.smooth_m2:SmoothM2",
    "smooth-m4": "vlqc.passes.smooth_m4:SmoothM4",
    "quantize-activations": "vlqc.passes.quantize_activations:QuantizeActivations",
    "quantize-weights": "vlqc.passes.quantize_weights:QuantizeWeights",
    "measure-sensitivity": "vlqc.passes.measure_sensitivity:MeasureSensitivity",
    "lower-linears": "vlqc.passes.lower_linears:LowerLinears",
    "propagate-quantized": "vlqc.passes.propagate_quantized:PropagateQuantized",
}

# Modules that a pass wraps around the model's own, by the name of their class; made of (the module).
WRAPPERS: dict[str, str] = {"Windowed": "vlqc.passes.split_window_attention:Windowed"}
RUNNERS = ("insert-observers",)  # passes that run a stage's samples
HANDING_ON = (*RUNNERS, "propagate-quantized")  # passes that decide what later stages are given
MEASURING = "measure-sensitivity"  # what a precision search goes by


@dataclass(frozen=True)
class Pass:
    """One step over one stage. Subclasses are frozen dataclasses whose fields are their options.

    name: kebab-case; kind: an analysis measures and decides, a rewrite changes weights, modules or the graph;
    summary: one line for `vlqc passes`; after: passes that must have run; before: passes that must not have.
    """

    name: ClassVar[str]
    kind: ClassVar[Literal["analysis", "rewrite"]]
    summary: ClassVar[str]
    after: ClassVar[tuple[str, ...]] = ()
    before: ClassVar[tuple[str, ...]] = ()

    def run(self, stage: Stage) -> bool:
        """Works on `stage` in place; whether anything changed."""
        raise TypeError(f"{type(self).__name__} does not say what it does: define run(stage) -> bool")


@dataclass
class PassManager:
    """Runs passes over a stage; after each: verifies the stage, holds the pass to its word, times it, shows it.

    after: called with (stage, number of the pass from 0, pass) once the checks have passed (dumps hang here).
    """

    passes: Sequence[Pass]
    verify: bool = True
    after: Callable[[Stage, int, Pass], None] = lambda stage, number, done: None
    before: Callable[[Stage, Pass], None] = lambda stage, coming: None
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, stage: Stage) -> None:
        """Raises InternalError if a pass leaves an invalid stage, or lies about what it changed."""
        known = self._evidence(stage)
        for number, step in enumerate(self.passes):
            self.before(stage, step)
            started = time.perf_counter()
            changed = step.run(stage)
            self.seconds[step.name] = self.seconds.get(step.name, 0.0) + time.perf_counter() - started
            if self.verify:
                if faults := check(stage):
                    listed = "\n  ".join(faults)
                    raise InternalError(
                        f"{stage.name} is not valid after {step.name}:\n  {listed}\n{print_stage(stage)}"
                    )
                known = self._hold_to_word(stage, step, changed, known)
            self.after(stage, number, step)
            return_memory()

    def _evidence(self, stage: Stage, trusted: "_Evidence | None" = None) -> "_Evidence":
        """trusted: of before an analysis: tensors that PyTorch knows to be untouched since keep their digests."""
        if not self.verify:
            return _Evidence({}, "", {})
        module = stage.module or nn.Module()
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        weights, marks = {}, {}
        for name, tensor in tensors.items():
            marks[name] = (weakref.ref(tensor), tensor.data_ptr(), tensor._version)
            untouched = trusted is not None and trusted.stands_for(name, tensor)
            weights[name] = trusted.weights[name] if trusted is not None and untouched else fingerprint(tensor)
        return _Evidence(weights, print_stage(stage, tensors=False), marks)

    def _hold_to_word(self, stage: Stage, step: Pass, changed: bool, known: "_Evidence") -> "_Evidence":
        """Returns the evidence after the pass, which is the evidence before the next one."""
        now = self._evidence(stage, known if step.kind == "analysis" else None)
        if step.kind == "analysis" and now.weights != known.weights:
            names = sorted({*now.weights, *known.weights})
            touched = [name for name in names if now.weights.get(name) != known.weights.get(name)]
            raise InternalError(f"{step.name} is an analysis but changed {', '.join(touched)} of {stage.name}")
        if changed != (now != known):
            says = "changed something but says it did not" if not changed else "says it changed something but did not"
            raise InternalError(f"{step.name} {says}, in {stage.name}")
        return now


@dataclass(frozen=True)
class _Evidence:
    """Digests of all weights, the text of everything else; per weight: which tensor, where, changed how often."""

    weights: dict[str, int]
    text: str
    marks: dict[str, "tuple[weakref.ref[Tensor], int, int]"] = field(compare=False)

    def stands_for(self, name: str, tensor: Tensor) -> bool:
        """Whether the tensor of this name was the same one, at the same place, and nothing was written to it since."""
        known, place, version = self.marks.get(name, (None, 0, 0))
        return known is not None and known() is tensor and (place, version) == (tensor.data_ptr(), tensor._version)


def require(holds: bool, what: str) -> None:
    """For a pass's __post_init__: ValueError unless it holds; a pipeline text makes that a fault of the user's."""
    if not holds:
        raise ValueError(what)


def load_pass(name: str) -> type[Pass]:
    """The class of a registered pass; UserError with near misses for an unknown name."""
    if name not in REGISTRY:
        raise UserError(
            Fault(f"unknown pass {name!r}", fix=near_miss(name, REGISTRY) or f"choose from {', '.join(REGISTRY)}")
        )
    module, _, attribute = REGISTRY[name].partition(":")
    loaded: type[Pass] = getattr(importlib.import_module(module), attribute)
    return loaded


def load_wrapper(kind: str) -> type[nn.Module]:
    """The class of a module that some pass wraps around others; ValueError for an unknown name."""
    if kind not in WRAPPERS:
        raise ValueError(f"no pass makes a module of the kind {kind}")
    module, _, attribute = WRAPPERS[kind].partition(":")
    loaded: type[nn.Module] = getattr(importlib.import_module(module), attribute)
    return loaded


def check_order(passes: Sequence[Pass], *, search: bool = False) -> None:
    """UserError if a pass stands before one that it needs, or after one that takes away what it works on.

    search: whether a precision search follows, which goes by what a pass has to measure.
    """
    faults = []
    for number, step in enumerate(passes):
        earlier = {each.name for each in passes[:number]}
        for name in (name for name in step.after if name not in earlier):
            faults.append(Fault(f"{step.name} needs {name} before it", "--pipeline", fix=f"put {name} before it"))
        for name in (name for name in step.before if name in earlier):
            why = f"after {name} there is nothing left for it to work on"
            faults.append(Fault(f"{step.name} stands after {name}", "--pipeline", why, f"put it before {name}"))
    if not any(step.name in RUNNERS for step in passes):
        why = "it runs the samples through each stage, and the next stage needs what they become"
        faults.append(Fault(f"the pipeline lacks {RUNNERS[0]}", "--pipeline", why, f"let it start with {RUNNERS[0]}"))
    if search and not any(step.name == MEASURING for step in passes):
        fix = f"put {MEASURING} before lower-linears, or leave out --fallback auto"
        faults.append(Fault(f"the pipeline lacks {MEASURING}", "--pipeline", "--fallback auto goes by it", fix))
    if faults:
        raise UserError(*faults)


def needed_by_later_stages(passes: Sequence[Pass]) -> list[Pass]:
    """The passes up to the last one that decides what a stage hands on; a stage nobody looks at needs no others."""
    last = max((number for number, step in enumerate(passes) if step.name in HANDING_ON), default=-1)
    return list(passes[: last + 1])


def pipeline_text(options: Options) -> str:
    """The pipeline that the user's options ask for, in normal form: options at their default are left out."""
    if options.pipeline is not None:
        return print_pipeline(parse_pipeline(options.pipeline))
    choose = {
        "scheme": str(options.scheme),
        "group_size": options.group_size,
        "target": options.engine_target,
        "scope": options.w4a8_scope,
        "fallback": "seed" if options.fallback == "seed" else "none",
        "exclude": options.exclude,
        "include": options.include,
    }
    foreseen = {"clip": options.act_method != 1, "weights": options.weight_method}
    smoothing: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "m2": [("smooth-m2", foreseen)],
        "m4": [("smooth-m4", {"alpha": options.anti_alpha, **foreseen})],
        "none": [],
    }
    shift: list[tuple[str, dict[str, Any]]] = [("shift-norms", {})] if options.shift else []
    onward: list[tuple[str, dict[str, Any]]] = [("propagate-quantized", {})] if options.propagate == "quantized" else []
    measure: list[tuple[str, dict[str, Any]]] = (
        [(MEASURING, {"target": options.engine_target, "method": options.weight_method})]
        if options.fallback == "auto"
        else []
    )
    method = {1: "minmax", 2: "histogram", 3: "automatic"}[options.act_method]
    named: list[tuple[str, dict[str, Any]]] = [
        ("split-window-attention", {}),
        ("insert-observers", {"balance": options.modality_balance}),
        ("assign-precision", choose),
        *shift,
        *smoothing[options.anti_method],
        ("quantize-activations", {"method": method}),
        ("quantize-weights", {"method": options.weight_method}),
        *measure,
        ("lower-linears", {}),
        *onward,
    ]
    return print_pipeline([load_pass(name)(**given) for name, given in named])


def print_pipeline(passes: Sequence[Pass]) -> str:
    """The text of a pipeline; options that have their default are left out."""
    return ",".join(_print_pass(step) for step in passes)


def parse_pipeline(text: str) -> list[Pass]:
    """`print_pipeline` backwards. UserError with every fault of the text at once."""
    passes: list[Pass] = []
    faults: list[Fault] = []
    for part in _split_outside_braces(text):
        try:
            passes.append(_parse_pass(part))
        except UserError as error:
            faults += error.faults
    if not passes and not faults:
        faults = [Fault("the pipeline is empty", where="--pipeline", fix=f"name passes from {', '.join(REGISTRY)}")]
    if faults:
        raise UserError(*faults)
    return passes


def _print_pass(step: Pass) -> str:
    options = [
        f"{option.name}={_print_value(getattr(step, option.name))}"
        for option in dataclasses.fields(step)
        if getattr(step, option.name) != option.default
    ]
    return step.name + (f"{{{','.join(options)}}}" if options else "")


def _print_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ";".join(value) if isinstance(value, tuple) else str(value)


def _split_outside_braces(text: str) -> list[str]:
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [part for part in [*parts, current.strip()] if part]


def _parse_pass(text: str) -> Pass:
    name, brace, rest = text.partition("{")
    name = name.strip()
    kind = load_pass(name)
    if brace and not rest.endswith("}"):
        raise UserError(Fault(f"{name}: options must end with }}", where=text, fix="write name{option=value,...}"))
    types_of = typing.get_type_hints(kind)
    known = [option.name for option in dataclasses.fields(kind)]
    given: dict[str, Any] = {}
    faults = []
    for item in filter(None, (item.strip() for item in rest.removesuffix("}").split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in known or not equals:
            fix = near_miss(key, known) or (f"{name} takes {', '.join(known)}" if known else f"{name} takes no options")
            faults.append(Fault(f"{name} has no option {item!r}", where=text, fix=fix))
            continue
        if key in given:
            faults.append(Fault(f"{name}: {key} is given twice", where=text))
        try:
            given[key] = _parse_value(value, types_of[key])
        except ValueError as error:
            faults.append(Fault(f"{name}: {key}={value} cannot be used", where=text, why=str(error)))
    if faults:
        raise UserError(*faults)
    try:
        return kind(**given)
    except ValueError as error:  # a pass may check its options when it is made
        raise UserError(Fault(f"{name}: these options cannot be used", where=text, why=str(error))) from error


def _parse_value(text: str, wanted: Any) -> Any:
    """A value of the field's type; ValueError says what would be right."""
    origin = typing.get_origin(wanted)
    if origin is Literal:
        choices = typing.get_args(wanted)
        if text not in choices:
            raise ValueError(f"choose from {', '.join(choices)}")
        return text
    if origin in (typing.Union, types.UnionType):
        inner = [kind for kind in typing.get_args(wanted) if kind is not type(None)]
        return None if text == "None" else _parse_value(text, inner[0])
    if origin is tuple:
        return tuple(filter(None, text.split(";")))
    if wanted is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("true or false is wanted")
        return text.lower() == "true"
    if wanted in (int, float):
        try:
            return wanted(text)
        except ValueError:
            raise ValueError("a whole number is wanted" if wanted is int else "a number is wanted") from None
    return text
