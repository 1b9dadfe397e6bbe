"""A sample made of random numbers, for looking at graphs: they depend on shapes alone."""

from typing import Any

import torch
from torch import Tensor

WORDS = 8  # tokens of text on either side of the picture
WINDOWS = (1, 1.5)  # height and width of the picture in windows of the vision tower's attention: one whole, one cut


def synthetic_sample(config: Any, seed: int = 0) -> dict[str, Tensor]:
    """The model's config -> model inputs as `calibration.Calibration` has them: text, a picture of noise, text."""
    vision = config.vision_config
    merge, patch = vision.spatial_merge_size, vision.patch_size
    unit = merge * patch  # pixels of a token
    tokens = [max(2, round(vision.window_size * share / unit)) for share in WINDOWS]
    text = getattr(config, "text_config", config)
    draw = torch.Generator().manual_seed(seed)
    special = {config.image_token_id, config.vision_start_token_id, getattr(config, "video_token_id", -1)}
    words = [
        word for word in torch.randperm(min(text.vocab_size, 1000), generator=draw).tolist() if word not in special
    ]
    before, behind = (words[:WORDS], words[WORDS : 2 * WORDS])
    end = getattr(config, "vision_end_token_id", None)
    picture = [config.vision_start_token_id, *[config.image_token_id] * (tokens[0] * tokens[1])]
    ids = torch.tensor([[*before, *picture, *([] if end is None else [end]), *behind]])
    height, width = (count * merge for count in tokens)
    values = vision.in_channels * vision.temporal_patch_size * patch**2
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(height * width, values, generator=draw),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }
