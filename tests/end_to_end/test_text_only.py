"""Calibration of a vision-language model with text alone, and a float16 result."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vlqc.reporting.summary
import vlqc.verify.accuracy
from tests.support import tiny
from tests.support.interrupted_runs import compile_into, file_contents, interrupt_compile, small_checkpoint, stage_runs
from vlqc.errors import UserError
from vlqc.families.registry import FAMILIES
from vlqc.frontend.calibration.dataset import selected_conversations
from vlqc.frontend.calibration.probe import probe_sample, vision_probe_sample
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.options.options import Options
from vlqc.reporting.plan import plan_compilation
from vlqc.reporting.summary import Result
from vlqc.verify import verify_folder

# Names as transformers 5 writes them.
FLOAT_VISION: dict[str, Any] = {"exclude": ["model.visual.*"], "dtype": "float16"}


@dataclasses.dataclass
class Compiled:
    result: Result
    checkpoint: Path
    samples: list[dict[str, Tensor]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Compiled with text samples; values above 0.001 between layers count as beyond float16."""
    folder = tmp_path_factory.mktemp("text_only")
    checkpoint = small_checkpoint(folder / "float")
    ids = [torch.tensor([[9, 10, 11, 12 + number]]) for number in range(2)]
    samples = [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlqc.reporting.summary, "FLOAT16_MAX", 1e-3)
        result = compile_into(folder / "out", checkpoint, samples, **FLOAT_VISION)
    return Compiled(result, checkpoint, samples)


def test_the_vision_tower_is_the_float_one_rotated(compiled: Compiled) -> None:
    """Catches a merger whose output is not rotated with the language model, and a tensor in another dtype.

    verify compares every tensor with the float checkpoint, and the logits with those of the float model, also of a
    sample with an image.
    """
    image = [tiny.synthetic_sample((4, 4), seed=1)]
    for samples in (compiled.samples, image):
        found = verify_folder(compiled.result.folder, model_path=compiled.checkpoint, samples=samples)
        assert found.ok, found.faults
        stages = [row["stage"] for row in found.facts["stages against float"]]
        assert any("visual" in stage for stage in stages) == (samples is image)
    assert [part.part for part in compiled.result.rotations if part.kind == "residual stream"] == ["vision", "language"]
    assert {scheme for (part, scheme), _ in compiled.result.counts.items() if part in ("vision", "merger")} == {"FLOAT"}
    assert json.loads((compiled.result.folder / "config.json").read_text())["torch_dtype"] == "float16"
    stored = Checkpoint(compiled.result.folder)
    assert stored.dtype == torch.float16
    assert any("no sample has an image" in note for note in compiled.result.notes)


def test_values_beyond_float16(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a result that computes Inf in an engine and is said to be all right."""
    (warning,) = [note for note in compiled.result.notes if "leave float16" in note]
    assert "layers" in warning and "--dtype bfloat16" in warning
    monkeypatch.setattr(vlqc.verify.accuracy, "FLOAT16_MAX", 1e-3)
    found = verify_folder(compiled.result.folder, model_path=compiled.checkpoint, samples=compiled.samples)
    (fault,) = found.faults
    assert "between layers" in fault.what and "--dtype bfloat16" in fault.fix


@pytest.mark.slow
@pytest.mark.parametrize("at", ["visual.merger", "model.layers.1"])
def test_resumed(compiled: Compiled, at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a resumed run that lacks the made-up image of the vision tower, or runs it in the language model."""
    monkeypatch.setattr(vlqc.reporting.summary, "FLOAT16_MAX", 1e-3)
    arguments = {"samples": compiled.samples, **FLOAT_VISION}
    interrupt_compile(tmp_path / "out", compiled.checkpoint, at, **arguments)
    runs = stage_runs(monkeypatch)
    compile_into(tmp_path / "out", compiled.checkpoint, resume=True, **arguments)
    assert runs[0] == at
    assert file_contents(tmp_path / "out") == file_contents(compiled.result.folder)


def test_plan(compiled: Compiled) -> None:
    """Catches a plan that fails, or differs from the compilation."""
    arguments = {"model_path": compiled.checkpoint, "samples": compiled.samples}
    plan = plan_compilation(weight_method="round", anti_method="none", **FLOAT_VISION, **arguments)
    assert plan.counts == compiled.result.counts and plan.patches == 0
    assert plan.bytes_after == pytest.approx(compiled.result.bytes_after, rel=0.05)


@pytest.mark.parametrize("given", ["samples", "lines", "selected lines"])
def test_a_quantized_vision_tower_needs_images(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error that comes only after the model is built, and one that does not say what to do."""
    lines = [{"prompt": "one"}, {"prompt": "two"}, *([{"image": "missing.png"}] if given == "selected lines" else [])]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ids = torch.tensor([[9, 10]])
    arguments: dict[str, Any] = {"calib_images": tmp_path / "lines.jsonl"}
    if given == "samples":
        arguments = {"samples": [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]}
    if given == "selected lines":
        arguments |= {"max_samples": 1, "seed": next(seed for seed in range(9) if _selects_text(tmp_path, seed))}
    monkeypatch.setattr("vlqc.compiler.open_model", lambda options: pytest.fail("the model was built"))
    with pytest.raises(UserError) as caught:
        vlqc.compile(model_path=tiny.TINY, save_directory=tmp_path / "out", exclude=["vision.*"], **arguments)
    unmatched, fault = caught.value.faults
    assert unmatched.what == "--exclude vision.* matches no layer"
    assert fault.what == "no calibration sample has an image" and "--exclude 'visual.*'" in fault.fix


def _selects_text(folder: Path, seed: int) -> bool:
    options = Options.without_paths(calib_images=folder / "lines.jsonl", max_samples=1, seed=seed)
    inputs = Checkpoint(tiny.TINY).family.inputs
    return not any(each.images for each in selected_conversations(options, inputs))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.image_format], ids=str)
def test_prefixes_of_the_vision_tower(family: Any) -> None:
    """Catches advice that leaves a layer of the vision tower or a merger quantized, or names one of another part."""
    patterns = family.vision_prefixes
    names = [pattern.replace("*", "0") for pattern in family.layers()]
    assert [name.startswith(patterns) for name in names] == [family.in_vision_tower(name) for name in names]
    assert len(patterns) == 1


def test_probes() -> None:
    """Catches a probe of the vision tower where a sample has an image, and a long text that proofs run whole."""
    model = tiny.float_model()
    inputs, config = model.family.inputs, model.module.config
    ids = torch.arange(2000)[None] % 90 + 9
    text, image = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tiny.synthetic_sample((4, 4))
    made_up = vision_probe_sample([text], inputs, config)
    assert made_up is not None and inputs.has_images(made_up) and not inputs.faults("", made_up, model.module)
    probe = probe_sample([text], inputs, config)
    assert probe is not None and not inputs.has_images(probe) and probe["input_ids"].shape[1] < 200
    assert vision_probe_sample([text, image], inputs, config) is None


def test_names_of_other_versions_in_patterns() -> None:
    """Catches patterns of the names that newer transformers versions save, which would match nothing."""
    options = Options.without_paths(
        model_path=tiny.TINY,
        exclude=["model.visual.blocks.*", "*.up_proj"],
        include=["model.language_model.layers.0.*"],
    )
    assert options.exclude == ("visual.blocks.*", "*.up_proj") and options.include == ("model.layers.0.*",)
