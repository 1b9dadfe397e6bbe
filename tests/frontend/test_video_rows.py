"""Rows of videos in the stages: labelled as such in both towers, and run through the vision tower once."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import tiny
from vlqc.frontend.sequential import SequentialForward
from vlqc.ir.execution import SampleShape, first_tensor
from vlqc.ir.observation import MODALITIES
from vlqc.passes.algorithms.observer import observe_rows, plan_quotas

IMAGE, VIDEO = MODALITIES.index("image"), MODALITIES.index("video")
VIDEO_TOKEN, START, END = 6, 3, 4


def with_video(image: dict[str, Tensor] | None, steps: int, height: int, width: int) -> dict[str, Tensor]:
    """A sample with a video of noise, and the image of another sample behind it."""
    video = [START, *[VIDEO_TOKEN] * (steps * height * width // 4), END]
    ids = torch.tensor([[9, 10, *video, 11]])
    generator = torch.Generator().manual_seed(3)
    sample = {
        "input_ids": ids if image is None else torch.cat([ids, image["input_ids"]], dim=1),
        "pixel_values_videos": torch.randn(steps * height * width, 1176, generator=generator),
        "video_grid_thw": torch.tensor([[steps, height, width]]),
        "second_per_grid_ts": torch.tensor([1.0]),
    }
    sample["attention_mask"] = torch.ones_like(sample["input_ids"])
    return sample | ({} if image is None else {name: image[name] for name in ("pixel_values", "image_grid_thw")})


@pytest.mark.every_transformers
def test_rows_of_every_stage() -> None:
    """Catches a video's rows that count as an image's, also where windows change their order; wrong outputs."""
    image = tiny.synthetic_sample((6, 10))
    samples = [with_video(image, 3, 10, 6), with_video(None, 3, 10, 6), image]
    model, seen = tiny.float_model(), set()
    with (
        model.non_stage_weights(model.checkpoint.tensor, head=True),
        SequentialForward(model, samples, run_to_end=True) as forward,
    ):
        for inputs in forward:
            both, video, alone = inputs.calls
            shapes = [SampleShape.from_call(call).rows_per_modality for call in inputs.calls]
            seen.add(model.is_language(inputs.module))
            if not model.is_language(inputs.module):
                assert shapes == [(0, 60, 180), (0, 0, 180), (0, 60, 0)]
                rows: Any = [first_tensor((*call.args, *call.kwargs.values())) for call in inputs.calls]
                assert both.modality is not None and video.modality is not None and alone.modality is None
                torch.testing.assert_close(rows[0][both.modality == VIDEO], rows[1], atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(rows[0][both.modality == IMAGE], rows[2], atol=1e-4, rtol=1e-4)
            else:
                assert [shape[1:] for shape in shapes] == [(15, 45), (0, 45), (15, 0)]
            tiny.run_float_stage(model, inputs)
    assert seen == {True, False}
    for sample, result in zip(samples, forward.results, strict=True):
        torch.testing.assert_close(result.logits, tiny.plain_logits(sample), atol=1e-4, rtol=1e-4)


def test_rows_behind_a_merger() -> None:
    """Catches merged rows of a video that count as an image's, and kept rows of one modality only."""
    modality = torch.tensor([VIDEO] * 8 + [IMAGE] * 4, dtype=torch.int8)
    merged = torch.tensor([[5.0], [7.0], [-3.0]])
    (quota,) = plan_quotas([(0, 4, 8)], budget=2)
    statistics, index = observe_rows(merged, modality, quota)
    assert {name: (span.rows, float(span.maximum)) for name, span in statistics.ranges.items()} == {
        "image": (1, -3.0),
        "video": (2, 7.0),
    }
    assert sorted(index.tolist()) == [0, 2] and sorted(statistics.kept_modality.tolist()) == [IMAGE, VIDEO]
