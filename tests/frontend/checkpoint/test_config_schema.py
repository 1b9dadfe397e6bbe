"""Nested objects of config.json: each defect gives one fault, not the faults of the values that follow from it."""

import copy
from typing import Any

import pytest

from tools.checkpoints.families import FAMILIES, config_of
from vlqc.families.registry import family_of
from vlqc.frontend.checkpoint.config_schema import config_faults

NESTED = ("qwen3_vl", "qwen3_vl_moe")
WITH_VISION = ("qwen2_vl", "qwen2_5_vl", *NESTED)


def faults_of(config: dict[str, Any]) -> list[str]:
    """What is wrong, with a checkpoint whose largest dimension is 1024 and that has 256 tensors."""
    family = family_of(config, "config.json")
    return [fault.what for fault in config_faults(family, family.engine_config(config), "config.json", 1024, 256)]


def valid_config(family: str) -> dict[str, Any]:
    return config_of(FAMILIES[family].shape, "bfloat16", tied=False, family=family)


@pytest.mark.parametrize("family", WITH_VISION)
def test_a_valid_config_has_no_faults(family: str) -> None:
    """Catches an object that is required although the published form does not have it."""
    assert faults_of(valid_config(family)) == []


@pytest.mark.parametrize(
    ("family", "key"),
    [*((family, "vision_config") for family in WITH_VISION), *((family, "text_config") for family in NESTED)],
)
@pytest.mark.parametrize("value", [None, [1], "x", 3])
def test_an_object_that_is_none_is_one_fault(family: str, key: str, value: Any) -> None:
    """Catches faults about default values of keys inside, and tensors compared with the default model."""
    config = valid_config(family)
    config[key] = value
    (what,) = faults_of(config)
    assert what.startswith(f"{key} is ") and "not an object" in what
    del config[key]
    assert faults_of(config) == [f"{key} is missing"]


@pytest.mark.parametrize("blocks", [[0, 0], [99], [-1], [1.5], [True], "01", None, {"0": 1}])
@pytest.mark.parametrize("family", NESTED)
def test_invalid_deepstack_indices_are_one_fault(family: str, blocks: Any) -> None:
    """Catches a block that feeds two mergers, of which one would be skipped, and blocks that do not exist."""
    config = copy.deepcopy(valid_config(family))
    config["vision_config"]["deepstack_visual_indexes"] = blocks
    (what,) = faults_of(config)
    assert what.startswith("vision_config.deepstack_visual_indexes is ")


@pytest.mark.parametrize("family", NESTED)
@pytest.mark.parametrize("value_heads", [0, 3, "2", None])
def test_value_heads_that_do_not_divide_the_heads_are_one_fault(family: str, value_heads: Any) -> None:
    """Catches a number of heads that fails inside the model's attention."""
    config = valid_config(family)
    config["text_config"]["num_key_value_heads"] = value_heads
    (what,) = faults_of(config)
    assert what.startswith("text_config.num_key_value_heads is ")
