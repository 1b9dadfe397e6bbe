"""The schemes that the reference script gives the layers of a small model, and all faults of an assignment."""

from collections.abc import Mapping

from vlqc.errors import Fault
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.targets.rules import group_faults, layer_faults
from vlqc.targets.schemes import Scheme
from vlqc.targets.target import TargetLike

FLOAT, W8A8, DYNAMIC, W4A8 = Scheme.FLOAT, Scheme.W8A8, Scheme.W8A8_DYNAMIC, Scheme.W4A8_DYNAMIC
MIX, W8A16 = Scheme.W8A8_MIX, Scheme.W8A16


def reference_assignment(blocks: int = 2) -> dict[str, Scheme]:
    schemes = {
        "lm_head": FLOAT,
        "model.embed_tokens": FLOAT,
        "visual.merger.mlp.0": FLOAT,
        "visual.merger.mlp.2": FLOAT,
    }
    for index in range(blocks):
        block, layer = f"visual.blocks.{index}", f"model.layers.{index}"
        schemes |= {f"{block}.{name}": W8A8 for name in ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj")}
        schemes |= {f"{layer}.self_attn.{name}_proj": W8A8 for name in "qkvo"}
        schemes |= {f"{layer}.mlp.{name}_proj": W8A8 for name in ("gate", "up")}
        schemes |= {f"{block}.mlp.down_proj": FLOAT, f"{layer}.mlp.down_proj": FLOAT}
    return schemes


def assignment_faults(target: TargetLike, schemes: Mapping[str, Scheme]) -> list[Fault]:
    """Scheme per checkpoint layer name -> faults of single layers and of groups."""
    return layer_faults(target, QWEN2_5_VL, schemes) + group_faults(target, QWEN2_5_VL, schemes)
