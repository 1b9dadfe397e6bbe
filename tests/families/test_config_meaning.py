"""What config.json says, independently of the version that wrote it: compared with what transformers builds."""

import copy
import json
from typing import Any

import pytest
import transformers
from packaging.version import Version

from tests.support.float_model import CONFIG
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.families.qwen3_vl_moe import QWEN3_VL_MOE

AT_THE_TOP = ("architectures", "model_type", "torch_dtype", "vision_config", "tie_word_embeddings")
LEFTOVERS = {"rope_theta": 5e5, "rms_norm_eps": 1e-3, "hidden_act": "gelu", "intermediate_size": 32}


def nested(**text: Any) -> dict[str, Any]:
    """CONFIG as transformers 4.52 and later write it."""
    top = {key: value for key, value in CONFIG.items() if key in AT_THE_TOP or key.endswith("_token_id")}
    inner = {key: value for key, value in CONFIG.items() if key not in top}
    return copy.deepcopy({**top, "text_config": {"model_type": "qwen2_5_vl_text", **inner, **text}})


def newest() -> dict[str, Any]:
    """CONFIG as transformers 5 writes it."""
    config = nested()
    text = config["text_config"]
    text["rope_parameters"] = {"rope_theta": text.pop("rope_theta"), "rope_type": "default"}
    text["rope_parameters"]["mrope_section"] = text.pop("rope_scaling")["mrope_section"]
    config["dtype"] = config.pop("torch_dtype")
    return config | {"transformers_version": "5.0.0"}


FORMS = {"flat": dict(CONFIG), "nested": nested(), "newest": newest(), "leftovers": nested() | LEFTOVERS}
READABLE = {
    name: form for name, form in FORMS.items() if name == "flat" or Version(transformers.__version__) >= Version("4.52")
}
if Version(transformers.__version__) < Version("5"):
    READABLE.pop("newest", None)


@pytest.mark.every_transformers
@pytest.mark.parametrize("name", READABLE)
def test_it_is_what_transformers_builds(name: str) -> None:
    """Catches a key read at another level, or under another name, than the model is built from."""
    built = transformers.Qwen2_5_VLConfig.from_dict(json.loads(json.dumps(READABLE[name])))
    text = getattr(built, "text_config", built)
    rope = getattr(text, "rope_parameters", None) or {**(text.rope_scaling or {}), "rope_theta": text.rope_theta}
    meaning = QWEN2_5_VL.config_meaning(READABLE[name])
    compared = 0
    meaning.pop("architectures")  # not always that of the file: the default of `from_dict`
    for key, value in meaning.items():
        if key == "rope_theta" or key.startswith("rope_scaling."):
            assert rope[key.removeprefix("rope_scaling.")] == value, key
        elif key.startswith("vision_config."):
            assert getattr(built.vision_config, key.removeprefix("vision_config.")) == value, key
        else:
            owner = (
                built
                if key in (*AT_THE_TOP, "tie_word_embeddings") or key.startswith(("image", "video", "vis"))
                else text
            )
            assert getattr(owner, key) == value, key
        compared += 1
    assert compared > 25


@pytest.mark.parametrize("name", FORMS)
def test_all_forms_mean_the_same(name: str) -> None:
    """Catches false faults for a folder whose float checkpoint was saved by another version of transformers."""
    assert QWEN2_5_VL.config_meaning(FORMS[name]) == QWEN2_5_VL.config_meaning(CONFIG)
    with_nulls = FORMS[name] | {"quantization_config": None, "dtype": "float16", "architectures": None}
    assert QWEN2_5_VL.config_meaning(with_nulls) == QWEN2_5_VL.config_meaning(CONFIG)


@pytest.mark.parametrize(
    ("key", "config"),
    [
        ("rope_theta", nested(rope_theta=5e6)),
        ("rope_scaling.rope_type", CONFIG | {"rope_scaling": {**CONFIG["rope_scaling"], "type": "yarn"}}),
        ("tie_word_embeddings", nested(tie_word_embeddings=True)),
        ("vision_config.window_size", CONFIG | {"vision_config": {**CONFIG["vision_config"], "window_size": 56}}),
        ("layer_types", CONFIG | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("layer_types", CONFIG | {"layer_types": ["full_attention"]}),
        ("layer_types", nested(layer_types=["full_attention", "chunked_attention"])),
        ("rope_parameters.rope_theta", CONFIG | {"rope_parameters": {"rope_theta": 1e6, "mrope_section": [2, 3, 3]}}),
        ("auto_map.AutoModel", CONFIG | {"auto_map": {"AutoModel": "code.Model"}}),
    ],
)
def test_a_changed_key_is_seen(key: str, config: dict[str, Any]) -> None:
    """Catches a change that two forms hide: at the level that counts, or in one of two forms in one file."""
    assert QWEN2_5_VL.config_meaning(config).get(key) != QWEN2_5_VL.config_meaning(CONFIG).get(key)


def test_unused_windows_and_renamed_keys_are_no_difference() -> None:
    """Catches false faults for keys that newer versions drop because nothing reads them, or call by another name."""
    unused = {
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 80,
        "layer_types": ["full_attention"] * 2,
    }
    assert QWEN2_5_VL.config_meaning(CONFIG | unused) == QWEN2_5_VL.config_meaning(CONFIG)
    older, newer = ({"text_config": {key: 8}} for key in ("num_experts", "num_local_experts"))
    assert QWEN3_VL_MOE.config_meaning(older) == QWEN3_VL_MOE.config_meaning(newer)
