"""Comparison with the float checkpoint where norms have biases of their own, on a compiled Qwen2-VL."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vlqc
from tools.checkpoints.outlier_checkpoint import make, random_samples
from vlqc.verify import verify_folder

pytestmark = [pytest.mark.slow, pytest.mark.every_transformers]

BLOCK, MERGER = "visual.blocks.1", "visual.merger"
DAMAGED = [
    f"{BLOCK}.norm1.weight",
    f"{BLOCK}.norm1.bias",
    f"{BLOCK}.attn.qkv.bias",
    f"{BLOCK}.attn.proj.bias",
    f"{BLOCK}.mlp.fc1.bias",
    f"{BLOCK}.mlp.fc2.weight",
    f"{BLOCK}.mlp.fc2.bias",
    f"{MERGER}.ln_q.weight",
    f"{MERGER}.ln_q.bias",
    f"{MERGER}.mlp.0.bias",
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(float checkpoint, compiled folder) of a Qwen2-VL of which every layer is quantized or scaled."""
    folder = tmp_path_factory.mktemp("qwen2_vl")
    config = make(folder / "float", family="qwen2_vl")
    samples = random_samples(config, 2, seed=1)
    vlqc.compile(model_path=folder / "float", save_directory=folder / "out", samples=samples, target="vllm-ascend")
    return folder / "float", folder / "out"


def changed(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a folder of which `change` has modified the tensors, in place."""
    shutil.copytree(folder, target)
    (file,) = target.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return target


@pytest.mark.parametrize("name", DAMAGED)
def test_a_wrong_value_is_named(compiled: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    """Catches a bias of a norm that is not compared, and one that is taken for a shift."""
    source, folder = compiled

    def damage(tensors: dict[str, Tensor]) -> None:
        flat = tensors[name].flatten()
        flat[5] = flat[5] * 1.25 + 0.01

    result = verify_folder(changed(folder, tmp_path / "out", damage), model_path=source)
    layer = name.rpartition(".")[0]
    assert any(fault.check == "float weights" and fault.where.startswith(layer) for fault in result.faults)


def test_a_shift_that_the_consumers_undo_is_no_fault(compiled: tuple[Path, Path], tmp_path: Path) -> None:
    """Catches a shift that is folded into a norm's own bias and is taken for damage."""
    source, folder = compiled

    def shift(tensors: dict[str, Tensor], consumer_too: bool = True) -> None:
        norm, weight = tensors[f"{MERGER}.ln_q.bias"], tensors[f"{MERGER}.mlp.0.weight"].double()
        before = norm.clone()
        norm += torch.linspace(-0.5, 0.5, len(norm))
        offset = (norm - before).double().repeat(weight.shape[1] // len(norm))
        if consumer_too:
            tensors[f"{MERGER}.mlp.0.bias"] -= (weight @ offset).to(norm.dtype)

    result = verify_folder(changed(folder, tmp_path / "shifted", shift), model_path=source)
    assert not [fault for fault in result.faults if fault.check == "float weights"]
    result = verify_folder(changed(folder, tmp_path / "half", lambda tensors: shift(tensors, False)), model_path=source)
    assert [fault.where for fault in result.faults if fault.check == "float weights"] == [f"{MERGER}.ln_q.bias"]
