"""vlqc.emit.size_estimate: disk space of a compilation, in the plan and in the run, against what is written."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlqc
from tests.support import tiny
from tests.support.interrupted_runs import small_checkpoint
from vlqc.emit.folder_writer import FolderWriter
from vlqc.emit.size_estimate import output_bytes, predict_schemes, predict_search
from vlqc.errors import UserError
from vlqc.frontend.activation_offload import ActivationOffload
from vlqc.frontend.memory import offloaded_bytes
from vlqc.options.options import Options
from vlqc.pipeline.presets import build_pipeline
from vlqc.reporting.plan import plan_compilation
from vlqc.targets.vllm_ascend import VLLM_ASCEND

QUICK: dict[str, Any] = {"weight_method": "round", "anti_method": "none", "act_method": 1}
FOUR_BITS = {"w_bit": 4, "is_dynamic": True, "is_lowbit": True, "open_outlier": False}
SAMPLES = [tiny.synthetic_sample((8, 8), seed=1), tiny.synthetic_sample((8, 10), seed=2)]
pytestmark = pytest.mark.slow
Disk = namedtuple("Disk", "total used free")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"exclude": ["model.*"]},
        {"fallback": "none"},
        {**FOUR_BITS, "w4a8_scope": "all"},
        {"fallback": "auto", "max_float_groups": 2, "target": "vllm-ascend"},
        {"memory_budget": 0},
    ],
    ids=lambda options: ", ".join(options) or "default",
)
def test_plan_and_run_require_the_same_space(
    options: dict[str, Any], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that is refused although its plan fits, and one that starts although its plan does not."""
    arguments = {"model_path": checkpoint, "save_directory": tmp_path / "out", "samples": SAMPLES, **QUICK, **options}
    needed = plan_compilation(**arguments).disk_needed
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(2 * needed, needed, needed - 1))
    assert plan_compilation(**arguments).to_dict()["fits"] is False
    with pytest.raises(UserError, match="not enough disk space"):
        vlqc.compile(**arguments)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(2 * needed, needed, needed))
    assert plan_compilation(**arguments).to_dict()["fits"] is True
    vlqc.compile(**arguments)


def test_offloaded_activations_are_counted(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches offloaded tensors that are not counted, and space required where all tensors stay in memory."""
    model = tiny.float_model(checkpoint)
    assert offloaded_bytes(model, SAMPLES, None) == 0 == offloaded_bytes(model, SAMPLES, 1.0)
    arguments = {"model_path": checkpoint, "save_directory": tmp_path / "out", "samples": SAMPLES}
    without, beyond = (plan_compilation(**arguments, memory_budget=budget).disk_needed for budget in (None, 0))
    assert beyond - without == offloaded_bytes(model, SAMPLES, 0) > 0

    live_bytes: dict[int, int] = {}
    most = [0]
    track = ActivationOffload._track

    def tracked(self: ActivationOffload, tensor: torch.Tensor, bound: int) -> None:
        track(self, tensor, bound)
        live_bytes[id(tensor)] = tensor.nbytes
        alive = {key: size for key, size in live_bytes.items() if key in self._tracked}
        most[0] = max(most[0], sum(alive.values()))

    monkeypatch.setattr(ActivationOffload, "_track", tracked)
    monkeypatch.setattr("vlqc.frontend.activation_offload.MIN_BYTES", 1)
    vlqc.compile(**arguments, **QUICK, memory_budget=0)
    pixels = sum(sample["pixel_values"].nbytes for sample in SAMPLES)
    assert 0 < most[0] <= 2 * (offloaded_bytes(model, SAMPLES, 0) + pixels)


W4A8 = {**FOUR_BITS, "group_size": 64}
SCHEMES: list[dict[str, Any]] = [{}, {"is_dynamic": True}, W4A8, {**W4A8, "w4a8_scope": "all"}, {"fallback": "none"}]


@pytest.mark.parametrize("layout", [{}, {"mindie_format": True}], ids=["vllm-ascend", "mindie"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_output_bytes_are_those_of_the_weight_files(
    checkpoint: Path, tmp_path: Path, scheme: dict[str, Any], layout: dict[str, Any], dtype: torch.dtype
) -> None:
    """Catches a tensor of a scheme that the estimate leaves out, or takes for another dtype or shape."""
    source = shutil.copytree(checkpoint, tmp_path / "float")
    (file,) = source.glob("*.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    arguments = {"model_path": source, "samples": SAMPLES[:1], **QUICK, **scheme, **layout}
    estimate = plan_compilation(save_directory=tmp_path / "out", **arguments).bytes_after
    vlqc.compile(save_directory=tmp_path / "out", **arguments)
    assert estimate == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))


def test_alternatives_of_a_search_are_counted(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that fills the disk after hours: deferred stages take more than the result."""
    options = Options.without_paths(fallback="auto", max_float_groups=2, target="vllm-ascend", **QUICK)
    model = tiny.float_model(checkpoint)
    sites = predict_schemes(model, build_pipeline(options))
    search = predict_search(model, sites, build_pipeline(options))
    estimate = output_bytes(model, sites, VLLM_ASCEND, search)
    on_disk = []

    def measured(self: FolderWriter, _: int) -> None:
        on_disk.append(sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file()))
        raise KeyboardInterrupt

    monkeypatch.setattr(FolderWriter, "resolve_schemes", measured)
    arguments = {"model_path": checkpoint, "save_directory": tmp_path / "out", "samples": SAMPLES[:1], **QUICK}
    with pytest.raises(KeyboardInterrupt):
        vlqc.compile(fallback="auto", max_float_groups=2, target="vllm-ascend", **arguments)
    assert 0.7 * estimate < on_disk[0] < 1.1 * estimate
