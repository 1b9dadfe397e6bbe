"""What the engines of a target accept: schemes for one layer, and an assignment of schemes to all layers.

A target is a `Target`, its text (`vllm-ascend`, `vllm-ascend@0.18`, `mindie@2.2`, `both`) or one engine. Without a
version it stands for any version of the engine. dtype: of the float tensors, "bfloat16" or "float16"; None stands for
either. The rules themselves are in the engines' files.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from vlqc.errors import Fault
from vlqc.families.family import DECODER_ROLES, ModelFamily
from vlqc.families.layer_names import layer_pattern
from vlqc.targets.engine import join_or
from vlqc.targets.schemes import Scheme, quant_type
from vlqc.targets.target import ENGINES, Target, TargetLike, as_target

# ---- one layer -------------------------------------------------------------------------------------------------------


def supported_schemes(
    target: TargetLike, family: ModelFamily, layer: str, dtype: str | None = None
) -> frozenset[Scheme]:
    """Checkpoint layer name -> schemes that every engine of the target runs, in its version or in some version.

    The output head, embeddings, norms, convolutions and layers without a rule: FLOAT only.
    """
    target = as_target(target)
    per_engine = (engine.supported_schemes(family, layer, target.parsed_version, dtype) for engine in target.engines)
    return frozenset(set.intersection(*per_engine))


def supports_scheme(target: TargetLike, family: ModelFamily, scheme: Scheme, dtype: str | None = None) -> bool:
    """Whether every engine of the target runs the scheme on at least one layer."""
    target = as_target(target)
    return not scheme.is_quantized or all(
        any(rule.scheme == scheme and rule.applies(target.parsed_version, dtype) for rule in engine.rules_of(family))
        for engine in target.engines
    )


def target_supporting(target: TargetLike, family: ModelFamily, scheme: Scheme) -> Target | None:
    """The target whose rules apply to a compilation in `scheme`: the given one if its version runs the scheme at all,
    else its engines in any version; None if no version runs the scheme."""
    target = as_target(target)
    choices = (target, Target(target.engines))
    return next((choice for choice in choices if supports_scheme(choice, family, scheme)), None)


def adds_norm_bias(part: str) -> bool:
    """Whether all engines add the bias of a norm in this part of the model, one of `Part`."""
    return all(part in engine.norm_bias_parts for engine in ENGINES)


# ---- all layers ------------------------------------------------------------------------------------------------------


def layer_faults(
    target: TargetLike, family: ModelFamily, schemes: Mapping[str, Scheme], dtype: str | None = None
) -> list[Fault]:
    """Scheme per checkpoint layer name -> every layer whose scheme an engine of the target does not run there."""
    target = as_target(target)
    faults = []
    for layer, scheme in schemes.items():
        for engine in target.engines:
            supported = engine.supported_schemes(family, layer, target.parsed_version, dtype)
            if scheme not in supported:
                why = f"{target.title(engine)} runs it in {join_or(sorted(supported))} only"
                if scheme in engine.supported_schemes(family, layer, target.parsed_version, None):
                    why += f" when the model is {dtype}"
                faults.append(Fault(f"{layer} is {scheme}", layer, why, f"compile with --exclude {layer}"))
    return faults


def group_faults(target: TargetLike, family: ModelFamily, schemes: Mapping[str, Scheme]) -> list[Fault]:
    """Scheme per checkpoint layer name -> combinations of schemes that an engine of the target does not run."""
    target = as_target(target)
    of_engines = [fault for engine in target.engines for fault in engine.group_faults(family, schemes)]
    return mixed_group_faults(target, family, schemes) + of_engines


def merge_repeated(faults: Iterable[Fault], *, across_layers: bool = False) -> list[Fault]:
    """Merges equal faults of the same layer in different blocks, or of any layers, into the first of them."""
    kinds: dict[tuple[str, ...], list[Fault]] = {}
    for fault in faults:
        layer = "" if across_layers else layer_pattern(fault.where)
        kinds.setdefault((layer, fault.what.removeprefix(fault.where), fault.why), []).append(fault)
    return [
        replace(first, what=f"{first.what}, and {len(rest)} more like it") if rest else first
        for first, *rest in kinds.values()
    ]


def mixed_group_faults(target: TargetLike, family: ModelFamily, schemes: Mapping[str, Scheme]) -> list[Fault]:
    """Scheme per checkpoint layer name -> fused groups whose members have several schemes."""
    target = as_target(target)
    faults = []
    for group in dict.fromkeys(map(family.fused_group, schemes)):
        members = {layer: schemes[layer] for layer in group if layer in schemes}
        if len(set(members.values())) > 1 and not all(
            engine.runs_unfused(family, members) for engine in target.engines
        ):
            mixed = ", ".join(f"{layer.rpartition('.')[2]} {scheme}" for layer, scheme in members.items())
            why = "engines multiply the members as one matrix, so all need the same scheme"
            fix = "use one scheme for the whole group"
            faults.append(Fault(f"one fused group has several schemes: {mixed}", group[0], why, fix))
    return faults


def folder_type(target: TargetLike, family: ModelFamily, schemes: Mapping[str, Scheme]) -> Scheme:
    """Scheme per checkpoint layer name -> the one that names a folder for the target; FLOAT if none is quantized."""
    types = (engine.folder_type(family, schemes) for engine in as_target(target).engines)
    return next((each for each in types if each is not None), quant_type(schemes.values()))


def run_together(target: TargetLike, family: ModelFamily, schemes: Iterable[Scheme]) -> bool:
    """Whether every engine of the target runs one folder with these schemes in different decoder layers."""
    layers = {_decoder_layer(family, number): scheme for number, scheme in enumerate(schemes)}
    return not group_faults(target, family, layers)


def joined_faults(target: TargetLike, family: ModelFamily, scheme: Scheme, group: Mapping[str, Scheme]) -> list[Fault]:
    """Scheme per member of one group -> combinations that an engine does not run, if other decoder layers are in
    `scheme`."""
    other = next(layer for layer in (_decoder_layer(family, 0), _decoder_layer(family, 1)) if layer not in group)
    return group_faults(target, family, {other: scheme, **group})


def _decoder_layer(family: ModelFamily, number: int) -> str:
    """The name of a linear layer of the decoder layer with this number that is fused with no other."""
    single = next(layer for layer in family.layers(*DECODER_ROLES) if len(family.fused_group(layer)) == 1)
    return single.replace("*", str(number))
