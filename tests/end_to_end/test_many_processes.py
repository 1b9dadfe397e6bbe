"""Several processes under torchrun: the same bytes as from one process, and an error on one ends all."""

import filecmp
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
def alone(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a single process."""
    folder = tmp_path_factory.mktemp("alone")
    done = run_python(SCRIPT, checkpoint, folder)
    assert done.returncode == 0, done.stderr
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_same_bytes(checkpoint: Path, alone: Path, tmp_path: Path) -> None:
    """Catches sums in another order, row budgets, probes or searches per rank, tokens counted on one rank, results
    assigned to the wrong site, a rank without samples that hangs, and output printed twice.

    The printed stages after every pass are compared as well. In one case the last rank fails: the case ends on all
    ranks with the same error, and the next one runs. Two processes are in the tests below and in test_families.
    """
    done = run_python(SCRIPT, checkpoint, tmp_path, processes=3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Schemes") == 1 and done.stderr.count("4 stages") == 1
    errors = [name for name in files(tmp_path) if name.startswith("refused error")]
    messages = {(tmp_path / name).read_text(encoding="utf-8") for name in errors}
    assert len(errors) == 3 and messages == {"sample 2 cannot be used"}
    assert not (tmp_path / "refused").exists()
    created = [name for name in files(alone) if not name.startswith(("refused", ".refused"))]
    assert created == [name for name in files(tmp_path) if not name.startswith(("refused", ".refused"))]
    assert len(created) > 50
    assert filecmp.cmpfiles(alone, tmp_path, created, shallow=False) == (created, [], [])


def test_a_killed_process_ends_all(checkpoint: Path, alone: Path, tmp_path: Path) -> None:
    """Catches ranks that wait for a killed one until the timeout, one error message per rank, a partial result, and
    stage outputs that are lost with the killed rank or assigned to another sample."""
    killed = tmp_path / "killed"
    killed.mkdir()
    done = run_python(SCRIPT, checkpoint, killed, 1, "model.layers.0", processes=2)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 and "connection lost" in done.stderr
    assert "3 of 4" in done.stderr
    assert [path.name[:16] for path in killed.iterdir()] == [".photos.partial-"]
    for processes in (1, 2):  # resumed with another and with the same number of processes
        copy = shutil.copytree(killed, tmp_path / f"{processes}")
        done = run_python(SCRIPT, checkpoint, copy, "resume", processes=processes)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("3 of 4") == 1
        assert [path.name for path in copy.iterdir()] == ["photos"]
        created = files(alone / "photos")
        assert files(copy / "photos") == created
        assert filecmp.cmpfiles(alone / "photos", copy / "photos", created, shallow=False) == (created, [], [])


def test_an_invalid_option_is_reported_once(checkpoint: Path, tmp_path: Path) -> None:
    """Catches one error message per rank, and ranks that wait for one that has ended already."""
    options = ["--model_path", checkpoint, "--save_directory", tmp_path / "out", "--w_bit", "5"]
    done = run_python("-m", "vlqc", "compile", *options, processes=2)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == done.stderr.count("error: --w_bit") == 1 and "(exitcode: 2)" in done.stderr
