"""Runs that are killed (SIGKILL) at listed moments and resumed give the same bytes as uninterrupted ones."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import resume_runs
from tests.support.interrupted_runs import small_checkpoint

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
NAMES = [f"{case}: {what}" for case, what, *_ in resume_runs.MOMENTS]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The output of `resume_runs`: what happened in every case and at every moment."""
    checkpoint, folder = small_checkpoint(tmp_path_factory.mktemp("checkpoint")), tmp_path_factory.mktemp("runs")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "support" / "resume_runs.py"), str(checkpoint), str(folder)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stderr
    result: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return result


def test_the_moments_are_many_and_distinct() -> None:
    """Catches a list of fewer than 25 moments, and duplicate names."""
    assert len(set(NAMES)) == len(NAMES) >= 25


def test_uninterrupted_runs(outcome: dict[str, Any]) -> None:
    """Catches cases that test nothing: a failing run, or a single weight file instead of several."""
    for case, whole in outcome["whole"].items():
        assert whole["code"] == 0 and len(whole["stages"]) == 5 and "MANIFEST.json" in whole["bytes"], case
    assert sum(name.endswith(".safetensors") for name in outcome["whole"]["shards"]["bytes"]) > 2


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_can_be_resumed(outcome: dict[str, Any], name: str) -> None:
    """Catches a moment that is not reached, an output folder that is changed too early, stages that run twice, other
    bytes in the result, and remaining run folders."""
    moment, whole = outcome["moments"][name], outcome["whole"][name.partition(":")[0]]
    assert moment["ended"] == -9 and moment["resumed"] == 0
    assert moment["unchanged"] or moment["there"] == whole["bytes"]
    assert moment["kept"] + moment["ran"] == whole["stages"] or moment["there"] == whole["bytes"]
    assert moment["bytes"] == whole["bytes"]
    assert moment["left"] == []


def test_most_moments_leave_finished_stages(outcome: dict[str, Any]) -> None:
    """Catches a journal that is always empty, so that every run starts again from the first stage."""
    kept = {name: len(moment["kept"]) for name, moment in outcome["moments"].items()}
    assert sum(count > 0 for count in kept.values()) >= 25
    assert {1, 2, 3, 4, 5} <= set(kept.values())
