"""vLLM Ascend: which layers it runs in which scheme and version, and the folder that it loads.

Source: the rules of its own loader for Qwen2.5-VL.
"""

import shlex
from collections.abc import Mapping
from typing import Any, ClassVar

from vlqc.families.family import DECODER_ROLES, VISION_ROLES, ModelFamily, Role
from vlqc.targets.engine import Engine, Rule, join_or
from vlqc.targets.schemes import Scheme

DESCRIPTION = "quant_model_description.json"
DESCRIPTION_VERSION = "1.0.0"  # by which it recognizes packed 4-bit weights
ONLY_BFLOAT16 = ("bfloat16",)
FAST_GROUP_SIZES = (64, 128)  # what its int4 kernels are written for


class VllmAscend(Engine):
    """See `Engine`."""

    name = "vllm-ascend"
    title = "vLLM Ascend"
    example_versions = "0.18 or 0.17.0rc1"
    since = "0.10.2rc2"
    rules: ClassVar[Mapping[str, tuple[Rule, ...]]] = {
        "qwen2_5_vl": (
            Rule(Scheme.W8A8, (*VISION_ROLES, Role.MERGER, *DECODER_ROLES), since="0.10.2rc2"),
            Rule(Scheme.W8A8_DYNAMIC, DECODER_ROLES, since="0.11", dtypes=ONLY_BFLOAT16),
            # The vision tower passes 3-D inputs to its layers; the per-token operator takes them from 0.16 on.
            Rule(Scheme.W8A8_DYNAMIC, (*VISION_ROLES, Role.MERGER), since="0.16", dtypes=ONLY_BFLOAT16),
            # The int4 operator ignores a bias, and q/k/v have one; it takes 2-D inputs only, so never vision.
            Rule(Scheme.W4A8_DYNAMIC, (Role.OUT, Role.UP, Role.DOWN), since="0.11", before="0.26"),
        ),
    }
    packs_int4 = True
    norm_bias_parts = ("language",)

    def description_name(self, quant_type: Scheme) -> str:
        return DESCRIPTION

    def description_header(self, quant_type: Scheme) -> dict[str, Any]:
        return {"version": DESCRIPTION_VERSION, "model_quant_type": str(quant_type)}

    def reads_config(self, family: ModelFamily, schemes: Mapping[str, Scheme], config: Mapping[str, Any]) -> bool:
        return "quantization_config" not in config  # vLLM would read that key instead of the description

    def serve_command(self, folder: str) -> str:
        # Versions from 0.17.0rc1 on detect the quantization by themselves; the flag does no harm there.
        return f"vllm serve {shlex.quote(folder)} --quantization ascend"

    def scheme_notes(self, scheme: Scheme, group_size: int | None) -> list[str]:
        if scheme != Scheme.W4A8_DYNAMIC or group_size is None or group_size in FAST_GROUP_SIZES:
            return []
        sizes = join_or(FAST_GROUP_SIZES)
        if group_size > max(FAST_GROUP_SIZES) * 2:
            return [f"group_size {group_size}: vLLM Ascend's int4 kernels are written for {sizes}, and may refuse it"]
        return [f"group_size {group_size}: vLLM Ascend's int4 kernels prefer {sizes}"]


VLLM_ASCEND = VllmAscend()
