"""vLLM Ascend: which layers it runs in which scheme and version, and the folder that it loads.

Source: its own loader at the tags that each row names (quantization/quant_config.py, from 0.14.0rc1 on
quantization/modelslim_config.py), and vLLM's models at the version that it runs with.
"""

import shlex
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from vlqc.errors import Fault
from vlqc.families.family import DECODER_ROLES, EXPERT_ROLES, VISION_ROLES, ModelFamily, Part, Role
from vlqc.families.linear import Linear
from vlqc.targets.cache_schemes import CacheScheme
from vlqc.targets.caches import used_schemes
from vlqc.targets.engine import (
    CACHE_KEY,
    COMPILE_AGAIN,
    IGNORED_BIAS,
    PARALLEL_SIZES,
    CacheRule,
    Engine,
    FinishedFolder,
    FolderContent,
    Rule,
    cache_faults,
    join_or,
    missing_entry,
    refused_heads,
    tied_head,
    wrong_keys,
)
from vlqc.targets.schemes import Scheme

DESCRIPTION = "quant_model_description.json"
DESCRIPTION_VERSION = "1.0.0"  # by which it recognizes packed 4-bit weights
ONLY_BFLOAT16 = ("bfloat16",)
FAST_GROUP_SIZES = (64, 128)  # what its int4 kernels are written for
# Of npu_weight_quant_batchmatmul; quantization/methods/w4a8.py, 0.18: `input_size_per_partition // group_size`.
GROUPS_NEED = "inputs that are a multiple of group_size, and at least two groups"
LARGEST_GROUP_SIZE = 256  # beyond it the kernels may refuse
ALWAYS_LOADS_HEAD = ("qwen3_vl_moe",)  # families of which it loads the output head even if that is tied
# Keys of config.json that vLLM reads instead of the description, at the top or among those of the language model
# (vllm/model_executor/model_loader/weight_utils.py and vllm/config, 0.18).
KEYS_READ_INSTEAD = ("quantization_config", "compression_config")
FILES_READ_INSTEAD = ("hf_quant_config.json",)  # likewise (vllm/transformers_utils/config.py)
TYPE_OF_MSMODELSLIM = "kv_quant_type"  # which msModelSlim writes beside CACHE_KEY, and vLLM Ascend ignores
CACHE_BLOCKS = 32  # tokens in a block of an int8 cache are a multiple of it (attention/attention_v1.py)
# The loader hands the scales over to any model since 0.25.1rc1 (get_cache_scale_mapper, #12463). Earlier ones take only
# the first element of each (vLLM's load_weights), but for Qwen3 (patch/worker/patch_qwen3_c8.py, patch_gqa_c8.py).
# From 0.21.0rc1 on it views a head of an int8 cache as blocks of 32 channels (attention_v1.py: head_size // 32).
CACHE_HEADS = 32
CACHE_OF_ANY_MODEL = (CacheRule(CacheScheme.C8, since="0.25.1rc1", dtypes=ONLY_BFLOAT16, head_multiple=CACHE_HEADS),)
# 0.18.0rc1 does not have it yet. Up to 0.20.2rc1 the key in the description quantizes the cache of every decoder layer,
# with a scale of 1 where the folder has none; later ones only layers with scales (modelslim_config.py,
# is_c8_quant_layer).
CACHE_OF_QWEN3 = (
    CacheRule(CacheScheme.C8, since="0.18", before="0.21.0rc1", dtypes=ONLY_BFLOAT16, every_layer=True),
    CacheRule(CacheScheme.C8, since="0.21.0rc1", dtypes=ONLY_BFLOAT16, head_multiple=CACHE_HEADS),
)
NORM_BIAS = "norm.bias"  # part of a key of the description that makes it build every RMSNorm with a bias


class VllmAscend(Engine):
    """See `Engine`."""

    name = "vllm-ascend"
    title = "vLLM Ascend"
    example_versions = "0.18 or 0.17.0rc1"
    quantization_keys = KEYS_READ_INSTEAD
    rules: ClassVar[Mapping[str, tuple[Rule, ...]]] = {
        "qwen2_5_vl": (
            Rule(Scheme.W8A8, (*VISION_ROLES, Role.MERGER, *DECODER_ROLES), since="0.10.2rc2"),
            Rule(Scheme.W8A8_DYNAMIC, DECODER_ROLES, since="0.11", dtypes=ONLY_BFLOAT16),
            # The vision tower passes 3-D inputs to its layers; the per-token operator takes them from 0.16 on.
            Rule(Scheme.W8A8_DYNAMIC, (*VISION_ROLES, Role.MERGER), since="0.16", dtypes=ONLY_BFLOAT16),
            # The int4 operator ignores a bias, and q/k/v have one; it takes 2-D inputs only, so never vision. Release
            # candidates of 0.26, which still load dense 4-bit weights, sort before 0.26.
            Rule(Scheme.W4A8_DYNAMIC, (Role.OUT, Role.UP, Role.DOWN), since="0.11", before="0.26"),
            # W8A8_MIX runs as W8A8_DYNAMIC, or as W8A8 (quantization/methods/w8a8_pdmix.py; 0.12, 0.13: w8a8_pdmix.py).
            Rule(Scheme.W8A8_MIX, DECODER_ROLES, since="0.12.0rc1", dtypes=ONLY_BFLOAT16),
            Rule(Scheme.W8A8_MIX, (*VISION_ROLES, Role.MERGER), since="0.16", dtypes=ONLY_BFLOAT16),
            # The operator of W8A16, npu_weight_quant_batchmatmul, takes 2-D inputs only (issue 3210), and next to
            # bfloat16 inputs only float32 biases (issue 7039; CANN, aclnn_weight_quant_batch_matmul_v2.cpp). All
            # versions pass it the inputs as they are, 3-D in vision blocks, and biases in the dtype of the model
            # (quantization/w8a16.py, from 0.14 on methods/w8a16.py). So layers with a bias have no row, nor in float16
            # models, in which the operator takes it.
            Rule(Scheme.W8A16, (Role.OUT, Role.UP, Role.DOWN), since="0.13.0rc1"),
        ),
        # The engine's table of fused layers has no row for Qwen2-VL, and needs none: vLLM 0.13 to 0.23 pass the
        # quantization to the tower and its merger (qwen2_vl.py). Up to 0.11 the engine has its own class of the model,
        # which pads the weight of the vision qkv, and not its scales.
        "qwen2_vl": (
            Rule(Scheme.W8A8, (*VISION_ROLES, Role.MERGER, *DECODER_ROLES), since="0.12.0rc1"),
            Rule(Scheme.W8A8_DYNAMIC, DECODER_ROLES, since="0.12.0rc1", dtypes=ONLY_BFLOAT16),
            # 3-D inputs from 0.16.0rc1 on: quantization/methods/w8a8_dynamic.py, `need_unsqz`.
            Rule(Scheme.W8A8_DYNAMIC, (*VISION_ROLES, Role.MERGER), since="0.16.0rc1", dtypes=ONLY_BFLOAT16),
            # q/k/v have a bias, as in Qwen2.5-VL.
            Rule(Scheme.W4A8_DYNAMIC, (Role.OUT, Role.UP, Role.DOWN), since="0.12.0rc1", before="0.26"),
            Rule(Scheme.W8A8_MIX, DECODER_ROLES, since="0.12.0rc1", dtypes=ONLY_BFLOAT16),
            Rule(Scheme.W8A8_MIX, (*VISION_ROLES, Role.MERGER), since="0.16.0rc1", dtypes=ONLY_BFLOAT16),
            Rule(Scheme.W8A16, (Role.OUT, Role.UP, Role.DOWN), since="0.13.0rc1"),
        ),
        # 0.13.0rc2 is the first tag that maps the names of this model to those of the description. 0.14.0rc1 to
        # 0.17.0rc1 have that map under the key qwen3_vl_text, which they compare with qwen3_vl: they stop with a
        # KeyError. 0.18.0rc1 stops at an untied lm_head; 0.18.0 does not.
        "qwen3_vl": (
            Rule(Scheme.W8A8, (*VISION_ROLES, Role.MERGER, *DECODER_ROLES), since="0.13.0rc2", before="0.14.0rc1"),
            Rule(Scheme.W8A8, (*VISION_ROLES, Role.MERGER, *DECODER_ROLES), since="0.18"),
            # Of the tower, 0.13 runs only the mergers per token, because their inputs are 2-D. They have no row here:
            # by default they are float, and a version that runs them and no vision block per token is of little use.
            Rule(Scheme.W8A8_DYNAMIC, DECODER_ROLES, since="0.13.0rc2", before="0.14.0rc1", dtypes=ONLY_BFLOAT16),
            Rule(Scheme.W8A8_DYNAMIC, (*VISION_ROLES, Role.MERGER, *DECODER_ROLES), since="0.18", dtypes=ONLY_BFLOAT16),
            # q/k/v have no bias.
            Rule(Scheme.W4A8_DYNAMIC, DECODER_ROLES, since="0.13.0rc2", before="0.14.0rc1"),
            Rule(Scheme.W4A8_DYNAMIC, DECODER_ROLES, since="0.18", before="0.26"),
            Rule(Scheme.W8A8_MIX, DECODER_ROLES, since="0.13.0rc2", before="0.14.0rc1", dtypes=ONLY_BFLOAT16),
            Rule(Scheme.W8A8_MIX, (*VISION_ROLES, Role.MERGER, *DECODER_ROLES), since="0.18", dtypes=ONLY_BFLOAT16),
            Rule(Scheme.W8A16, DECODER_ROLES, since="0.13.0rc2", before="0.14.0rc1"),
            Rule(Scheme.W8A16, DECODER_ROLES, since="0.18"),
        ),
        # Every tag from 0.13.0rc1 on has a row for Qwen3-VL-MoE in the table of fused layers, and a map of its names.
        # None of these tags registers static W8A8 for experts (quantization/methods, "moe").
        "qwen3_vl_moe": (
            Rule(Scheme.W8A8, (*VISION_ROLES, Role.MERGER, *DECODER_ROLES), since="0.13.0rc1"),
            Rule(Scheme.W8A8_DYNAMIC, (*DECODER_ROLES, *EXPERT_ROLES), since="0.13.0rc1", dtypes=ONLY_BFLOAT16),
            Rule(Scheme.W8A8_DYNAMIC, (*VISION_ROLES, Role.MERGER), since="0.16.0rc1", dtypes=ONLY_BFLOAT16),
            # Groups of weights in experts are deprecated in 0.26.0rc and an error after it (methods/w4a8.py).
            Rule(Scheme.W4A8_DYNAMIC, DECODER_ROLES, since="0.13.0rc1", before="0.26"),
            Rule(Scheme.W4A8_DYNAMIC, EXPERT_ROLES, since="0.13.0rc1", before="0.26", dtypes=ONLY_BFLOAT16),
            # Experts in W8A8_MIX are dropped after 0.26.0rc (methods/w8a8_pdmix.py), and W8A16 has none.
            Rule(Scheme.W8A8_MIX, DECODER_ROLES, since="0.13.0rc1", dtypes=ONLY_BFLOAT16),
            Rule(Scheme.W8A8_MIX, (*VISION_ROLES, Role.MERGER), since="0.16.0rc1", dtypes=ONLY_BFLOAT16),
            Rule(Scheme.W8A16, DECODER_ROLES, since="0.13.0rc1"),
        ),
        # The table of fused layers has no rows for Qwen2 and Qwen3, and needs none: vLLM's classes name their fused
        # layers (qwen2.py, qwen3.py, 0.13).
        "qwen2": (
            Rule(Scheme.W8A8, DECODER_ROLES, since="0.11"),
            Rule(Scheme.W8A8_DYNAMIC, DECODER_ROLES, since="0.11", dtypes=ONLY_BFLOAT16),
            Rule(Scheme.W4A8_DYNAMIC, (Role.OUT, Role.UP, Role.DOWN), since="0.11", before="0.26"),
            Rule(Scheme.W8A8_MIX, DECODER_ROLES, since="0.12.0rc1", dtypes=ONLY_BFLOAT16),
            Rule(Scheme.W8A16, (Role.OUT, Role.UP, Role.DOWN), since="0.13.0rc1"),
        ),
        "qwen3": (
            Rule(Scheme.W8A8, DECODER_ROLES, since="0.11"),
            Rule(Scheme.W8A8_DYNAMIC, DECODER_ROLES, since="0.11", dtypes=ONLY_BFLOAT16),
            Rule(Scheme.W4A8_DYNAMIC, DECODER_ROLES, since="0.11", before="0.26"),  # q/k/v have no bias
            Rule(Scheme.W8A8_MIX, DECODER_ROLES, since="0.12.0rc1", dtypes=ONLY_BFLOAT16),
            Rule(Scheme.W8A16, DECODER_ROLES, since="0.13.0rc1"),
        ),
    }
    # The class of Qwen3-VL's language model inherits from that of Qwen3 (vllm/model_executor/models/qwen3_vl.py).
    cache_rules: ClassVar[Mapping[str, tuple[CacheRule, ...]]] = {
        "qwen3": CACHE_OF_QWEN3,
        "qwen3_vl": CACHE_OF_QWEN3,
        **dict.fromkeys(("qwen2", "qwen2_vl", "qwen2_5_vl", "qwen3_vl_moe"), CACHE_OF_ANY_MODEL),
    }
    packs_int4 = True
    norm_bias_parts = (Part.LANGUAGE,)
    # requirements.txt of its tags; 0.10.2 has the limit of vLLM 0.10.2 only.
    transformers = (
        ("0.10.2rc2", "4.55.2"),
        ("0.11", "4.57.1"),
        ("0.13.0rc3", "4.57.4"),
        ("0.19.1rc1", "5.5.3"),
        ("0.21.0rc1", "5.5.4"),
        ("0.24.0rc1", "5.13.0"),
        ("0.25.1rc1", "5.14.1"),
    )

    def group_faults(self, family: ModelFamily, schemes: Mapping[str, Scheme]) -> list[Fault]:
        """One scheme for all experts of a layer: the engine looks up the entries of expert 0, and runs all in its
        scheme."""
        first: dict[str | None, str] = {}
        faults = []
        for layer, scheme in schemes.items():
            if family.role(layer) not in EXPERT_ROLES:
                continue
            other = first.setdefault(family.block(layer), layer)
            if schemes[other] != scheme:
                what = f"{layer} is {scheme} while {other} is {schemes[other]}"
                why = "vLLM Ascend runs all experts of a layer in the scheme of the first one"
                faults.append(Fault(what, layer, why, "use one scheme for all experts of the layer"))
        return faults

    # ---- writing a folder ------------------------------------------------------------------------------------------

    def description_name(self, quant_type: Scheme) -> str:
        return DESCRIPTION

    def find_description(self, files: Iterable[str]) -> str | None:
        return DESCRIPTION if DESCRIPTION in files else None

    def description_header(self, content: FolderContent) -> dict[str, Any]:
        header = {"version": DESCRIPTION_VERSION} | super().description_header(content)
        schemes = content.cache_schemes
        return header | ({CACHE_KEY: str(schemes[0])} if schemes else {})

    def describes(self, family: ModelFamily, tensor: str) -> bool:
        """Not the biases of norms outside the language model, whose keys would give its RMSNorms a bias of zeros."""
        return NORM_BIAS not in tensor or family.part(tensor) in self.norm_bias_parts

    # ---- a finished folder -----------------------------------------------------------------------------------------

    def reads_config(self, family: ModelFamily, schemes: Mapping[str, Scheme], config: Mapping[str, Any]) -> bool:
        return not _keys_read_instead(family, config) and not self.model_faults(family, config)

    def config_faults(self, folder: FinishedFolder) -> list[Fault]:
        return (
            [
                Fault(
                    f"unexpected key {key}",
                    "config.json",
                    f"vLLM would read that key instead of {DESCRIPTION}",
                    "remove the key",
                )
                for key in _keys_read_instead(folder.family, folder.config)
            ]
            + [
                Fault(f"unexpected file {name}", name, f"vLLM would read it instead of {DESCRIPTION}", "remove it")
                for name in FILES_READ_INSTEAD
                if name in folder.files
            ]
            + self.model_faults(folder.family, folder.config)
        )

    def model_faults(self, family: ModelFamily, config: Mapping[str, Any]) -> list[Fault]:
        """vLLM's qwen3_vl_moe.py builds an output head of its own for tied models, too, and looks its entry up."""
        loads_head = (family.engine_rows or family.name) in ALWAYS_LOADS_HEAD
        return tied_head(self, family, config) if loads_head else []

    def header_faults(self, folder: FinishedFolder) -> list[Fault]:
        return super().header_faults(folder) + wrong_keys(folder, {"version": DESCRIPTION_VERSION})

    def cache_faults(self, folder: FinishedFolder) -> list[Fault]:
        """Without the key it does not load the scales; with it, versions up to 0.20 quantize the cache of all layers,
        also of those without scales."""
        schemes = used_schemes(folder.caches)
        if not schemes:
            return super().cache_faults(folder)
        allowed = {CACHE_KEY: schemes[0], TYPE_OF_MSMODELSLIM: schemes[0]}
        faults = cache_faults(folder.description, folder.description_name, allowed=allowed)
        faults += refused_heads(self, folder.family, folder.config)
        if folder.description.get(CACHE_KEY):
            return faults
        what = f"{CACHE_KEY} is missing, and {sum(map(bool, folder.caches.values()))} layers have scales for it"
        why = "vLLM Ascend quantizes keys and values only with this key, and does not load the scales without it"
        return [*faults, Fault(what, folder.description_name, why, f"set it to {str(schemes[0])!r}")]

    def description_faults(self, folder: FinishedFolder) -> list[Fault]:
        """Its loader looks up every linear layer, mergers and routers among them, and the embedding of the language
        model; it stops with a KeyError if one is missing. Of the experts of a layer it looks up the first one."""
        if folder.layout is not self:
            why = f"vLLM Ascend reads {DESCRIPTION}, not the description of {folder.layout.title}'s layout"
            return [Fault(f"no description for {self.title}", folder.description_name, why)]
        stored = (name.removesuffix(".weight") for name in folder.tensors if name.endswith(".weight"))
        routers = (name for name in stored if folder.family.role(name) == Role.ROUTER)
        return [
            missing_entry(folder, layer, "vLLM Ascend looks up every linear layer and the embedding there, and stops")
            for layer in dict.fromkeys((folder.embedding, *folder.linears, *routers))
            if f"{layer}.weight" not in folder.description
        ]

    def description_warnings(self, folder: FinishedFolder) -> list[Fault]:
        parts = {folder.family.part(norm) for norm in folder.shifted_norms()}
        if parts & set(self.norm_bias_parts):
            return []
        why = f"vLLM Ascend builds every RMSNorm with a bias of zeros if a key contains {NORM_BIAS!r}, which is slower"
        strays = [key for key in folder.description if NORM_BIAS in key]
        return [Fault(f"it lists {strays[0]!r}", folder.description_name, why, COMPILE_AGAIN)] if strays else []

    def tensor_faults(self, folder: FinishedFolder) -> list[Fault]:
        """Biases of norms that it does not load, and numbers of outputs that the int4 operator does not take."""
        faults = []
        if not any(NORM_BIAS in key for key in folder.description):
            why = f"vLLM Ascend loads norm biases only if some key of the description contains {NORM_BIAS!r}"
            faults = [Fault(IGNORED_BIAS, f"{norm}.bias", why, COMPILE_AGAIN) for norm in folder.shifted_norms()]
        faults += [
            Fault(
                f"group_size {group_size} with {folder.linears[layer].inputs} inputs",
                layer,
                f"vLLM Ascend's int4 operator needs {GROUPS_NEED}",
                "compile again with a smaller --group_size",
            )
            for layer, scheme in folder.schemes.items()
            if layer in folder.linears
            and scheme.spec.weight.per_group
            and folder.family.role(layer) not in EXPERT_ROLES  # they have another operator
            and isinstance(group_size := folder.description.get("group_size"), int)
            and group_size > 0
            and not fits_groups(folder.linears[layer].inputs, group_size)
        ]
        return faults + [
            Fault(
                f"{folder.linears[layer].outputs} outputs in {scheme.spec.weight.bits} bits",
                layer,
                f"vLLM Ascend's int4 operator needs a multiple of {scheme.spec.output_multiple}",
                f"compile again with --exclude {layer}",
            )
            for layer, scheme in folder.schemes.items()
            if layer in folder.linears and folder.linears[layer].outputs % scheme.spec.output_multiple
        ]

    def parallel_sizes(self, grouped: Iterable[Linear], group_size: int) -> tuple[int, ...]:
        """Row-parallel layers are sharded along the inputs, whose groups must stay whole; others along the outputs."""
        layers = list(grouped)
        return tuple(size for size in PARALLEL_SIZES if all(_can_shard(layer, group_size, size) for layer in layers))

    def group_size_warning(self, group_size: int) -> str:
        if group_size in (*FAST_GROUP_SIZES, LARGEST_GROUP_SIZE):
            return ""
        return f"vLLM Ascend's int4 kernels prefer {join_or(FAST_GROUP_SIZES)}"

    # ---- notes for the user ----------------------------------------------------------------------------------------

    def serve_command(self, folder: str) -> str:
        # Versions from 0.17.0rc1 on detect the quantization by themselves; the flag does no harm there.
        return f"vllm serve {shlex.quote(folder)} --quantization ascend"

    def scheme_notes(self, family: ModelFamily, scheme: Scheme, group_size: int | None) -> list[str]:
        if scheme == Scheme.W8A8_MIX:
            where = "on the decode nodes of a deployment that separates them from prefill nodes"
            return [f"vLLM Ascend runs W8A8_MIX as W8A8 {where}, and as W8A8_DYNAMIC everywhere else"]
        if scheme != Scheme.W4A8_DYNAMIC or group_size is None or group_size in FAST_GROUP_SIZES:
            return []
        sizes = join_or(FAST_GROUP_SIZES)
        if group_size > LARGEST_GROUP_SIZE:
            return [f"group_size {group_size}: vLLM Ascend's int4 kernels are written for {sizes}, and may refuse it"]
        return [f"group_size {group_size}: vLLM Ascend's int4 kernels prefer {sizes}"]

    def cache_notes(self, family: ModelFamily, scheme: CacheScheme) -> list[str]:
        return [
            f"vLLM Ascend needs a --block-size that is a multiple of {CACHE_BLOCKS} for the {scheme.spec.option} KV "
            "cache. It reads keys and values of the current tokens in float while it prefills the first chunk of a "
            "prompt, and caches them in float on a KV producer"
        ]


def fits_groups(inputs: int, group_size: int) -> bool:
    """Whether the operator of 4-bit weights takes so many inputs on one device (`antiquant_group_size`)."""
    return inputs % group_size == 0 and group_size <= inputs - 1


def _can_shard(layer: Linear, group_size: int, devices: int) -> bool:
    outputs, inputs = layer.outputs, layer.inputs
    sharded, whole = (inputs, outputs) if layer.row_parallel else (outputs, inputs)
    if sharded % devices:
        return False
    inputs, outputs = (sharded // devices, whole) if layer.row_parallel else (whole, sharded // devices)
    return fits_groups(inputs, group_size) and outputs % Scheme.W4A8_DYNAMIC.spec.output_multiple == 0


def _keys_read_instead(family: ModelFamily, config: Mapping[str, Any]) -> list[str]:
    parts = (config, family.text_config(config))
    return [key for key in KEYS_READ_INSTEAD if any(key in part for part in parts)]


VLLM_ASCEND = VllmAscend()
