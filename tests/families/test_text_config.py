"""config.json with keys of the language model at two levels: what each transformers version builds from it."""

import copy
import random
from typing import Any

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tools.checkpoints.families import FAMILIES, config_of
from vlqc.families.config_values import without_nulls
from vlqc.families.registry import family_of
from vlqc.frontend.checkpoint.config_schema import engine_form

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
NESTED_SINCE = (4, 52)  # earlier versions read flat configs of Qwen2-VL and Qwen2.5-VL only
WITH_VISION = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
AVAILABLE = [name for name in WITH_VISION if name in CONFIG_MAPPING]
VALUES: dict[str, tuple[Any, ...]] = {
    "vocab_size": (128, 136),
    "hidden_size": (64, 128),
    "intermediate_size": (96, 100),
    "num_hidden_layers": (2, 3),
    "num_attention_heads": (4, 8),
    "num_key_value_heads": (2, 4),
    "hidden_act": ("silu", "gelu"),
    "max_position_embeddings": (500, 1000),
    "rms_norm_eps": (1e-6, 1e-5),
    "use_sliding_window": (True, False),
    "sliding_window": (64, 32),
    "max_window_layers": (1, 2),
    "rope_theta": (1e4, 5e6),
    "image_token_id": (7, 9),
    "video_token_id": (8, 10),
}
SCALINGS: tuple[dict[str, Any], ...] = (
    {"rope_type": "default", "mrope_section": [2, 3, 3]},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mrope_section": [2, 3, 3]},
)


def random_config(family: str, generator: random.Random) -> dict[str, Any]:
    """Each key at the top, in `text_config`, at both levels with different values, or nowhere."""
    config: dict[str, Any] = {"model_type": family, "text_config": {"model_type": f"{family}_text"}}
    for key, values in {**VALUES, "rope_scaling": SCALINGS}.items():
        top, inner = generator.sample(values, 2)
        if generator.random() < 0.5 and (key != "rope_scaling" or VERSION < (5, 0)):  # which refuses it at the top
            config[key] = copy.deepcopy(top)
        if generator.random() < 0.7:
            config["text_config"][key] = copy.deepcopy(inner)
    text = config["text_config"]
    if generator.random() < 0.3 and VERSION >= (5, 0) and "rope_scaling" in text and "rope_theta" in text:
        text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
    if not text.get("use_sliding_window") and generator.random() < 0.5:
        text["sliding_window"] = None  # as transformers 4.57 and 5 write it
    return config


def built(config: dict[str, Any]) -> dict[str, Any]:
    """What a model is built from: keys of the language model, ids of image tokens, rotary settings."""
    whole: Any = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    text = whole.get_text_config() if VERSION >= NESTED_SINCE else whole
    values = {key: getattr(text, key, None) for key in VALUES if not key.endswith("_token_id")}
    values |= {key: getattr(whole, key, None) for key in VALUES if key.endswith("_token_id")}
    rotary = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    values |= {key: rotary.get(key) for key in ("factor", "original_max_position_embeddings", "mrope_section")}
    values["rope_type"] = rotary.get("rope_type", "default").replace("mrope", "default")
    values["rope_theta"] = rotary.get("rope_theta", values["rope_theta"])
    if not values["use_sliding_window"]:
        del values["sliding_window"]
    return values


@pytest.mark.every_transformers
@pytest.mark.parametrize("family", AVAILABLE)
def test_the_result_is_read_as_the_source(family: str) -> None:
    """Catches any key of the language model that is taken from the wrong level: for 40 random configs, a model built
    from the result's config.json has the values of one built from the source's."""
    generator = random.Random(0)
    for _ in range(40):
        config = random_config(family, generator)
        known = copy.deepcopy(config)
        result = engine_form(family_of(config, "config.json"), config)
        text = config["text_config"]
        source = config
        if VERSION < NESTED_SINCE:  # the same as a flat config, for versions that read no other
            tokens = {key: config[key] for key in config if key.endswith("_token_id")}
            source = {key: value for key, value in text.items() if not key.endswith("_token_id")} | tokens
            source["model_type"] = family
        assert built(result) == built(source), config
        assert config == known
        for key in result.keys() & result.get("text_config", {}).keys() - {"model_type"}:
            assert result[key] == result["text_config"][key] or key.endswith("_token_id"), key


KINDS = {"f": "full", "s": "sliding"}
TIES = [(top, inner) for top in (None, True, False) for inner in (None, True, False)]


@pytest.mark.every_transformers
@pytest.mark.parametrize("family", AVAILABLE)
@pytest.mark.parametrize(("top", "inner"), TIES)
def test_ties(family: str, top: bool | None, inner: bool | None) -> None:
    """Catches a trained head that is dropped, or a head that is missed, because the tie is read at the wrong level.

    Where both levels agree, all versions do. Otherwise the head is stored if and only if the model is not tied: else
    the versions disagree, and that is a fault."""
    config = config_of(FAMILIES[family].shape, "bfloat16", tied=False, family=family)
    if "text_config" not in config:
        text = {key: config.pop(key) for key in VALUES if key in config and not key.endswith("_token_id")}
        config["text_config"] = text | {"rope_scaling": config.pop("rope_scaling")}
    for part, value in ((config, top), (config["text_config"], inner)):
        part.pop("tie_word_embeddings", None)
        if value is not None:
            part["tie_word_embeddings"] = value
    reader = family_of(config, "config.json")
    tied = reader.is_tied(config)
    result = engine_form(reader, config)
    assert reader.is_tied(result) == tied
    levels = (result, result.get("text_config", {}))
    assert {level["tie_word_embeddings"] for level in levels if "tie_word_embeddings" in level} <= {tied}
    if VERSION >= NESTED_SINCE and bool(top) == bool(inner):
        whole: Any = CONFIG_MAPPING[family].from_dict(copy.deepcopy(config))
        readers = (whole, whole.get_text_config())
        assert any(bool(getattr(each, "tie_word_embeddings", False)) == tied for each in readers)
    contradicts = top is not None and top != bool(inner)
    assert bool(reader.checkpoint_faults(config, {"lm_head.weight"})) == (contradicts and tied)
    assert bool(reader.checkpoint_faults(config, set())) == (contradicts and not tied)


NULLS = ("architectures", "torch_dtype", "use_sliding_window", "tie_word_embeddings", "attention_dropout")


@pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("key", NULLS)
def test_null_is_a_missing_key(family: str, key: str) -> None:
    """Catches null that is refused, or a result without the class that engines look up."""
    config = config_of(FAMILIES[family].shape, "bfloat16", tied=False, family=family)
    missing, null = copy.deepcopy(config), copy.deepcopy(config)
    for changed, is_null in ((missing, False), (null, True)):
        for level in [changed, *(changed[name] for name in ("text_config",) if name in changed)]:
            level.pop(key, None)
            if is_null:
                level[key] = None
    reader = family_of(config, "config.json")
    assert engine_form(reader, null) == engine_form(reader, missing)
    assert engine_form(reader, null)["architectures"] == config["architectures"]


def test_null_of_value_heads_is_the_number_of_heads() -> None:
    """Catches the class's default for a missing key, which is another number."""
    assert without_nulls({"num_attention_heads": 28, "num_key_value_heads": None}, ())["num_key_value_heads"] == 28


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("types", "more", "is_fault"),
    [
        ("ff", {}, False),
        ("fs", {}, True),
        ("f", {}, True),
        ("fs", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, False),
        ("sf", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, True),
    ],
)
def test_layer_types_that_do_not_follow(types: str, more: dict[str, Any], is_fault: bool, nested: bool) -> None:
    """Catches layers with another attention than the float model's, because a key of newer versions is dropped."""
    text = {"num_hidden_layers": 2, "layer_types": [f"{KINDS[each]}_attention" for each in types], **more}
    config = {"model_type": "qwen2_5_vl", **({"text_config": text} if nested else text)}
    assert bool(family_of(config, "config.json").checkpoint_faults(config, set())) == is_fault
