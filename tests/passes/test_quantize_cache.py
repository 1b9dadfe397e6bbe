"""quantize-cache: which layers get scales, what folds do to observed values, and what the pass refuses."""

from collections.abc import Callable

import pytest
import torch

from tests.support.cache_stages import Layer, exact_layer, layer
from tests.support.random_stage import EVERY_LINEAR, decoder, outputs, through
from vlqc.errors import UserError
from vlqc.ir.printer import print_stage
from vlqc.ir.stage import CacheSite, Stage
from vlqc.passes.algorithms.cache_scales import covering_scale
from vlqc.passes.insert_observers import InsertObservers
from vlqc.passes.quantize_cache import QuantizeCache
from vlqc.passes.smooth_m4 import SmoothM4
from vlqc.pipeline.ordering import check_order
from vlqc.pipeline.registry import parse_pipeline
from vlqc.targets.cache_schemes import CacheScheme

pytestmark = pytest.mark.usefixtures("float32_runs")  # the same numbers on every processor

OBSERVE = InsertObservers(caches=True)


def site_of(stage: Stage) -> CacheSite:
    (site,) = stage.caches.values()
    return site


def test_golden(golden: Callable[[str, str], None]) -> None:
    """Any change of the scales that the pass chooses for the exact layer shows here as text."""
    golden("after-quantize-cache.vlqc", print_stage(through(exact_layer(), OBSERVE, QuantizeCache())))


def test_scales_are_near_the_observed_ranges() -> None:
    """Scales of the keys for the values, or of another head or channel."""
    stage = through(layer(), OBSERVE, QuantizeCache())
    site, (observation,) = site_of(stage), stage.cache_observations.values()
    assert site.scheme == CacheScheme.C8 and site.reason == "" and site.sqnr is not None and site.sqnr > 35
    for scale, absmax in ((site.key_scale, observation.key_absmax), (site.value_scale, observation.value_absmax)):
        assert scale is not None
        covering = covering_scale(absmax, 127, torch.bfloat16)
        assert bool((scale <= covering).all()) and bool((scale >= 0.39 * covering).all())


def test_layers_with_a_large_error_stay_in_float() -> None:
    """A layer that is quantized although its keys have no digits left, or scales of a layer that stays in float."""
    stage = through(layer(key_bias=2000.0), OBSERVE, QuantizeCache())
    site = site_of(stage)
    assert site.scheme is None and site.reason == "less than 20 dB" and site.sqnr is not None and site.sqnr < 20
    assert site.scales() == {}
    assert site_of(through(stage, QuantizeCache(min_sqnr=-100))).scales().keys() == {"key_scale", "value_scale"}
    assert site_of(through(stage, QuantizeCache(min_sqnr=100))).scales() == {}


def test_folds_rescale_the_observed_values() -> None:
    """Scales of values for weights as they were before smoothing, which divides channels of the value projection."""
    stage = through(decoder(outliers=True), OBSERVE, EVERY_LINEAR, SmoothM4())
    (before,) = stage.cache_observations.values()
    outputs(stage)
    (again,) = through(stage, OBSERVE).cache_observations.values()
    plain = through(decoder(outliers=True), OBSERVE).cache_observations["model.layers.0.self_attn"]
    assert not torch.allclose(before.value_absmax, plain.value_absmax, rtol=0.1)
    assert torch.allclose(before.value_absmax, again.value_absmax, rtol=1e-4)
    assert torch.allclose(before.key_absmax, again.key_absmax, rtol=1e-4)
    for kept, new in zip(before.kept, again.kept, strict=True):
        assert torch.allclose(kept.value, new.value, atol=1e-4, rtol=1e-4)
        assert torch.allclose(kept.key, new.key, atol=1e-4, rtol=1e-4)


def test_nothing_observed() -> None:
    """Scales of nothing; and stages without keys and values, which pass through unchanged."""
    with pytest.raises(UserError, match=r"insert-observers\{caches=true\}"):
        through(layer(), InsertObservers(), QuantizeCache())
    block = Layer()
    del block.self_attn
    vision = layer()
    vision.name = "visual.blocks.0"
    assert QuantizeCache().run(vision) is False


def test_order_and_options() -> None:
    """Smoothing behind the scales, which would be those of other values; an unknown scheme."""
    begin, end = "insert-observers{caches=true},assign-precision,", "quantize-activations,quantize-weights"
    check_order(parse_pipeline(f"{begin}smooth-m2,{end},quantize-cache{{min_sqnr=30}},lower-cache"))
    with pytest.raises(UserError, match="smooth-m2 must run before quantize-cache"):
        check_order(parse_pipeline(f"{begin}quantize-cache,smooth-m2,{end}"))
    with pytest.raises(UserError, match="C8"):
        parse_pipeline("quantize-cache{scheme=C4}")
