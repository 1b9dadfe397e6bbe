"""Small samples for everything that needs a sample but no statistics.

`probe_sample` cuts one out of a calibration sample, for proofs that a rewrite leaves a stage's output unchanged. Proofs
run a stage repeatedly in float32; they need real rows, not many: the first tokens (one of which carries massive
activations), a crop of an image with several attention windows, some text after it. `synthetic_sample` makes one of
random numbers, for tracing without calibration data.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PROBE = -1  # index of the probe, which is not one of the calibration samples
PROBE_ROWS = 512  # if a sample has at most this many rows, the largest such sample is the probe
CROP_HEIGHT, CROP_WIDTH = 16, 12  # patches; windows have 8 x 8, so the crop has complete and partial ones
FIRST, NEAREST, AFTER = 16, 8, 48  # tokens of text that are kept: the first ones, before the image, after it
TEXT_TOKENS = 8  # of a synthetic sample, on either side of the image
WINDOWS = (1, 1.5)  # height and width of a synthetic image in attention windows: one complete, one partial


def probe_sample(samples: Sequence[dict[str, Tensor]], config: Any) -> dict[str, Tensor] | None:
    """Cuts a probe out of the smallest sample with images.

    Args:
        samples: model inputs, see `CalibrationDataset`.
        config: of the model, with image_token_id and vision_config.

    Returns:
        Model inputs; None if no sample has images, or one with images has at most PROBE_ROWS rows as it is.
    """
    with_images = [sample for sample in samples if "pixel_values" in sample]
    if not with_images or any(_rows(sample) <= PROBE_ROWS for sample in with_images):
        return None
    return _crop(min(with_images, key=_rows), config)


def choose_probe(rows: Sequence[int]) -> int:
    """Row counts of the samples -> index of the largest of at most PROBE_ROWS rows, or else of the smallest."""
    small = [index for index, count in enumerate(rows) if count <= PROBE_ROWS]
    if small:
        return max(small, key=lambda index: rows[index])
    return min(range(len(rows)), key=lambda index: rows[index])


def synthetic_sample(config: Any, seed: int = 0, *, windows: tuple[float, float] = WINDOWS) -> dict[str, Tensor]:
    """Model inputs of random text, an image of noise, and random text.

    Args:
        config: of the model, with its token ids and vision_config.
        seed: of the random numbers.
        windows: height and width of the image in attention windows; it has at least 2 x 2 image tokens.
    """
    vision = config.vision_config
    merge, patch = vision.spatial_merge_size, vision.patch_size
    token_side = merge * patch  # pixels
    rows, columns = (max(2, round(vision.window_size * share / token_side)) for share in windows)
    text = getattr(config, "text_config", config)
    generator = torch.Generator().manual_seed(seed)
    special = {config.image_token_id, config.vision_start_token_id, getattr(config, "video_token_id", -1)}
    words = [
        word for word in torch.randperm(min(text.vocab_size, 1000), generator=generator).tolist() if word not in special
    ]
    before, after = words[:TEXT_TOKENS], words[TEXT_TOKENS : 2 * TEXT_TOKENS]
    end = getattr(config, "vision_end_token_id", None)
    image = [config.vision_start_token_id, *[config.image_token_id] * (rows * columns)]
    ids = torch.tensor([[*before, *image, *([] if end is None else [end]), *after]])
    height, width = rows * merge, columns * merge
    values = vision.in_channels * vision.temporal_patch_size * patch**2
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(height * width, values, generator=generator),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }


def _rows(sample: dict[str, Tensor]) -> int:
    """The largest number of rows that any stage computes for the sample."""
    return max(sample["input_ids"].shape[1], sample["pixel_values"].shape[0])


def _crop(sample: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The upper left corner of the first image, and the text near it."""
    merge = config.vision_config.spatial_merge_size
    frames, height, width = (int(size) for size in sample["image_grid_thw"][0])
    rows, columns = min(height, CROP_HEIGHT) // merge, min(width, CROP_WIDTH) // merge
    # The merge * merge patches of one image token are adjacent.
    patches = sample["pixel_values"][: frames * height * width]
    blocks = patches.reshape(frames, height // merge, width // merge, merge * merge, -1)
    ids = sample["input_ids"][sample["attention_mask"] != 0]  # [S] without padding
    image = (ids == config.image_token_id).nonzero().flatten()
    begin, end = int(image[0]), int(image[0]) + frames * height * width // merge**2
    after = ids[end : int(image[image >= end][0]) - NEAREST if bool((image >= end).any()) else None]
    before = ids[:begin] if begin <= FIRST + NEAREST else torch.cat([ids[:FIRST], ids[begin - NEAREST : begin]])
    kept = torch.cat([before, ids[begin : begin + rows * columns], after[:AFTER]])[None]
    return {
        "input_ids": kept,
        "attention_mask": torch.ones_like(kept),
        "pixel_values": blocks[0, :rows, :columns].reshape(-1, patches.shape[-1]).contiguous(),
        "image_grid_thw": torch.tensor([[1, rows * merge, columns * merge]]),
    }
