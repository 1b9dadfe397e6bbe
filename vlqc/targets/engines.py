"""What each engine accepts, asked of the table: for a layer, and for a whole assignment of schemes.

A target is a `Target` or its text: `vllm-ascend`, `vllm-ascend@0.18`, `mindie@2.2`, `both`. Without a version it stands
for any version of the engine. A dtype is that of the float tensors, "bfloat16" or "float16"; None stands for either.
"""

from collections.abc import Iterable, Mapping

from vlqc.errors import Fault
from vlqc.targets.rules import (
    FUSED_GROUPS,
    REFERENCE_FLOAT,
    TABLE,
    VISION_QKV,
    Scheme,
    matches,
)
from vlqc.targets.target import BOTH, ENGINE_TITLES, MINDIE, VLLM_ASCEND, Target, as_target, parse_target

__all__ = [
    "BOTH",
    "ENGINE_TITLES",
    "MINDIE",
    "VLLM_ASCEND",
    "Scheme",
    "Target",
    "assignment_faults",
    "engines_of",
    "fused_group",
    "legal_schemes",
    "parse_target",
    "part_of",
    "rules_for",
    "runs_anywhere",
    "stays_float_in_reference",
]


# ---- questions to the table ------------------------------------------------------------------------------------------


def engines_of(target: str | Target) -> tuple[str, ...]:
    """Target -> the engines that must load the result. UserError for a text that is no target."""
    return as_target(target).engines


def fused_group(layer: str) -> tuple[str, ...]:
    """Checkpoint layer name -> all members of its fused group, in the engines' order; a layer on its own: itself."""
    for group in FUSED_GROUPS:
        if matches(layer, group):
            parent = layer.rpartition(".")[0]
            return tuple(f"{parent}.{member.rpartition('.')[2]}" for member in group)
    return (layer,)


def legal_schemes(target: str | Target, layer: str, dtype: str | None = None) -> frozenset[Scheme]:
    """Checkpoint layer name -> schemes that every engine of the target runs, each in its version or some version.

    lm_head, embeddings, norms, the patch embedding and layers that the table does not know: FLOAT only.
    """
    target = as_target(target)
    per_engine = [
        {Scheme.FLOAT}
        | {rule.scheme for rule in TABLE if rule.holds(engine, target.place, dtype) and matches(layer, rule.layers)}
        for engine in target.engines
    ]
    return frozenset(set.intersection(*per_engine))


def runs_anywhere(target: str | Target, scheme: Scheme, dtype: str | None = None) -> bool:
    """Whether every engine of the target runs the scheme on at least one layer."""
    target = as_target(target)
    return scheme == Scheme.FLOAT or all(
        any(rule.scheme == scheme and rule.holds(engine, target.place, dtype) for rule in TABLE)
        for engine in target.engines
    )


def rules_for(target: str | Target, scheme: Scheme) -> Target | None:
    """By whose rules a compilation in `scheme` gives layers their schemes: by the target's where it runs the scheme at
    all, else by those of the engine's other versions; None: no version runs it, so there is nothing to go by."""
    target = as_target(target)
    choices = (target, Target(target.engines))
    return next((choice for choice in choices if runs_anywhere(choice, scheme)), None)


def part_of(layer: str) -> str:
    """Checkpoint name of a layer or tensor -> "vision", "merger", "language" or "other" (lm_head, unknown names)."""
    for prefix, part in (("visual.merger.", "merger"), ("visual.", "vision"), ("model.", "language")):
        if layer.startswith(prefix):
            return part
    return "other"


def stays_float_in_reference(layer: str) -> bool:
    """Whether the reference script leaves this layer in float."""
    return matches(layer, REFERENCE_FLOAT)


# ---- a whole assignment ----------------------------------------------------------------------------------------------


def layer_faults(target: str | Target, schemes: Mapping[str, Scheme], dtype: str | None = None) -> list[Fault]:
    """Scheme per checkpoint layer name -> every layer whose scheme an engine of the target does not run there."""
    target = as_target(target)
    faults = []
    for layer, scheme in schemes.items():
        for engine in target.engines:
            if scheme not in (legal := legal_schemes(target.alone(engine), layer, dtype)):
                why = f"{target.title(engine)} runs it in {listed(sorted(legal))} only"
                if scheme in legal_schemes(target.alone(engine), layer):
                    why += f" when the model is {dtype}"
                faults.append(Fault(f"{layer} is {scheme}", layer, why, f"compile with --exclude {layer}"))
    return faults


def group_faults(target: str | Target, schemes: Mapping[str, Scheme]) -> list[Fault]:
    """Scheme per checkpoint layer name -> schemes that the target runs, but not beside each other."""
    tower = _vision_tower_faults(schemes) if MINDIE in engines_of(target) else []
    return mixed_group_faults(target, schemes) + tower


def mixed_group_faults(target: str | Target, schemes: Mapping[str, Scheme]) -> list[Fault]:
    """Scheme per checkpoint layer name -> fused groups whose members have several schemes."""
    engines = engines_of(target)
    faults = []
    for group in dict.fromkeys(fused_group(layer) for layer in schemes):
        found = {member: schemes[member] for member in group if member in schemes}
        quantized = {member: scheme for member, scheme in found.items() if scheme != Scheme.FLOAT}
        if engines == (MINDIE,) and group[0].startswith("model.") and set(quantized.values()) <= {Scheme.W8A8}:
            continue  # MindIE alone runs float members of a static language group beside quantized ones, unfused
        if len(set(found.values())) > 1:
            faults.append(_mixed_group(group[0], found))
    return faults


def assignment_faults(target: str | Target, schemes: Mapping[str, Scheme], dtype: str | None = None) -> list[Fault]:
    """Scheme per checkpoint layer name -> everything an engine of the target would refuse or compute wrongly."""
    return layer_faults(target, schemes, dtype) + group_faults(target, schemes)


def _mixed_group(where: str, found: Mapping[str, Scheme]) -> Fault:
    mixed = ", ".join(f"{member.rpartition('.')[2]} {scheme}" for member, scheme in found.items())
    return Fault(
        f"one fused group has several schemes: {mixed}",
        where,
        "engines multiply the members as one matrix, so all need the same scheme",
        "give the whole group one scheme",
    )


def _vision_tower_faults(schemes: Mapping[str, Scheme]) -> list[Fault]:
    """MindIE: the vision tower is all float, or W8A8 with qkv quantized in every block; one scheme for all that is not
    float, since the one `quantize` of config.json names it."""
    vision = {layer: scheme for layer, scheme in schemes.items() if layer.startswith("visual.")}
    quantized = [layer for layer, scheme in vision.items() if scheme != Scheme.FLOAT]
    faults = [
        Fault(
            f"{layer} is FLOAT while {quantized[0]} is {vision[quantized[0]]}",
            layer,
            "MindIE builds every block's qkv quantized as soon as the vision tower is",
            "quantize qkv in every vision block, leave the whole vision tower float, or serve with vLLM Ascend only",
        )
        for layer, scheme in vision.items()
        if quantized and matches(layer, VISION_QKV) and scheme == Scheme.FLOAT
    ]
    static = [layer for layer, scheme in schemes.items() if scheme == Scheme.W8A8]
    dynamic = [layer for layer, scheme in schemes.items() if scheme == Scheme.W8A8_DYNAMIC]
    beside = (quantized or static) if dynamic else []
    if beside:
        faults.append(
            Fault(
                f"{beside[0]} is {schemes[beside[0]]} while {dynamic[0]} is {Scheme.W8A8_DYNAMIC}",
                beside[0],
                "MindIE runs W8A8_DYNAMIC only beside a float vision tower, and never beside W8A8",
                "leave the whole vision tower float and give all else one scheme, or serve with vLLM Ascend only",
            )
        )
    return faults


def listed(words: Iterable[object]) -> str:
    return " or ".join(str(word) for word in words)
