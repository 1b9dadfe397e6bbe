"""Checks the layer patterns of --exclude and --include, and the schemes of all layers, before anything is computed."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from vlqc.errors import Fault, UserError
from vlqc.families.family import ModelFamily, Role
from vlqc.families.layer_names import layer_pattern, matches_any
from vlqc.formatting import did_you_mean
from vlqc.frontend.emitted_dtype import dtype_name
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.options.options import Options
from vlqc.options.scheme_flags import scheme_fix
from vlqc.pipeline.presets import search_substitutes
from vlqc.targets.advice import incompatibilities
from vlqc.targets.engine import join_or
from vlqc.targets.precision import choose_scheme
from vlqc.targets.rules import group_faults, layer_faults, merge_repeated, supports_scheme
from vlqc.targets.schemes import DEFAULT_SCHEME, Scheme
from vlqc.targets.target import ENGINES, engine_of_option, parse_target


def check_layers(model: StreamedModel, options: Options) -> None:
    """UserError for patterns that match nothing, and for schemes that an engine of the target does not run together."""
    names = [*model.linear_layers, *model.heads, *_other_modules(model)]
    check_globs(names, exclude=options.exclude)
    check_globs(names, include=options.include)
    _check_float(model, options.include)
    check_globs(model.stages, what="stage", dump_stages=options.dump_stages)
    excludes = any(matches_any(layer, options.exclude) for layer in model.linear_layers)
    if excludes or options.pipeline is None:  # passes that the user chose may assign other schemes
        shapes = {
            name.removesuffix(".weight"): tuple(tensor.shape) for name, tensor in model.parameters(model.module).items()
        }
        check_schemes({layer: shapes[layer] for layer in model.linear_layers}, model.family, options)


def check_engines(model: StreamedModel, options: Options) -> None:
    """UserError for a model that an engine of the target does not run, whatever the schemes, or, with --strict_target,
    in its dtype. After `rotate_model`."""
    target, config = parse_target(options.engine_target), copy.deepcopy(model.checkpoint.config)
    if model.rotation_plan.untied_head:
        model.family.untie(config)
    others = [engine for engine in ENGINES if not engine.model_faults(model.family, config)]
    where, faults = str(model.checkpoint.folder / "config.json"), []
    for engine in target.engines:
        for fault in engine.model_faults(model.family, config):
            fix = f"compile for {others[0].title}: --target {others[0]}" if others else fault.fix
            faults.append(replace(fault, where=where, fix=fix))
    if faults := faults or _strict_faults(model, options):
        raise UserError(*faults)


def _strict_faults(model: StreamedModel, options: Options) -> list[Fault]:
    """With --strict_target, what no version of the target loads because of the dtype of the result, which is known
    when the checkpoint is open. --exclude may avoid it, and --pipeline assigns schemes of its own."""
    if not options.strict_target or options.exclude or options.pipeline is not None:
        return []
    dtype = dtype_name(model.emitted_dtype)
    sentences = incompatibilities(
        options.engine_target,
        model.family,
        options.scheme,
        dtype,
        options.w4a8_scope,
        options.cache_scheme,
        options.float_as,
    )
    fix = "remove --strict_target, or use --dtype bfloat16"
    return [Fault(f"--strict_target with a result in {dtype}", why=sentence, fix=fix) for sentence in sentences]


def check_schemes(layers: Mapping[str, Sequence[int] | None], family: ModelFamily, options: Options) -> None:
    """UserError where the options, --exclude among them, give schemes that the target does not load together.

    An exclusion extends to its fused group, so only rules about whole parts of the model can be broken. If some layer's
    scheme alone is more than the target runs, the folder is written for none of its versions, and nothing is checked
    without --exclude.

    layers: every Linear by checkpoint name, with its shape; family: of the model.
    """
    target = options.engine_target
    schemes: dict[str, Scheme] = {}
    excluded: dict[str, str] = {}  # layers that stay float with another one -> the one that --exclude names
    for group in family.scheme_groups(layers):
        members = {layer: layers[layer] for layer in group}
        decision = choose_scheme(
            members,
            family=family,
            scheme=options.scheme,
            target=target,
            group_size=options.group_size,
            scope=options.w4a8_scope,
            fallback=options.fallback,
            exclude=options.exclude,
            include=options.include,
            float_as=options.float_as,
            substitutes=search_substitutes(options),
        )
        schemes |= dict.fromkeys(members, decision.scheme)
        if named := [layer for layer in group if matches_any(layer, options.exclude)]:
            excluded |= {layer: named[0] for layer in group if layer not in named}
    if any(matches_any(layer, options.exclude) for layer in layers):
        if not any(scheme.is_quantized for scheme in schemes.values()):
            raise UserError(Fault("nothing would be quantized", "--exclude", "every layer stays float", "exclude less"))
        faults = [_of_excluded(fault, excluded) for fault in group_faults(target, family, schemes)]
        where = f"--exclude {' '.join(options.exclude)}, for {parse_target(target).text}"
        if faults := merge_repeated(faults, across_layers=True):
            raise UserError(*(replace(fault, where=where) for fault in faults))
    elif not layer_faults(target, family, schemes) and (faults := group_faults(target, family, schemes)):
        raise UserError(_unsupported(options, family, faults[0], schemes))


def _of_excluded(fault: Fault, excluded: Mapping[str, str]) -> Fault:
    """A fault of a layer that stays float with an excluded one -> that of the excluded layer."""
    layer = excluded.get(fault.where, fault.where)
    return replace(fault, what=fault.what.replace(fault.where, layer, 1), where=layer)


def _unsupported(options: Options, family: ModelFamily, fault: Fault, schemes: Mapping[str, Scheme]) -> Fault:
    """The scheme of the options breaks a rule of the target about several layers: fault. schemes: by layer."""
    target, by_option = parse_target(options.engine_target), engine_of_option(options)
    if options.scheme == DEFAULT_SCHEME:
        fixes = ["use another --scheme"]
    else:
        fixes = [f"use {scheme_fix(DEFAULT_SCHEME, options, options.model_fields_set)}"]
    instead = f" instead of --{by_option.layout_option}" if by_option else ""
    fixes += [
        f"compile for {engine.title} (--target {engine}{instead})"
        for engine in ENGINES
        if target.engines != (engine,) and supports_scheme(engine, family, options.scheme)
    ]
    refusing = [engine.title for engine in target.engines if group_faults(engine, family, schemes)]
    what = f"no version of {join_or(refusing)} loads {options.scheme} of {family.title}"
    return Fault(what, why=f"{fault.what}: {fault.why}", fix=", or ".join(fixes))


def _check_float(model: StreamedModel, include: Sequence[str]) -> None:
    """UserError for every pattern of --include that matches only layers that all engines run in float."""
    routers = [layer for layer in model.linear_layers if model.family.role(layer) == Role.ROUTER]
    others = [*routers, *model.heads, *_other_modules(model)]
    quantizable = [layer for layer in model.linear_layers if layer not in set(routers)]
    faults = []
    for pattern in include:
        if not any(matches_any(layer, [pattern]) for layer in quantizable):
            layer = next(layer for layer in others if matches_any(layer, [pattern]))
            what = f"--include {pattern}: {layer_pattern(layer)} stays float"
            faults.append(Fault(what, why="engines run it in float", fix=f"remove --include {pattern}"))
    if faults:
        raise UserError(*faults)


def _other_modules(model: StreamedModel) -> list[str]:
    """Names of embeddings, convolutions and norms, which are float in any case."""
    linear = {*model.linear_layers, *model.heads}
    return sorted({name.rpartition(".")[0] for name in model.parameters(model.module)} - linear)


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
