"""What is observed of keys and values: against hooks and NumPy, without padding, in one process or several."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.cache_stages import HEADS, HIDDEN, KV_HEADS, SIZE, Layer, layer, rotate
from tests.support.random_stage import through
from vlqc.errors import UserError
from vlqc.ir.cache_observation import CacheObservation
from vlqc.ir.execution import Call, SampleShape
from vlqc.ir.printer import print_stage
from vlqc.ir.stage import CacheSite, Stage
from vlqc.passes.algorithms.cache_observer import CacheObserver, Kept, attention_bias, merge_caches, plan_kept
from vlqc.passes.insert_observers import InsertObservers

pytestmark = pytest.mark.usefixtures("float32_runs")  # the same numbers on every processor

SITE = CacheSite("attn", "attn", "attn.k", "attn.v", "node", KV_HEADS, SIZE)
ALONE = torch.arange(KV_HEADS * SIZE)  # no rotary embedding


def observed(stage: Stage) -> CacheObservation:
    (observation,) = through(stage, InsertObservers(caches=True)).cache_observations.values()
    return observation


def keys_and_values(stage: Stage, call: Call) -> tuple[Tensor, Tensor]:
    """float32 [S, C], computed from the weights."""
    block = stage.module
    assert isinstance(block, Layer)
    rows = block.input_layernorm(call.args[0])
    key = block.self_attn.k_proj(rows).reshape(1, -1, KV_HEADS, SIZE).transpose(1, 2)
    return rotate(key).transpose(1, 2).flatten(2)[0], block.self_attn.v_proj(rows)[0]


@pytest.mark.parametrize("repeat", [False, True])
def test_ranges_and_rows(repeat: bool) -> None:
    """Keys before the rotary embedding, ranges of keys at their own positions only, padding that counts, repeated
    heads, or rows of another sample."""
    stage = layer(repeat=repeat)
    observation = observed(stage)
    expected = []
    for call in stage.execution.calls:
        assert call.modality is not None
        expected.append([part[call.modality >= 0] for part in keys_and_values(stage, call)])
    keys, values = (torch.cat([rows[part] for rows in expected]) for part in (0, 1))
    assert torch.allclose(observation.value_absmax, values.abs().amax(0), rtol=1e-5)
    radius = keys.reshape(len(keys), KV_HEADS, 2, -1).norm(dim=2, keepdim=True).expand(-1, -1, 2, -1)
    assert torch.allclose(observation.key_absmax, radius.flatten(1).amax(0), rtol=1e-5)
    assert len(observation.kept) == 3 and observation.rows == {"text": 17, "image": 19}
    for kept, (key, value) in zip(observation.kept, expected, strict=True):
        assert torch.allclose(kept.key, key, atol=1e-5) and torch.allclose(kept.value, value, atol=1e-5)


def test_output_of_the_attention_can_be_computed() -> None:
    """Queries without their scaling or in another order, a mask that is not causal, or energies of other tokens."""
    stage = layer(length=6)
    outputs: list[Tensor] = []
    stage.module.get_submodule("self_attn.o_proj").register_forward_pre_hook(lambda _, args: outputs.append(args[0][0]))
    observation = observed(stage)
    for call, kept, output in zip(stage.execution.calls, observation.kept, outputs, strict=True):
        queries = kept.query.reshape(-1, HEADS, SIZE)
        key, value = (part.reshape(-1, KV_HEADS, SIZE).repeat_interleave(2, 1) for part in (kept.key, kept.value))
        scores = torch.einsum("qhd,thd->hqt", queries, key) * observation.scaling + kept.bias
        mixed = torch.einsum("hqt,thd->qhd", scores.softmax(-1), value).flatten(1)
        assert call.modality is not None
        tokens = call.modality >= 0
        assert torch.allclose(mixed, output[tokens], atol=1e-5)
        energy = stage.execution.outputs[call.sample][0][0].square().mean(-1)
        assert torch.equal(kept.modality, call.modality[tokens]) and torch.allclose(kept.energy, energy[tokens])
    weights = torch.cat(observation.query_weights())
    modality = torch.cat([kept.modality for kept in observation.kept])
    assert abs(float(weights[modality == 0].sum()) - 0.5) < 1e-9  # text counts as much as images


def test_several_processes_observe_the_same() -> None:
    """Statistics that depend on which process ran a sample: merged from one list, and from two in order."""
    stage = layer(samples=4)
    plan = plan_kept([SampleShape.from_call(call) for call in stage.execution.calls], 30)
    calls = []
    for call in stage.execution.calls:
        key, value = (part.reshape(1, -1, KV_HEADS, SIZE).transpose(1, 2) for part in keys_and_values(stage, call))
        query = torch.randn(1, HEADS, key.shape[2], SIZE, generator=torch.Generator().manual_seed(call.sample))
        calls.append(({"query": query, "key": key, "value": value, "is_causal": True}, call))
    observers = [CacheObserver(SITE, plan, balance=True, partners=ALONE) for _ in range(3)]
    for index, (arguments, call) in enumerate(calls):
        observers[0](arguments, call)
        observers[1 + index // 2](arguments, call)
    whole = merge_caches(observers[0].samples)
    split = merge_caches([*observers[1].samples, *observers[2].samples])
    assert (whole.rows, whole.samples) == (split.rows, split.samples)
    assert all(torch.equal(one, other) for one, other in zip(whole.tensors(), split.tensors(), strict=True))


def test_bounded_selection() -> None:
    """A budget that one long sample takes, samples of one modality only, or more tokens than the budget."""
    shapes = [SampleShape(n, 100, (100, 0, 0) if n % 3 else (40, 60, 0)) for n in range(20)]
    plan = plan_kept(shapes, 700)
    assert len(plan) == 7 and {0, 1} <= {bool(sample % 3) for sample in plan}
    assert max(plan) >= 10 and sum(sum(kept.queries.values()) for kept in plan.values()) == 256
    long = plan_kept([SampleShape(0, 9000, (9000, 0, 0)), *shapes], 700)
    assert all(kept.rows == 175 for kept in long.values()) and len(long) >= 4


def test_long_samples_keep_queries_that_see_their_own_token() -> None:
    """Queries without a kept key, whose attention would be NaN."""
    length = 50
    tensors = {name: torch.randn(1, heads, length, SIZE) for name, heads in (("query", 4), ("key", 2), ("value", 2))}
    observer = CacheObserver(SITE, {0: Kept(10, {0: 3, 1: 3})}, balance=True, partners=ALONE)
    modality = (torch.arange(length) % 2).to(torch.int8)
    observer({**tensors, "is_causal": True}, Call(0, (), {}, modality))
    (kept,) = observer.samples[0].statistics.kept
    assert kept.key.shape == (10, 16) and kept.query.shape == (6, 32) and kept.modality.sum() == 3
    assert bool((kept.bias == 0).any(1).all()) and bool((kept.bias[-1] == 0).all())


def test_masks() -> None:
    """A boolean and a float mask that are read differently, rows of the mask of other queries, or batch entries that
    attend to each other."""
    allowed = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.5
    queries, tokens = torch.tensor([1, 4, 7]), torch.tensor([0, 2, 5, 6, 8])
    expected = np.full((3, 5), -np.inf)
    for row, query in enumerate(queries.tolist()):
        for column, token in enumerate(tokens.tolist()):
            if query // 6 == token // 6 and allowed[query // 6, 0, query % 6, token % 6]:
                expected[row, column] = 0
    lowest = torch.finfo(torch.float32).min
    for mask in (allowed, torch.where(allowed, 0.0, lowest), torch.where(allowed, 0.0, -torch.inf)):
        arguments = {"query": torch.zeros(2, HEADS, 6, SIZE), "attn_mask": mask}
        assert np.array_equal(attention_bias(arguments, queries, tokens).numpy(), expected)


def test_values_that_are_not_finite() -> None:
    """NaN that becomes a scale."""
    tensors = {name: torch.full((1, 2, 4, SIZE), torch.nan) for name in ("query", "key", "value")}
    with pytest.raises(UserError, match="NaN"):
        CacheObserver(SITE, {}, balance=True, partners=ALONE)(
            tensors, Call(0, (), {}, torch.zeros(4, dtype=torch.int8))
        )


def test_nothing_is_left_behind() -> None:
    """Hooks that remain, a second observation that adds to the first, and observation without being asked."""
    stage = layer()
    assert not through(stage, InsertObservers()).caches
    first = print_stage(through(stage, InsertObservers(caches=True)))
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in stage.module.modules())
    assert print_stage(through(stage, InsertObservers(caches=True))) == first and "key_absmax" in first
    assert HIDDEN == HEADS * SIZE
