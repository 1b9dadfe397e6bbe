"""MindIE: which layers it runs in which scheme and version, and the folder that it loads.

Source: its own loader and models at the versions that each row names: atb_llm/models/FAMILY for those with a vision
tower, and mindie_llm/runtime for text models from 3.0.0.beta.1 on. No source of versions before 3.0.0alpha1 is public;
rows with such versions follow the README of msModelSlim.
"""

import json
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vlqc.errors import Fault
from vlqc.families.family import DECODER_ROLES, EXPERT_ROLES, VISION_ROLES, ModelFamily, Part, Role
from vlqc.formatting import pluralize
from vlqc.targets.caches import TensorScheme
from vlqc.targets.engine import (
    COMPILE_AGAIN,
    IGNORED_BIAS,
    Engine,
    FinishedFolder,
    FolderContent,
    Rule,
    cache_faults,
    join_and,
    join_or,
    missing_entry,
    tied_head,
)
from vlqc.targets.schemes import Scheme, quant_type

DESCRIPTION = re.compile(r"quant_model_description_.+\.json")
ANY_DESCRIPTION = re.compile(r"quant_model_description(_.+)?\.json")
PLAIN_DESCRIPTION = "quant_model_description.json"
# The first version that completes config.json from PLAIN_DESCRIPTION (models/base/router.py) and gives every RMSNorm in
# front of W8A8 layers the bias X.bias if it is stored (models/qwen2/modeling_qwen2.py, utils/quantize/pack_type.py). No
# source of versions before it is public.
READS_PLAIN = "3.0.0alpha1"
ACCEPTED_PATH = re.compile(r"[0-9a-zA-Z_./-]+")
ELSEWHERE = "or compile for vLLM Ascend only (--target vllm-ascend)"
SHOWN = 5  # names of files in one message
# Vision layers that it can run quantized in the families after Qwen2.5-VL; all others are plain float operators.
QUANTIZED_VISION = (Role.VISION_QKV, Role.VISION_PROJ, Role.VISION_UP)
# Options of the compilation that its config.json repeats.
CONFIG_OPTIONS = ("w_bit", "a_bit", "is_dynamic", "is_lowbit", "act_method", "anti_method")


@dataclass(frozen=True)
class ModelLoader:
    """What the loader of one family requires of several layers together.

    static_tower: roles that are W8A8 in every vision block as soon as the vision tower is quantized; needs_tower:
    whether the tower must be quantized if anything is; tower_with_dynamic: whether it is W8A8 next to a W8A8_DYNAMIC
    language model, or must be float there; dynamic_experts: whether the experts are W8A8_DYNAMIC if anything is
    quantized; unfused: roles whose fused groups may have FLOAT members next to W8A8 ones; documented: sizes that its
    documentation lists as quantized, empty if others are not worth a note; vision_key: whether it reads
    `vision_config.quantize`; looked_up: roles whose layers it looks up in the description; by_entries: whether it reads
    biases only if they have an entry there, and refuses a second description; extra_vision_outputs: how many outputs of
    the vision tower besides the last one its graph has, None if that does not matter; loads_head: whether it loads the
    weight of the output head even of tied models.
    """

    static_tower: tuple[Role, ...] = ()
    needs_tower: bool = False
    tower_with_dynamic: bool = False
    dynamic_experts: bool = False
    unfused: tuple[Role, ...] = ()
    documented: str = ""
    vision_key: bool = False
    looked_up: tuple[Role, ...] = (Role.QKV, Role.UP)
    by_entries: bool = False
    extra_vision_outputs: int | None = None
    loads_head: bool = False


TEXT_LOADER = ModelLoader(looked_up=DECODER_ROLES, by_entries=True)  # of 3.0.0.beta.1 and later


class MindIE(Engine):
    """See `Engine`."""

    name = "mindie"
    title = "MindIE"
    example_versions = "2.2 or 2.2.RC1"
    layout_option = "mindie_format"
    quantization_keys = (
        "quantize", "vision_config.quantize", *(f"quantization_config.{key}" for key in ("group_size", *CONFIG_OPTIONS))
    )  # fmt: skip
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
        # The last layer of the vision MLP and the merger are plain float operators (modeling_qwen2_vl_vit_atb.py,
        # 3.0.0alpha1 to 3.0.0). W8A8_DYNAMIC: modeling_qwen2.py, 3.0.0alpha1.
        "qwen2_vl": (
            Rule(Scheme.W8A8, (*QUANTIZED_VISION, *DECODER_ROLES), since="2.1.RC1"),
            Rule(Scheme.W8A8_DYNAMIC, DECODER_ROLES, since="3.0.0alpha1"),
        ),
        # modeling_qwen3_vl_vit.py and _text.py, first in 3.0.0.beta.1. FlashLayer has no 4-bit weights.
        "qwen3_vl": (
            Rule(Scheme.W8A8, (*QUANTIZED_VISION, *DECODER_ROLES), since="3.0.0.beta.1"),
            Rule(Scheme.W8A8_DYNAMIC, DECODER_ROLES, since="3.0.0.beta.1"),
        ),
        # modeling_qwen3_vl_moe_text.py, first in 3.0.0.beta.1: static attention, experts per token, router in float.
        "qwen3_vl_moe": (
            Rule(Scheme.W8A8, (*QUANTIZED_VISION, Role.QKV, Role.OUT), since="3.0.0.beta.1"),
            Rule(Scheme.W8A8_DYNAMIC, EXPERT_ROLES, since="3.0.0.beta.1"),
        ),
        # Text models have two loaders: modeling_qwen2.py in 3.0.0alpha1, and from 3.0.0.beta.1 on
        # runtime/layers/quantization/ms_model_slim.
        "qwen2": (
            Rule(Scheme.W8A8, DECODER_ROLES, since="3.0.0alpha1"),
            Rule(Scheme.W8A8_DYNAMIC, DECODER_ROLES, since="3.0.0alpha1"),
            # ms_model_slim/w8a8.py, W8A8MixLinearMethod: per token always, up to 3.0.0.
            Rule(Scheme.W8A8_MIX, DECODER_ROLES, since="3.0.0.beta.1"),
            # No rule for W8A16: from 3.0.0.beta.1 on such a layer is taken for a float one, with a warning in the log
            # (quantization_config.py). Before, it is documented for larger models with a quantized cache only.
        ),
        "qwen3": (
            Rule(Scheme.W8A8, DECODER_ROLES, since="3.0.0alpha1"),
            Rule(Scheme.W8A8_DYNAMIC, DECODER_ROLES, since="3.0.0alpha1"),
            Rule(Scheme.W8A8_MIX, DECODER_ROLES, since="3.0.0.beta.1"),
        ),
    }
    loaders: ClassVar[Mapping[str, ModelLoader]] = {
        "qwen2_5_vl": ModelLoader(
            static_tower=(Role.VISION_QKV,),
            unfused=(Role.QKV, Role.UP),
            vision_key=True,
            looked_up=(Role.QKV, Role.UP, Role.VISION_UP),
        ),
        # One graph reads the static tensors of qkv, proj and fc1 in every block.
        "qwen2_vl": ModelLoader(static_tower=QUANTIZED_VISION, unfused=(Role.QKV, Role.UP), vision_key=True),
        # flash_causal_qwen3_vl.py: the tower takes the `quantize` of the model. q/k/v are always one matrix.
        "qwen3_vl": ModelLoader(
            static_tower=(Role.VISION_QKV, Role.VISION_UP),
            needs_tower=True,
            tower_with_dynamic=True,
            unfused=(Role.UP,),
            documented="8B and 32B",
            extra_vision_outputs=3,
        ),
        "qwen3_vl_moe": ModelLoader(
            static_tower=(Role.VISION_QKV, Role.VISION_UP),
            needs_tower=True,
            dynamic_experts=True,
            documented="30B-A3B",
            extra_vision_outputs=3,  # modeling_qwen3_vl_vit.py, of both families
            loads_head=True,
            looked_up=(Role.QKV, *EXPERT_ROLES),
        ),
        "qwen2": TEXT_LOADER,
        "qwen3": TEXT_LOADER,
    }
    group_sizes = (0, 64, 128, 256)  # what its config reader accepts
    packs_int4 = False
    norm_bias_parts = (Part.LANGUAGE,)
    # Versions of transformers: requirements/models/requirements_*.txt, equal in 3.0.0alpha1 to 3.0.0.
    required: ClassVar[Mapping[str, str]] = {
        "qwen2_5_vl": "4.49.0",  # requirements_qwen2_vl.txt
        "qwen2_vl": "4.49.0",
        "qwen3_vl": "4.57.0",
        "qwen3_vl_moe": "4.57.0",
        "qwen2": "4.43.1",  # requirements_qwen2.5.txt
        "qwen3": "4.51.0",
    }
    template_by_processor = True  # input_builder_qwen2_vl.py, input_builder_qwen3_vl.py
    norm_copies = "module"  # `X.module.weight` makes it build the norm that has a bias

    def transformers_versions(self, family: ModelFamily) -> tuple[tuple[str, str], ...]:
        version, required = self.first_version(family), self.required.get(family.engine_rows or family.name)
        return ((version, required),) if version and required else ()

    def _loader(self, family: ModelFamily) -> ModelLoader:
        return self.loaders[family.engine_rows or family.name] if self.rules_of(family) else ModelLoader()

    # ---- rules about several layers --------------------------------------------------------------------------------

    def group_faults(self, family: ModelFamily, schemes: Mapping[str, Scheme]) -> list[Fault]:
        """The vision tower is all float, or W8A8 with certain layers quantized in every block; one scheme for all that
        is not float, since the one `quantize` of config.json names it."""
        loader = self._loader(family)
        return self._tower_faults(family, loader, schemes) + self._mixed_faults(family, loader, schemes)

    def _tower_faults(self, family: ModelFamily, loader: ModelLoader, schemes: Mapping[str, Scheme]) -> list[Fault]:
        """Float layers of a vision tower in which the loader builds them quantized."""
        quantized = [layer for layer, scheme in schemes.items() if scheme.is_quantized]
        reasons = quantized if loader.needs_tower else [layer for layer in quantized if family.in_vision_tower(layer)]
        layers = [layer for layer, scheme in schemes.items() if scheme == Scheme.FLOAT]
        layers = [layer for layer in layers if family.role(layer) in loader.static_tower]
        if not reasons or not layers:
            return []
        names = join_and(dict.fromkeys(each.rpartition(".")[2] for each in family.layers(*loader.static_tower)))
        why = f"MindIE builds every block's {names} quantized as soon as "
        if loader.needs_tower:
            why, fix = f"{why}anything is", f"quantize {names} to W8A8 in every vision block"
        else:
            why, fix = f"{why}the vision tower is", f"quantize {names} in every vision block, leave the tower float"
        return [
            Fault(
                f"{layer} is FLOAT while {reasons[0]} is {schemes[reasons[0]]}",
                layer,
                why,
                f"{fix}, {ELSEWHERE}",
            )
            for layer in layers
        ]

    def _mixed_faults(self, family: ModelFamily, loader: ModelLoader, schemes: Mapping[str, Scheme]) -> list[Fault]:
        """Layers whose scheme does not go with the only one that config.json can name."""
        static = [layer for layer, scheme in schemes.items() if scheme == Scheme.W8A8]
        mixed = [layer for layer, scheme in schemes.items() if scheme == Scheme.W8A8_MIX]
        dynamic = mixed + [layer for layer, scheme in schemes.items() if scheme == Scheme.W8A8_DYNAMIC]
        if loader.dynamic_experts:
            experts = [layer for layer in schemes if family.role(layer) in EXPERT_ROLES]
            others = [layer for layer in experts if schemes[layer] != Scheme.W8A8_DYNAMIC]
            if not others or not static + dynamic:
                return []
            why = "MindIE runs quantized models of this kind with all experts in W8A8_DYNAMIC"
            fix = f"give all experts W8A8_DYNAMIC, {ELSEWHERE}"
            return [Fault(f"{others[0]} is {schemes[others[0]]}", others[0], why, fix)]
        if loader.tower_with_dynamic or not family.layers(*VISION_ROLES):
            conflicting = [layer for layer in static if not family.in_vision_tower(layer)]
            conflicting += mixed if len(mixed) < len(dynamic) else []
            why = "MindIE runs one scheme in the language model, which config.json names"
            fix = f"give the language model one scheme, {ELSEWHERE}"
        else:
            in_tower = [layer for layer in schemes if family.in_vision_tower(layer) and schemes[layer].is_quantized]
            conflicting = in_tower or static
            why = "MindIE runs W8A8_DYNAMIC only with a float vision tower, and never together with W8A8"
            fix = f"leave the vision tower float and give all else one scheme, {ELSEWHERE}"
        if not dynamic or not conflicting:
            return []
        others = [layer for layer in dynamic if layer not in conflicting]
        what = f"{conflicting[0]} is {schemes[conflicting[0]]}"
        what += f" while {others[0]} is {schemes[others[0]]}" if others else ""
        return [Fault(what, conflicting[0], why, fix)]

    def runs_unfused(self, family: ModelFamily, schemes: Mapping[str, Scheme]) -> bool:
        """It runs float members of some static groups next to quantized ones, unfused."""
        roles = self._loader(family).unfused
        return all(family.role(layer) in roles for layer in schemes) and (
            set(schemes.values()) <= {Scheme.FLOAT, Scheme.W8A8}
        )

    # ---- writing a folder ------------------------------------------------------------------------------------------

    def folder_type(self, family: ModelFamily, schemes: Mapping[str, Scheme]) -> Scheme:
        """The type that its `quantize` names. A static vision tower, or static attention before experts, is implied by
        W8A8_DYNAMIC there."""
        loader = self._loader(family)
        if (loader.tower_with_dynamic or loader.dynamic_experts) and Scheme.W8A8_DYNAMIC in schemes.values():
            return Scheme.W8A8_DYNAMIC
        return quant_type(schemes.values())

    def description_name(self, quant_type: Scheme) -> str:
        return f"quant_model_description_{quant_type.lower()}.json"

    def find_description(self, files: Iterable[str]) -> str | None:
        return min((name for name in files if DESCRIPTION.fullmatch(name)), default=None)

    def edit_config(self, config: dict[str, Any], content: FolderContent, *, own_layout: bool) -> None:
        """`quantize` and `vision_config.quantize`, and in its own layout `quantization_config`.

        In another layout it runs static W8A8 only, with a cache in float; the other engine ignores the keys.
        """
        if not own_layout and (Scheme.W8A8 not in content.schemes.values() or content.cache_schemes):
            return
        config["quantize"] = content.quant_type.lower()
        family, vision_config = content.family, content.family.vision_config(config)
        if isinstance(vision_config, dict):
            vision_config.pop("quantize", None)
            if self._loader(family).vision_key and _quantizes_vision(family, content.schemes):
                vision_config["quantize"] = content.quant_type.lower()
        if own_layout:
            options = content.options
            grouped = content.scheme == Scheme.W4A8_DYNAMIC and options["group_size"] in self.group_sizes
            config["quantization_config"] = {"group_size": options["group_size"] if grouped else 0} | {
                name: options[name] for name in CONFIG_OPTIONS
            }

    # ---- a finished folder -----------------------------------------------------------------------------------------

    def reads_config(self, family: ModelFamily, schemes: Mapping[str, Scheme], config: Mapping[str, Any]) -> bool:
        """`quantize` names the folder's type, and that of the vision tower is there only if it is quantized."""
        vision_key = bool((family.vision_config(config) or {}).get("quantize"))
        return (
            family.engine_config(dict(config)) == config
            and not self.model_faults(family, config)
            and config.get("quantize") == self.folder_type(family, schemes).lower()
            and (not self._loader(family).vision_key or vision_key == _quantizes_vision(family, schemes))
        )

    def completed_config(self, folder: FinishedFolder) -> Mapping[str, Any] | None:
        """`quantize` from model_quant_type. 3.0.0alpha1 to 3.0.0.beta.2 take it even if config.json names another type,
        which is a fault here because later versions take the one in config.json."""
        described = folder.description.get("model_quant_type")
        is_read = folder.description_name == PLAIN_DESCRIPTION and folder.config.get("quantize") is None
        if not is_read or not isinstance(described, str) or not folder.quant_type.is_quantized:
            return None
        return {**folder.config, "quantize": described.lower()}

    def version_faults(self, folder: FinishedFolder) -> dict[tuple[str, str | None], list[Fault]]:
        faults = []
        if self.completed_config(folder) is not None:
            why = f"MindIE takes the type from the description from {READS_PLAIN} on only"
            fix = f"set it to {folder.quant_type.lower()!r}"
            faults.append(Fault("quantize is missing", "config.json", why, fix))
        for norm in folder.shifted_norms():
            if self._has_plain_bias(folder, norm):
                why = f"MindIE reads the bias of a norm under its plain name from {READS_PLAIN} on only"
                fix = f"compile again with --{self.layout_option}"
                faults.append(Fault(f"{norm}.{self.norm_copies}.bias is missing", f"{norm}.bias", why, fix))
        return {("0", READS_PLAIN): faults, (READS_PLAIN, None): []} if faults else {}

    def is_named_in(self, config: Mapping[str, Any]) -> bool:
        return "quantize" in config

    def config_faults(self, folder: FinishedFolder) -> list[Fault]:
        config, family = self.completed_config(folder) or folder.config, folder.family
        faults = []
        published = family.engine_config(dict(config))
        if others := [key for key, value in config.items() if key not in published or published[key] != value]:
            what = f"in the form of another transformers version: {join_and(others)}"
            fix = "compile again, or restore the keys of the published checkpoint"
            faults.append(Fault(what, "config.json", f"MindIE reads the config of {family.title} as published", fix))
        faults += self.model_faults(family, config)
        vision_key = (family.vision_config(config) or {}).get("quantize")
        vision = {scheme for layer, scheme in folder.schemes.items() if family.in_vision_tower(layer)} - {Scheme.FLOAT}
        values: dict[str, tuple[Any, Any]] = {"quantize": (config.get("quantize"), folder.quant_type.lower())}
        if self._loader(family).vision_key:
            wanted = Scheme.W8A8.lower() if vision else None
            if vision_key and not all(scheme.spec.takes_added_bias for scheme in vision):
                wanted = vision_key  # no version supports it; the engine rules report that
            values["vision_config.quantize"] = (vision_key, wanted)
        for key, (value, wanted) in values.items():
            if value != wanted:
                what = f"{key} is {value!r} instead of {wanted!r}"
                why = "MindIE quantizes the layers of this part of the model only if this key says so"
                faults.append(Fault(what, "config.json", why, f"set {key}" if wanted else f"remove {key}"))
        options = config.get("quantization_config")
        faults += cache_faults(options if isinstance(options, Mapping) else {}, "config.json", "quantization_config.")
        if isinstance(options, Mapping) and options.get("group_size", 0) not in self.group_sizes:
            what = f"quantization_config.group_size is {options['group_size']!r}"
            why = f"MindIE accepts {join_or(self.group_sizes)}"
            faults.append(Fault(what, "config.json", why, "compile again with another --group_size"))
        elif folder.layout is self and not isinstance(options, Mapping):
            why = "MindIE reads the group size from it"
            faults.append(Fault("quantization_config is missing", "config.json", why, COMPILE_AGAIN))
        return faults

    def model_faults(self, family: ModelFamily, config: Mapping[str, Any]) -> list[Fault]:
        """A tied head where its code loads one, and other outputs of the vision tower than it adds up."""
        loader, outputs = self._loader(family), family.extra_vision_outputs(config)
        faults = tied_head(self, family, config) if loader.loads_head else []
        if loader.extra_vision_outputs not in (None, outputs):
            what = f"{pluralize(outputs, 'output')} of the vision tower besides the last one"
            why = f"MindIE runs {family.title} with exactly {loader.extra_vision_outputs}"
            faults.append(Fault(what, "config.json", why, "serve with vLLM Ascend only"))
        return faults

    def header_faults(self, folder: FinishedFolder) -> list[Fault]:
        name, expected = folder.description_name, self.description_name(folder.quant_type)
        faults = super().header_faults(folder)
        if name != expected:
            what, why = (
                f"named {name} instead of {expected}",
                f"MindIE derives the name from the type {folder.quant_type}",
            )
            faults.append(Fault(what, name, why, "rename the file"))
        return faults

    def description_faults(self, folder: FinishedFolder) -> list[Fault]:
        """The loader of most models looks up the members of fused groups; that of text models all linear layers and the
        biases of norms and of layers that it runs per token."""
        loader, family = self._loader(folder.family), folder.family
        faults = [
            missing_entry(folder, layer, "MindIE looks it up there, and stops")
            for layer in folder.linears
            if family.role(layer) in loader.looked_up and f"{layer}.weight" not in folder.description
        ]
        if not loader.by_entries:
            return faults
        schemes = {layer: folder.schemes.get(layer, Scheme.FLOAT) for layer in folder.linears}
        layers = (layer for layer, scheme in schemes.items() if scheme.spec.activation.is_dynamic)
        biases = (f"{name}.bias" for name in (*layers, *folder.shifted_norms()))
        for bias in biases:
            if bias in folder.tensors and bias not in folder.description:
                why = "MindIE ignores a bias without an entry"
                faults.append(Fault(f"{bias} has no entry", folder.description_name, why, COMPILE_AGAIN))
        descriptions = [name for name in folder.files if ANY_DESCRIPTION.fullmatch(name)]
        if len(descriptions) > 1:
            why = "MindIE refuses a text model with several descriptions"
            faults.append(Fault("several descriptions", ", ".join(descriptions), why, "remove all but one"))
        return faults

    def tensor_faults(self, folder: FinishedFolder) -> list[Fault]:
        """Biases of norms (a folded shift) that it does not apply, and their copies."""
        shifted = folder.shifted_norms()
        faults = []
        for norm in shifted:
            readers = [folder.schemes[layer] for layer in folder.norm_readers[norm] if layer in folder.schemes]
            if not all(scheme.spec.takes_added_bias for scheme in readers):
                why = "MindIE applies a norm bias only if every layer that reads the norm is W8A8"
                faults.append(Fault(IGNORED_BIAS, f"{norm}.bias", why, COMPILE_AGAIN))
        for norm in folder.norm_readers:
            faults += self._copy_faults(folder, norm, biased=norm in shifted)
        return faults

    def _copy_faults(self, folder: FinishedFolder, norm: str, *, biased: bool) -> list[Fault]:
        """It needs copies X.module.weight and X.module.bias of exactly the norms that have a bias. In the layout of
        another engine some versions need none, see `version_faults`."""
        faults: list[Fault] = []
        if biased and self._has_plain_bias(folder, norm):
            return faults
        for suffix in ("weight", "bias"):
            name, copy = f"{norm}.{suffix}", f"{norm}.{self.norm_copies}.{suffix}"
            if (copy in folder.tensors) != biased:
                what = f"{copy} is missing" if biased else f"{copy} exists, but the norm has no bias"
                why = "MindIE applies the bias of exactly those norms whose tensors are repeated under X.module"
                faults.append(Fault(what, name, why, COMPILE_AGAIN))
            elif biased and name in folder.tensors:
                first, second = folder.tensors[name], folder.tensors[copy]
                same_form = (first.dtype, first.shape) == (second.dtype, second.shape)
                if not (same_form and first.read().tobytes() == second.read().tobytes()):
                    why = "they must be equal, because MindIE reads one or the other"
                    faults.append(Fault(f"differs from {name}", copy, why, "copy the folder again, or compile again"))
        return faults

    def _has_plain_bias(self, folder: FinishedFolder, norm: str) -> bool:
        copies = {f"{norm}.{self.norm_copies}.{suffix}" for suffix in ("weight", "bias")}
        return folder.layout is not self and not copies & (folder.tensors.keys() | folder.description.keys())

    def group_size_entry(self, folder: FinishedFolder) -> tuple[str, str, Any]:
        options = folder.config.get("quantization_config")
        value = options.get("group_size") if isinstance(options, Mapping) else None
        return "config.json", "quantization_config.group_size", value

    def placement_faults(self, folder: FinishedFolder) -> list[Fault]:
        return _writable_by_all(folder) if folder.layout is self else []

    def placement_warnings(self, folder: FinishedFolder) -> list[Fault]:
        faults = [] if folder.layout is self else _writable_by_all(folder)
        return self.path_faults(folder.path) + faults

    def path_faults(self, folder: Path) -> list[Fault]:
        """atb_llm/utils/file_utils.py, check_path_has_special_characters."""
        if ACCEPTED_PATH.fullmatch(path := str(folder.resolve())):
            return []
        what, fix = "MindIE accepts only letters, digits and _ . / - in paths", "move the folder before serving it"
        return [Fault(what, path, fix=f"{fix} with MindIE")]

    # ---- notes for the user ----------------------------------------------------------------------------------------

    def serve_command(self, folder: str) -> str:
        return f'"modelWeightPath": {json.dumps(folder, ensure_ascii=False)} in the config.json of the MindIE service'

    def unsupported_where(self, family: ModelFamily, scheme: Scheme) -> str:
        if scheme == Scheme.W4A8_DYNAMIC and family.layers(*VISION_ROLES):
            return " for vision-language models"
        return "" if any(rule.scheme == scheme for rule in self.rules_of(family)) else f" of {family.title}"

    def scheme_notes(self, family: ModelFamily, scheme: Scheme, group_size: int | None) -> list[str]:
        loader = self._loader(family)
        if scheme == Scheme.W8A8 and loader.documented:
            return [f"MindIE documents {scheme} of {family.title} for {loader.documented} only"]
        if scheme == Scheme.W8A8_DYNAMIC and loader.vision_key:
            return ["MindIE runs W8A8_DYNAMIC in the language model only: the vision tower stays float"]
        if scheme == Scheme.W8A8_MIX and any(rule.scheme == scheme for rule in self.rules_of(family)):
            return ["MindIE runs W8A8_MIX as W8A8_DYNAMIC, in prefill and decoding"]
        if scheme == Scheme.W4A8_DYNAMIC and group_size is not None and group_size not in self.group_sizes:
            return [f"group_size {group_size}: MindIE accepts {join_or(self.group_sizes[1:])} only"]
        return []


def _quantizes_vision(family: ModelFamily, schemes: Mapping[str, TensorScheme]) -> bool:
    """Tensor or layer name -> scheme: whether anything in the vision tower is quantized."""
    return any(family.in_vision_tower(name) for name, scheme in schemes.items() if scheme != Scheme.FLOAT)


def _writable_by_all(folder: FinishedFolder) -> list[Fault]:
    """MindIE checks file modes before it reads."""
    paths = (folder.path, *sorted(folder.path.iterdir()))
    writable = [path.name for path in paths if path.stat().st_mode & stat.S_IWOTH]
    if not writable:
        return []
    what = "writable by all users" + (f", and {len(writable) - SHOWN} more" if len(writable) > SHOWN else "")
    return [Fault(what, ", ".join(writable[:SHOWN]), "MindIE rejects such files", "chmod o-w")]


MINDIE = MindIE()
