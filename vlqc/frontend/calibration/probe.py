"""A small sample to prove things on: cut out of one that was given, where all of those are large.

Proofs run a stage again and again, in float32. They need rows to be real, not many: the first tokens (one of which
carries massive activations), a piece of a picture with several windows of attention, some text behind it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PROBE = -1  # the number of this sample: it is no part of the calibration
PROBE_ROWS = 512  # proofs run on the largest sample of at most this many rows, if there is one
HEIGHT, WIDTH = 16, 12  # patches of the piece at most: windows of 8 x 8 patches, whole ones and cut ones
FIRST, NEAREST, BEHIND = 16, 8, 48  # tokens of text kept: at the start, before the picture, after it


def probe_sample(samples: Sequence[dict[str, Tensor]], config: Any) -> dict[str, Tensor] | None:
    """Model inputs (see `calibration.Calibration`) -> such inputs, small. None where no sample has a picture, or one
    with a picture is small enough as it is. config: of the model, with its image_token_id and vision_config."""
    with_picture = [sample for sample in samples if "pixel_values" in sample]
    if not with_picture or any(_rows(sample) <= PROBE_ROWS for sample in with_picture):
        return None
    return _cut(min(with_picture, key=_rows), config)


def choose_probe(rows: Sequence[int]) -> int:
    """Rows of every call -> which has most of those of at most PROBE_ROWS, otherwise which has fewest."""
    small = [number for number, count in enumerate(rows) if count <= PROBE_ROWS]
    if small:
        return max(small, key=lambda number: rows[number])
    return min(range(len(rows)), key=lambda number: rows[number])


def _rows(sample: dict[str, Tensor]) -> int:
    """The most rows that a stage sees of it."""
    return max(sample["input_ids"].shape[1], sample["pixel_values"].shape[0])


def _cut(sample: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The first picture's upper left corner, and the text near to it."""
    merge = config.vision_config.spatial_merge_size
    frames, height, width = (int(it) for it in sample["image_grid_thw"][0])
    high, wide = min(height, HEIGHT) // merge, min(width, WIDTH) // merge
    # Patches lie block by block: those that are merged into one token follow each other.
    patches = sample["pixel_values"][: frames * height * width]
    blocks = patches.reshape(frames, height // merge, width // merge, merge * merge, -1)
    ids = sample["input_ids"][sample["attention_mask"] != 0]  # [S] without padding
    image = (ids == config.image_token_id).nonzero().flatten()
    begin, end = int(image[0]), int(image[0]) + frames * height * width // merge**2
    behind = ids[end : int(image[image >= end][0]) - NEAREST if bool((image >= end).any()) else None]
    before = ids[:begin] if begin <= FIRST + NEAREST else torch.cat([ids[:FIRST], ids[begin - NEAREST : begin]])
    kept = torch.cat([before, ids[begin : begin + high * wide], behind[:BEHIND]])[None]
    return {
        "input_ids": kept,
        "attention_mask": torch.ones_like(kept),
        "pixel_values": blocks[0, :high, :wide].reshape(-1, patches.shape[-1]).contiguous(),
        "image_grid_thw": torch.tensor([[1, high * merge, wide * merge]]),
    }
