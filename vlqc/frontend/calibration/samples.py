"""Ready model inputs: what a sample must be before the model sees it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlqc.errors import Fault, UserError
from vlqc.formatting import did_you_mean

REQUIRED = ("input_ids", "attention_mask")
PICTURE = ("pixel_values", "image_grid_thw")
LARGEST_PIXEL = 1e4  # forgotten steps of the preparation stay below that; what is beyond is no picture
WHOLE_NUMBERS = ("input_ids", "attention_mask", "image_grid_thw")


def refuse_both(*, samples: object, passes: object, **given: object) -> None:
    """UserError where the Python API is given two things of which one would be ignored."""
    faults = []
    if samples is not None and "calib_images" in given:
        faults.append(Fault("samples and calib_images are both given", fix="give one of them"))
    if passes is not None and given.get("pipeline") is not None:
        faults.append(Fault("passes and pipeline are both given", fix="give one of them"))
    if faults:
        raise UserError(*faults)


def checked_samples(samples: Sequence[dict[str, Tensor]], model: nn.Module) -> list[dict[str, Tensor]]:
    """The samples with whole numbers as int64. UserError with every fault of every sample.

    Faults are of keys, shapes, token ids, and pictures that do not fit the text.
    """
    if not isinstance(samples, Sequence):
        raise UserError(Fault(f"samples is a {type(samples).__name__}", "samples", "a list of dicts is wanted"))
    if not samples:
        raise UserError(Fault("there is no calibration sample", "samples", fix="give at least one, 30 are advised"))
    faults = [fault for number, sample in enumerate(samples) for fault in _faults(f"samples[{number}]", sample, model)]
    if faults:
        raise UserError(*faults)
    return [{key: it.long() if key in WHOLE_NUMBERS else it for key, it in sample.items()} for sample in samples]


def without_copies(samples: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The samples, each once: what runs a second time says nothing new."""
    unique: list[dict[str, Tensor]] = []
    for sample in samples:
        if not any(_equal(sample, other) for other in unique):
            unique.append(sample)
    return unique


def by_pictures(samples: Sequence[dict[str, Tensor]]) -> list[list[dict[str, Tensor]]]:
    """The samples in groups that have the same pictures, which need to be looked at once; groups as they first come.

    A sample without pictures is a group of its own.
    """
    groups: list[list[dict[str, Tensor]]] = []
    for sample in samples:
        same = next((group for group in groups if same_pictures(group[0], sample)), None)
        if same is None:
            groups.append([sample])
        else:
            same.append(sample)
    return groups


def same_pictures(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether both have pictures, and the same ones."""
    return all(key in one and key in other and torch.equal(one[key], other[key]) for key in PICTURE)


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    if one.keys() != other.keys() or any(one[key].dtype != other[key].dtype for key in one):
        return False
    return all(torch.equal(one[key], other[key]) for key in one)


def without_padding(sample: dict[str, Tensor], image_token: int) -> dict[str, Tensor]:
    """A checked sample without the tokens that nobody attends to: they would only cost time.

    The positions of all others stay, as models count them without padding. A sample that masks a picture is left alone.
    """
    mask = sample["attention_mask"][0].bool()  # [S]
    if bool(mask.all()) or bool((sample["input_ids"][0][~mask] == image_token).any()):
        return sample
    per_token = {key for key, it in sample.items() if it.shape == sample["input_ids"].shape}
    return {key: it[:, mask] if key in per_token else it for key, it in sample.items()}


def _faults(where: str, sample: dict[str, Tensor], model: nn.Module) -> list[Fault]:
    if not isinstance(sample, Mapping):
        return [Fault(f"a sample is a {type(sample).__name__}", where, "a dict of tensors is wanted")]
    faults = []
    for key in sample:
        if key in ("pixel_values_videos", "video_grid_thw"):
            faults.append(Fault("videos are not supported", where, fix="calibrate with pictures"))
        elif key not in (*REQUIRED, *PICTURE, "mm_token_type_ids"):
            known = (*REQUIRED, *PICTURE)
            fix = did_you_mean(str(key), known) or f"a sample has {', '.join(known)}"
            faults.append(Fault(f"unknown model input {key!r}", where, fix=fix))
    missing = [key for key in REQUIRED if not isinstance(sample.get(key), Tensor)]
    if any(key in sample for key in PICTURE):
        missing += [key for key in PICTURE if not isinstance(sample.get(key), Tensor)]
    if missing:
        why = "a sample has input_ids and attention_mask, and with pictures pixel_values and image_grid_thw"
        return [*faults, *(Fault(f"the tensor {key} is missing", where, why) for key in missing)]
    ids, mask = sample["input_ids"], sample["attention_mask"]
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0 or not _is_whole(ids):
        return [*faults, Fault(f"input_ids is {_kind(ids)}", where, "whole numbers [1, S] with S > 0 are wanted")]
    if (
        mask.shape != ids.shape
        or mask.is_complex()
        or not bool(mask.any())
        or not bool(((mask == 0) | (mask == 1)).all())
    ):
        why = f"it must be {list(ids.shape)}, of zeros and ones, and not all zero"
        faults.append(Fault(f"attention_mask is {_kind(mask)}", where, why))
    kinds = sample.get("mm_token_type_ids", ids)
    if not isinstance(kinds, Tensor) or kinds.shape != ids.shape or not _is_whole(kinds):
        faults.append(Fault("mm_token_type_ids does not fit input_ids", where, f"whole numbers {list(ids.shape)}"))
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        faults.append(Fault("a token id is outside the vocabulary", where, f"ids go from 0 to {vocabulary - 1}"))
    return faults + _picture_faults(where, sample, model)


def _picture_faults(where: str, sample: dict[str, Tensor], model: nn.Module) -> list[Fault]:
    config = model.config
    tokens = int((sample["input_ids"] == config.image_token_id).sum())  # type: ignore[union-attr]
    if PICTURE[0] not in sample:
        why = "input_ids holds image tokens but there are no pixel_values"
        return [Fault(f"{tokens} image tokens without a picture", where, why)] if tokens else []
    pixels, grid = sample["pixel_values"], sample["image_grid_thw"]
    whole = _is_whole(grid) and grid.ndim == 2 and grid.shape[-1] == 3 and grid.shape[0] > 0
    if not whole or pixels.ndim != 2 or not pixels.is_floating_point() or not bool((grid > 0).all()):
        why = "pixel_values float [P, D] and image_grid_thw whole numbers [pictures, 3] are wanted"
        return [Fault(f"pixel_values is {_kind(pixels)}, image_grid_thw is {_kind(grid)}", where, why)]
    if not bool((grid <= pixels.shape[0]).all()):  # products of larger numbers may wrap around, and seem to fit
        return [Fault("image_grid_thw is larger than pixel_values", where, f"which has {pixels.shape[0]} patches")]
    faults = []
    patches = int(grid.prod(-1).sum())
    vision: Any = config.vision_config  # type: ignore[union-attr]
    merge = vision.spatial_merge_size
    merged = patches // merge**2
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    if bool((grid[:, 1:] % merge != 0).any()):
        faults.append(Fault("image_grid_thw cannot be merged", where, f"height and width must be multiples of {merge}"))
    if pixels.shape[1] != values:
        faults.append(Fault(f"pixel_values has {pixels.shape[1]} values per patch", where, f"the model takes {values}"))
    if pixels.shape[0] != patches:
        faults.append(Fault(f"pixel_values has {pixels.shape[0]} patches, image_grid_thw says {patches}", where))
    if tokens != merged:
        why = f"the pictures give {merged} image features; never cut image tokens"
        faults.append(Fault(f"input_ids holds {tokens} image tokens", where, why))
    if not bool(torch.isfinite(pixels).all()):
        faults.append(Fault("pixel_values holds NaN or Inf", where))
    elif (most := max(abs(float(end)) for end in torch.aminmax(pixels))) > LARGEST_PIXEL:
        why = "colours from 0 to 1, less their mean and divided by their deviation, stay within 10"
        faults.append(Fault(f"pixel_values reaches {most:.3g}", where, why, "check image_std and rescale_factor"))
    return faults


def _is_whole(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
