"""lower-linears{correct_bias=true} from the command to `vlqc verify`: allowed where it is declared, found elsewhere."""

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

PIPELINE = "insert-observers,assign-precision{fallback=seed},quantize-activations,quantize-weights{method=round}"
KEY = "quant_bias_correction"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with large outliers: clipping and rounding them leaves mean errors."""
    folder = tmp_path_factory.mktemp("planted")
    plant_outliers.plant(Path(tiny_task.__file__).parent / "tiny_vl", folder, alpha=128, share=0.02, seed=0)
    return folder


@pytest.fixture(scope="module")
def folders(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Compiled without and with the correction."""
    made = {}
    for on in (False, True):
        made[on] = tmp_path_factory.mktemp("compiled") / str(on)
        pipeline = f"{PIPELINE},lower-linears{'{correct_bias=true}' if on else ''}"
        vlqc.compile(
            model_path=planted, save_directory=made[on], samples=tiny_task.samples(2, seed=1), pipeline=pipeline
        )
    return made


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
    """Catches a correction that nobody declares, that changes nothing, or that `verify` takes for damage."""
    assert KEY not in description(folders[False]) and description(folders[True])[KEY] == CORRECTION_STEP
    plain, corrected = biases(folders[False]), biases(folders[True])
    moved = torch.cat([(corrected[name] - plain[name]).flatten() for name in plain])
    assert bool(moved.any()) and not bool((moved % CORRECTION_STEP).any())
    for folder in folders.values():
        report = verify_folder(folder, model_path=planted)
        assert report.ok and not report.warnings, report.faults


def moved(folder: Path, target: Path, steps: int) -> tuple[Path, str]:
    """A copy without its manifest in which one value of one quant_bias is off by `steps`, and the name of that."""
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
def test_the_same_without_a_word_is_damage(folders: dict[bool, Path], steps: int, tmp_path: Path) -> None:
    """Catches a `verify` that accepts what looks like a correction in a folder that does not speak of any."""
    damaged, name = moved(folders[False], tmp_path / "damaged", steps)
    report = verify_folder(damaged)
    assert not report.ok and any(name in str(finding) for finding in report.faults)


def test_a_correction_that_is_not_whole_is_damage(folders: dict[bool, Path], tmp_path: Path) -> None:
    """Catches a declaration that makes every quant_bias right: three steps are no multiple of CORRECTION_STEP."""
    damaged, _ = moved(folders[True], tmp_path / "damaged", 3)
    assert not verify_folder(damaged).ok
