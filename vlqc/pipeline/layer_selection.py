"""Patterns over checkpoint layer names: what --exclude and --include mean, checked before anything runs."""

from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase

from vlqc.errors import Fault, UserError
from vlqc.families.qwen2_5_vl import fused_group, stays_float_in_reference
from vlqc.formatting import did_you_mean
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.options.options import Options
from vlqc.targets.rules import group_faults, supported_schemes
from vlqc.targets.schemes import Scheme


def check_layers(model: StreamedModel, options: Options) -> None:
    """UserError for patterns that match nothing, or leave what no engine loads."""
    check_globs([*model.layers, *model.heads], exclude=options.exclude)
    check_globs(model.layers, include=options.include)
    check_globs(model.stages, what="stage", dump_stages=options.dump_stages)
    check_plan(model.layers, options)


def check_plan(layers: Iterable[str], options: Options) -> None:
    """UserError where --exclude leaves a model that the target does not load, before hours of work.

    An exclusion extends to its fused group, so only rules about whole parts of the model can be broken.
    """
    excluded = {
        member
        for layer in layers
        if any(fnmatchcase(layer, pattern) for pattern in options.exclude)
        for member in fused_group(layer)
    }
    if not excluded:
        return
    target, planned = options.engine_target, {}
    for layer in layers:
        included = any(fnmatchcase(layer, pattern) for pattern in options.include)
        by_seed = options.fallback == "reference" and stays_float_in_reference(layer) and not included
        stays = layer in excluded or by_seed
        quantized = not stays and options.scheme in supported_schemes(target, layer)
        planned[layer] = options.scheme if quantized else Scheme.FLOAT
    if all(scheme == Scheme.FLOAT for scheme in planned.values()):
        raise UserError(Fault("nothing would be quantized", "--exclude", "every layer stays float", "exclude less"))
    if faults := group_faults(target, planned):
        raise UserError(*(replace(fault, where=f"--exclude, for {target}") for fault in faults))


def check_globs(layers: Iterable[str], what: str = "layer", **globs: tuple[str, ...]) -> None:
    """UserError for every pattern that matches no layer (or stage); keyword names are the flags they came with."""
    known = list(layers)
    faults = []
    for flag, patterns in globs.items():
        for pattern in patterns:
            if not any(fnmatchcase(layer, pattern) for layer in known):
                named = f"{what}s are named like {known[0]}, {known[-1]}" if known else "the model has none"
                fix = did_you_mean(pattern, known) or named
                faults.append(Fault(f"--{flag} {pattern} matches no {what}", fix=fix))
    if faults:
        raise UserError(*faults)
