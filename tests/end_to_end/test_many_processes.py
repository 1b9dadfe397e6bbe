"""Several processes: the same bytes as from one process, and an error on one ends all."""

import filecmp
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.support import tiny
from tests.support.subprocesses import ROOT, run_python

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "tests" / "support" / "distributed_runs.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with two vision blocks and one decoder layer."""

    def drop(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            block, _, number = ".".join(name.split(".")[:3]).rpartition(".")
            if number.isdecimal() and int(number) >= {"visual.blocks": 2, "model.layers": 1}.get(block, 99):
                del tensors[name]

    def change(config: dict[str, Any]) -> None:
        config["num_hidden_layers"] = 1
        config["vision_config"] |= {"depth": 2, "fullatt_block_indexes": [1]}

    return tiny.damaged(tmp_path_factory.mktemp("checkpoint"), tensors=drop, config=change)


@pytest.fixture(scope="module")
def runs(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folders of one process and of three, by their number, and what they printed."""
    folder = tmp_path_factory.mktemp("runs")
    assert forked(checkpoint, folder) == {"1": [0], "3": [0, 0, 0]}
    return folder


def forked(checkpoint: Path, folder: Path, *more: str) -> dict[str, list[int]]:
    """Runs SCRIPT, which forks the processes; returns their exit codes."""
    done = run_python(SCRIPT, checkpoint, folder, *more)
    assert done.returncode == 0, done.stderr
    codes: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    return codes


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_same_bytes(runs: Path) -> None:
    """Catches sums in another order, row budgets, probes or searches per rank, tokens counted on one rank, results
    assigned to the wrong site, a rank without samples that hangs, and output printed twice.

    The printed stages after every pass are compared as well. In one case the last rank fails: the case ends on all
    ranks with the same error, and the next one runs. Processes of torchrun are in the tests below and in test_families.
    """
    alone, together, printed = runs / "1", runs / "3", runs / "output of 3"
    assert (printed / "stdout").read_text().count("Schemes") == (printed / "stderr").read_text().count("4 stages") == 1
    errors = [name for name in files(together) if name.startswith("refused error")]
    messages = {(together / name).read_text(encoding="utf-8") for name in errors}
    assert len(errors) == 3 and messages == {"sample 2 cannot be used"}
    assert not (together / "refused").exists()
    created = [name for name in files(alone) if not name.startswith(("refused", ".refused"))]
    assert created == [name for name in files(together) if not name.startswith(("refused", ".refused"))]
    assert len(created) > 50
    assert filecmp.cmpfiles(alone, together, created, shallow=False) == (created, [], [])


def test_a_killed_process_ends_all(checkpoint: Path, runs: Path, tmp_path: Path) -> None:
    """Catches ranks that wait for a killed one until the timeout, one error message per rank, a partial result, and
    stage outputs that are lost with the killed rank or assigned to another sample."""
    killed = tmp_path / "killed"
    killed.mkdir()
    done = run_python(SCRIPT, checkpoint, killed, 1, "model.layers.0", processes=2)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 and "connection lost" in done.stderr
    assert "3 of 4" in done.stderr
    assert [path.name[:16] for path in killed.iterdir()] == [".photos.partial-"]
    copies = {processes: shutil.copytree(killed, tmp_path / str(processes)) for processes in (1, 2)}
    assert forked(checkpoint, tmp_path, "resume") == {"1": [0], "2": [0, 0]}
    for processes, copy in copies.items():  # resumed with another and with the same number of processes
        assert (tmp_path / f"output of {processes}" / "stderr").read_text().count("3 of 4") == 1
        assert [path.name for path in copy.iterdir()] == ["photos"]
        alone, created = runs / "1" / "photos", files(runs / "1" / "photos")
        assert files(copy / "photos") == created
        assert filecmp.cmpfiles(alone, copy / "photos", created, shallow=False) == (created, [], [])


def test_an_invalid_option_is_reported_once(checkpoint: Path, tmp_path: Path) -> None:
    """Catches one error message per rank, and ranks that wait for one that has ended already."""
    options = ["--model_path", checkpoint, "--save_directory", tmp_path / "out", "--w_bit", "5"]
    done = run_python("-m", "vlqc", "compile", *options, processes=2)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == done.stderr.count("error: --w_bit") == 1 and "(exitcode: 2)" in done.stderr
