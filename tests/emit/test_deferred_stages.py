"""vlqc.emit.deferred_stages: stages that wait on disk come back as if their schemes had been chosen at once."""

import gc
import itertools
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.random_stage import decoder, staged, through
from tests.support.tiny import float_model
from vlqc.emit import stage_tensors as ascend
from vlqc.emit.deferred_stages import DeferredStages, expected_bytes
from vlqc.emit.stage_tensors import Entry, stage_entries
from vlqc.ir.stage import Call, Stage
from vlqc.passes.assign_precision import AssignPrecision
from vlqc.passes.insert_observers import InsertObservers
from vlqc.passes.lower_linears import LowerLinears
from vlqc.passes.measure_sensitivity import MeasureSensitivity
from vlqc.passes.quantize_activations import QuantizeActivations
from vlqc.passes.quantize_weights import QuantizeWeights
from vlqc.pipeline.precision_search import Plan
from vlqc.targets.schemes import Scheme

STATIC, DYNAMIC, FLOAT = Scheme.W8A8, Scheme.W8A8_DYNAMIC, Scheme.FLOAT
PIPELINE = QuantizeActivations(), QuantizeWeights(), MeasureSensitivity(target="vllm-ascend"), LowerLinears()


def compiled(seed: int = 0, **options: object) -> Stage:
    """A decoder layer as it comes to the emitter."""
    assign = AssignPrecision(target="vllm-ascend", fallback="none", **options)  # type: ignore[arg-type]
    return through(decoder(seed), InsertObservers(), assign, *PIPELINE)


def put(spool: DeferredStages, stage: Stage) -> None:
    spool.put(stage, stage_entries(stage, packed=True), packed=True)


def plan(spool: DeferredStages, *schemes: Scheme) -> Plan:
    return Plan(tuple(spool.groups()), schemes, None, 0.0)


def of(entries: list[Entry]) -> list[tuple[str, Scheme, torch.dtype, list[object]]]:
    """Entries as what can be compared."""
    return [(it.name, it.mark, it.tensor.dtype, it.tensor.flatten().tolist()) for it in entries]


@pytest.mark.parametrize("schemes", list(itertools.product([STATIC, FLOAT], [DYNAMIC, FLOAT], [DYNAMIC, STATIC])))
def test_what_comes_back_was_chosen(tmp_path: Path, schemes: tuple[Scheme, ...]) -> None:
    """Catches tensors of another choice, another order, a rounded or lost tensor, whatever was chosen.

    The reference is the same layer with its groups quantized one by one: no smoothing joins them here.
    """
    spool = DeferredStages(tmp_path / "waiting")
    put(spool, compiled())
    chosen = (*schemes, STATIC)
    entries = list(spool.take(plan(spool, *chosen)))
    wanted: dict[str, Entry] = {}
    for group, scheme in zip(spool.groups(), chosen, strict=True):
        others = tuple(name for name in decoder().sites if name not in group.sites)
        assign = AssignPrecision(str(scheme), target="vllm-ascend", fallback="none", exclude=others)  # type: ignore[arg-type]
        alone = through(decoder(), InsertObservers(), assign, *PIPELINE)
        for entry in stage_entries(alone, packed=True):
            if entry.name.rpartition(".")[0] in group.sites or "norm" in entry.name:
                wanted[entry.name] = entry
    assert {it.name for it in entries} == set(wanted) and len(entries) == len(wanted)
    assert of(entries) == of([wanted[it.name] for it in entries])


def test_without_a_change_nothing_changes(tmp_path: Path) -> None:
    """Catches another order of tensors than without a search: the same choice should give the same file."""
    spool = DeferredStages(tmp_path / "waiting")
    stage = compiled()
    put(spool, stage)
    entries = list(spool.take(plan(spool, *[STATIC] * 4)))
    assert of(entries) == of(list(stage_entries(stage, packed=True)))


def test_stages_in_order_and_then_gone(tmp_path: Path) -> None:
    """Catches files that stay until the end, where the result needs the room, or that stay in the result."""
    spool, folder = DeferredStages(tmp_path / "waiting"), tmp_path / "waiting"
    wanted = []
    for seed in range(3):
        stage = compiled(seed)
        put(spool, stage)
        wanted += of(list(stage_entries(stage, packed=True)))
    assert len(list(folder.iterdir())) == 3
    taken, files = [], []
    for entry in spool.take(plan(spool, *[STATIC] * 12)):
        taken.append(entry)
        files.append(len(list(folder.iterdir())))
    assert of(taken) == wanted
    assert files == sorted(files, reverse=True) and files[0] == 3 and files[-1] == 1
    spool.remove()
    assert list(tmp_path.iterdir()) == []


def test_bytes_are_those_of_the_tensors(tmp_path: Path) -> None:
    """Catches a cost that forgets scales, counts all choices, or takes int4 for int8."""
    spool = DeferredStages(tmp_path / "waiting")
    put(spool, compiled())
    for number, group in enumerate(spool.groups()):
        assert set(group.choices) == {STATIC, DYNAMIC, FLOAT}
        weights = sum(decoder().sites[name].shape[0] * decoder().sites[name].shape[1] for name in group.sites)
        rows = sum(decoder().sites[name].shape[0] for name in group.sites)
        biases = 2 * rows if number == 0 else 0  # q, k, v
        assert group.choices[FLOAT].bytes == 2 * weights + biases
        assert group.choices[DYNAMIC].bytes == weights + 8 * rows + biases  # two float32 per row
        # ... beside them an int32 and a float32, and per layer the input's scale and offset
        assert group.choices[STATIC].bytes == weights + 16 * rows + 8 * len(group.sites) + biases


def test_a_stage_is_forgotten(tmp_path: Path) -> None:
    """Catches modules that are kept until the decision: the whole model would be in memory."""
    spool, stage = DeferredStages(tmp_path / "waiting"), compiled()
    put(spool, stage)
    kept = [weakref.ref(it) for found in stage.sensitivities for of in found.modules.values() for it in of.values()]
    del stage
    gc.collect()
    assert kept and all(reference() is None for reference in kept)


def test_vision_noise_counts_for_its_tokens(tmp_path: Path) -> None:
    """Catches noise of the vision tower that is thought to reach text tokens: it would be spent on in vain."""

    def tower(part: str) -> Stage:
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).requires_grad_(False)
        modality = torch.tensor([0, 0, 0, 1, 1, -1, -1, -1], dtype=torch.int8) if part == "model" else None
        name = "visual.merger" if part == "visual" else "model.layers.0"
        stage = staged(block, [Call(0, (torch.randn(8, 16),), {}, modality)], name=name)
        for old in list(stage.sites):
            wanted = (
                {"0": "mlp.0", "2": "mlp.2"} if part == "visual" else {"0": "self_attn.o_proj", "2": "mlp.down_proj"}
            )
            site = stage.sites.pop(old)
            site.name = f"{name}.{wanted[site.target]}"
            stage.sites[site.name] = site
        assign = AssignPrecision(target="vllm-ascend", fallback="none")
        stage = through(stage, InsertObservers(), assign, QuantizeActivations(), QuantizeWeights())
        return through(stage, MeasureSensitivity(target="vllm-ascend"))

    stages = [tower("visual"), tower("model")]
    spool = DeferredStages(tmp_path / "waiting")
    for stage in stages:
        spool.put(stage, [], packed=True)
    found = [found.noise[STATIC] for stage in stages for found in stage.sensitivities]
    told = [group.choices[STATIC].noise for group in spool.groups()]
    assert told[:2] == pytest.approx([2 / 5 * it for it in found[:2]])
    assert told[2:] == found[2:]


def test_room_for_what_waits(tmp_path: Path) -> None:
    """Catches a run that fills the disk after hours: what waits is more than the result."""
    model = float_model()
    spool = DeferredStages(tmp_path / "waiting")
    put(spool, compiled())
    shapes = [it.shape for it in decoder().sites.values()]
    on_disk = sum(path.stat().st_size for path in (tmp_path / "waiting").iterdir())
    assert on_disk > 4 * sum(rows * columns for rows, columns in shapes)  # int8, int8 and a float of two bytes
    quantizable = sum(
        parameter.numel()
        for name, parameter in model.parameters(model.module).items()
        if name.endswith("proj.weight") or "qkv.weight" in name or "merger.mlp" in name
    )
    assert expected_bytes(model) - ascend.expected_bytes(model) >= 3 * 0.9 * quantizable
