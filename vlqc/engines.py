"""What each engine accepts, asked of the table: for a layer, an assignment of schemes, a finished folder, a user.

A target is a `Target` or its text: `vllm-ascend`, `vllm-ascend@0.18`, `mindie@2.2`, `both`. Without a version it stands
for any version of the engine. A dtype is that of the float tensors, "bfloat16" or "float16"; None stands for either.
"""

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from vlqc.engine_table import (
    FAST_GROUP_SIZES,
    FLOAT_SINCE,
    FUSED_GROUPS,
    LANGUAGE,
    MINDIE_GROUP_SIZES,
    NAMING_ORDER,
    SEED_FLOAT,
    TABLE,
    VISION_GATE_UP,
    VISION_PROJ,
    VISION_QKV,
    Scheme,
)
from vlqc.errors import Fault
from vlqc.targets import BOTH, ENGINE_TITLES, MINDIE, VLLM_ASCEND, Target, Version, parse_target

__all__ = [
    "BOTH",
    "ENGINE_TITLES",
    "MINDIE",
    "VLLM_ASCEND",
    "Scheme",
    "Target",
    "assignment_faults",
    "cannot_load",
    "engine_notes",
    "engines_of",
    "folder_type",
    "fused_group",
    "layer_schemes",
    "legal_schemes",
    "loads",
    "parse_target",
    "part_of",
    "rules_for",
    "runs_anywhere",
    "serve_commands",
    "span",
    "stays_float_by_seed",
]


# ---- questions to the table ------------------------------------------------------------------------------------------


def engines_of(target: str | Target) -> tuple[str, ...]:
    """Target -> the engines that must load the result. UserError for a text that is no target."""
    return _target(target).engines


def fused_group(layer: str) -> tuple[str, ...]:
    """Checkpoint layer name -> all members of its fused group, in the engines' order; a layer on its own: itself."""
    for group in FUSED_GROUPS:
        if _matches(layer, group):
            parent = layer.rpartition(".")[0]
            return tuple(f"{parent}.{member.rpartition('.')[2]}" for member in group)
    return (layer,)


def legal_schemes(target: str | Target, layer: str, dtype: str | None = None) -> frozenset[Scheme]:
    """Checkpoint layer name -> schemes that every engine of the target runs, each in its version or some version.

    lm_head, embeddings, norms, the patch embedding and layers that the table does not know: FLOAT only.
    """
    target = _target(target)
    per_engine = [
        {Scheme.FLOAT}
        | {rule.scheme for rule in TABLE if rule.holds(engine, target.place, dtype) and _matches(layer, rule.layers)}
        for engine in target.engines
    ]
    return frozenset(set.intersection(*per_engine))


def runs_anywhere(target: str | Target, scheme: Scheme, dtype: str | None = None) -> bool:
    """Whether every engine of the target runs the scheme on at least one layer."""
    target = _target(target)
    return scheme == Scheme.FLOAT or all(
        any(rule.scheme == scheme and rule.holds(engine, target.place, dtype) for rule in TABLE)
        for engine in target.engines
    )


def rules_for(target: str | Target, scheme: Scheme) -> Target | None:
    """By whose rules a compilation in `scheme` gives layers their schemes: by the target's where it runs the scheme at
    all, else by those of the engine's other versions; None: no version runs it, so there is nothing to go by."""
    target = _target(target)
    choices = (target, Target(target.engines))
    return next((choice for choice in choices if runs_anywhere(choice, scheme)), None)


def part_of(layer: str) -> str:
    """Checkpoint name of a layer or tensor -> "vision", "merger", "language" or "other" (lm_head, unknown names)."""
    for prefix, part in (("visual.merger.", "merger"), ("visual.", "vision"), ("model.", "language")):
        if layer.startswith(prefix):
            return part
    return "other"


def stays_float_by_seed(layer: str) -> bool:
    """Whether the reference script leaves this layer in float."""
    return _matches(layer, SEED_FLOAT)


# ---- a whole assignment ----------------------------------------------------------------------------------------------


def layer_faults(target: str | Target, schemes: Mapping[str, Scheme], dtype: str | None = None) -> list[Fault]:
    """Scheme per checkpoint layer name -> every layer whose scheme an engine of the target does not run there."""
    target = _target(target)
    faults = []
    for layer, scheme in schemes.items():
        for engine in target.engines:
            if scheme not in (legal := legal_schemes(target.alone(engine), layer, dtype)):
                why = f"{target.title(engine)} runs it in {_listed(sorted(legal))} only"
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
        if quantized and _matches(layer, VISION_QKV) and scheme == Scheme.FLOAT
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


# ---- which versions --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """Versions of one engine, from `since` to `until` (None: no known end)."""

    engine: str
    since: str
    until: str | None = None

    def __str__(self) -> str:
        return f"{ENGINE_TITLES[self.engine]} {self.since} " + (f"to {self.until}" if self.until else "and later")

    def covers(self, version: str) -> bool:
        place = Version.parse(version)
        return Version.parse(self.since) <= place and (self.until is None or place <= Version.parse(self.until))


def span(engine: str, schemes: Mapping[str, Scheme], dtype: str) -> Span | None:
    """The versions of the engine in which every (layer, scheme) is legal; None when there is none."""
    since, until = FLOAT_SINCE[engine], None
    for layer, scheme in schemes.items():
        if scheme == Scheme.FLOAT:
            continue
        rule = next(
            (r for r in TABLE if r.scheme == scheme and r.holds(engine, None, dtype) and _matches(layer, r.layers)),
            None,
        )
        if rule is None:
            return None
        since = max(since, rule.since, key=Version.parse)
        until = min(filter(None, (until, rule.until)), key=Version.parse, default=None)
    return None if until and Version.parse(until) < Version.parse(since) else Span(engine, since, until)


def loads(description: Mapping[str, Any], dtype: str, config: Mapping[str, Any]) -> list[str]:
    """Which engines load a finished folder, in words, e.g. ["vLLM Ascend 0.10.2rc2 and later"]; [] when none does.

    description: quant_model_description*.json (tensor name -> scheme); dtype: "bfloat16" or "float16";
    config: config.json.
    """
    schemes = layer_schemes(description)
    spans = (loading_span(engine, schemes, dtype, config) for engine in ENGINE_TITLES)
    return [str(found) for found in spans if found is not None]


def loading_span(engine: str, schemes: Mapping[str, Scheme], dtype: str, config: Mapping[str, Any]) -> Span | None:
    """The versions of one engine that load a folder of these schemes with this config.json; None when none does."""
    if not _reads_config(engine, schemes, config) or group_faults(engine, schemes):
        return None
    return span(engine, schemes, dtype)


def layer_schemes(description: Mapping[str, Any]) -> dict[str, Scheme]:
    """Description (tensor name -> scheme word) -> scheme per layer, from the entries that end in `.weight`.

    A norm that MindIE's layout repeats as `X.module.weight`, marked with the folder's type, counts once, as FLOAT.
    """
    words = {str(scheme) for scheme in Scheme}
    return {
        name.removesuffix(".weight"): Scheme(word)
        for name, word in description.items()
        if name.endswith(".weight") and not name.endswith(".module.weight") and word in words
    }


def folder_type(schemes: Iterable[Scheme]) -> Scheme:
    """Schemes that occur -> the one that names files and model_quant_type; FLOAT when nothing is quantized."""
    found = set(schemes)
    return next((scheme for scheme in NAMING_ORDER if scheme in found), Scheme.FLOAT)


def _reads_config(engine: str, schemes: Mapping[str, Scheme], config: Mapping[str, Any]) -> bool:
    """Whether the engine, given this config.json, treats the folder as quantized in the way it is."""
    if engine == VLLM_ASCEND:
        return "quantization_config" not in config  # vLLM would read that key instead of the description
    vision_config = config.get("vision_config")
    vision_key = vision_config.get("quantize") if isinstance(vision_config, Mapping) else None
    vision_quantized = any(name.startswith("visual.") and scheme != Scheme.FLOAT for name, scheme in schemes.items())
    quantize = folder_type(schemes.values()).lower()
    return "text_config" not in config and config.get("quantize") == quantize and vision_quantized == bool(vision_key)


# ---- what the user is told -------------------------------------------------------------------------------------------


def cannot_load(target: str | Target, scheme: Scheme, dtype: str = "bfloat16", scope: str = "engine") -> list[str]:
    """One sentence per engine of the target that will not load a compilation in `scheme`; [] when all will.

    scope: "engine" gives layers that the target does not run in `scheme` another one, "all" gives them `scheme`, too.
    """
    target = _target(target)
    dtype = _run_dtype(dtype)
    sentences = []
    for engine in target.engines:
        found = span(engine, _typical(target, scheme, scope), dtype)
        if found is None:
            why = ""
            if span(engine, _typical(target, scheme, scope), "bfloat16"):
                why = f" of a {dtype} model (bfloat16 only)"
            elif span(engine, _typical(target, scheme, "engine"), dtype):
                why = " on layers with a bias or in the vision tower"
            elif scheme == Scheme.W4A8_DYNAMIC and engine == MINDIE:
                why = " for vision-language models"
            sentences.append(f"no version of {ENGINE_TITLES[engine]} loads {scheme}{why}")
        elif target.version and not found.covers(target.version):
            sentences.append(f"{target.title(engine)} does not load {scheme}; {found} do")
    return sentences


def engine_notes(
    target: str | Target, scheme: Scheme, dtype: str = "bfloat16", group_size: int | None = None, scope: str = "engine"
) -> list[str]:
    """What the user should be told before compiling: `cannot_load`, limits to some versions, costly group sizes."""
    target = _target(target)
    notes = cannot_load(target, scheme, dtype, scope)
    for engine in target.engines:
        found = span(engine, _typical(target, scheme, scope), _run_dtype(dtype))
        if found and found.until and not target.version:
            notes.append(f"{found} load {scheme}, later versions do not")
        elif found and found.since != FLOAT_SINCE[engine] and not target.version:
            notes.append(f"{found} load {scheme}, earlier versions do not")
    if scheme == Scheme.W8A8_DYNAMIC and MINDIE in target.engines:
        notes.append("MindIE runs W8A8_DYNAMIC in the language model only: the vision tower stays float")
    if scheme == Scheme.W4A8_DYNAMIC and group_size is not None:
        if VLLM_ASCEND in target.engines and group_size > max(FAST_GROUP_SIZES) * 2:
            sizes = _listed(FAST_GROUP_SIZES)
            notes.append(
                f"group_size {group_size}: vLLM Ascend's int4 kernels are written for {sizes}, and may refuse it"
            )
        elif VLLM_ASCEND in target.engines and group_size not in FAST_GROUP_SIZES:
            sizes = _listed(FAST_GROUP_SIZES)
            notes.append(f"group_size {group_size}: vLLM Ascend's int4 kernels prefer {sizes}")
        if MINDIE in target.engines and group_size not in MINDIE_GROUP_SIZES:
            notes.append(f"group_size {group_size}: MindIE accepts {_listed(MINDIE_GROUP_SIZES[1:])} only")
    return notes


def serve_commands(target: str | Target, folder: str | Path) -> list[str]:
    """One line per engine of the target: what to run or set so that the engine serves `folder`."""
    lines = {
        # Versions from 0.17.0rc1 on detect the quantization by themselves; the flag does no harm there.
        VLLM_ASCEND: f"vllm serve {shlex.quote(str(folder))} --quantization ascend",
        MINDIE: f'"modelWeightPath": {json.dumps(str(folder), ensure_ascii=False)} in the config.json of the MindIE '
        "service",
    }
    return [lines[engine] for engine in engines_of(target)]


def _typical(target: Target, scheme: Scheme, scope: str) -> dict[str, Scheme]:
    """What a compilation in `scheme` gives one layer of each kind outside the seed's exclusions."""
    kinds = [k for k in (*VISION_QKV, *VISION_PROJ, *VISION_GATE_UP, *LANGUAGE) if not stays_float_by_seed(k)]
    rules = rules_for(target, scheme)
    if scope == "all" or rules is None:
        return dict.fromkeys(kinds, scheme)
    choices = (scheme, Scheme.W8A8_DYNAMIC) if scheme == Scheme.W4A8_DYNAMIC else (scheme,)
    return {
        kind: next((each for each in choices if each in legal_schemes(rules, kind)), Scheme.FLOAT) for kind in kinds
    }


def _run_dtype(dtype: str) -> str:
    """The dtype that engines run a model of this dtype in: float32 is emitted as bfloat16."""
    return "float16" if dtype == "float16" else "bfloat16"


def _target(target: str | Target) -> Target:
    return target if isinstance(target, Target) else parse_target(target)


def _matches(layer: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(layer, pattern) for pattern in patterns)


def _listed(words: Iterable[object]) -> str:
    return " or ".join(str(word) for word in words)
