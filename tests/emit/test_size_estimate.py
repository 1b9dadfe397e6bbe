"""The room that a compilation asks for: the plan's figure and that of the real run, what is spilled included."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

import vlqc
from tests.support import tiny
from tests.support.interrupted_runs import small
from vlqc.errors import UserError
from vlqc.frontend.activation_offload import ActivationOffload
from vlqc.frontend.memory import offloaded_bytes
from vlqc.reporting.plan import plan_compilation

QUICK: dict[str, Any] = {"weight_method": "round", "anti_method": "none", "act_method": 1}
FOUR_BITS = {"w_bit": 4, "is_dynamic": True, "is_lowbit": True, "open_outlier": False}
SAMPLES = [tiny.made_up((8, 8), seed=1), tiny.made_up((8, 10), seed=2)]
Disk = namedtuple("Disk", "total used free")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("checkpoint"))


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
def test_the_plan_and_the_run_ask_for_the_same_room(
    options: dict[str, Any], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that is refused although its plan says that it fits, and one that begins although it does not."""
    given = {"model_path": checkpoint, "save_directory": tmp_path / "out", "samples": SAMPLES, **QUICK, **options}
    needed = plan_compilation(**given).disk_needed
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(2 * needed, needed, needed - 1))
    assert plan_compilation(**given).to_dict()["fits"] is False
    with pytest.raises(UserError, match="not enough disk space"):
        vlqc.compile(**given)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(2 * needed, needed, needed))
    assert plan_compilation(**given).to_dict()["fits"] is True
    vlqc.compile(**given)


def test_what_is_spilled_counts(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches room for tensors between stages that nobody asks for, or that is asked for where all stay in memory."""
    model = tiny.float_model(checkpoint)
    assert offloaded_bytes(model, SAMPLES, None) == 0 == offloaded_bytes(model, SAMPLES, 1.0)
    given = {"model_path": checkpoint, "save_directory": tmp_path / "out", "samples": SAMPLES}
    without, beyond = (plan_compilation(**given, memory_budget=budget).disk_needed for budget in (None, 0))
    assert beyond - without == offloaded_bytes(model, SAMPLES, 0) > 0

    held: dict[int, int] = {}
    most = [0]
    track = ActivationOffload._track

    def tracked(self: ActivationOffload, tensor: torch.Tensor, bound: int) -> None:
        track(self, tensor, bound)
        held[id(tensor)] = tensor.nbytes
        alive = {key: size for key, size in held.items() if key in self._tracked}
        most[0] = max(most[0], sum(alive.values()))

    monkeypatch.setattr(ActivationOffload, "_track", tracked)
    monkeypatch.setattr("vlqc.frontend.activation_offload.MIN_BYTES", 1)
    vlqc.compile(**given, **QUICK, memory_budget=0)
    pixels = sum(sample["pixel_values"].nbytes for sample in SAMPLES)
    assert 0 < most[0] <= 2 * (offloaded_bytes(model, SAMPLES, 0) + pixels)
