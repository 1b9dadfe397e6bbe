"""Runs that are killed (SIGKILL) at listed moments: nothing half-made or done twice, the same bytes in the end."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import resume_runs
from tests.support.interrupted_runs import small

ROOT = Path(__file__).parents[2]
NAMES = [f"{case}: {what}" for case, what, *_ in resume_runs.MOMENTS]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `resume_runs` says of every case and every moment."""
    checkpoint, folder = small(tmp_path_factory.mktemp("checkpoint")), tmp_path_factory.mktemp("runs")
    paths = str(ROOT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, str(ROOT / "tests" / "support" / "resume_runs.py"), str(checkpoint), str(folder)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stderr
    told: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return told


def test_the_moments_are_many_and_distinct() -> None:
    """Catches a list that shrank: at least 25 moments, of every phase."""
    assert len(set(NAMES)) == len(NAMES) >= 25


def test_uninterrupted_runs(outcome: dict[str, Any]) -> None:
    """Catches cases that show nothing: one that fails, a single weight file where several are meant."""
    for case, whole in outcome["whole"].items():
        assert whole["code"] == 0 and len(whole["stages"]) == 5 and "MANIFEST.json" in whole["bytes"], case
    for case in ("shards", "search"):
        assert sum(name.endswith(".safetensors") for name in outcome["whole"][case]["bytes"]) > 2


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_goes_on(outcome: dict[str, Any], name: str) -> None:
    """Catches a moment that is never reached, a save folder touched before its time, stages run again, other bytes in
    the end, leftovers."""
    moment, whole = outcome["moments"][name], outcome["whole"][name.partition(":")[0]]
    assert moment["ended"] == -9 and moment["went on"] == 0
    assert moment["untouched"] or moment["there"] == whole["bytes"]
    assert moment["kept"] + moment["ran"] == whole["stages"] or moment["there"] == whole["bytes"]
    assert moment["bytes"] == whole["bytes"]
    assert moment["left"] == []


def test_stages_were_there_to_go_on_from(outcome: dict[str, Any]) -> None:
    """Catches a journal that is always empty, with which every run starts anew: most moments leave finished stages."""
    kept = {name: len(moment["kept"]) for name, moment in outcome["moments"].items()}
    assert sum(count > 0 for count in kept.values()) >= 25
    assert {1, 2, 3, 4, 5} <= set(kept.values())
