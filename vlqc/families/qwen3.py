"""Qwen3, dense language models without a vision tower. Their layers have the names of Qwen2's."""

from vlqc.families.inputs.input_format import TextFormat
from vlqc.families.qwen2 import Qwen2


class Qwen3(Qwen2):
    """Qwen3, dense: norms of queries and keys, no biases."""

    name = "qwen3"
    title = "Qwen3"
    model_types = ("qwen3",)
    architectures = ("Qwen3ForCausalLM",)
    transformers_version = "4.51"

    text_format = TextFormat()


QWEN3 = Qwen3()
