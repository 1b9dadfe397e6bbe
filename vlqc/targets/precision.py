"""Chooses the scheme of a group of layers that share an input, within what the target's engines run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlqc.families.family import ModelFamily, Role
from vlqc.families.layer_names import layer_pattern, matches_any
from vlqc.targets.engine import join_and
from vlqc.targets.rules import joined_faults, supported_schemes, target_supporting
from vlqc.targets.schemes import Scheme
from vlqc.targets.target import TargetLike, as_target


@dataclass(frozen=True)
class Decision:
    """scheme: of a group; reason: printed in the IR if it is not the default scheme; note: message for the user."""

    scheme: Scheme
    reason: str = ""
    note: str = ""


def choose_scheme(
    layers: Mapping[str, Sequence[int] | None],
    *,
    family: ModelFamily,
    scheme: Scheme,
    target: TargetLike,
    group_size: int = 64,
    scope: str = "engine",
    fallback: str = "none",
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    float_as: Scheme = Scheme.FLOAT,
    substitutes: Sequence[Scheme] = (),
) -> Decision:
    """Returns the common scheme of layers that must have one, with the reason if it is not the default scheme.

    The group is FLOAT if the engines fuse a member with a layer outside of it: their scales would differ.

    layers: checkpoint name -> (outputs, inputs), or None if the shape does not matter. family: of the model. scheme:
    the default scheme. target: engines whose rules apply; where the target's version does not run the scheme at all,
    those of the other versions. scope: `engine` uses 4-bit weights only in layers where the target runs them, `all` in
    every layer. fallback: `reference` leaves the layers that the reference script excludes in float, as their inputs
    are hard to quantize; `none` only those that the engine cannot run quantized.
    exclude: globs of layers that stay float. include: globs of layers that are quantized in spite of the reference
    exclusions; `exclude` takes precedence. float_as: what layers get in place of FLOAT where all engines of the target
    run it: those of the reference exclusions, and those on which an engine runs neither the scheme nor its substitute.
    substitutes: tried in this order after the scheme's own substitute and before `float_as`; those that an engine does
    not run in one folder with the scheme are left out.
    """
    excluded = _excluded(family, list(layers), exclude)
    if excluded is not None:
        return excluded
    in_place, refused = _in_place_of_float(list(layers), family, float_as, target)
    included = any(matches_any(layer, include) for layer in layers)
    if fallback == "reference" and not included and any(map(family.stays_float_in_reference, layers)):
        if in_place.is_quantized:
            return Decision(in_place, "in place of float, in which the reference exclusions keep it")
        return Decision(in_place, f"kept in float by the reference exclusions{refused}")
    first = layer_pattern(next(iter(layers)))
    missing = sorted({other for layer in layers for other in family.fused_group(layer)} - layers.keys())
    if missing:
        reason = f"the engine fuses it with {', '.join(missing)}, which reads another input"
        return Decision(Scheme.FLOAT, reason, f"{first} stays float: {reason}")
    rules = target_supporting(target, family, scheme)
    choices = [scheme] if scheme.substitute is None else [scheme, scheme.substitute]
    choices += [
        each
        for each in substitutes
        if each not in choices
        and (rules is None or not joined_faults(rules, family, scheme, dict.fromkeys(layers, each)))
    ]
    if scope == "engine" and rules is not None:
        choices = [each for each in choices if all(each in supported_schemes(rules, family, layer) for layer in layers)]
    faults = {each: misfit(layers, each, group_size) for each in choices}
    fault = faults.get(scheme, "")
    choices = [each for each in choices if not faults[each]]
    chosen = choices[0] if choices else in_place
    if choices or float_as == scheme:  # the reason says why not `scheme`
        refused = ""
    if fault:
        return Decision(chosen, fault + refused, f"{first} is {chosen}: {fault}")
    if chosen == scheme:
        return Decision(scheme)
    target = as_target(target)
    refusing = [
        target.title(engine)
        for engine in target.engines
        if rules and not all(scheme in supported_schemes(rules.only(engine), family, layer) for layer in layers)
    ]
    reason = f"{scheme} is not supported here by {join_and(refusing)}"
    several = len(target.engines) > 1
    engines, run = (f"both {target.text}" if several else target.text), "run" if several else "runs"
    return Decision(chosen, reason + refused, f"{scheme} only where {engines} {run} it; elsewhere {chosen}")


def _in_place_of_float(
    layers: Sequence[str], family: ModelFamily, float_as: Scheme, target: TargetLike
) -> tuple[Scheme, str]:
    """`float_as` if all engines of the target run the layers so, else FLOAT, and an addition to the reason for it."""
    target = as_target(target)
    refusing = [
        target.title(engine)
        for engine in target.engines
        if not all(float_as in supported_schemes(target.only(engine), family, layer) for layer in layers)
    ]
    if refusing:
        return Scheme.FLOAT, f"; {float_as} is not supported here by {join_and(refusing)}"
    return float_as, ""


def _excluded(family: ModelFamily, layers: Sequence[str], exclude: Sequence[str]) -> Decision | None:
    """Returns FLOAT if one layer is a router, or if the user's globs exclude one, else None."""
    if any(family.role(layer) == Role.ROUTER for layer in layers):
        return Decision(Scheme.FLOAT, "a router stays float: it decides which experts run")
    for layer in layers:
        pattern = next((pattern for pattern in exclude if matches_any(layer, [pattern])), None)
        if pattern is not None:
            others = [layer_pattern(other) for other in layers if not matches_any(other, exclude)]
            if others and family.experts_of(layer):
                why = "all experts of a layer have one scheme"
                count = len({expert.rpartition(".")[0] for expert in layers})
                note = f"{why}: excluding {pattern} keeps all {count} in float"
                return Decision(Scheme.FLOAT, f"{why}, and {pattern} excludes some", note)
            stay = "stay" if len(others) > 1 else "stays"
            note = f"{', '.join(others)} {stay} float with {layer_pattern(layer)}, which --exclude names"
            return Decision(Scheme.FLOAT, f"excluded by {pattern}", note if others else "")
    return None


def misfit(layers: Mapping[str, Sequence[int] | None], scheme: Scheme, group_size: int) -> str:
    """Returns why the weights cannot be stored in groups, or an empty string."""
    for shape in layers.values():
        if shape is None or not scheme.spec.weight.per_group:
            continue
        outputs, inputs = shape
        if inputs % group_size:
            return f"its {inputs} inputs are not divisible by group size {group_size}"
        if inputs == group_size:  # operators of 4-bit weights need at least two groups
            return f"its {inputs} inputs are a single group of size {group_size}"
        if outputs % scheme.spec.output_multiple:
            return f"its {outputs} outputs are not divisible by {scheme.spec.output_multiple}"
    return ""
