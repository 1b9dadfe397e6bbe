"""The tensors of a quantized cache: names, values and schemes, and stages that must not be written."""

import pytest
import torch

from tests.support.cache_stages import KV_HEADS, SIZE, layer
from tests.support.random_stage import through
from vlqc.emit.stage_tensors import stage_tensors
from vlqc.errors import UserError
from vlqc.passes.insert_observers import InsertObservers
from vlqc.passes.lower_cache import LowerCache
from vlqc.passes.quantize_cache import QuantizeCache
from vlqc.targets.schemes import Scheme
from vlqc.targets.vllm_ascend import VLLM_ASCEND

QUANTIZE = (InsertObservers(caches=True), QuantizeCache())
ATTENTION = "model.layers.0.self_attn"


def test_scales_and_offsets() -> None:
    """Catches scales under the other projection's name, an offset that is not 0, and weights that the wrapper hides."""
    stage = through(layer(), *QUANTIZE, LowerCache())
    emitted = {each.name: each for each in stage_tensors(stage, VLLM_ASCEND, Scheme.W8A8)}
    (site,) = stage.caches.values()
    of_cache = {name: each for name, each in emitted.items() if ".kv_cache_" in name}
    projections = {f"{ATTENTION}.k_proj": site.key_scale, f"{ATTENTION}.v_proj": site.value_scale}
    assert of_cache.keys() == {f"{name}.kv_cache_{suffix}" for name in projections for suffix in ("scale", "offset")}
    for name, scale in projections.items():
        assert scale is not None and torch.equal(of_cache[f"{name}.kv_cache_scale"].tensor, scale)
        offset = of_cache[f"{name}.kv_cache_offset"].tensor
        assert offset.shape == (KV_HEADS * SIZE,) and offset.dtype == torch.float32 and not offset.any()
    assert {str(each.scheme) for each in of_cache.values()} == {"C8"}
    weights = {f"{ATTENTION}.{member}_proj.weight" for member in "qkvo"}
    assert weights <= emitted.keys() and len(emitted) == len(list(stage.module.named_parameters())) + len(of_cache)


def test_a_cache_in_float_has_no_tensors() -> None:
    """Catches scales of a layer that was left out: the engine would quantize its cache."""
    stage = through(layer(), InsertObservers(caches=True), QuantizeCache(min_sqnr=200.0), LowerCache())
    assert stage.caches and not any(
        ".kv_cache_" in each.name for each in stage_tensors(stage, VLLM_ASCEND, Scheme.W8A8)
    )


def test_a_cache_that_is_not_lowered() -> None:
    """Catches a folder whose engine reads quantized keys and values, while its measurements are those of float ones."""
    stage = through(layer(), *QUANTIZE)
    with pytest.raises(UserError, match="reads it in float"):
        list(stage_tensors(stage, VLLM_ASCEND, Scheme.W8A8))
