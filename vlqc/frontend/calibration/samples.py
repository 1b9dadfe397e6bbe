"""Checks and orders model inputs: faults, duplicates, padding, shared images."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlqc.errors import Fault, UserError
from vlqc.families.inputs.text_inputs import TextInputs
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.options.options import Options


def reject_conflicting_arguments(options: Options, *, samples: object, passes: object) -> None:
    """UserError if the Python API receives two arguments of which one would be ignored."""
    faults = []
    if samples is not None and "calib_images" in options.model_fields_set:
        faults.append(Fault("samples and calib_images are both given", fix="pass one of them"))
    if passes is not None and options.pipeline is not None:
        faults.append(Fault("passes and pipeline are both given", fix="pass one of them"))
    if faults:
        raise UserError(*faults)


def check_samples(samples: Sequence[dict[str, Tensor]], model: StreamedModel) -> list[dict[str, Tensor]]:
    """The samples with integer inputs as int64.

    Raises:
        UserError: with every fault of every sample: keys, shapes, token ids, images that do not match the text.
    """
    if not isinstance(samples, Sequence):
        raise UserError(Fault(f"samples is a {type(samples).__name__}", "samples", "a list of dicts is expected"))
    if not samples:
        raise UserError(Fault("samples is empty", "samples", fix="pass at least one; 30 varied ones are recommended"))
    inputs = model.family.inputs
    faults = [
        fault
        for index, sample in enumerate(samples)
        for fault in inputs.faults(f"samples[{index}]", sample, model.module)
    ]
    if faults:
        raise UserError(*faults)
    return [inputs.normalized(sample) for sample in samples]


def drop_duplicates(samples: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The samples without those that are equal to an earlier one."""
    unique: list[dict[str, Tensor]] = []
    for sample in samples:
        if not any(_equal(sample, other) for other in unique):
            unique.append(sample)
    return unique


def group_by_images(samples: Sequence[dict[str, Tensor]], inputs: TextInputs) -> list[list[dict[str, Tensor]]]:
    """Groups of samples with the same images, in the order of their first samples.

    The vision tower runs once per group. A sample without images is a group of its own.
    """
    groups: list[list[dict[str, Tensor]]] = []
    for sample in samples:
        group = next((group for group in groups if inputs.same_images(group[0], sample)), None)
        if group is None:
            groups.append([sample])
        else:
            group.append(sample)
    return groups


def drop_padding(sample: dict[str, Tensor], inputs: TextInputs, config: Any) -> dict[str, Tensor]:
    """A checked sample without the tokens that attention_mask excludes, which would only cost time.

    The positions of the other tokens do not change, because models count them without padding. A sample that masks
    image tokens is returned unchanged.

    inputs, config: of the model.
    """
    mask = sample["attention_mask"][0].bool()  # [S]
    if bool(mask.all()) or bool(inputs.is_image_token(sample["input_ids"], config)[0][~mask].any()):
        return sample
    per_token = {key for key, tensor in sample.items() if tensor.shape == sample["input_ids"].shape}
    return {key: tensor[:, mask] if key in per_token else tensor for key, tensor in sample.items()}


def _equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    if first.keys() != second.keys() or any(first[key].dtype != second[key].dtype for key in first):
        return False
    return all(torch.equal(first[key], second[key]) for key in first)
