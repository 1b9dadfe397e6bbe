"""The three passes of vlqc/docs/cookbook.md run, alone and in a compilation."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vlqc
from tests.support import tiny
from tools.demo import tiny_task
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.frontend.process_group import ProcessGroup
from vlqc.frontend.stage_builder import find_sites
from vlqc.frontend.tracing import trace
from vlqc.ir.execution import Call, StageRun
from vlqc.ir.stage import Stage
from vlqc.passes.assign_precision import AssignPrecision
from vlqc.passes.insert_observers import InsertObservers
from vlqc.pipeline.manager import PassManager
from vlqc.targets.schemes import Scheme

PAGE = Path(vlqc.__file__).parent / "docs" / "cookbook.md"
OTHERS = "quantize-activations,quantize-weights{method=round},lower-linears"


@pytest.fixture
def cookbook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules of the page by name, as files in the working directory."""
    kurtosis, rotation, rule = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "heavy_tails.py").write_text(f"{kurtosis}\n\n{rule}", encoding="utf-8")
    (folder / "rotate_values.py").write_text(rotation, encoding="utf-8")
    monkeypatch.chdir(folder)
    names = ("heavy_tails", "rotate_values")
    vlqc.parse_pipeline("heavy_tails:Kurtosis,rotate_values:RotateValues")  # imports them from the working directory
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        del sys.modules[name]


def stage_of(name: str) -> Stage:
    """A stage of the tiny model with its weights, as passes get it."""
    recorded = tiny.recorded_stages()[name]
    model = tiny.float_model()
    module = next(it for path, it in model.module.named_modules() if path == recorded.path)
    model.materialize(module, model.checkpoint.tensor)
    call = Call(0, recorded.call.args, recorded.call.kwargs, recorded.call.modality)
    graph = trace(module, call, name)

    def canonical(target: str) -> str:
        return f"{name}.{target}"

    part = "language" if name.startswith("model") else "vision"
    sites = find_sites(module, graph, canonical)
    execution = StageRun(module, ProcessGroup(), [call], call)
    return Stage(name, part, QWEN2_5_VL, torch.bfloat16, module, graph, sites, execution, checkpoint_name=canonical)


def run(stage: Stage, *passes: Any) -> None:
    with torch.no_grad():
        PassManager(passes).run(stage)


def sylvester(power: int) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """A Hadamard matrix by another definition: entry (i, j) is -1 to the number of bits that i and j share."""
    size = 2**power
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return np.array(signs, dtype=np.float64) / size**0.5


def test_hadamard(cookbook: dict[str, ModuleType]) -> None:
    """Catches a matrix that is not orthonormal, or that mixes more than the largest power of two allows."""
    hadamard = cookbook["rotate_values"].hadamard
    np.testing.assert_allclose(hadamard(32).numpy(), sylvester(5), atol=1e-6)
    eighty = hadamard(80)
    torch.testing.assert_close(eighty @ eighty.T, torch.eye(80), atol=1e-5, rtol=0)
    assert int((eighty != 0).sum()) == 80 * 16


@pytest.mark.parametrize(
    ("name", "producer", "reader", "first_row", "heads", "repeats"),
    [
        ("model.layers.1", "self_attn.v_proj", "self_attn.o_proj", 0, 2, 3),
        ("visual.blocks.0", "attn.qkv", "attn.proj", 256, 4, 1),
        ("visual.blocks.1", "attn.qkv", "attn.proj", 256, 4, 1),
    ],
)
def test_rotation(
    cookbook: dict[str, ModuleType], name: str, producer: str, reader: str, first_row: int, heads: int, repeats: int
) -> None:
    """Catches a rotation that is not undone, changes q or k, omits the bias, or mixes up grouped queries."""
    stage = stage_of(name)
    maker, user = stage.module.get_submodule(producer), stage.module.get_submodule(reader)
    assert isinstance(maker, torch.nn.Linear) and isinstance(user, torch.nn.Linear)
    rows, bias, columns = (it.detach().double().numpy().copy() for it in (maker.weight, maker.bias, user.weight))
    before = stage.execution.probe_output().flatten()
    run(stage, cookbook["rotate_values"].RotateValues())
    after = stage.execution.probe_output().flatten()
    assert float((after - before).abs().max()) < 1e-4 * float(before.square().mean().sqrt()) + 1e-4 * float(
        before.abs().max()
    )
    turn = np.kron(np.eye(heads), sylvester(5))
    values = slice(first_row, first_row + 32 * heads)
    rows[values], bias[values] = turn @ rows[values], turn @ bias[values]
    columns = columns @ np.kron(np.eye(heads * repeats), sylvester(5))
    for actual, expected in ((maker.weight, rows), (maker.bias, bias), (user.weight, columns)):
        np.testing.assert_allclose(actual.detach().numpy(), expected, atol=1e-5)
    assert not stage.notes


def test_wrong_rotation_is_undone(cookbook: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an example that keeps a rotation that changes the output."""
    stage = stage_of("model.layers.0")
    weights = {name: it.clone() for name, it in stage.module.named_parameters()}
    monkeypatch.setattr(cookbook["rotate_values"], "hadamard", lambda width: 1.5 * torch.eye(width))
    run(stage, cookbook["rotate_values"].RotateValues())
    assert all(torch.equal(it, weights[name]) for name, it in stage.module.named_parameters())
    (note,) = stage.notes
    assert re.findall(r"model\.[\w.]+", note) == ["model.layers.0.self_attn.v_proj", "model.layers.0"]


def moments(rows: Tensor) -> float:
    """Kurtosis in NumPy."""
    flat = rows.double().numpy().ravel()
    return float(((flat - flat.mean()) ** 4).mean() / flat.var() ** 2)


def test_kurtosis_and_rule(cookbook: dict[str, ModuleType]) -> None:
    """Catches a wrong fourth moment, a missing site, and a rule that splits a fused group."""
    heavy = cookbook["heavy_tails"]
    assert heavy.kurtosis(torch.zeros(3, 3)) == 0.0
    stage = stage_of("model.layers.1")
    run(stage, InsertObservers(), AssignPrecision(fallback="none"), heavy.Kurtosis(at_least=0.0))
    kurtosis = {source: moments(observation.kept) for source, observation in stage.observations.items()}
    noted = {(note.partition(":")[0], note.split()[-1]) for note in stage.notes}
    assert noted == {(site.name, f"{kurtosis[site.source]:.0f}") for site in stage.sites.values()}
    assert len(stage.notes) == 7
    bound = sorted(kurtosis.values())[-2]
    run(stage, heavy.KeepHeavyTails(bound=bound))
    schemes = {source: {site.scheme for site in members} for source, members in stage.groups().items()}
    assert {source for source, used in schemes.items() if used == {Scheme.FLOAT}} == {
        max(kurtosis, key=kurtosis.__getitem__)
    }
    assert all(len(used) == 1 for used in schemes.values())
    with pytest.raises(vlqc.UserError, match="bound must be above 0"):
        vlqc.parse_pipeline("heavy_tails:KeepHeavyTails{bound=0}")


def test_all_three_in_a_compilation(cookbook: dict[str, ModuleType], tmp_path: Path) -> None:
    """Catches a pass that works alone, but not in the text of a pipeline."""
    text = (
        "split-window-attention,rotate_values:RotateValues,insert-observers,heavy_tails:Kurtosis{at_least=4.0},"
        f"assign-precision,heavy_tails:KeepHeavyTails{{bound=9.0}},{OTHERS}"
    )
    assert vlqc.print_pipeline(vlqc.parse_pipeline(text)) == text
    samples = tiny_task.samples(4, seed=1)
    result = vlqc.compile(model_path=tiny.TINY, save_directory=tmp_path / "out", samples=samples, pipeline=text)
    assert any("the kurtosis of its input is" in note for note in result.notes)
    assert not any("left out" in note for note in result.notes)
    facts = (tmp_path / "out" / "vlqc_report.json").read_text(encoding="utf-8")
    assert "rotate_values:RotateValues" in facts and "the kurtosis of its input is" in facts
    assert vlqc.verify_folder(tmp_path / "out").ok
    reference = tiny_task.answer_logits(tiny.plain(), 8)
    logits = tiny_task.answer_logits(vlqc.load(tmp_path / "out"), 8)
    assert float((logits - reference).abs().max()) < 0.2 * float(reference.abs().max())
