"""Compilations of a small checkpoint, complete or interrupted."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import vlqc
from tests.support import tiny
from tests.support.resume_runs import QUICK, SAMPLES
from vlqc.ir.execution import StageRun

STAGES = ["visual.blocks.0", "visual.blocks.1", "visual.merger", "model.layers.0", "model.layers.1"]


def small_checkpoint(folder: Path) -> Path:
    """The tiny checkpoint with two vision blocks and two decoder layers: five stages."""

    def drop(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            block, _, number = ".".join(name.split(".")[:3]).rpartition(".")
            if number.isdecimal() and int(number) >= {"visual.blocks": 2, "model.layers": 2}.get(block, 99):
                del tensors[name]

    def change(config: dict[str, Any]) -> None:
        config["num_hidden_layers"] = 2
        config["vision_config"] |= {"depth": 2, "fullatt_block_indexes": [1]}

    return tiny.damaged(folder, tensors=drop, config=change)


def compile_into(folder: Path, checkpoint: Path, samples: list[dict[str, Tensor]] = SAMPLES, **options: Any) -> Any:
    return vlqc.compile(model_path=checkpoint, save_directory=folder, samples=samples, **(QUICK | options))


def file_contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def compile_and_read(folder: Path, checkpoint: Path) -> dict[str, bytes]:
    """Compiles without interruption; returns file name -> content."""
    compile_into(folder, checkpoint)
    return file_contents(folder)


def run_folders(target: Path) -> list[Path]:
    return sorted(target.parent.glob(".*.partial-*"))


@contextmanager
def fail_at_stage(stage: str, error: BaseException) -> Iterator[None]:
    """Raises `error` when this stage is about to run its samples."""
    run = StageRun.forward

    def changed(self: StageRun, *watch: Any) -> None:
        if self.name == stage:
            raise error
        run(self, *watch)

    StageRun.forward = changed  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        StageRun.forward = run  # type: ignore[method-assign]


def interrupt_compile(save: Path, checkpoint: Path, at: str = STAGES[3], **options: Any) -> Path:
    """Interrupts a compilation at a stage; returns its run folder."""
    with fail_at_stage(at, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        compile_into(save, checkpoint, **options)
    (work,) = run_folders(save)
    assert not save.exists()
    return work


def stage_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list to which the names of the stages that run are appended."""
    names: list[str] = []
    run = StageRun.forward

    def noted(stage: StageRun, *watch: Any) -> None:
        names.append(stage.name)
        run(stage, *watch)

    monkeypatch.setattr(StageRun, "forward", noted)
    return names
