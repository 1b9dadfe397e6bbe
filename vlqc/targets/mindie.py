"""MindIE: which layers it runs in which scheme and version, and the folder that it loads.

Source: the rules of its own loader for Qwen2.5-VL.
"""

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from vlqc.errors import Fault
from vlqc.families.family import DECODER_ROLES, ModelFamily, Role
from vlqc.targets.engine import Engine, FolderContent, Rule, join_or
from vlqc.targets.schemes import Scheme, quant_type

# Options of the compilation that its config.json repeats.
CONFIG_OPTIONS = ("w_bit", "a_bit", "is_dynamic", "is_lowbit", "act_method", "anti_method")


class MindIE(Engine):
    """See `Engine`."""

    name = "mindie"
    title = "MindIE"
    example_versions = "2.2 or 2.2.RC1"
    since = "2.2.RC1"
    rules: ClassVar[Mapping[str, tuple[Rule, ...]]] = {
        "qwen2_5_vl": (
            # It keeps the last layer of the vision MLP in float. See also `group_faults`.
            Rule(
                Scheme.W8A8,
                (Role.VISION_QKV, Role.VISION_PROJ, Role.VISION_UP, Role.MERGER, *DECODER_ROLES),
                since="2.2.RC1",
            ),
            Rule(Scheme.W8A8_DYNAMIC, DECODER_ROLES, since="2.2.RC1"),
            # No rule for W4A8_DYNAMIC: no version runs it in a vision-language model.
        ),
    }
    group_sizes = (0, 64, 128, 256)  # what its config reader accepts
    packs_int4 = False
    norm_bias_parts = ("language",)
    norm_copies = "module"  # `X.module.weight` makes it build the norm that has a bias

    def group_faults(self, family: ModelFamily, schemes: Mapping[str, Scheme]) -> list[Fault]:
        """The vision tower is all float, or W8A8 with qkv quantized in every block; one scheme for all that is not
        float, since the one `quantize` of config.json names it."""
        vision = {layer: scheme for layer, scheme in schemes.items() if family.in_vision_tower(layer)}
        quantized = [layer for layer, scheme in vision.items() if scheme != Scheme.FLOAT]
        faults = [
            Fault(
                f"{layer} is FLOAT while {quantized[0]} is {vision[quantized[0]]}",
                layer,
                "MindIE builds every block's qkv quantized as soon as the vision tower is",
                "quantize qkv in every vision block, leave the vision tower float, or serve with vLLM Ascend only",
            )
            for layer, scheme in vision.items()
            if quantized and family.role(layer) == Role.VISION_QKV and scheme == Scheme.FLOAT
        ]
        static = [layer for layer, scheme in schemes.items() if scheme == Scheme.W8A8]
        dynamic = [layer for layer, scheme in schemes.items() if scheme == Scheme.W8A8_DYNAMIC]
        if dynamic and (conflicting := quantized or static):
            faults.append(
                Fault(
                    f"{conflicting[0]} is {schemes[conflicting[0]]} while {dynamic[0]} is {Scheme.W8A8_DYNAMIC}",
                    conflicting[0],
                    "MindIE runs W8A8_DYNAMIC only with a float vision tower, and never together with W8A8",
                    "leave the vision tower float and give all else one scheme, or serve with vLLM Ascend only",
                )
            )
        return faults

    def runs_unfused(self, family: ModelFamily, schemes: Mapping[str, Scheme]) -> bool:
        """It runs float members of a static language group next to quantized ones, unfused."""
        return all(family.part(layer) == "language" for layer in schemes) and (
            set(schemes.values()) <= {Scheme.FLOAT, Scheme.W8A8}
        )

    def description_name(self, quant_type: Scheme) -> str:
        return f"quant_model_description_{quant_type.lower()}.json"

    def description_header(self, quant_type: Scheme) -> dict[str, Any]:
        return {"model_quant_type": str(quant_type)}

    def edit_config(self, config: dict[str, Any], content: FolderContent, *, own_layout: bool) -> None:
        """`quantize` and `vision_config.quantize`, and in its own layout `quantization_config`.

        In another layout it runs static W8A8 only; the other engine ignores the keys.
        """
        if not own_layout and Scheme.W8A8 not in content.schemes.values():
            return
        config["quantize"] = content.quant_type.lower()
        family, vision_config = content.family, content.family.vision_config(config)
        if isinstance(vision_config, dict):
            vision_config.pop("quantize", None)
            if any(family.in_vision_tower(name) for name, scheme in content.schemes.items() if scheme != Scheme.FLOAT):
                vision_config["quantize"] = content.quant_type.lower()
        if own_layout:
            options = content.options
            grouped = content.scheme == Scheme.W4A8_DYNAMIC and options["group_size"] in self.group_sizes
            config["quantization_config"] = {"group_size": options["group_size"] if grouped else 0} | {
                name: options[name] for name in CONFIG_OPTIONS
            }

    def reads_config(self, family: ModelFamily, schemes: Mapping[str, Scheme], config: Mapping[str, Any]) -> bool:
        """A flat config whose `quantize` keys name the folder's type, the vision tower's only if it is quantized."""
        vision_config = family.vision_config(config) or {}
        vision_quantized = any(
            family.in_vision_tower(name) and scheme != Scheme.FLOAT for name, scheme in schemes.items()
        )
        return (
            family.engine_config(dict(config)) == config
            and config.get("quantize") == quant_type(schemes.values()).lower()
            and vision_quantized == bool(vision_config.get("quantize"))
        )

    def serve_command(self, folder: str) -> str:
        return f'"modelWeightPath": {json.dumps(folder, ensure_ascii=False)} in the config.json of the MindIE service'

    def unsupported_where(self, family: ModelFamily, scheme: Scheme) -> str:
        return " for vision-language models" if scheme == Scheme.W4A8_DYNAMIC else ""

    def scheme_notes(self, scheme: Scheme, group_size: int | None) -> list[str]:
        if scheme == Scheme.W8A8_DYNAMIC:
            return ["MindIE runs W8A8_DYNAMIC in the language model only: the vision tower stays float"]
        if scheme == Scheme.W4A8_DYNAMIC and group_size is not None and group_size not in self.group_sizes:
            return [f"group_size {group_size}: MindIE accepts {join_or(self.group_sizes[1:])} only"]
        return []


MINDIE = MindIE()
