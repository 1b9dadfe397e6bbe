"""The schemes among which the precision search chooses for one group of layers."""

from collections.abc import Collection, Mapping, Sequence

from vlqc.families.family import ModelFamily
from vlqc.targets.precision import misfit
from vlqc.targets.rules import run_together, supported_schemes, target_supporting
from vlqc.targets.schemes import Scheme
from vlqc.targets.target import TargetLike


def candidate_schemes(
    layers: Mapping[str, Sequence[int] | None],
    assigned: Scheme,
    *,
    family: ModelFamily,
    target: TargetLike,
    dtype: str,
    group_size: int,
    only: Collection[Scheme] = (),
) -> list[Scheme]:
    """The assigned scheme, then the others in which every engine of the target runs all layers, the cheapest first.

    One folder may have all of them, each in other decoder layers. A scheme of which the engine decides how it
    quantizes inputs is a candidate only if it is assigned. Where no version of the target runs the assigned scheme, no
    rule applies.

    layers: members of one group, checkpoint name -> (outputs, inputs), None if the shape does not matter. assigned:
    quantized. dtype: of the float tensors, "bfloat16" or "float16". group_size: of weights with groups. only: schemes
    besides FLOAT and the assigned one that may be chosen; all of them if it is empty.
    """
    rules = target_supporting(target, family, assigned)
    chosen = [assigned]
    for scheme in sorted(Scheme, key=lambda each: each.is_quantized):  # FLOAT first: what goes with it counts
        allowed = scheme.spec.has_one_arithmetic and (not only or scheme in only or not scheme.is_quantized)
        if scheme == assigned or not allowed or misfit(layers, scheme, group_size):
            continue
        if rules is not None and not (
            all(scheme in supported_schemes(rules, family, layer, dtype) for layer in layers)
            and run_together(rules, family, [*chosen, scheme])
        ):
            continue
        chosen.append(scheme)
    return [assigned, *sorted(chosen[1:], key=lambda each: each.spec.cost)]
