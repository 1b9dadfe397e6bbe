"""The table of what each engine runs, as data: which scheme on which layer, from which version to which.

Layers are named as in the checkpoint (`model.layers.0.self_attn.q_proj`). Sources: the vLLM Ascend and MindIE loaders'
own rules for Qwen2.5-VL. To teach vlqc a new scheme or version, add a line to `TABLE`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from vlqc.targets.target import MINDIE, VLLM_ASCEND, Version


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
REFERENCE_FLOAT: tuple[str, ...] = (
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

    def holds(self, engine: str, version: Version | None, dtype: str | None) -> bool:
        """Whether the rule is one of this engine's version (None: of any) and dtype (None: any)."""
        if self.engine != engine or (dtype is not None and dtype not in self.dtypes):
            return False
        until = self.until is None or version is None or version <= Version.parse(self.until)
        return until and (version is None or Version.parse(self.since) <= version)


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
    # MindIE has no line for W4A8_DYNAMIC: no version of it runs that in a vision-language model.
)
FLOAT_SINCE = {VLLM_ASCEND: "0.10.2rc2", MINDIE: "2.2.RC1"}  # float layers load wherever a quantized folder loads

# A folder of several schemes is named after the first of these that occurs in it.
NAMING_ORDER = (Scheme.W4A8_DYNAMIC, Scheme.W8A8, Scheme.W8A8_DYNAMIC)
INT4_ROWS = 8  # vLLM Ascend's int4 operator takes outputs in eights
FAST_GROUP_SIZES = (64, 128)  # what its kernels are written for
MINDIE_GROUP_SIZES = (0, 64, 128, 256)  # what MindIE's config reader accepts


def matches(layer: str, patterns: Iterable[str]) -> bool:
    """Whether a layer's checkpoint name is meant by one of the patterns."""
    return any(fnmatchcase(layer, pattern) for pattern in patterns)
