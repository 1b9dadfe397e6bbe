"""How images are resized before the image processor resizes them once more."""

import ast
import functools
import importlib.util
import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vlqc.families.family import ModelFamily
from vlqc.families.registry import FAMILIES

TOKEN_SIDES = {"qwen2_vl": 28, "qwen2_5_vl": 28, "qwen3_vl": 32, "qwen3_vl_moe": 32}  # pixels: patch size times 2
WITH_IMAGES = [family for family in FAMILIES if family.name in TOKEN_SIDES]


@functools.cache
def reference_smart_resize() -> Callable[[int, int, int], tuple[int, int]]:
    """smart_resize of qwen_vl_utils, compiled from its source: the package cannot be imported without torchvision."""
    spec = importlib.util.find_spec("qwen_vl_utils")
    assert spec is not None and spec.submodule_search_locations
    file = Path(spec.submodule_search_locations[0]) / "vision_process.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    kept = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.Assign) and is_needed(node)]
    namespace: dict[str, Any] = {"math": math, "Optional": typing.Optional, "Tuple": tuple}
    exec(compile(ast.Module(kept, []), str(file), "exec"), namespace)
    function: Callable[[int, int, int], tuple[int, int]] = namespace["smart_resize"]
    return function


def is_needed(node: ast.FunctionDef | ast.Assign) -> bool:
    if isinstance(node, ast.FunctionDef):
        return node.name == "smart_resize" or node.name.endswith("_by_factor")
    return isinstance(node.value, ast.Constant)


@pytest.mark.parametrize("family", WITH_IMAGES, ids=str)
@given(height=st.integers(1, 30000), width=st.integers(1, 30000))
@example(height=1, width=1)
@example(height=27, width=2000)
@example(height=200, width=1)
@example(height=201, width=1)
@example(height=9000, width=9000)
def test_images_are_resized_like_the_reference(family: ModelFamily, height: int, width: int) -> None:
    """Catches calibration images of another shape than those of qwen_vl_utils, at any size and aspect ratio."""
    processing = family.inputs.processing
    assert processing is not None
    try:
        expected = reference_smart_resize()(height, width, TOKEN_SIDES[family.name])
    except ValueError:
        with pytest.raises(ValueError, match="aspect ratio"):
            processing.resize(height, width)
    else:
        assert processing.resize(height, width) == expected
