"""Invalid input: runs of the command on real folders, each with one fault; one of them in a process of its own.

Every run must end with exit code 2, name the fault, its place and a fix, print no traceback, and leave no files.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from tools.demo import tiny_task
from vlqc.cli.commands import app

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TINY = Path(tiny_task.__file__).parent / "tiny_vl"
PHOTOS = Path(__file__).parents[1] / "photos"
QUICK = ("--weight_method", "round", "--anti_method", "none", "--act_method", "1")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["compile", *map(str, arguments)])


def run_process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "vlqc", "compile", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def refused(code: int, stderr: str, *words: str) -> None:
    """The run was refused in the user's terms, and its text holds all of `words`."""
    assert code == 2, stderr
    assert "Traceback" not in stderr
    assert "error" in stderr
    for word in words:
        assert word in stderr


def refuses(*arguments: str | Path, words: tuple[str, ...]) -> str:
    """Runs the command, which must be refused with these words; returns what it prints to stderr."""
    done = run(*arguments)
    assert isinstance(done.exception, SystemExit)
    refused(done.exit_code, done.stderr, *words)
    return done.stderr


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no safetensors": (lambda m: (m / "model.safetensors").unlink(), ("no *.safetensors", "convert")),
    "no config": (lambda m: (m / "config.json").unlink(), ("config.json",)),
    "truncated shard": (truncate, ("model.safetensors", "copy the file again")),
    "tensor missing": (
        lambda m: change_weights(m, lambda t: [t.pop("visual.merger.ln_q.weight"), t.pop("lm_head.weight")]),
        ("tensor visual.merger.ln_q.weight is missing", "tensor lm_head.weight is missing"),
    ),
    "NaN": (
        lambda m: change_weights(m, lambda t: t["model.layers.2.mlp.up_proj.weight"][3].fill_(torch.nan)),
        ("model.layers.2.mlp.up_proj.weight holds NaN or Inf", "192 of 98304"),
    ),
    "Inf": (
        lambda m: change_weights(m, lambda t: t["visual.blocks.0.norm1.weight"][5].fill_(torch.inf)),
        ("visual.blocks.0.norm1.weight holds NaN or Inf",),
    ),
    "unknown architecture": (lambda m: change_config(m, architectures=["NoSuchModel"]), ("NoSuchModel",)),
    "other model": (
        lambda m: change_config(m, architectures=["LlamaForCausalLM"], model_type="llama"),
        ("unsupported model type 'llama'", "qwen2_5_vl"),
    ),
    "config that no model fits": (lambda m: change_config(m, hidden_act="no_such_function"), ("no_such_function",)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint(model: Path, tmp_path: Path, damage: str) -> None:
    """Catches a damaged checkpoint that ends in a traceback, a misleading message, or a partial folder."""
    apply, words = DAMAGES[damage]
    apply(model)
    arguments = ("--model_path", model, "--calib_images", PHOTOS, "--save_directory", tmp_path / "out", *QUICK)
    if damage == "tensor missing":
        done = run_process(*arguments)
        stderr = done.stderr
        refused(done.returncode, stderr, *words)
    else:
        stderr = refuses(*arguments, words=words)
    left = [path for path in tmp_path.iterdir() if path.name != "model"]
    if damage == "NaN":  # found in a late stage: once it is repaired, the run can go on
        assert "--resume" in stderr and [path.name[:13] for path in left] == [".out.partial-"]
    else:
        assert left == []


def test_architecture_that_cannot_be_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a block that cannot be traced ending in a traceback of torch."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

    def branch_on_values(self: torch.nn.Module, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> None:
        raise RuntimeError("control flow that looks at values")

    monkeypatch.setattr(modeling.Qwen2_5_VLVisionBlock, "forward", branch_on_values)
    arguments = ["--model_path", str(TINY), "--calib_images", str(PHOTOS), "--save_directory", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["compile", *arguments])
    assert done.exit_code == 2
    assert "visual.blocks.0" in done.stderr and "control flow that looks at values" in done.stderr
    assert not list(tmp_path.iterdir())


def test_images(tmp_path: Path) -> None:
    """Catches an empty folder or an unreadable image that is ignored, and --skip_bad_images without effect."""
    images = tmp_path / "images"
    images.mkdir()
    arguments = ["--model_path", TINY, "--calib_images", images, "--save_directory", tmp_path / "out", *QUICK]
    refuses(*arguments, words=(str(images), "--calib_images"))
    shutil.copy(next(PHOTOS.glob("*.jpg")), images / "good.jpg")
    (images / "bad.jpg").write_bytes(b"not an image")
    refuses(*arguments, words=("bad.jpg", "--skip_bad_images"))
    assert not (tmp_path / "out").exists()
    done = run(*arguments, "--skip_bad_images")
    assert done.exit_code == 0, done.stderr
    assert "bad.jpg" in done.stdout and (tmp_path / "out" / "config.json").exists()


def test_folders_and_values(model: Path, tmp_path: Path) -> None:
    """Catches output over the model or over other files, and invalid values or combinations."""
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("years of work")
    good = ["--model_path", model, "--calib_images", PHOTOS]
    out = ("--save_directory", tmp_path / "out")
    refuses("--model_path", tmp_path / "mode", *out, words=("no such folder", "model"))
    refuses(*good, "--save_directory", model, words=("is the model folder itself",))
    refuses(*good, "--save_directory", model / "out", words=("inside the model folder",))
    refuses(*good, "--save_directory", full, words=("not empty", "--overwrite"))
    refuses(*good, *out, "--anti_method", "m3", words=("--anti_method", "m3", "m2"))
    refuses(*good, *out, "--w_bit", "4", words=("--w_bit", "--is_lowbit"))
    refuses(*good, *out, "--pipeline", "smooth-m3", words=("smooth-m3", "smooth-m2"))
    refuses(*good, *out, "--pipeline", "smooth-m2,lower-linears", words=("insert-observers",))
    assert [path.name for path in full.iterdir()] == ["thesis.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "model"]
    assert not (model / "out").exists()


def test_not_enough_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a full disk that is noticed only after hours of work."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    arguments = ["--model_path", str(TINY), "--calib_images", str(PHOTOS), "--save_directory", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["compile", *arguments])
    assert done.exit_code == 2
    assert "not enough disk space" in done.stderr and not (tmp_path / "out").exists()
