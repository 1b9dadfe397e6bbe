"""Estimated memory, errors and notes if it is not available, and errors of allocators."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vlqc
from tests.support import tiny
from tools.checkpoints import outlier_checkpoint as outliers
from vlqc.emit.size_estimate import stage_output_bytes
from vlqc.frontend.memory import GIB, OBSERVED_BYTES, check_memory, estimate_memory, is_out_of_memory
from vlqc.passes.quantize_weights import QuantizeWeights

PHOTOS = Path(__file__).parents[1] / "photos"
OPTIONS = {"model_path": tiny.TINY, "weight_method": "round"}


def test_estimate_matches_a_manual_sum() -> None:
    """Catches an estimate from another stage than the largest, without samples, or with a budget applied to weights."""
    model, sample = tiny.float_model(), tiny.synthetic_sample((8, 10))
    sizes = [sum(it.numel() for it in stage.parameters()) for stage in model.stages.values()]
    alone = estimate_memory(model, [])
    assert alone == 9 * max(sizes) + OBSERVED_BYTES
    hidden = model.module.get_submodule(model.path(model.stages["visual.blocks.0"])).norm1.weight.numel()  # type: ignore[operator, union-attr]
    pixels = sample["pixel_values"].numel() * 4
    assert estimate_memory(model, [sample] * 3) - alone == 3 * (pixels + 80 * hidden * 8)
    assert estimate_memory(model, [sample] * 3, budget=0) - alone == 3 * pixels


@pytest.mark.parametrize(
    ("family", "channels"),
    [("qwen2", 256), ("qwen2_vl", 128), pytest.param("qwen3_vl", 144, marks=pytest.mark.qwen3_vl)],
)
def test_activations_of_other_families(tmp_path: Path, family: str, channels: int) -> None:
    """Catches a text-only model for which images are expected, and channels of a vision tower from another key.

    Images have more patches than the text has tokens, so that the channels of the vision tower count.
    """
    config = outliers.make(tmp_path, family=family)
    model = tiny.float_model(tmp_path)
    (sample,) = outliers.random_samples(config, 1, grids=[(16, 20)])
    rows = len(sample["pixel_values"]) if "pixel_values" in sample else sample["input_ids"].numel()
    image = sample["pixel_values"].nbytes if "pixel_values" in sample else 0
    assert estimate_memory(model, [sample] * 3) - estimate_memory(model, []) == 3 * (8 * rows * channels + image)
    assert stage_output_bytes(model, [sample] * 3) == 3 * 8 * rows * channels


LIMITED = """
import resource
from pathlib import Path
import vlqc.cli.commands, vlqc.emit.resume.journal
estimate = vlqc.emit.resume.journal.estimate_memory
def limited(*args):
    needed, used = estimate(*args), Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0]
    resource.setrlimit(resource.RLIMIT_AS, (int(used) * 1024 + needed // 2, -1))
    return needed
vlqc.emit.resume.journal.estimate_memory = limited
vlqc.cli.commands.main()
"""


def test_a_low_ulimit_is_an_error_at_once(tmp_path: Path) -> None:
    """Catches hours of work before an allocation fails, for a `ulimit -v` of half the estimate."""
    arguments = ["--model_path", tiny.TINY, "--save_directory", tmp_path / "out", "--calib_images", PHOTOS]
    ran = subprocess.run([sys.executable, "-c", LIMITED, "compile", *arguments], capture_output=True, text=True)
    assert ran.returncode == 2, ran.stderr
    assert "ulimit -v" in ran.stderr and "Traceback" not in ran.stderr
    assert "GiB of address space" in ran.stderr and not list(tmp_path.iterdir())


def test_low_available_memory_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error although other programs may free memory, and a missing note."""
    notes: list[str] = []
    monkeypatch.setattr("vlqc.frontend.memory._available_memory", lambda: 2 * GIB)
    check_memory(GIB, [], notes.append)
    assert not notes
    check_memory(3 * GIB, [], notes.append)
    assert len(notes) == 1 and "3.0 GiB" in notes[0] and "2.0 GiB" in notes[0]


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")],
    ids=["python", "torch"],
)
def test_a_failed_allocation_is_a_user_error(error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches a traceback for a failed allocation, a missing stage name, and finished stages that are lost."""
    run, stages = QuantizeWeights.run, []

    def fail(self: QuantizeWeights, stage: vlqc.Stage) -> bool:
        stages.append(stage.name)
        if len(stages) == 3:
            raise error
        return run(self, stage)

    monkeypatch.setattr(QuantizeWeights, "run", fail)
    with pytest.raises(vlqc.UserError, match="out of memory") as caught:
        vlqc.compile(save_directory=tmp_path / "out", samples=tiny.mixed_samples(), **OPTIONS)
    assert "visual.blocks.2" in str(caught.value) and "--memory_budget" in str(caught.value)
    assert any("2 of 9 stages are finished" in note for note in caught.value.__notes__)
    assert not (tmp_path / "out").exists()


def test_other_errors_are_not_out_of_memory() -> None:
    """Catches other RuntimeErrors that are reported as out of memory."""
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) and not is_out_of_memory(
        OSError(12, "memory")
    )
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
