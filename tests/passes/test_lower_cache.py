"""lower-cache: the stage runs attention on quantized keys and values, and its text shows that."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.cache_stages import KV_HEADS, SIZE, Array, Layer, exact_layer, layer, numpy_attention, rotate
from tests.support.random_stage import EVERY_LINEAR, outputs, through
from vlqc.errors import UserError
from vlqc.ir.parser import parse_stage
from vlqc.ir.printer import print_stage
from vlqc.ir.verifier import check
from vlqc.kernels_ref.kv_cache import QuantizedCacheAttention
from vlqc.kernels_ref.quant_linear import StaticQuantLinear
from vlqc.passes.insert_observers import InsertObservers
from vlqc.passes.lower_cache import LowerCache
from vlqc.passes.lower_linears import LowerLinears
from vlqc.passes.propagate_quantized import PropagateQuantized
from vlqc.passes.quantize_activations import QuantizeActivations
from vlqc.passes.quantize_cache import QuantizeCache
from vlqc.passes.quantize_weights import QuantizeWeights
from vlqc.pipeline.ordering import check_order
from vlqc.pipeline.registry import parse_pipeline
from vlqc.reporting.dumps.as_json import stage_to_dict
from vlqc.reporting.dumps.diff import diff_stages

pytestmark = pytest.mark.usefixtures("float32_runs")  # the same numbers on every processor

PASSES = (InsertObservers(caches=True), QuantizeCache())


def test_golden(golden: Callable[[str, str], None]) -> None:
    """Any change of how quantized keys and values appear in a stage shows here as text."""
    text = print_stage(through(exact_layer(), *PASSES, LowerCache()))
    golden("after-lower-cache.vlqc", text)
    assert print_stage(parse_stage(text)) == text


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("repeat", [False, True])
def test_whole_layer_against_numpy(normed: bool, repeat: bool) -> None:
    """Keys quantized before the rotary embedding or a norm, or attention that stays in float."""
    stage = through(layer(normed=normed, repeat=repeat), *PASSES, LowerCache())
    block, (site,) = stage.module, stage.caches.values()
    wrapper = block.get_submodule("self_attn")
    assert isinstance(block, Layer) and isinstance(wrapper, QuantizedCacheAttention)
    scales = {"key": site.key_scale, "value": site.value_scale}
    attention = wrapper.float_attention

    def rounded(rows: Array, which: str) -> Array:
        part, head = which.split()
        scale = scales[part].reshape(KV_HEADS, SIZE)[int(head)].numpy()  # type: ignore[union-attr]
        return np.clip(np.rint(rows.astype(np.float32) * (1 / scale)), -128, 127).astype(np.float64) * scale

    for call in stage.execution.calls:
        rows = block.input_layernorm(call.args[0])
        q, k, v = (
            getattr(attention, f"{part}_proj")(rows).reshape(1, rows.shape[1], -1, SIZE) for part in ("q", "k", "v")
        )
        if normed:
            q, k = attention.get_submodule("q_norm")(q), attention.get_submodule("k_norm")(k)
        q, k, v = rotate(q.transpose(1, 2)), rotate(k.transpose(1, 2)), v.transpose(1, 2)
        weight = attention.get_parameter("o_proj.weight").double().numpy()
        mixed, plain = (numpy_attention(q, k, v, change) for change in (rounded, lambda rows, _: rows))
        output = block(*call.args)[0][0, :-1].double().numpy()  # without padding
        expected, float_output = ((call.args[0][0].double().numpy() + part @ weight.T)[:-1] for part in (mixed, plain))
        assert np.abs(output - expected).max() < np.abs(output - float_output).max() / 20


def test_graph_and_module_agree() -> None:
    """A graph without the rounding, or a rounding of other tensors: the attention reads what is rounded."""
    stage = through(layer(), *PASSES, LowerCache())
    (site,) = stage.caches.values()
    query, key, value, *_ = stage.node(site.node).args
    assert [node.target.__name__ for node in (key, value)] == ["round_cache"] * 2  # type: ignore[union-attr]
    assert getattr(query.target, "__name__", "") != "round_cache"  # type: ignore[union-attr]
    for node, scale in ((key, site.key_scale), (value, site.value_scale)):
        assert torch.equal(node.args[1].meta["constant"], scale)  # type: ignore[union-attr,arg-type]
    assert check(stage) == []


def test_with_lowered_linears_and_propagation() -> None:
    """Linear layers that are lowered inside a wrapped attention, before or after, and outputs in float for later
    stages."""
    texts = []
    begin = (*PASSES[:1], EVERY_LINEAR, QuantizeActivations(), QuantizeWeights(method="round"), PASSES[1])
    for order in ((LowerLinears(), LowerCache()), (LowerCache(), LowerLinears())):
        stage = through(layer(), *begin, *order)
        assert isinstance(stage.module.get_submodule("self_attn.k_proj"), StaticQuantLinear)
        before = stage.execution.outputs[0][0]
        through(stage, PropagateQuantized())
        assert not torch.equal(stage.execution.outputs[0][0], before)
        assert torch.equal(stage.execution.outputs[0][0], stage.module(*stage.execution.calls[0].args)[0])
        texts.append(print_stage(stage, tensors=False))
    assert texts[0] == texts[1]


def test_layers_in_float_stay_unchanged() -> None:
    """A wrapper around attention whose cache stays in float."""
    stage = through(layer(), PASSES[0], QuantizeCache(min_sqnr=200))
    before = outputs(stage)
    assert LowerCache().run(stage) is False and torch.equal(outputs(stage), before)


def test_json_and_differences() -> None:
    """A dump without the caches, or a difference that is not shown."""
    stage = through(exact_layer(), PASSES[0])
    before = parse_stage(print_stage(stage))
    after = parse_stage(print_stage(through(stage, PASSES[1], LowerCache())))
    (cache,) = stage_to_dict(after)["caches"].values()
    assert cache["scheme"] == "C8" and cache["observation"]["kept"] == 6 and len(cache["scales"]) == 2
    changes = diff_stages(before, after)
    assert any("cache scheme" in sentence for sentence in changes["model.layers.0.self_attn"])
    assert diff_stages(after, after) == {} and diff_stages(after, before)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda site: setattr(site, "key_scale", None), "1 scales"),
        (lambda site: setattr(site, "key_scale", torch.full((2,), 0.1)), "does not have"),
        (lambda site: setattr(site, "value_scale", -torch.ones(2)), "not positive"),
        (lambda site: setattr(site, "value_scale", torch.ones(3)), "float32 \\[2\\]"),
        (lambda site: setattr(site, "value_scale", torch.ones(2)), "other scales"),
        (lambda site: setattr(site, "heads", 2), "expected 2 x 2"),
        (lambda site: setattr(site, "node", "hidden_states"), "not an attention call"),
        (lambda site: setattr(site, "key", "nothing"), "not a site"),
    ],
)
def test_verifier(damage: Callable[[object], None], fault: str) -> None:
    """A stage whose scales are wrong goes on to the folder."""
    stage = through(exact_layer(), *PASSES, LowerCache())
    damage(next(iter(stage.caches.values())))
    assert any(re.search(fault, found) for found in check(stage))


def test_order() -> None:
    """Outputs for later stages before the cache is lowered, and lowering without scales."""
    begin = "insert-observers{caches=true},assign-precision,quantize-activations,quantize-weights,lower-linears,"
    with pytest.raises(UserError, match="lower-cache must run before propagate-quantized"):
        check_order(parse_pipeline(begin + "quantize-cache,propagate-quantized,lower-cache"))
    with pytest.raises(UserError, match="lower-cache needs quantize-cache"):
        check_order(parse_pipeline(begin + "lower-cache"))
    assert issubclass(QuantizedCacheAttention, nn.Module)
