"""What vlqc assumes of Qwen2.5-VL: config.json of every transformers version, and names."""

import copy
from typing import Any

import pytest

from vlqc.families.qwen2_5_vl import flatten_config, original_name

# The language model's keys of Qwen2.5-VL-7B, as the first release wrote them beside the rest ...
LANGUAGE = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "sliding_window": 32768,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
# ... those of the whole, and of vision.
WHOLE = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen2_5_vl",
    "tie_word_embeddings": False,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
}
VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "model_type": "qwen2_5_vl",
    "out_hidden_size": 3584,
}
SECTIONS = [16, 24, 24]
FLAT = {
    **WHOLE,
    **LANGUAGE,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": SECTIONS},
    "torch_dtype": "bfloat16",
    "vision_config": VISION,
}


def nested(**rope: Any) -> dict[str, Any]:
    """The config of the same model in the form of newer transformers versions."""
    return {
        **WHOLE,
        "dtype": "bfloat16",
        "text_config": {
            **LANGUAGE,
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl_text",
            "dtype": "bfloat16",
            "layer_types": ["full_attention"] * 28,
            **rope,
        },
        "vision_config": {**VISION, "dtype": "bfloat16", "rope_parameters": {"rope_theta": 1e4, "rope_type": "axial"}},
    }


JOINED = {"rope_parameters": {"mrope_section": SECTIONS, "rope_theta": 1000000.0, "rope_type": "default"}}
BETWEEN = {"rope_theta": 1000000.0, "rope_scaling": FLAT["rope_scaling"]}  # nested, but rotary settings as before


@pytest.mark.parametrize("rope", [JOINED, BETWEEN], ids=["rope_parameters", "rope_scaling"])
def test_nested_becomes_flat(rope: dict[str, Any]) -> None:
    """Catches a key that is lost, stays nested, or is taken from the nested part (model_type, dtype)."""
    config = nested(**copy.deepcopy(rope))
    before = copy.deepcopy(config)
    assert flatten_config(config) == FLAT
    assert config == before  # the source's text is still needed as it was


def test_flat_stays_as_it_is() -> None:
    """Catches a flat config that is changed although engines can read it."""
    assert flatten_config(FLAT) is FLAT
    assert flatten_config(flatten_config(nested(**JOINED))) == FLAT


def test_text_config_wins_over_the_top_level() -> None:
    """Catches a leftover of the top level that replaces the value from which the language model is built."""
    config = nested(**BETWEEN) | {"vocab_size": 1, "rope_theta": 2.0, "rms_norm_eps": 0.5, "rope_scaling": {}}
    config["text_config"]["tie_word_embeddings"] = True
    assert flatten_config(config) == {**FLAT, "tie_word_embeddings": True}


def test_keys_that_stand_at_the_top_level_only() -> None:
    """Catches a value that no version reads beside `text_config`, and ids of image tokens that are taken from it."""
    config = nested(**BETWEEN) | {"max_window_layers": 3, "head_dim": 2}
    del config["text_config"]["max_window_layers"]
    config["text_config"]["image_token_id"] = None
    expected = {key: value for key, value in FLAT.items() if key != "max_window_layers"}
    assert flatten_config(config) == expected


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        (JOINED["rope_parameters"], {"rope_scaling": FLAT["rope_scaling"], "rope_theta": 1000000.0}),
        (
            {"mrope_section": SECTIONS, "rope_theta": 5.0},
            {"rope_scaling": FLAT["rope_scaling"], "rope_theta": 5.0},
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "mrope_section": SECTIONS, "rope_theta": 5.0},
            {
                "rope_scaling": {"type": "yarn", "rope_type": "yarn", "factor": 4.0, "mrope_section": SECTIONS},
                "rope_theta": 5.0,
            },
        ),
        ({"rope_type": "linear", "factor": 2.0}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ],
)
def test_rotary(parameters: dict[str, Any], expected: dict[str, Any]) -> None:
    """Catches a scaling type that is lost, missing mrope sections, and a rope_theta that is made up; also of a flat
    config, which transformers 5 reads."""
    known = copy.deepcopy(parameters)
    for config in ({"rope_parameters": parameters}, {"text_config": {"rope_parameters": parameters}}):
        assert flatten_config(config) == expected and parameters == known


def test_no_text_config_to_speak_of() -> None:
    """Catches an exception for a `text_config` that is not an object."""
    assert flatten_config({"text_config": None, "dtype": "float16"}) == {"text_config": None, "dtype": "float16"}


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("model.visual.merger.ln_q.weight", "visual.merger.ln_q.weight"),
        ("visual.merger.ln_q.weight", "visual.merger.ln_q.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("model.norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.visuals.weight", "model.visuals.weight"),
    ],
)
def test_original_names(name: str, original: str) -> None:
    """Catches a prefix that is not removed, or removed from a name that only begins like it."""
    assert original_name(name) == original
