"""A picture that several samples ask about is looked at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vlqc
from tests.support import tiny
from tests.support.interrupted_runs import STAGES, fail_at_stage, file_contents, small_checkpoint
from tests.support.resume_runs import QUICK
from vlqc.frontend.calibration.dataset import load_calibration
from vlqc.frontend.calibration.samples import group_by_images
from vlqc.frontend.sequential import SequentialForward
from vlqc.options.options import Options

ONE, TEXT, TWO, LARGE = tiny.mixed_samples()
AGAIN, THIRD = tiny.asked_again(ONE, 9, 12, 31), tiny.asked_again(ONE, 40)
TWO_AGAIN = tiny.asked_again(TWO, 17, 18)


def test_groups() -> None:
    """Catches samples that are told apart by their words, text-only ones taken for equal, another order of groups."""
    samples = [TEXT, ONE, TWO, AGAIN, TEXT, TWO_AGAIN, LARGE, THIRD]
    numbers = {id(sample): number for number, sample in enumerate(samples)}
    groups = [[numbers[id(sample)] for sample in group] for group in group_by_images(samples)]
    assert groups == [[4], [1, 3, 7], [2, 5], [4], [6]]


def test_one_pixel_makes_another_picture() -> None:
    """Catches pictures that are compared by size alone."""
    other = tiny.asked_again(ONE, 9)
    other["pixel_values"][-1, -1] += 1e-3
    turned = ONE | {"image_grid_thw": torch.tensor([[1, 8, 4]])}
    assert len(group_by_images([ONE, other, turned])) == 3


@pytest.mark.every_transformers
def test_all_get_the_answers_of_the_first() -> None:
    """Catches answers of another picture, text stages that are skipped, too, and an extra run in the vision tower."""
    model, samples = tiny.float_model(), [TEXT, ONE, AGAIN, THIRD, LARGE, TWO, TWO_AGAIN]
    with (
        model.non_stage_weights(model.checkpoint.tensor, head=True),
        SequentialForward(model, samples, first=10, run_to_end=True, share_images=True) as forward,
    ):
        for inputs in forward:
            looked = [11, 14, 15] if "visual" in inputs.name else list(range(10, 17))
            assert [call.sample for call in inputs.calls] == looked
            tiny.answer(model, inputs)
    for sample, result in zip(samples, forward.results, strict=True):
        assert torch.equal(result.logits, tiny.plain_logits(sample))


def test_the_probe_looks_for_itself() -> None:
    """Catches a probe that takes a sample's answers: nobody would run it through the vision tower."""
    model = tiny.float_model()
    with (
        model.non_stage_weights(model.checkpoint.tensor),
        SequentialForward(model, [ONE], probe=tiny.asked_again(ONE, 9), share_images=True) as forward,
    ):
        for inputs in forward:
            assert [call.sample for call in inputs.calls] == [0, -1]
            tiny.answer(model, inputs)


def test_samples_with_the_same_picture_are_neighbours() -> None:
    """Catches a compilation that looks twice because another sample stands between."""
    options = Options.without_paths(model_path=tiny.TINY)
    found = load_calibration(options, tiny.float_model().module, [ONE, TEXT, AGAIN])
    assert [len(sample["input_ids"][0]) for sample in found.samples] == [
        len(it["input_ids"][0]) for it in (ONE, AGAIN, TEXT)
    ]


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_resumed_run_shares_as_well(stage: str, tmp_path: Path) -> None:
    """Catches a sample that ran through no stage of its own yet and gets nothing, or NaN, when a run goes on."""
    checkpoint = small_checkpoint(tmp_path / "checkpoint")
    given: list[dict[str, Tensor]] = [ONE, TEXT, AGAIN, TWO]

    def run(folder: Path, **more: Any) -> None:
        vlqc.compile(model_path=checkpoint, save_directory=folder, samples=given, **(QUICK | more))

    run(tmp_path / "whole")
    with fail_at_stage(stage, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out")
    run(tmp_path / "out", resume=True)
    assert file_contents(tmp_path / "out") == file_contents(tmp_path / "whole")
