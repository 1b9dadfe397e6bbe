"""Which versions of which engines load a folder."""

import pytest

from tests.support.reference_schemes import DYNAMIC, W4A8, W8A8, reference_assignment
from vlqc.targets.schemes import Scheme
from vlqc.targets.versions import loading_engines


def described(schemes: dict[str, Scheme]) -> dict[str, str]:
    return {f"{layer}.weight": str(scheme) for layer, scheme in schemes.items()} | {"version": "1.0.0"}


QUANTIZED = {"model_type": "qwen2_5_vl", "quantize": "w8a8", "vision_config": {"quantize": "w8a8"}}
VLLM, MINDIE = "vLLM Ascend 0.10.2rc2 and later", "MindIE 2.2.RC1 and later"


@pytest.mark.parametrize(
    ("change", "config", "expected"),
    [
        ({}, {"model_type": "qwen2_5_vl", "vision_config": {}}, [VLLM]),
        ({}, QUANTIZED, [VLLM, MINDIE]),
        ({}, QUANTIZED | {"quantize": "w8a8_dynamic"}, [VLLM]),  # MindIE would build other layers
        ({}, QUANTIZED | {"quantization_config": {}}, [MINDIE]),  # vLLM would read that key
        ({}, QUANTIZED | {"text_config": {}}, [VLLM]),  # MindIE wants a flat config
        ({}, QUANTIZED | {"vision_config": {}}, [VLLM]),  # MindIE would build a float tower
        ({"visual.blocks.1.mlp.down_proj": W8A8}, QUANTIZED, [VLLM]),
        ({"lm_head": W8A8}, QUANTIZED, []),
        ({"model.layers.0.mlp.down_proj": DYNAMIC}, QUANTIZED, ["vLLM Ascend 0.11 and later"]),
        ({"visual.merger.mlp.0": DYNAMIC}, QUANTIZED, ["vLLM Ascend 0.16 and later"]),
        ({"model.layers.0.mlp.down_proj": W4A8}, QUANTIZED, ["vLLM Ascend 0.11 and later, before 0.26"]),
        (
            {"model.layers.0.mlp.down_proj": W4A8, "visual.merger.mlp.0": DYNAMIC},
            QUANTIZED,
            ["vLLM Ascend 0.16 and later, before 0.26"],
        ),
    ],
)
def test_which_engines_load_a_folder(change: dict[str, Scheme], config: dict[str, object], expected: list[str]) -> None:
    """Catches a promise to the user that an engine version would break."""
    assert loading_engines(described(reference_assignment() | change), "bfloat16", config) == expected


def test_per_token_schemes_need_bfloat16() -> None:
    """Catches a float16 per-token folder announced as loadable."""
    description = described(reference_assignment() | {"model.layers.0.mlp.down_proj": DYNAMIC})
    assert loading_engines(description, "float16", QUANTIZED) == []
    assert loading_engines(described(reference_assignment()), "float16", QUANTIZED) == [VLLM, MINDIE]
