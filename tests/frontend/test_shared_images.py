"""Samples with the same images share one run of the vision tower."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vlqc
from tests.support import tiny
from tests.support.interrupted_runs import STAGES, fail_at_stage, file_contents, small_checkpoint
from tests.support.resume_runs import QUICK
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.frontend.calibration.dataset import load_calibration
from vlqc.frontend.calibration.samples import group_by_images
from vlqc.frontend.sequential import SequentialForward
from vlqc.options.options import Options

ONE_IMAGE, TEXT, TWO_IMAGES, LARGE_IMAGE = tiny.mixed_samples()
ONE_IMAGE_AGAIN, ONE_IMAGE_THIRD = tiny.with_other_text(ONE_IMAGE, 9, 12, 31), tiny.with_other_text(ONE_IMAGE, 40)
TWO_IMAGES_AGAIN = tiny.with_other_text(TWO_IMAGES, 17, 18)


def test_samples_are_grouped_by_images() -> None:
    """Catches grouping by text, text-only samples in one group, and another order of groups."""
    samples = [TEXT, ONE_IMAGE, TWO_IMAGES, ONE_IMAGE_AGAIN, TEXT, TWO_IMAGES_AGAIN, LARGE_IMAGE, ONE_IMAGE_THIRD]
    numbers = {id(sample): number for number, sample in enumerate(samples)}
    groups = [[numbers[id(sample)] for sample in group] for group in group_by_images(samples, QWEN2_5_VL.inputs)]
    assert groups == [[4], [1, 3, 7], [2, 5], [4], [6]]


def test_different_pixels_or_grids_are_different_images() -> None:
    """Catches images that are compared by size alone."""
    changed_pixel = tiny.with_other_text(ONE_IMAGE, 9)
    changed_pixel["pixel_values"][-1, -1] += 1e-3
    transposed = ONE_IMAGE | {"image_grid_thw": torch.tensor([[1, 8, 4]])}
    assert len(group_by_images([ONE_IMAGE, changed_pixel, transposed], QWEN2_5_VL.inputs)) == 3


@pytest.mark.every_transformers
def test_samples_with_the_same_images_share_outputs() -> None:
    """Catches the outputs of another image, skipped text stages, and a second vision run of the same image."""
    model, samples = (
        tiny.float_model(),
        [TEXT, ONE_IMAGE, ONE_IMAGE_AGAIN, ONE_IMAGE_THIRD, LARGE_IMAGE, TWO_IMAGES, TWO_IMAGES_AGAIN],
    )
    with (
        model.non_stage_weights(model.checkpoint.tensor, head=True),
        SequentialForward(model, samples, first=10, run_to_end=True, share_images=True) as forward,
    ):
        for inputs in forward:
            expected = [11, 14, 15] if "visual" in inputs.name else list(range(10, 17))
            assert [call.sample for call in inputs.calls] == expected
            tiny.run_float_stage(model, inputs)
    for sample, result in zip(samples, forward.results, strict=True):
        assert torch.equal(result.logits, tiny.plain_logits(sample))


def test_the_probe_has_its_own_vision_run() -> None:
    """Catches a probe that shares the outputs of a sample and has no vision run of its own."""
    model = tiny.float_model()
    with (
        model.non_stage_weights(model.checkpoint.tensor),
        SequentialForward(model, [ONE_IMAGE], probe=tiny.with_other_text(ONE_IMAGE, 9), share_images=True) as forward,
    ):
        for inputs in forward:
            assert [call.sample for call in inputs.calls] == [0, -1]
            tiny.run_float_stage(model, inputs)


def test_samples_with_the_same_images_are_adjacent() -> None:
    """Catches a second vision run because a sample with other images lies between two that share theirs."""
    options = Options.without_paths(model_path=tiny.TINY)
    calibration = load_calibration(options, tiny.float_model(), [ONE_IMAGE, TEXT, ONE_IMAGE_AGAIN])
    assert [len(sample["input_ids"][0]) for sample in calibration.samples] == [
        len(sample["input_ids"][0]) for sample in (ONE_IMAGE, ONE_IMAGE_AGAIN, TEXT)
    ]


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_resumed_run_shares_images(stage: str, tmp_path: Path) -> None:
    """Catches missing or NaN outputs, after a resume, of a sample that shares the vision run of another."""
    checkpoint = small_checkpoint(tmp_path / "checkpoint")
    samples: list[dict[str, Tensor]] = [ONE_IMAGE, TEXT, ONE_IMAGE_AGAIN, TWO_IMAGES]

    def run(folder: Path, **more: Any) -> None:
        vlqc.compile(model_path=checkpoint, save_directory=folder, samples=samples, **(QUICK | more))

    run(tmp_path / "whole")
    with fail_at_stage(stage, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out")
    run(tmp_path / "out", resume=True)
    assert file_contents(tmp_path / "out") == file_contents(tmp_path / "whole")
