"""The probe: a small sample, cut out of a large one, that is a valid model input."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.support import tiny
from tests.support.stages import materialized_stage
from vlqc.families.inputs.image_inputs import AFTER, CROP_HEIGHT, CROP_WIDTH, FIRST, NEAREST
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.frontend.calibration.probe import PROBE, PROBE_ROWS, probe_sample
from vlqc.frontend.calibration.samples import check_samples
from vlqc.frontend.sequential import SequentialForward, StageInputs
from vlqc.ir.stage import Stage

IMAGE, MERGE = 60, 2
INPUTS = QWEN2_5_VL.inputs
CONFIG = SimpleNamespace(
    image_token_id=IMAGE, video_token_id=IMAGE + 1, vision_config=SimpleNamespace(spatial_merge_size=MERGE)
)


def write_image(before: int, grids: list[tuple[int, int, int]], behind: int, padding: int = 0) -> dict[str, Tensor]:
    """A sample whose patches contain their frame, row and column, and whose text tokens count from 1."""
    ids = list(range(1, before + 1))
    patches = []
    for frames, height, width in grids:
        ids += [IMAGE] * (frames * height * width // MERGE**2) + [50]
        where = torch.cartesian_prod(*(torch.arange(size) for size in (frames, height, width)))
        blocks = where.reshape(frames, height // MERGE, MERGE, width // MERGE, MERGE, 3).permute(0, 1, 3, 2, 4, 5)
        patches.append(blocks.reshape(-1, 3).float())
    ids += [70 + number for number in range(behind)]
    mask = torch.tensor([[0] * padding + [1] * len(ids)])
    return {
        "input_ids": torch.tensor([[9] * padding + ids]),
        "attention_mask": mask,
        "pixel_values": torch.cat(patches),
        "image_grid_thw": torch.tensor(grids),
    }


def test_a_corner_of_the_first_image() -> None:
    """Catches patches from outside the corner, or not in the order in which they are merged."""
    probe = probe_sample([write_image(3, [(1, 40, 30), (1, 4, 4)], 5)], INPUTS, CONFIG)
    assert probe is not None
    expected = write_image(3, [(1, CROP_HEIGHT, CROP_WIDTH)], 0)
    assert torch.equal(probe["pixel_values"], expected["pixel_values"])
    assert probe["image_grid_thw"].tolist() == [[1, CROP_HEIGHT, CROP_WIDTH]]
    assert probe["input_ids"].shape == probe["attention_mask"].shape and bool(probe["attention_mask"].all())


@pytest.mark.parametrize("padding", [0, 4])
def test_text_that_is_kept(padding: int) -> None:
    """Catches padding that is kept, text from the wrong side, a lost first token, image tokens without an image."""
    few = probe_sample([write_image(5, [(2, 24, 20)], 2, padding)], INPUTS, CONFIG)
    many = probe_sample([write_image(40, [(1, 24, 24)], 200, padding)], INPUTS, CONFIG)
    assert few is not None and many is not None
    tokens = CROP_HEIGHT * CROP_WIDTH // MERGE**2
    assert few["input_ids"].tolist() == [[1, 2, 3, 4, 5, *[IMAGE] * tokens, 50, 70, 71]]
    first, nearest = [*range(1, FIRST + 1)], [*range(41 - NEAREST, 41)]
    behind = [50, *range(70, 70 + AFTER - 1)]
    assert many["input_ids"].tolist() == [[*first, *nearest, *[IMAGE] * tokens, *behind]]


def test_the_text_behind_ends_before_the_next_image() -> None:
    """Catches image tokens of a second image, and the token that precedes them."""
    probe = probe_sample([write_image(2, [(1, 24, 24), (1, 2, 2)], 30)], INPUTS, CONFIG)
    assert probe is not None
    assert int((probe["input_ids"] == IMAGE).sum()) == len(probe["pixel_values"]) // MERGE**2


def test_none_where_none_is_needed() -> None:
    """Catches a cropped probe where a sample is small enough, and one without an image."""
    small, large = write_image(3, [(1, 16, 16)], 5), write_image(3, [(1, 24, 24)], 5)
    text = {key: large[key][:, :2] for key in ("input_ids", "attention_mask")}
    assert len(large["pixel_values"]) > PROBE_ROWS
    assert probe_sample([large, small], INPUTS, CONFIG) is None
    assert probe_sample([text], INPUTS, CONFIG) is None
    assert probe_sample([text, large], INPUTS, CONFIG) is not None


@pytest.mark.every_transformers
def test_every_stage_is_proven_on_it() -> None:
    """Catches a probe that the model rejects, that counts as a calibration sample, that does not reach the
    next stage, or that the proofs do not use."""
    model = tiny.float_model()
    samples = check_samples([tiny.synthetic_sample((24, 24))], model)
    probe = probe_sample(samples, INPUTS, model.module.config)
    assert probe is not None and check_samples([probe], model)
    seen: list[tuple[str, int]] = []

    def look(inputs: StageInputs, stage: Stage) -> None:
        assert [call.sample for call in inputs.calls] == [7, PROBE]
        assert [call.sample for call in stage.execution.calls] == [7] and stage.execution.probe is inputs.calls[-1]
        stage.execution.forward()
        assert len(stage.execution.outputs) == 1 and len(stage.execution.next_inputs()) == 2
        seen.append((stage.name, len(stage.execution.probe_output())))

    with (
        model.non_stage_weights(model.checkpoint.tensor),
        SequentialForward(model, samples, first=7, probe=probe) as forward,
    ):
        for inputs in forward:
            with materialized_stage(model, inputs, torch.bfloat16, model.checkpoint.tensor) as stage:
                look(inputs, stage)
                inputs.outputs = stage.execution.next_inputs()
    assert [name for name, _ in seen] == tiny.STAGES
    patches, tokens = CROP_HEIGHT * CROP_WIDTH, probe["input_ids"].shape[1]
    assert {rows for name, rows in seen if "blocks" in name} == {patches}
    assert {rows for name, rows in seen if "layers" in name} == {tokens}
