"""Where passes are found; a pipeline of them as text and back; in which order they may stand; what options build.

A pipeline text is a comma-separated list of pass names, each with its options in braces, as in MLIR:

    insert-observers{tokens=4096},assign-precision{fallback=none},smooth-m2,quantize-activations{method=histogram}

A name is one of the table below, one that an installed package offers, or `module:Class`.
"""

import importlib
from collections.abc import Sequence
from typing import Any

from torch import nn

from vlqc.errors import Fault, UserError
from vlqc.formatting import did_you_mean
from vlqc.options.options import Options
from vlqc.pipeline.manager import Pass as Pass
from vlqc.pipeline.manager import PassManager as PassManager
from vlqc.pipeline.manager import require as require
from vlqc.pipeline.plugins import import_path, installed_places, is_import_path, resolve_class
from vlqc.pipeline.spec import parse_steps, print_steps

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
ENTRY_POINTS = "vlqc.passes"  # the group in which installed packages offer passes of theirs
RUNNERS = ("insert-observers",)  # passes that run a stage's samples
HANDING_ON = (*RUNNERS, "propagate-quantized")  # passes that decide what later stages are given
MEASURING = "measure-sensitivity"  # what a precision search goes by


def load_pass(name: str) -> type[Pass]:
    """The class of a pass: of a name of the table, of one that an installed package offers, or of `module:Class`.

    UserError with near misses for an unknown name, and where a name would stand for two classes.
    """
    if name in REGISTRY:
        return resolve_class(REGISTRY[name], Pass)
    if is_import_path(name):
        kind = resolve_class(name, Pass)
        if kind.name in REGISTRY and REGISTRY[kind.name] != import_path(kind):
            why = "a pass of vlqc has this name, and orders of passes go by names"
            raise UserError(Fault(f"{name} calls itself {kind.name}", "--pipeline", why, "give the class another name"))
        return kind
    offered = installed_places(ENTRY_POINTS)
    known = [*REGISTRY, *(each for each in offered if each not in REGISTRY)]
    if name not in offered:
        fix = did_you_mean(name, known) or f"choose from {', '.join(known)}, or write module:Class"
        raise UserError(Fault(f"unknown pass {name!r}", fix=fix))
    if len(offered[name]) > 1:
        why = f"installed packages offer {' and '.join(offered[name])} under it"
        raise UserError(Fault(f"the name {name} is taken twice", "--pipeline", why, "write the one that is meant"))
    (place,) = offered[name]
    kind = resolve_class(place, Pass)
    if kind.name != name:
        why = f"a package offers it as {name}, the class calls itself {kind.name}"
        raise UserError(Fault(f"{place} has two names", "--pipeline", why, f"write {place}"))
    return kind


def offered_passes() -> dict[str, list[str]]:
    """Passes of installed packages: name -> "module:Class" of all that want it. Nothing is imported."""
    return installed_places(ENTRY_POINTS)


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
    classes: dict[str, type[Pass]] = {}
    for step in passes:
        if classes.setdefault(step.name, type(step)) is not type(step):
            why = f"{import_path(classes[step.name])} and {import_path(type(step))} call themselves so"
            faults.append(Fault(f"two passes are named {step.name}", "--pipeline", why, "rename one of them"))
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


def pipeline_of(options: Options, passes: Sequence[Pass] | None = None) -> list[Pass]:
    """The passes of a compilation: those given, else those that its options ask for. UserError as `check_order`."""
    pipeline = list(passes) if passes is not None else parse_pipeline(pipeline_text(options))
    check_order(pipeline, search=options.fallback == "auto")
    return pipeline


def pipeline_text(options: Options) -> str:
    """The pipeline that the user's options ask for, in normal form: options at their default are left out."""
    if options.pipeline is not None:
        return print_pipeline(parse_pipeline(options.pipeline))
    choose = {
        "scheme": str(options.scheme),
        "group_size": options.group_size,
        "target": options.engine_target,
        "scope": options.w4a8_scope,
        "fallback": "none" if options.fallback in ("none", "auto") else "reference",
        "exclude": options.exclude,
        "include": options.include,
    }
    target_warnings = {"clip": options.act_method != 1, "weights": options.weight_method}
    smoothing: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "m2": [("smooth-m2", target_warnings)],
        "m4": [("smooth-m4", {"alpha": options.anti_alpha, **target_warnings})],
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
    return print_steps([(_name_in_text(type(step)), step) for step in passes])


def parse_pipeline(text: str) -> list[Pass]:
    """`print_pipeline` backwards. UserError with every fault of the text at once.

    `module:Class` imports that module: hand over nobody's text but the user's own.
    """
    passes: list[Pass] = parse_steps(text, load_pass)
    if not passes:
        fix = f"name passes from {', '.join(REGISTRY)}"
        raise UserError(Fault("the pipeline is empty", where="--pipeline", fix=fix))
    return passes


def _name_in_text(kind: type[Pass]) -> str:
    """What reads back as this class: its name where that leads to it, otherwise where it lies."""
    place = import_path(kind)
    if REGISTRY.get(kind.name) == place or "<locals>" in place:  # what lies in a function nobody finds
        return kind.name
    return kind.name if installed_places(ENTRY_POINTS).get(kind.name) == [place] else place
