"""The table of pass names, and the text form of a pipeline.

A pipeline text is a comma-separated list of pass names, each with its options in braces, as in MLIR:

    insert-observers{tokens=4096},assign-precision{fallback=none},smooth-m2,quantize-activations{method=histogram}

A name is a key of REGISTRY, an entry point of an installed package, or `module:Class`. Importing this module does not
import torch: classes of passes are imported when they are used.
"""

import pkgutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlqc.errors import Fault, UserError
from vlqc.formatting import did_you_mean
from vlqc.import_paths import entry_points, import_path, is_import_path
from vlqc.pipeline.pass_api import Pass
from vlqc.pipeline.pass_class import resolve_pass
from vlqc.pipeline.spec import parse_spec, print_spec

if TYPE_CHECKING:
    from torch import nn

REGISTRY: dict[str, str] = {
    "rotate-residual": "vlqc.passes.rotate_residual:RotateResidual",
    "rotate-heads": "vlqc.passes.rotate_heads:RotateHeads",
    "split-window-attention": "vlqc.passes.split_window_attention:SplitWindowAttention",
    "insert-observers": "vlqc.passes.insert_observers:InsertObservers",
    "assign-precision": "vlqc.passes.assign_precision:AssignPrecision",
    "shift-norms": "vlqc.passes.shift_norms:ShiftNorms",
    "smooth-m2": "vlqc.passes.smooth_m2:SmoothM2",
    "smooth-m4": "vlqc.passes.smooth_m4:SmoothM4",
    "quantize-activations": "vlqc.passes.quantize_activations:QuantizeActivations",
    "quantize-weights": "vlqc.passes.quantize_weights:QuantizeWeights",
    "quantize-cache": "vlqc.passes.quantize_cache:QuantizeCache",
    "measure-sensitivity": "vlqc.passes.measure_sensitivity:MeasureSensitivity",
    "lower-linears": "vlqc.passes.lower_linears:LowerLinears",
    "lower-cache": "vlqc.passes.lower_cache:LowerCache",
    "propagate-quantized": "vlqc.passes.propagate_quantized:PropagateQuantized",
}
ENTRY_POINTS = "vlqc.passes"  # entry point group in which installed packages register passes

# Modules that passes wrap around modules of the model, by class name; each is constructed with the wrapped module.
WRAPPERS: dict[str, str] = {"Windowed": "vlqc.passes.split_window_attention:Windowed"}


def load_pass(name: str) -> type[Pass]:
    """Imports the class of a pass.

    Args:
        name: a key of REGISTRY, an entry point of an installed package, or `module:Class`.

    Raises:
        UserError: unknown name (with the closest known ones), or one that two classes claim.
    """
    if name in REGISTRY:
        return resolve_pass(REGISTRY[name])
    if is_import_path(name):
        cls = resolve_pass(name)
        if cls.name in REGISTRY and REGISTRY[cls.name] != import_path(cls):
            why = f"{cls.name} is the name of a pass of vlqc, and the order of passes is checked by name"
            raise UserError(Fault(f"the name of {name} is {cls.name}", "--pipeline", why, "rename the class's `name`"))
        return cls
    plugins = plugin_passes()
    if name not in plugins:
        known = [*REGISTRY, *(plugin for plugin in plugins if plugin not in REGISTRY)]
        fix = did_you_mean(name, known) or f"choose from {', '.join(known)}, or write module:Class"
        raise UserError(Fault(f"unknown pass {name!r}", "--pipeline", fix=fix))
    if len(plugins[name]) > 1:
        why = f"installed packages register {' and '.join(plugins[name])} under this name"
        raise UserError(Fault(f"ambiguous pass {name!r}", "--pipeline", why, "write the import path of one of them"))
    (path,) = plugins[name]
    cls = resolve_pass(path)
    if cls.name != name:
        why = f"its entry point is {name}, its class attribute `name` is {cls.name}"
        raise UserError(Fault(f"{path} has two names", "--pipeline", why, f"write {path}"))
    return cls


def plugin_passes() -> dict[str, list[str]]:
    """Name -> import paths of the passes that installed packages register. Imports none of them."""
    return entry_points(ENTRY_POINTS)


def load_wrapper(name: str) -> "type[nn.Module]":
    """The class of a wrapper module by its name. Raises ValueError for an unknown name."""
    if name not in WRAPPERS:
        raise ValueError(f"unknown wrapper module {name!r}")
    cls: type[nn.Module] = pkgutil.resolve_name(WRAPPERS[name])
    return cls


def parse_pipeline(text: str) -> list[Pass]:
    """Parses a pipeline text. `module:Class` imports that module, so pass trusted text only.

    Raises:
        UserError: with every fault of the text, not only the first.
    """
    passes: list[Pass] = parse_spec(text, load_pass)
    if not passes:
        fix = f"name passes from {', '.join(REGISTRY)}"
        raise UserError(Fault("the pipeline is empty", where="--pipeline", fix=fix))
    return passes


def print_pipeline(passes: Sequence[Pass]) -> str:
    """The text of a pipeline, without the options that have their default. `parse_pipeline` reads it back."""
    return print_spec([(_name_in_text(type(step)), step) for step in passes])


def _name_in_text(cls: type[Pass]) -> str:
    """The name of the pass where `load_pass` maps it to this class, else the import path of the class."""
    path = import_path(cls)
    if REGISTRY.get(cls.name) == path or "<locals>" in path:  # a class defined in a function has no import path
        return cls.name
    return cls.name if plugin_passes().get(cls.name) == [path] else path
