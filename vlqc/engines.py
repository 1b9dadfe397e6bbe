"""What each engine accepts, as data: which scheme on which layer, from which version to which.

Layers are named as in the checkpoint (`model.layers.0.self_attn.q_proj`). Sources: the vLLM Ascend and MindIE loaders'
own rules for Qwen2.5-VL. To teach vlqc a new scheme or version, add a line to `TABLE`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from vlqc.errors import Fault

VLLM_ASCEND = "vllm-ascend"
MINDIE = "mindie"
BOTH = "both"
ENGINE_TITLES = {VLLM_ASCEND: "vLLM Ascend", MINDIE: "MindIE"}


class Scheme(StrEnum):
    """How one Linear is stored and run; the values are the words of quant_model_description.json."""

    FLOAT = "FLOAT"
    W8A8 = "W8A8"  # int8 weight per output channel, int8 activation per tensor with stored scale and offset
    W8A8_DYNAMIC = "W8A8_DYNAMIC"  # int8 weight per output channel, int8 activation per token
    W4A8_DYNAMIC = "W4A8_DYNAMIC"  # int4 weight per group, int8 activation per token


# ---- the layers of Qwen2.5-VL, by the rules they share ---------------------------------------------------------------

VISION_QKV = ("visual.blocks.*.attn.qkv",)
VISION_PROJ = ("visual.blocks.*.attn.proj",)
VISION_GATE_UP = ("visual.blocks.*.mlp.gate_proj", "visual.blocks.*.mlp.up_proj")
VISION_DOWN = ("visual.blocks.*.mlp.down_proj",)
MERGER = ("visual.merger.mlp.0", "visual.merger.mlp.2")
LANGUAGE_QKV = tuple(f"model.layers.*.self_attn.{member}_proj" for member in "qkv")
LANGUAGE_WITHOUT_BIAS = (
    "model.layers.*.self_attn.o_proj",
    "model.layers.*.mlp.gate_proj",
    "model.layers.*.mlp.up_proj",
    "model.layers.*.mlp.down_proj",
)
VISION = VISION_QKV + VISION_PROJ + VISION_GATE_UP + VISION_DOWN
LANGUAGE = LANGUAGE_QKV + LANGUAGE_WITHOUT_BIAS

# Engines multiply the members of a group as one matrix: one input, one scheme, one input scale.
FUSED_GROUPS = (
    LANGUAGE_QKV,
    ("model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj"),
    VISION_GATE_UP,
)

# What the reference quantization script of Qwen2.5-VL leaves in float: the default of `--fallback seed`.
SEED_FLOAT: tuple[str, ...] = (
    "visual.patch_embed*",  # a convolution; engines run it in float
    "visual.blocks.*.mlp.down_proj",  # products of two activations: the widest ranges of a vision block
    "visual.merger.mlp.*",  # the one door from vision to language; two matrices in all
    "model.embed_tokens",  # a table, not a matrix product
    "model.layers.*.mlp.down_proj",  # holds the massive activations of a language model
    "lm_head",  # engines run it in float
)


# ---- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """`engine` runs `layers` in `scheme` from version `since` to version `until` (None: no known end)."""

    engine: str
    scheme: Scheme
    layers: tuple[str, ...]
    since: str
    until: str | None = None
    dtypes: tuple[str, ...] = ("bfloat16", "float16")


# Versions that matter, oldest first: their place in this list is their order.
VERSIONS = {
    VLLM_ASCEND: ("0.10.2rc2", "0.11", "0.16", "0.17.0rc1", "0.26.0rc"),
    MINDIE: ("2.2.RC1",),
}
ONLY_BFLOAT16 = ("bfloat16",)

TABLE: tuple[Rule, ...] = (
    Rule(VLLM_ASCEND, Scheme.W8A8, VISION + MERGER + LANGUAGE, since="0.10.2rc2"),
    Rule(VLLM_ASCEND, Scheme.W8A8_DYNAMIC, LANGUAGE, since="0.11", dtypes=ONLY_BFLOAT16),
    # The vision tower hands 3-D inputs to its layers; the per-token operator takes them from 0.16 on.
    Rule(VLLM_ASCEND, Scheme.W8A8_DYNAMIC, VISION + MERGER, since="0.16", dtypes=ONLY_BFLOAT16),
    # The int4 operator ignores a bias, and q/k/v of Qwen2.5-VL have one; it takes 2-D inputs only, so never vision.
    Rule(VLLM_ASCEND, Scheme.W4A8_DYNAMIC, LANGUAGE_WITHOUT_BIAS, since="0.11", until="0.26.0rc"),
    # MindIE keeps the vision down_proj in float. See also `_vision_tower_faults`.
    Rule(MINDIE, Scheme.W8A8, VISION_QKV + VISION_PROJ + VISION_GATE_UP + MERGER + LANGUAGE, since="2.2.RC1"),
    Rule(MINDIE, Scheme.W8A8_DYNAMIC, LANGUAGE, since="2.2.RC1"),
)
FLOAT_SINCE = {VLLM_ASCEND: "0.10.2rc2", MINDIE: "2.2.RC1"}  # float layers load wherever a quantized folder loads


# ---- questions to the table ------------------------------------------------------------------------------------------


def engines_of(target: str) -> tuple[str, ...]:
    """Target ("vllm-ascend", "mindie", "both") -> the engines that must load the result. ValueError for other words."""
    if target == BOTH:
        return (VLLM_ASCEND, MINDIE)
    if target not in VERSIONS:
        raise ValueError(f"unknown target {target!r}: known are {VLLM_ASCEND}, {MINDIE}, {BOTH}")
    return (target,)


def fused_group(layer: str) -> tuple[str, ...]:
    """Checkpoint layer name -> all members of its fused group, in the engines' order; a layer on its own: itself."""
    for group in FUSED_GROUPS:
        if _matches(layer, group):
            parent = layer.rpartition(".")[0]
            return tuple(f"{parent}.{member.rpartition('.')[2]}" for member in group)
    return (layer,)


def legal_schemes(target: str, layer: str) -> frozenset[Scheme]:
    """Target and checkpoint layer name -> schemes that some version of every engine of the target runs.

    lm_head, embeddings, norms, the patch embedding and layers that the table does not know: FLOAT only.
    """
    per_engine = [
        {Scheme.FLOAT} | {rule.scheme for rule in TABLE if rule.engine == engine and _matches(layer, rule.layers)}
        for engine in engines_of(target)
    ]
    return frozenset(set.intersection(*per_engine))


def part_of(layer: str) -> str:
    """Checkpoint name of a layer or tensor -> "vision", "merger", "language" or "other" (lm_head, unknown names)."""
    for prefix, part in (("visual.merger.", "merger"), ("visual.", "vision"), ("model.", "language")):
        if layer.startswith(prefix):
            return part
    return "other"


def stays_float_by_seed(layer: str) -> bool:
    """Whether the reference script leaves this layer in float."""
    return _matches(layer, SEED_FLOAT)


def assignment_faults(target: str, schemes: Mapping[str, Scheme]) -> list[Fault]:
    """Scheme per checkpoint layer name -> everything an engine of the target would refuse or compute wrongly."""
    faults = []
    for layer, scheme in schemes.items():
        for engine in engines_of(target):
            if scheme not in (legal := legal_schemes(engine, layer)):
                why = f"{ENGINE_TITLES[engine]} runs it in {_listed(sorted(legal))} only"
                faults.append(Fault(f"{layer} is {scheme}", layer, why, f"compile with --exclude {layer}"))
    for group in dict.fromkeys(fused_group(layer) for layer in schemes):
        found = {member: schemes[member] for member in group if member in schemes}
        if target == MINDIE and group[0].startswith("model."):
            # MindIE alone runs float members of a language group beside quantized ones, unfused.
            found = {member: scheme for member, scheme in found.items() if scheme != Scheme.FLOAT}
        if len(set(found.values())) > 1:
            faults.append(_mixed_group(group[0], found))
    if MINDIE in engines_of(target):
        faults += _vision_tower_faults(schemes)
    return faults


def _mixed_group(where: str, found: Mapping[str, Scheme]) -> Fault:
    mixed = ", ".join(f"{member.rpartition('.')[2]} {scheme}" for member, scheme in found.items())
    return Fault(
        f"one fused group has several schemes: {mixed}",
        where,
        "engines multiply the members as one matrix, so all need the same scheme",
        "give the whole group one scheme",
    )


def _vision_tower_faults(schemes: Mapping[str, Scheme]) -> list[Fault]:
    """MindIE: the vision tower is all float, or W8A8 with qkv quantized in every block and a static language model."""
    vision = {layer: scheme for layer, scheme in schemes.items() if layer.startswith("visual.")}
    quantized = [layer for layer, scheme in vision.items() if scheme != Scheme.FLOAT]
    if not quantized:
        return []
    faults = [
        Fault(
            f"{layer} is FLOAT while {quantized[0]} is {vision[quantized[0]]}",
            layer,
            "MindIE builds every block's qkv quantized as soon as the vision tower is",
            "quantize qkv in every vision block, leave the whole vision tower float, or serve with vLLM Ascend only",
        )
        for layer, scheme in vision.items()
        if _matches(layer, VISION_QKV) and scheme == Scheme.FLOAT
    ]
    dynamic = [layer for layer, scheme in schemes.items() if scheme == Scheme.W8A8_DYNAMIC]
    if dynamic:
        faults.append(
            Fault(
                f"{quantized[0]} is {vision[quantized[0]]} while {dynamic[0]} is {Scheme.W8A8_DYNAMIC}",
                quantized[0],
                "MindIE runs W8A8_DYNAMIC only beside a float vision tower",
                "leave the whole vision tower float, or serve with vLLM Ascend only",
            )
        )
    return faults


def loads(description: Mapping[str, Any], dtype: str, config: Mapping[str, Any]) -> list[str]:
    """Which engines load a finished folder, in words, e.g. ["vLLM Ascend 0.10.2rc2 and later"]; [] when none does.

    description: quant_model_description.json (tensor name -> scheme); dtype: "bfloat16" or "float16";
    config: config.json.
    """
    schemes = layer_schemes(description)
    sentences = []
    for engine in (VLLM_ASCEND, MINDIE):
        if _reads_config(engine, schemes, config) and not assignment_faults(engine, schemes):
            span = _versions(engine, schemes, dtype)
            if span is not None:
                since, until = span
                sentences.append(f"{ENGINE_TITLES[engine]} {since} " + (f"to {until}" if until else "and later"))
    return sentences


def layer_schemes(description: Mapping[str, Any]) -> dict[str, Scheme]:
    """Description (tensor name -> scheme word) -> scheme per layer, from the entries that end in `.weight`."""
    words = {str(scheme) for scheme in Scheme}
    return {
        name.removesuffix(".weight"): Scheme(word)
        for name, word in description.items()
        if name.endswith(".weight") and word in words
    }


def serve_commands(target: str, folder: str | Path) -> list[str]:
    """One line per engine of the target: what to run or set so that the engine serves `folder`."""
    lines = {
        # Versions from 0.17.0rc1 on detect the quantization by themselves; the flag does no harm there.
        VLLM_ASCEND: f"vllm serve {folder} --quantization ascend",
        MINDIE: f'"modelWeightPath": "{folder}" in the config.json of the MindIE service',
    }
    return [lines[engine] for engine in engines_of(target)]


def _reads_config(engine: str, schemes: Mapping[str, Scheme], config: Mapping[str, Any]) -> bool:
    """Whether the engine, given this config.json, treats the folder as quantized in the way it is."""
    if engine == VLLM_ASCEND:
        return "quantization_config" not in config  # vLLM would read that key instead of the description
    vision_config = config.get("vision_config")
    vision_key = vision_config.get("quantize") if isinstance(vision_config, Mapping) else None
    vision_quantized = any(name.startswith("visual.") and scheme != Scheme.FLOAT for name, scheme in schemes.items())
    return "text_config" not in config and bool(config.get("quantize")) and vision_quantized == bool(vision_key)


def _versions(engine: str, schemes: Mapping[str, Scheme], dtype: str) -> tuple[str, str | None] | None:
    """The span of versions in which every (layer, scheme) is legal; None when there is none."""
    order = VERSIONS[engine].index
    since, until = FLOAT_SINCE[engine], None
    for layer, scheme in schemes.items():
        if scheme == Scheme.FLOAT:
            continue
        rules = [
            rule
            for rule in TABLE
            if (rule.engine, rule.scheme) == (engine, scheme) and dtype in rule.dtypes and _matches(layer, rule.layers)
        ]
        if not rules:
            return None
        since = max(since, min((rule.since for rule in rules), key=order), key=order)
        if all(rule.until for rule in rules):
            last = max((rule.until for rule in rules if rule.until), key=order)
            until = min(until, last, key=order) if until else last
    return None if until and order(until) < order(since) else (since, until)


def _matches(layer: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(layer, pattern) for pattern in patterns)


def _listed(words: Iterable[str]) -> str:
    return " or ".join(str(word) for word in words)
