"""Where each family's config.json states the dtype of the float tensors."""

import json
from typing import Any

import pytest

from vlqc.families.family import ModelFamily
from vlqc.families.qwen2 import QWEN2
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.families.qwen3_vl import QWEN3_VL

TEXT = {"text_config": {"dtype": "bfloat16"}}


@pytest.mark.parametrize(
    ("family", "config", "dtypes"),
    [
        (QWEN2, {"torch_dtype": "float16"}, {"torch_dtype": "float16"}),
        (QWEN2_5_VL, {"dtype": "float16"}, {"dtype": "float16"}),
        (QWEN2_5_VL, TEXT, {"torch_dtype": None}),  # engines read the flat form
        (QWEN3_VL, TEXT, {"text_config.dtype": "bfloat16"}),
        (QWEN3_VL, TEXT | {"torch_dtype": "float16"}, {"torch_dtype": "float16", "text_config.dtype": "bfloat16"}),
        (QWEN3_VL, {"text_config": None}, {"torch_dtype": None}),
    ],
)
def test_dtypes(family: ModelFamily, config: dict[str, Any], dtypes: dict[str, Any]) -> None:
    """Catches a dtype that an engine reads and `vlqc verify` does not compare."""
    assert family.dtypes(config) == dtypes


@pytest.mark.parametrize("family", [QWEN2, QWEN2_5_VL, QWEN3_VL])
@pytest.mark.parametrize("config", [{}, {"dtype": "float32"}, {"torch_dtype": None, "dtype": "float32"}])
def test_a_dtype_that_is_written_is_read(family: ModelFamily, config: dict[str, Any]) -> None:
    """Catches a key that is read and keeps the dtype of the float checkpoint."""
    written = json.loads(json.dumps(config | {"text_config": dict(config)}))
    family.set_dtype(written, "bfloat16")
    assert set(family.dtypes(written).values()) == {"bfloat16"} and written["torch_dtype"] == "bfloat16"
