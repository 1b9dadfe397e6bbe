"""Checks and orders model inputs: shapes, dtypes, token ids, duplicates, padding, shared images."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlqc.errors import Fault, UserError
from vlqc.families.qwen2_5_vl import IMAGE_INPUTS, OPTIONAL_INPUTS, TEXT_INPUTS, VIDEO_INPUTS, InputLayout
from vlqc.formatting import did_you_mean
from vlqc.options.options import Options

LARGEST_PIXEL = 1e4  # pixels that are not rescaled or not normalized stay below it
INTEGER_INPUTS = ("input_ids", "attention_mask", "image_grid_thw")


def reject_conflicting_arguments(options: Options, *, samples: object, passes: object) -> None:
    """UserError if the Python API receives two arguments of which one would be ignored."""
    faults = []
    if samples is not None and "calib_images" in options.model_fields_set:
        faults.append(Fault("samples and calib_images are both given", fix="pass one of them"))
    if passes is not None and options.pipeline is not None:
        faults.append(Fault("passes and pipeline are both given", fix="pass one of them"))
    if faults:
        raise UserError(*faults)


def check_samples(samples: Sequence[dict[str, Tensor]], model: nn.Module) -> list[dict[str, Tensor]]:
    """The samples with integer inputs as int64.

    Raises:
        UserError: with every fault of every sample: keys, shapes, token ids, images that do not match the text.
    """
    if not isinstance(samples, Sequence):
        raise UserError(Fault(f"samples is a {type(samples).__name__}", "samples", "a list of dicts is expected"))
    if not samples:
        raise UserError(Fault("samples is empty", "samples", fix="pass at least one; 30 varied ones are recommended"))
    faults = [fault for index, sample in enumerate(samples) for fault in _faults(f"samples[{index}]", sample, model)]
    if faults:
        raise UserError(*faults)
    return [
        {key: tensor.long() if key in INTEGER_INPUTS else tensor for key, tensor in sample.items()}
        for sample in samples
    ]


def drop_duplicates(samples: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The samples without those that are equal to an earlier one."""
    unique: list[dict[str, Tensor]] = []
    for sample in samples:
        if not any(_equal(sample, other) for other in unique):
            unique.append(sample)
    return unique


def group_by_images(samples: Sequence[dict[str, Tensor]]) -> list[list[dict[str, Tensor]]]:
    """Groups of samples with the same images, in the order of their first samples.

    The vision tower runs once per group. A sample without images is a group of its own.
    """
    groups: list[list[dict[str, Tensor]]] = []
    for sample in samples:
        group = next((group for group in groups if same_images(group[0], sample)), None)
        if group is None:
            groups.append([sample])
        else:
            group.append(sample)
    return groups


def same_images(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether both samples have images, and the same images."""
    return all(key in first and key in second and torch.equal(first[key], second[key]) for key in IMAGE_INPUTS)


def drop_padding(sample: dict[str, Tensor], image_token_id: int) -> dict[str, Tensor]:
    """A checked sample without the tokens that attention_mask excludes, which would only cost time.

    The positions of the other tokens do not change, because models count them without padding. A sample that masks
    image tokens is returned unchanged.
    """
    mask = sample["attention_mask"][0].bool()  # [S]
    if bool(mask.all()) or bool((sample["input_ids"][0][~mask] == image_token_id).any()):
        return sample
    per_token = {key for key, tensor in sample.items() if tensor.shape == sample["input_ids"].shape}
    return {key: tensor[:, mask] if key in per_token else tensor for key, tensor in sample.items()}


def _equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    if first.keys() != second.keys() or any(first[key].dtype != second[key].dtype for key in first):
        return False
    return all(torch.equal(first[key], second[key]) for key in first)


def _faults(where: str, sample: dict[str, Tensor], model: nn.Module) -> list[Fault]:
    if not isinstance(sample, Mapping):
        return [Fault(f"a sample is a {type(sample).__name__}", where, "a dict of tensors is expected")]
    faults = [fault for key in sample if (fault := _key_fault(where, key))]
    missing = [key for key in TEXT_INPUTS if not isinstance(sample.get(key), Tensor)]
    if any(key in sample for key in IMAGE_INPUTS):
        missing += [key for key in IMAGE_INPUTS if not isinstance(sample.get(key), Tensor)]
    if missing:
        why = "a sample has input_ids and attention_mask, and with images pixel_values and image_grid_thw"
        return [*faults, *(Fault(f"the tensor {key} is missing", where, why) for key in missing)]
    ids = sample["input_ids"]
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0 or not _is_integer(ids):
        return [*faults, Fault(f"input_ids is {_shape(ids)}", where, "integers [1, S] with S > 0 are expected")]
    return faults + _text_faults(where, sample, model) + _image_faults(where, sample, InputLayout.of(model.config))


def _key_fault(where: str, key: object) -> Fault | None:
    if key in VIDEO_INPUTS:
        return Fault("videos are not supported", where, fix="calibrate with images")
    known = (*TEXT_INPUTS, *IMAGE_INPUTS)
    if key in known or key in OPTIONAL_INPUTS:
        return None
    fix = did_you_mean(str(key), known) or f"a sample has {', '.join(known)}"
    return Fault(f"unknown model input {key!r}", where, fix=fix)


def _text_faults(where: str, sample: dict[str, Tensor], model: nn.Module) -> list[Fault]:
    faults = []
    ids, mask = sample["input_ids"], sample["attention_mask"]
    if (
        mask.shape != ids.shape
        or mask.is_complex()
        or not bool(mask.any())
        or not bool(((mask == 0) | (mask == 1)).all())
    ):
        why = f"zeros and ones {list(ids.shape)} are expected, not all of them zero"
        faults.append(Fault(f"attention_mask is {_shape(mask)}", where, why))
    token_types = sample.get("mm_token_type_ids", ids)
    if not isinstance(token_types, Tensor) or token_types.shape != ids.shape or not _is_integer(token_types):
        why = f"integers {list(ids.shape)} are expected"
        faults.append(Fault("mm_token_type_ids does not match input_ids", where, why))
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    if not 0 <= int(ids.min()) <= int(ids.max()) < embeddings.num_embeddings:
        why = f"token ids range from 0 to {embeddings.num_embeddings - 1}"
        faults.append(Fault("a token id is outside the vocabulary", where, why))
    return faults


def _image_faults(where: str, sample: dict[str, Tensor], layout: InputLayout) -> list[Fault]:
    tokens = int((sample["input_ids"] == layout.image_token_id).sum())
    if IMAGE_INPUTS[0] not in sample:
        why = "input_ids holds image tokens, but there are no pixel_values"
        return [Fault(f"{tokens} image tokens without an image", where, why)] if tokens else []
    pixels, grid = sample["pixel_values"], sample["image_grid_thw"]
    is_grid = _is_integer(grid) and grid.ndim == 2 and grid.shape[-1] == 3 and grid.shape[0] > 0
    if not is_grid or pixels.ndim != 2 or not pixels.is_floating_point() or not bool((grid > 0).all()):
        why = "pixel_values float [P, D] and image_grid_thw integers [images, 3] are expected"
        return [Fault(f"pixel_values is {_shape(pixels)}, image_grid_thw is {_shape(grid)}", where, why)]
    if not bool((grid <= pixels.shape[0]).all()):  # products of larger numbers may overflow and appear to match
        return [Fault("image_grid_thw is larger than pixel_values", where, f"which has {pixels.shape[0]} patches")]
    faults = []
    patches, merge = int(grid.prod(-1).sum()), layout.merge_size
    if bool((grid[:, 1:] % merge != 0).any()):
        why = f"height and width must be multiples of {merge}"
        faults.append(Fault("image_grid_thw cannot be merged", where, why))
    if pixels.shape[1] != layout.patch_values:
        why = f"the model expects {layout.patch_values}"
        faults.append(Fault(f"pixel_values has {pixels.shape[1]} values per patch", where, why))
    if pixels.shape[0] != patches:
        why = f"image_grid_thw implies {patches}"
        faults.append(Fault(f"pixel_values has {pixels.shape[0]} patches", where, why))
    if tokens != layout.image_tokens(patches):
        why = f"the images have {layout.image_tokens(patches)} image features; image tokens must not be truncated"
        faults.append(Fault(f"input_ids holds {tokens} image tokens", where, why))
    if not bool(torch.isfinite(pixels).all()):
        faults.append(Fault("pixel_values holds NaN or Inf", where))
    elif (largest := max(abs(float(end)) for end in torch.aminmax(pixels))) > LARGEST_PIXEL:
        why = "normalized pixels (colors from 0 to 1, minus mean, divided by standard deviation) stay below 10"
        faults.append(Fault(f"pixel_values reaches {largest:.3g}", where, why, "check image_std and rescale_factor"))
    return faults


def _is_integer(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
