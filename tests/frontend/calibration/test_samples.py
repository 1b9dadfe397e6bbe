"""Ready model inputs: valid samples pass, and all faults of the others are reported at once."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support import tiny
from vlqc.errors import UserError
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.frontend.calibration.samples import check_samples, drop_duplicates, drop_padding

Sample = dict[str, Any]


class Model(nn.Module):
    """The parts of a model that the checks use: a vocabulary of 64, image token 5, 2x2 merging, patches of 1176."""

    def __init__(self) -> None:
        super().__init__()
        vision = SimpleNamespace(spatial_merge_size=2, in_channels=3, temporal_patch_size=2, patch_size=14)
        self.config = SimpleNamespace(image_token_id=5, video_token_id=6, vision_config=vision)

    def get_input_embeddings(self) -> nn.Embedding:
        return nn.Embedding(64, 4)


MODULE = Model()
MODEL: Any = SimpleNamespace(module=MODULE, family=QWEN2_5_VL)


def faults_of(*samples: Any) -> list[tuple[str, str]]:
    """(where, what) of every fault."""
    with pytest.raises(UserError) as caught:
        check_samples(samples, MODEL)
    return [(fault.where, fault.what) for fault in caught.value.faults]


def test_good_samples_pass() -> None:
    """Catches a check that rejects text only, several images, padding, token types or another integer type."""
    padded = tiny.synthetic_sample(words=4)
    padded["attention_mask"][0, :2] = 0
    typed = tiny.synthetic_sample((4, 4))
    typed["mm_token_type_ids"] = torch.zeros_like(typed["input_ids"])
    small = {
        name: value.int() if not value.is_floating_point() else value
        for name, value in tiny.synthetic_sample((4, 4)).items()
    }
    check_samples([*tiny.mixed_samples(), padded, typed, small], MODEL)


@pytest.mark.every_transformers
def test_good_samples_pass_with_the_real_model() -> None:
    """Catches an attribute of the config that has another name in some transformers version."""
    check_samples(tiny.mixed_samples(), tiny.float_model())


def dropped(sample: dict[str, Tensor]) -> dict[str, Tensor]:
    return drop_padding(sample, QWEN2_5_VL.inputs, MODULE.config)


def without(name: str) -> Callable[[Sample], None]:
    return lambda sample: sample.pop(name)


def having(name: str, value: Any) -> Callable[[Sample], None]:
    return lambda sample: sample.update({name: value})


def changed(name: str, change: Callable[[Tensor], Any]) -> Callable[[Sample], None]:
    return lambda sample: sample.update({name: change(sample[name])})


def at(place: int, value: int) -> Callable[[Tensor], Tensor]:
    return lambda ids: ids.index_fill(1, torch.tensor([place]), value)


def nan_at_the_end(pixels: Tensor) -> Tensor:
    pixels = pixels.clone()
    pixels[-1, -1] = torch.nan
    return pixels


# To an image of 4 x 4 patches, ids [1, 13] (begin, start, 4 image tokens, end, 6 words): what is done, the faults.
FAULTS: list[tuple[str, Callable[[Sample], None], list[str]]] = [
    ("no ids", without("input_ids"), ["the tensor input_ids is missing"]),
    ("no mask", without("attention_mask"), ["the tensor attention_mask is missing"]),
    ("no pixels", without("pixel_values"), ["the tensor pixel_values is missing"]),
    ("no grid", without("image_grid_thw"), ["the tensor image_grid_thw is missing"]),
    ("ids as a list", changed("input_ids", lambda ids: ids.tolist()), ["the tensor input_ids is missing"]),
    ("pixels as an array", changed("pixel_values", lambda p: p.numpy()), ["the tensor pixel_values is missing"]),
    ("grid as a list", changed("image_grid_thw", lambda g: g.tolist()), ["the tensor image_grid_thw is missing"]),
    ("ids without a batch", changed("input_ids", lambda ids: ids[0]), ["input_ids is int64[13]"]),
    ("a batch of two", changed("input_ids", lambda ids: ids.repeat(2, 1)), ["input_ids is int64[2, 13]"]),
    ("no tokens", changed("input_ids", lambda ids: ids[:, :0]), ["input_ids is int64[1, 0]"]),
    ("broken ids", changed("input_ids", lambda ids: ids.float()), ["input_ids is float32[1, 13]"]),
    ("mask too short", changed("attention_mask", lambda m: m[:, 1:]), ["attention_mask is int64[1, 12]"]),
    ("mask of zeros", changed("attention_mask", lambda m: m * 0), ["attention_mask is int64[1, 13]"]),
    ("id too large", changed("input_ids", at(12, 64)), ["a token id is outside the vocabulary"]),
    ("id below zero", changed("input_ids", at(12, -100)), ["a token id is outside the vocabulary"]),
    ("image token too many", changed("input_ids", at(12, 5)), ["input_ids holds 5 image tokens"]),
    ("image token cut off", changed("input_ids", at(3, 9)), ["input_ids holds 3 image tokens"]),
    (
        "pixels as an image",
        changed("pixel_values", lambda p: p[:, :, None]),
        ["pixel_values is float32[16, 1176, 1], image_grid_thw is int64[1, 3]"],
    ),
    (
        "grid without frames",
        changed("image_grid_thw", lambda g: g[:, 1:]),
        ["pixel_values is float32[16, 1176], image_grid_thw is int64[1, 2]"],
    ),
    (
        "grid without images",
        changed("image_grid_thw", lambda g: g[0]),
        ["pixel_values is float32[16, 1176], image_grid_thw is int64[3]"],
    ),
    (
        "grid of floats",
        changed("image_grid_thw", lambda g: g.float()),
        ["pixel_values is float32[16, 1176], image_grid_thw is float32[1, 3]"],
    ),
    (
        "grid of zeros",
        changed("image_grid_thw", lambda g: g * 0),
        ["pixel_values is float32[16, 1176], image_grid_thw is int64[1, 3]"],
    ),
    (
        "an empty grid",
        changed("image_grid_thw", lambda g: g[:0]),
        ["pixel_values is float32[16, 1176], image_grid_thw is int64[0, 3]"],
    ),
    (
        "patches cut off",
        changed("pixel_values", lambda p: p[:12]),
        ["pixel_values has 12 patches"],
    ),
    (
        "patches of another model",
        changed("pixel_values", lambda p: p[:, :588]),
        ["pixel_values has 588 values per patch"],
    ),
    ("odd grid", having("image_grid_thw", torch.tensor([[1, 16, 1]])), ["image_grid_thw cannot be merged"]),
    ("broken pixels", changed("pixel_values", nan_at_the_end), ["pixel_values holds NaN or Inf"]),
    ("a video without grid", having("pixel_values_videos", torch.ones(1)), ["the tensor video_grid_thw is missing"]),
    (
        "seconds of no video",
        having("second_per_grid_ts", [1.0]),
        ["the tensor pixel_values_videos is missing", "the tensor video_grid_thw is missing"],
    ),
    ("a word misspelt", having("pixel_value", torch.ones(1)), ["unknown model input 'pixel_value'"]),
    (
        "several at once",
        lambda s: s.update(labels=1, input_ids=at(12, 99)(s["input_ids"]), pixel_values=s["pixel_values"][:4]),
        [
            "unknown model input 'labels'",
            "a token id is outside the vocabulary",
            "pixel_values has 4 patches",
        ],
    ),
]


@pytest.mark.parametrize(("damage", "faults"), [row[1:] for row in FAULTS], ids=[row[0] for row in FAULTS])
def test_every_fault_is_named_with_its_sample(damage: Callable[[Sample], None], faults: list[str]) -> None:
    """Catches invalid input that reaches the model."""
    sample = tiny.synthetic_sample((4, 4))
    damage(sample)
    assert faults_of(tiny.synthetic_sample(), sample) == [("samples[1]", what) for what in faults]


def test_image_tokens_without_an_image() -> None:
    """Catches a text-only sample with image tokens."""
    sample = tiny.synthetic_sample((4, 4))
    del sample["pixel_values"], sample["image_grid_thw"]
    assert faults_of(sample) == [("samples[0]", "4 image tokens without an image")]


def test_no_sample_at_all() -> None:
    """Catches a calibration without samples."""
    assert faults_of() == [("samples", "samples is empty")]


def test_a_sample_that_is_no_dict() -> None:
    """Catches an exception for a tensor or a tuple in place of a sample."""
    assert faults_of(torch.ones(1, 3), ("input_ids",)) == [
        ("samples[0]", "a sample is a Tensor"),
        ("samples[1]", "a sample is a tuple"),
    ]


def test_faults_of_all_samples_at_once() -> None:
    """Catches a check that stops at the first bad sample."""
    bad = tiny.synthetic_sample()
    del bad["attention_mask"]
    assert [where for where, _ in faults_of(bad, tiny.synthetic_sample(), bad)] == ["samples[0]", "samples[2]"]


@pytest.mark.every_transformers
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 2), (1, 1)])
def test_padding_is_dropped_and_nothing_else_changes(left: int, right: int) -> None:
    """Catches tokens that change their positions, token types or patches of another length, padding that is kept."""
    sample = tiny.synthetic_sample((4, 8), words=9)
    pad = {"input_ids": 7, "attention_mask": 0}
    padded = sample | {
        name: torch.nn.functional.pad(sample[name], (left, right), value=value) for name, value in pad.items()
    }
    there = padded["attention_mask"][0].bool()
    cut = dropped(padded)
    assert all(torch.equal(cut[name], it) for name, it in sample.items()) and cut.keys() == sample.keys()
    torch.testing.assert_close(tiny.plain_logits(cut), tiny.plain_logits(padded)[:, there], rtol=0, atol=1e-4)
    assert dropped(cut) is cut


def test_a_masked_image_stays() -> None:
    """Catches image tokens that are dropped while their patches stay."""
    sample = tiny.synthetic_sample((4, 4))
    sample["attention_mask"][0, sample["input_ids"][0] == 5] = 0
    assert dropped(sample) is sample


def test_duplicates_are_dropped() -> None:
    """Catches a sample that is dropped because only its text, its image or its shape equals another sample's."""
    one = tiny.synthetic_sample((4, 8), seed=1)
    other_text = one | {"input_ids": one["input_ids"].roll(1)}
    other_picture = one | {"pixel_values": one["pixel_values"] + 1}
    text_only = tiny.synthetic_sample(words=4)
    copy = {name: it.clone() for name, it in one.items()}
    samples = [one, other_text, copy, text_only, other_picture, one]
    assert [id(it) for it in drop_duplicates(samples)] == [id(it) for it in (one, other_text, text_only, other_picture)]
