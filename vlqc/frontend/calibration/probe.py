"""The sample on which rewrites of a stage are proven: a calibration sample, or a small one cut out of it.

Proofs run a stage repeatedly in float32; they need real rows, not many: the first tokens (one of which carries massive
activations), a crop of an image with several attention windows, some text after it.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vlqc.families.inputs.text_inputs import TextInputs
from vlqc.ir.execution import SampleShape

PROBE = -1  # index of the probe, which is not one of the calibration samples
VISION_PROBE = -2  # of the probe of the vision tower, if no calibration sample has an image
PROBE_ROWS = 512  # if a sample has at most this many rows, the largest such sample is the probe
MEASURED_ROWS = 4096  # of a sample that is measured for a modality that the probe lacks: bounds the time


def probe_sample(samples: Sequence[dict[str, Tensor]], inputs: TextInputs, config: Any) -> dict[str, Tensor] | None:
    """Cuts a probe out of the smallest sample, in a model with images out of the smallest one with images.

    Args:
        samples: model inputs, see `CalibrationDataset`.
        inputs: of the model's family.
        config: of the model.

    Returns:
        Model inputs; None if there is no such sample, or one of them has at most PROBE_ROWS rows as it is.
    """
    candidates = [sample for sample in samples if inputs.has_images(sample)] or samples
    if not candidates or any(inputs.rows(sample) <= PROBE_ROWS for sample in candidates):
        return None
    return inputs.crop(min(candidates, key=inputs.rows), config)


def vision_probe_sample(
    samples: Sequence[dict[str, Tensor]], inputs: TextInputs, config: Any
) -> dict[str, Tensor] | None:
    """A made-up sample with an image, for the proofs in the vision tower of a model; None if a sample has an image, or
    the model has no vision tower."""
    if inputs.processing is None or not samples or any(map(inputs.has_images, samples)):
        return None
    return inputs.synthetic_sample(config)


def choose_probe(rows: Sequence[int]) -> int:
    """Row counts of the samples -> index of the largest of at most PROBE_ROWS rows, or else of the smallest."""
    small = [index for index, count in enumerate(rows) if count <= PROBE_ROWS]
    if small:
        return max(small, key=lambda index: rows[index])
    return min(range(len(rows)), key=lambda index: rows[index])


def missing_modalities(probe: SampleShape, shapes: Sequence[SampleShape]) -> list[SampleShape]:
    """Samples with the modalities that the probe of a stage lacks: for each one chosen as a probe is.

    Modalities whose samples all have more than MEASURED_ROWS rows are left out.
    """
    chosen: list[SampleShape] = []
    for index, rows in enumerate(probe.rows_per_modality):
        if rows or any(shape.rows_per_modality[index] for shape in chosen):
            continue
        having = [shape for shape in shapes if shape.rows_per_modality[index] and shape.rows <= MEASURED_ROWS]
        if having:
            chosen.append(having[choose_probe([shape.rows for shape in having])])
    return chosen
