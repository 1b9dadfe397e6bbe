"""Qwen2 and Qwen2.5, language models without a vision tower."""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from pydantic import TypeAdapter

from vlqc.families.config_values import ConfigLimits, TextConfig, rope_keys
from vlqc.families.family import ModelFamily, Part, Role
from vlqc.families.inputs.input_format import TextFormat
from vlqc.families.text_config import layer_type_faults

QKV = tuple(f"model.layers.*.self_attn.{member}_proj" for member in "qkv")
GATE_UP = ("model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj")
CONFIG = TypeAdapter(TextConfig)


class Qwen2(ModelFamily):
    """Qwen2 and Qwen2.5."""

    name = "qwen2"
    title = "Qwen2"
    model_types = ("qwen2",)
    architectures = ("Qwen2ForCausalLM",)
    transformers_version = "4.37"

    roles: ClassVar[Mapping[Role, tuple[str, ...]]] = {
        Role.QKV: QKV,
        Role.OUT: ("model.layers.*.self_attn.o_proj",),
        Role.UP: GATE_UP,
        Role.DOWN: ("model.layers.*.mlp.down_proj",),
    }
    fused_groups = (QKV, GATE_UP)
    key_value = QKV[1:]
    reference_float = (
        "model.embed_tokens",  # a table, not a matrix product
        "model.layers.*.mlp.down_proj",  # holds the massive activations of a language model
        "lm_head",  # engines run it in float
    )
    row_parallel = ("o_proj", "down_proj")

    parts = (("model.", Part.LANGUAGE),)
    subparts = (
        ("model.layers.", "language layers"),
        ("model.embed_tokens.", "embeddings"),
        ("model.", "language, other"),
        ("lm_head.", "lm_head"),
    )
    block_lists = ("model.layers.",)

    text_format: ClassVar[TextFormat] = TextFormat(system_prompt="You are a helpful assistant.")

    # Values that the model's config class gives to missing keys, where they can be invalid for the checkpoint.
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
    }

    def engine_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Newer transformers versions rename `torch_dtype` and write `rope_parameters` in place of two other keys."""
        if "rope_parameters" not in config and "dtype" not in config:
            return config
        return {"torch_dtype" if key == "dtype" else key: value for key, value in rope_keys(config).items()}

    def model_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """transformers 4.49 masks by `sliding_window` even without `use_sliding_window`; newer versions drop it."""
        return config if config.get("use_sliding_window") else {**config, "sliding_window": None}

    def config_values(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "dtype": config.get("torch_dtype", config.get("dtype")),
            "language layers": config.get("num_hidden_layers"),
            "hidden size": config.get("hidden_size"),
            "tied embeddings": config.get("tie_word_embeddings"),
        }

    def checkpoint_faults(self, config: Mapping[str, Any], names: Collection[str]) -> list[tuple[str, str]]:
        return layer_type_faults(config)

    def config_schema(self) -> TypeAdapter[Any]:
        return CONFIG

    def config_limits(self, config: Mapping[str, Any], largest: int, tensors: int) -> ConfigLimits:
        return ConfigLimits.of(config, None, largest, tensors)

    def complete_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.defaults, **config}


QWEN2 = Qwen2()
