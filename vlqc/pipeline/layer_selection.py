"""Checks the layer patterns of --exclude and --include, and the schemes of all layers, before anything is computed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from vlqc.errors import Fault, UserError
from vlqc.families.family import ModelFamily
from vlqc.families.layer_names import matches_any
from vlqc.formatting import did_you_mean
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.options.options import Options
from vlqc.targets.precision import choose_scheme
from vlqc.targets.rules import group_faults, layer_faults
from vlqc.targets.schemes import Scheme


def check_layers(model: StreamedModel, options: Options) -> None:
    """UserError for patterns that match nothing, and for schemes that an engine of the target does not run together."""
    check_globs([*model.linear_layers, *model.heads], exclude=options.exclude)
    check_globs(model.linear_layers, include=options.include)
    check_globs(model.stages, what="stage", dump_stages=options.dump_stages)
    excludes = any(matches_any(layer, options.exclude) for layer in model.linear_layers)
    if excludes or options.pipeline is None:  # passes that the user chose may assign other schemes
        shapes = {
            name.removesuffix(".weight"): tuple(tensor.shape) for name, tensor in model.parameters(model.module).items()
        }
        check_schemes({layer: shapes[layer] for layer in model.linear_layers}, model.family, options)


def check_schemes(layers: Mapping[str, Sequence[int] | None], family: ModelFamily, options: Options) -> None:
    """UserError where the options, --exclude among them, give schemes that the target does not load together.

    An exclusion extends to its fused group, so only rules about whole parts of the model can be broken. If some layer's
    scheme alone is more than the target runs, the folder is written for none of its versions, and nothing is checked
    without --exclude.

    layers: every Linear by checkpoint name, with its shape; family: of the model.
    """
    target = options.engine_target
    schemes: dict[str, Scheme] = {}
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
        )
        schemes |= dict.fromkeys(members, decision.scheme)
    if any(matches_any(layer, options.exclude) for layer in layers):
        if not any(scheme.is_quantized for scheme in schemes.values()):
            raise UserError(Fault("nothing would be quantized", "--exclude", "every layer stays float", "exclude less"))
        if faults := group_faults(target, family, schemes):
            raise UserError(*(replace(fault, where=f"--exclude, for {target}") for fault in faults))
    elif not layer_faults(target, family, schemes) and (faults := group_faults(target, family, schemes)):
        raise UserError(replace(faults[0], where=f"{options.scheme} of {family.title}, for {target}"))


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
