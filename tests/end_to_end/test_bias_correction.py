"""lower-linears{correct_bias=true}: `vlqc verify` accepts it where the description declares it, and only there."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vlqc
from tools.demo import plant_outliers, tiny_task
from vlqc.kernels_ref.matmul import CORRECTION_STEP
from vlqc.verify import verify_folder

PIPELINE = "insert-observers,assign-precision{fallback=reference},quantize-activations,quantize-weights{method=round}"
KEY = "quant_bias_correction"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with large outliers: rounding and clipping leave mean errors."""
    folder = tmp_path_factory.mktemp("planted")
    plant_outliers.plant(Path(tiny_task.__file__).parent / "tiny_vl", folder, alpha=128, share=0.02, seed=0)
    return folder


@pytest.fixture(scope="module")
def folders(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Compiled without and with the correction."""
    folders = {}
    for on in (False, True):
        folders[on] = tmp_path_factory.mktemp("compiled") / str(on)
        pipeline = f"{PIPELINE},lower-linears{'{correct_bias=true}' if on else ''}"
        vlqc.compile(
            model_path=planted, save_directory=folders[on], samples=tiny_task.samples(2, seed=1), pipeline=pipeline
        )
    return folders


def description(folder: Path) -> dict[str, object]:
    (path,) = folder.glob("quant_model_description*.json")
    read: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    return read


def biases(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return {name: it for name, it in tensors.items() if name.endswith("quant_bias")}


def test_declared_and_sound(folders: dict[bool, Path], planted: Path) -> None:
    """Catches a correction that is not declared, changes nothing, or is reported as damage."""
    assert KEY not in description(folders[False]) and description(folders[True])[KEY] == CORRECTION_STEP
    plain, corrected = biases(folders[False]), biases(folders[True])
    moved = torch.cat([(corrected[name] - plain[name]).flatten() for name in plain])
    assert bool(moved.any()) and not bool((moved % CORRECTION_STEP).any())
    for folder in folders.values():
        report = verify_folder(folder, model_path=planted)
        assert report.ok and not report.warnings, report.faults


def moved(folder: Path, target: Path, steps: int) -> tuple[Path, str]:
    """Copies the folder without its manifest, adds `steps` to one value of one quant_bias, returns copy and name."""
    shutil.copytree(folder, target)
    (target / "MANIFEST.json").unlink()
    name = sorted(biases(target))[0]
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name][1] += steps
            save_file(tensors, path, {"format": "pt"})
    return target, name


@pytest.mark.parametrize("steps", [1, CORRECTION_STEP, -3 * CORRECTION_STEP])
def test_an_undeclared_correction_is_damage(folders: dict[bool, Path], steps: int, tmp_path: Path) -> None:
    """Catches a verification that accepts a changed quant_bias in a folder that declares no correction."""
    damaged, name = moved(folders[False], tmp_path / "damaged", steps)
    report = verify_folder(damaged)
    assert not report.ok and any(name in str(finding) for finding in report.faults)


def test_a_partial_step_is_damage(folders: dict[bool, Path], tmp_path: Path) -> None:
    """Catches a declaration with which every quant_bias is accepted: 3 is not a multiple of CORRECTION_STEP."""
    damaged, _ = moved(folders[True], tmp_path / "damaged", 3)
    assert not verify_folder(damaged).ok
