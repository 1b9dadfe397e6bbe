"""Qwen3-VL with experts: Qwen3-VL whose decoder layers have a mixture of experts in place of the MLP.

Checkpoints hold the weights of all experts of a layer in two tensors, inputs x outputs; compiled folders hold three
matrices per expert, outputs x inputs.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, TypeAdapter

from vlqc.families.config_values import Size
from vlqc.families.family import Role, TensorSlice
from vlqc.families.qwen3_vl import TEXT_DEFAULTS as DENSE_DEFAULTS
from vlqc.families.qwen3_vl import Config as DenseConfig
from vlqc.families.qwen3_vl import LanguageConfig, Qwen3VL

if TYPE_CHECKING:
    from torch import nn

EXPERT_GATE_UP = tuple(f"model.language_model.layers.*.mlp.experts.*.{name}_proj" for name in ("gate", "up"))
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}  # stored tensor -> its layers, in order


class MoeLanguageConfig(LanguageConfig, total=False):
    """Keys of `text_config`."""

    moe_intermediate_size: Size
    num_experts: Size
    num_experts_per_tok: Size
    decoder_sparse_step: Annotated[int, Field(ge=1)]
    mlp_only_layers: list[Annotated[int, Field(ge=0)]]
    norm_topk_prob: bool


class Config(DenseConfig, total=False):
    """Keys of config.json; validated with a `ConfigLimits` as context."""

    text_config: MoeLanguageConfig  # type: ignore[misc]


CONFIG = TypeAdapter(Config)
# Values that the model's config class gives to missing keys, where they can be invalid for the checkpoint.
TEXT_DEFAULTS = DENSE_DEFAULTS | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "moe_intermediate_size": 1408,
    "num_experts": 60,
    "num_experts_per_tok": 4,
}


class Qwen3VLMoe(Qwen3VL):
    """Qwen3-VL 30B-A3B and 235B-A22B."""

    name = "qwen3_vl_moe"
    title = "Qwen3-VL-MoE"
    model_types = ("qwen3_vl_moe",)
    architectures = ("Qwen3VLMoeForConditionalGeneration",)

    roles: ClassVar[Mapping[Role, tuple[str, ...]]] = {
        **Qwen3VL.roles,
        Role.EXPERT_UP: EXPERT_GATE_UP,
        Role.EXPERT_DOWN: ("model.language_model.layers.*.mlp.experts.*.down_proj",),
        Role.ROUTER: ("model.language_model.layers.*.mlp.gate",),
    }
    fused_groups = (*Qwen3VL.fused_groups, EXPERT_GATE_UP)
    renamed_config_keys: ClassVar[Mapping[str, str]] = {"num_local_experts": "num_experts"}
    reference_float = (*Qwen3VL.reference_float, "model.language_model.layers.*.mlp.gate")  # decides between experts

    def engine_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """transformers 5 writes `num_local_experts` in place of `num_experts`."""
        config = super().engine_config(config)
        text = config.get("text_config")
        if not isinstance(text, dict) or "num_local_experts" not in text:
            return config
        experts = text.get("num_experts", text["num_local_experts"])
        renamed = {key: value for key, value in text.items() if key != "num_local_experts"}
        return {**config, "text_config": renamed | {"num_experts": experts}}

    def matrices(
        self, shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]
    ) -> dict[str, dict[str, TensorSlice]]:
        """`experts.gate_up_proj`, the gate's outputs first, and `experts.down_proj`, each for all experts of a layer.

        Published checkpoints hold [E, hidden, 2 * I] and [E, I, hidden]; those that transformers 5 saved hold
        [E, 2 * I, hidden] and [E, hidden, I]. Both tensors of a layer are of one kind, and the shape of at least one of
        them shows which.
        """
        hidden, fused = self.text_config(config).get("hidden_size"), {}
        for name, shape in shapes.items():
            prefix, _, last = name.rpartition(".")
            if prefix.endswith(".experts") and last in FUSED and len(shape) == 3:
                transposed = is_transposed(shapes, prefix, hidden)
                layers, outputs = FUSED[last], shape[2] if transposed else shape[1]
                width = outputs // len(layers)
                fused[name] = {
                    f"{prefix}.{expert}.{layer}.weight": TensorSlice(expert, begin, begin + width, transposed)
                    for expert in range(shape[0])
                    for layer, begin in zip(layers, range(0, outputs, width or 1), strict=False)
                }
        return fused

    def prepare(self, model: "nn.Module") -> None:
        """The module tree gets linear layers per expert, in every transformers version."""
        from vlqc.families.experts import MixtureOfExperts  # imports torch

        config: Any = model.config
        text = config.text_config
        for path, module in list(model.named_modules()):
            if type(module).__name__ == "Qwen3VLMoeTextSparseMoeBlock":
                experts: Any = module.experts
                sizes = (text.hidden_size, text.moe_intermediate_size, text.num_experts, text.num_experts_per_tok)
                model.set_submodule(path, MixtureOfExperts(*sizes, activation=experts.act_fn))

    def config_schema(self) -> TypeAdapter[Any]:
        return CONFIG

    def complete_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**config, "text_config": TEXT_DEFAULTS | dict(self.text_config(config))}


def is_transposed(shapes: Mapping[str, Sequence[int]], prefix: str, hidden: Any) -> bool:
    """Whether the tensors of the experts at `prefix` are inputs x outputs. hidden: channels of the language model.

    If no shape fits, as in published checkpoints.
    """
    for name, position in (("gate_up_proj", 1), ("down_proj", 2)):
        shape = shapes.get(f"{prefix}.{name}", ())
        if len(shape) == 3 and shape[1] != shape[2] and hidden in shape[1:]:
            return bool(shape[position] == hidden)
    return True


QWEN3_VL_MOE = Qwen3VLMoe()
