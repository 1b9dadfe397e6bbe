"""Several processes under torchrun: the same bytes as from one process, and an error on one ends all."""

import filecmp
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.support import tiny

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "support" / "distributed_runs.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with two blocks of its vision tower, and one layer of its language model."""

    def drop(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            block, _, number = ".".join(name.split(".")[:3]).rpartition(".")
            if number.isdecimal() and int(number) >= {"visual.blocks": 2, "model.layers": 1}.get(block, 99):
                del tensors[name]

    def change(config: dict[str, Any]) -> None:
        config["num_hidden_layers"] = 1
        config["vision_config"] |= {"depth": 2, "fullatt_block_indexes": [1]}

    return tiny.damaged(tmp_path_factory.mktemp("checkpoint"), tensors=drop, config=change)


def environment() -> dict[str, str]:
    """Of a child process: one thread each, and no world of whoever runs the tests."""
    alone = {name: it for name, it in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = str(ROOT)
    return alone | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


def ran(*arguments: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, in so many processes."""
    several = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes) if processes > 1 else ()
    command = [sys.executable, *map(str, several), *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def alone(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that one process makes."""
    folder = tmp_path_factory.mktemp("alone")
    done = ran(SCRIPT, checkpoint, folder)
    assert done.returncode == 0, done.stderr
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("processes", [2, 3])
def test_the_same_bytes(processes: int, checkpoint: Path, alone: Path, tmp_path: Path) -> None:
    """Catches sums in the order of arrival, rows kept per process, a probe or a search of one's own, tokens counted on
    one process, work that comes back to the wrong site, a process without samples that hangs, output written twice.

    The texts of all stages after all passes are compared, too. In one of the cases a sample of the last process cannot
    be used: that ends the case on all of them, alike, and the next one goes on.
    """
    done = ran(SCRIPT, checkpoint, tmp_path, processes=processes)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Schemes") == 1 and done.stderr.count("4 stages") == 1
    errors = [name for name in files(tmp_path) if name.startswith("refused error")]
    told = {(tmp_path / name).read_text(encoding="utf-8") for name in errors}
    assert len(errors) == processes and len(told) == 1 and told == {"sample 2 cannot be used"}
    assert not (tmp_path / "refused").exists()
    made = [name for name in files(alone) if not name.startswith(("refused", ".refused"))]
    assert made == [name for name in files(tmp_path) if not name.startswith(("refused", ".refused"))]
    assert len(made) > 50
    assert filecmp.cmpfiles(alone, tmp_path, made, shallow=False) == (made, [], [])


def test_a_killed_process_ends_all(checkpoint: Path, alone: Path, tmp_path: Path) -> None:
    """Catches a run that waits for a dead process until a timeout, N copies of one error, and half a result; outputs
    that are lost with the process that had the sample, or come back to another one."""
    killed = tmp_path / "killed"
    killed.mkdir()
    done = ran(SCRIPT, checkpoint, killed, 1, "model.layers.0", processes=2)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 and "connection lost" in done.stderr
    assert "3 of 4" in done.stderr
    assert [path.name[:16] for path in killed.iterdir()] == [".photos.partial-"]
    for processes in (1, 2):  # another number of processes, and the same one
        copy = shutil.copytree(killed, tmp_path / f"{processes}")
        done = ran(SCRIPT, checkpoint, copy, "resume", processes=processes)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("3 of 4") == 1
        assert [path.name for path in copy.iterdir()] == ["photos"]
        made = files(alone / "photos")
        assert files(copy / "photos") == made
        assert filecmp.cmpfiles(alone / "photos", copy / "photos", made, shallow=False) == (made, [], [])


def test_an_invalid_option_is_reported_once(checkpoint: Path, tmp_path: Path) -> None:
    """Catches one error message per rank, and ranks that wait for one that has ended already."""
    options = ["--model_path", checkpoint, "--save_directory", tmp_path / "out", "--w_bit", "5"]
    done = ran("-m", "vlqc", "compile", *options, processes=2)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == done.stderr.count("error: --w_bit") == 1 and "(exitcode: 2)" in done.stderr
