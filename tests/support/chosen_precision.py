"""What assign-precision is to choose for the model's layers, and what it does choose."""

from typing import Any

from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.ir.stage import Site
from vlqc.passes.assign_precision import AssignPrecision
from vlqc.targets.precision import Decision
from vlqc.targets.schemes import Scheme

S, D, G, F = Scheme.W8A8, Scheme.W8A8_DYNAMIC, Scheme.W4A8_DYNAMIC, Scheme.FLOAT
# Every linear of the model: in the reference script these stay float ...
FLOAT_IN_REFERENCE = (
    "visual.blocks.3.mlp.down_proj",
    "visual.merger.mlp.0",
    "visual.merger.mlp.2",
    "model.layers.27.mlp.down_proj",
    "lm_head",
)
# ... and these do not.
QUANTIZED_IN_REFERENCE = (
    "visual.blocks.3.attn.qkv",
    "visual.blocks.3.attn.proj",
    "visual.blocks.3.mlp.gate_proj",
    "visual.blocks.3.mlp.up_proj",
    *(f"model.layers.27.self_attn.{part}_proj" for part in "qkvo"),
    "model.layers.27.mlp.gate_proj",
    "model.layers.27.mlp.up_proj",
)
GROUPS = (
    ("model.layers.27.self_attn.q_proj", "model.layers.27.self_attn.k_proj", "model.layers.27.self_attn.v_proj"),
    ("model.layers.27.mlp.gate_proj", "model.layers.27.mlp.up_proj"),
    ("visual.blocks.3.mlp.gate_proj", "visual.blocks.3.mlp.up_proj"),
)
REFERENCE_REASON = "kept in float by the reference exclusions"


def members_with(name: str, shape: tuple[int, int] = (64, 256)) -> list[Site]:
    names = next((group for group in GROUPS if name in group), (name,))
    return [Site(member, member, "x", shape) for member in names]


def choose(members: list[Site], **options: Any) -> Decision:
    return AssignPrecision(**options).choose(members, QWEN2_5_VL)
