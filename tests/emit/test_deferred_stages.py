"""vlqc.emit.deferred_stages: deferred stages are read back as if their schemes had been chosen at once."""

import gc
import itertools
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from tests.support.random_stage import decoder, staged, through
from vlqc.emit.deferred_stages import DeferredStages
from vlqc.emit.stage_tensors import EmittedTensor, stage_tensors
from vlqc.ir.execution import Call
from vlqc.ir.stage import Stage
from vlqc.passes.assign_precision import AssignPrecision
from vlqc.passes.insert_observers import InsertObservers
from vlqc.passes.lower_linears import LowerLinears
from vlqc.passes.measure_sensitivity import MeasureSensitivity
from vlqc.passes.quantize_activations import QuantizeActivations
from vlqc.passes.quantize_weights import QuantizeWeights
from vlqc.pipeline.precision_search import SearchResult
from vlqc.targets.schemes import Scheme
from vlqc.targets.vllm_ascend import VLLM_ASCEND

STATIC, DYNAMIC, WEIGHTS_ONLY, FLOAT = Scheme.W8A8, Scheme.W8A8_DYNAMIC, Scheme.W8A16, Scheme.FLOAT
PIPELINE = QuantizeActivations(), QuantizeWeights(), MeasureSensitivity(target="vllm-ascend"), LowerLinears()


def lowered(seed: int = 0, **options: object) -> Stage:
    """A decoder layer after all passes."""
    assign = AssignPrecision(target="vllm-ascend", fallback="none", **options)  # type: ignore[arg-type]
    return through(decoder(seed), InsertObservers(), assign, *PIPELINE)


def tensors_of(stage: Stage) -> list[EmittedTensor]:
    return list(stage_tensors(stage, VLLM_ASCEND, STATIC))


def store(deferred: DeferredStages, stage: Stage) -> None:
    deferred.store(stage, tensors_of(stage), packed=True)


def plan(deferred: DeferredStages, *schemes: Scheme) -> SearchResult:
    return SearchResult(tuple(deferred.groups()), schemes, None, 0.0)


def load(deferred: DeferredStages, *schemes: Scheme) -> list[EmittedTensor]:
    return [emitted for _, tensors in deferred.load(plan(deferred, *schemes)) for emitted in tensors]


def comparable(tensors: list[EmittedTensor]) -> list[tuple[str, Scheme, torch.dtype, list[object]]]:
    return [(it.name, it.scheme, it.tensor.dtype, it.tensor.flatten().tolist()) for it in tensors]


@pytest.mark.parametrize("schemes", list(itertools.product([STATIC, FLOAT], [DYNAMIC, FLOAT], [DYNAMIC, STATIC])))
def test_chosen_tensors_are_loaded(tmp_path: Path, schemes: tuple[Scheme, ...]) -> None:
    """Catches tensors of another choice, another order, and a changed or lost tensor, for every choice.

    The reference is the same layer with its groups quantized one by one: no smoothing joins them here.
    """
    deferred = DeferredStages(tmp_path / "waiting")
    store(deferred, lowered())
    chosen = (*schemes, STATIC)
    tensors = load(deferred, *chosen)
    expected: dict[str, EmittedTensor] = {}
    for group, scheme in zip(deferred.groups(), chosen, strict=True):
        others = tuple(name for name in decoder().sites if name not in group.sites)
        assign = AssignPrecision(str(scheme), target="vllm-ascend", fallback="none", exclude=others)  # type: ignore[arg-type]
        alone = through(decoder(), InsertObservers(), assign, *PIPELINE)
        for emitted in tensors_of(alone):
            if emitted.name.rpartition(".")[0] in group.sites or "norm" in emitted.name:
                expected[emitted.name] = emitted
    assert {it.name for it in tensors} == set(expected) and len(tensors) == len(expected)
    assert comparable(tensors) == comparable([expected[it.name] for it in tensors])


def test_without_a_change_nothing_changes(tmp_path: Path) -> None:
    """Catches another order of tensors than without a search: the same choice should give the same file."""
    deferred = DeferredStages(tmp_path / "waiting")
    stage = lowered()
    store(deferred, stage)
    assert comparable(load(deferred, *[STATIC] * 4)) == comparable(tensors_of(stage))


def test_files_are_discarded_in_order(tmp_path: Path) -> None:
    """Catches files that are kept until the end, when the result needs the space, or that stay in the result."""
    deferred, folder = DeferredStages(tmp_path / "waiting"), tmp_path / "waiting"
    expected = []
    for seed in range(3):
        stage = lowered(seed)
        store(deferred, stage)
        expected += comparable(tensors_of(stage))
    assert len(list(folder.iterdir())) == 3
    loaded, files = [], []
    for number, tensors in deferred.load(plan(deferred, *[STATIC] * 12)):
        loaded += comparable(list(tensors))
        files.append(len(list(folder.iterdir())))
        deferred.discard(number)
    assert loaded == expected
    assert files == [3, 2, 1]
    deferred.remove()
    assert list(tmp_path.iterdir()) == []


def test_bytes_are_those_of_the_tensors(tmp_path: Path) -> None:
    """Catches a cost without the scales, of all choices together, or of int8 in place of int4."""
    deferred = DeferredStages(tmp_path / "waiting")
    store(deferred, lowered())
    for number, group in enumerate(deferred.groups()):
        assert set(group.candidates) == {STATIC, DYNAMIC, FLOAT} | ({WEIGHTS_ONLY} if number else set())
        weights = sum(decoder().sites[name].shape[0] * decoder().sites[name].shape[1] for name in group.sites)
        rows = sum(decoder().sites[name].shape[0] for name in group.sites)
        biases = 2 * rows if number == 0 else 0  # q, k, v
        assert group.candidates[FLOAT].bytes == 2 * weights + biases
        assert group.candidates[DYNAMIC].bytes == weights + 8 * rows + biases  # two float32 per row
        if number:
            assert group.candidates[WEIGHTS_ONLY].bytes == group.candidates[DYNAMIC].bytes
        # ... beside them an int32 and a float32, and per layer the input's scale and offset
        assert group.candidates[STATIC].bytes == weights + 16 * rows + 8 * len(group.sites) + biases


def test_equal_tensors_are_stored_once(tmp_path: Path) -> None:
    """Catches a weight on the disk for every scheme that has the same one, and one that is taken for another."""
    deferred, stage = DeferredStages(tmp_path / "waiting"), lowered()
    store(deferred, stage)
    record = deferred.last_record()
    keys: dict[tuple[str, str], int] = {(name, choice): key for name, _, key, _, choice in record["tensors"]}
    weight = "model.layers.0.mlp.down_proj.weight"
    assert keys[weight, DYNAMIC] == keys[weight, WEIGHTS_ONLY]
    assert len({keys[weight, choice] for choice in (STATIC, DYNAMIC, FLOAT)}) == 3
    with safe_open(tmp_path / "waiting" / "0.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(map(str, keys.values()))


def test_modules_of_a_stage_are_freed(tmp_path: Path) -> None:
    """Catches modules that are kept until schemes are chosen: the whole model would be in memory."""
    deferred, stage = DeferredStages(tmp_path / "waiting"), lowered()
    store(deferred, stage)
    kept = [weakref.ref(it) for found in stage.sensitivities for of in found.modules.values() for it in of.values()]
    del stage
    gc.collect()
    assert kept and all(reference() is None for reference in kept)


def test_vision_noise_is_weighted_by_image_tokens(tmp_path: Path) -> None:
    """Catches noise of the vision tower counted for text tokens, which it does not reach."""

    def tower(part: str) -> Stage:
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).requires_grad_(False)
        modality = torch.tensor([0, 0, 0, 1, 1, -1, -1, -1], dtype=torch.int8) if part == "model" else None
        name = "visual.merger" if part == "visual" else "model.layers.0"
        stage = staged(block, [Call(0, (torch.randn(8, 16),), {}, modality)], name=name)
        for old in list(stage.sites):
            expected = (
                {"0": "mlp.0", "2": "mlp.2"} if part == "visual" else {"0": "self_attn.o_proj", "2": "mlp.down_proj"}
            )
            site = stage.sites.pop(old)
            site.name = f"{name}.{expected[site.target]}"
            stage.sites[site.name] = site
        assign = AssignPrecision(target="vllm-ascend", fallback="none")
        stage = through(stage, InsertObservers(), assign, QuantizeActivations(), QuantizeWeights())
        return through(stage, MeasureSensitivity(target="vllm-ascend"))

    stages = [tower("visual"), tower("model")]
    deferred = DeferredStages(tmp_path / "waiting")
    for stage in stages:
        deferred.store(stage, [], packed=True)
    sensitivity = [sensitivity.noise[STATIC] for stage in stages for sensitivity in stage.sensitivities]
    noises = [group.candidates[STATIC].noise for group in deferred.groups()]
    assert noises[:2] == pytest.approx([2 / 5 * it for it in sensitivity[:2]])
    assert noises[2:] == sensitivity[2:]
