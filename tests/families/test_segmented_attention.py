"""Attention of the vision tower by segments, as transformers with a mask of all pairs of patches computes it."""

import pytest
import torch

import vlqc.families.segmented_attention as segmented
from tests.support import tiny
from vlqc.frontend.sequential import SequentialForward


@pytest.mark.every_transformers
def test_equals_the_masked_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches patches that attend across images or windows, heads that change places, and a mask of all pairs."""
    monkeypatch.setattr(segmented, "MASKED_ROWS", 0)
    model, samples = tiny.float_model(), [tiny.synthetic_sample((4, 4), (10, 18), seed=3)]
    shapes = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: shapes.append(size) or zeros(*size, **options))
    with (
        model.non_stage_weights(model.checkpoint.tensor, head=True),
        SequentialForward(model, samples, run_to_end=True) as forward,
    ):
        for inputs in forward:
            tiny.run_float_stage(model, inputs)
    patches = len(samples[0]["pixel_values"])
    assert not any(patches in size or [1, patches, patches] in size for size in shapes)
    monkeypatch.undo()
    torch.testing.assert_close(forward.results[0].logits, tiny.plain_logits(samples[0]), rtol=1e-4, atol=1e-4)


def test_pairs_of_patches() -> None:
    """Catches a plan in which windows cost as much as whole images, or two images as much as one of both sizes."""
    model = tiny.float_model()
    family, config = model.family, model.module.config
    sample = tiny.synthetic_sample((4, 4), (16, 20))
    window = (config.vision_config.window_size // config.vision_config.patch_size) ** 2
    assert family.inputs.attention_pairs(sample, config, windowed=False) == 16**2 + 320**2
    assert family.inputs.attention_pairs(sample, config, windowed=True) == 16 * 16 + 320 * min(window, 320)
    whole = config.vision_config.fullatt_block_indexes
    windowed = [family.attends_in_windows(f"visual.blocks.{index}", config) for index in range(4)]
    assert windowed == [index not in whole for index in range(4)]
