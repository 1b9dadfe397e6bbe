"""Loads the calibration data: a folder of images, one image, JSON lines or ready samples -> model inputs."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vlqc.errors import Fault, UserError, first_faults
from vlqc.families.inputs.image_processing import Patches
from vlqc.families.inputs.text_inputs import TextInputs
from vlqc.families.registry import family_of
from vlqc.files import read_json_object
from vlqc.formatting import excerpt, pluralize
from vlqc.frontend.calibration.conversation import Conversation, ImageRef
from vlqc.frontend.calibration.data_file import is_data_file
from vlqc.frontend.calibration.image_budget import split_budget
from vlqc.frontend.calibration.images import MISSING, ImageError, is_video, read_image
from vlqc.frontend.calibration.probe import probe_sample
from vlqc.frontend.calibration.processor import SampleProcessor
from vlqc.frontend.calibration.samples import check_samples, drop_duplicates, drop_padding, group_by_images
from vlqc.frontend.calibration.sources import list_samples
from vlqc.frontend.distributed import current_process_group
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.options.options import Options

RECOMMENDED = 30  # images, or prompts of text-only models


@dataclass(frozen=True)
class CalibrationDataset:
    """Model inputs in a fixed order, and notes for the user.

    samples: input_ids and attention_mask [1, S] int64; with images also those of the family's inputs. probe: a small
    sample, see `probe_sample`.
    """

    samples: list[dict[str, torch.Tensor]]
    notes: list[str] = field(default_factory=list)
    probe: dict[str, torch.Tensor] | None = None


def load_calibration(
    options: Options, model: StreamedModel, samples: Sequence[dict[str, torch.Tensor]] | None = None
) -> CalibrationDataset:
    """Loads, checks and orders the calibration samples; samples with the same images are adjacent.

    Ranks other than 0 get an empty dataset.

    Args:
        options: name the calibration data.
        model: the model that the samples must match.
        samples: ready model inputs, used instead of options.calib_images.

    Raises:
        UserError: for unusable samples.
    """
    if not current_process_group().is_rank0:
        return CalibrationDataset([])
    notes: list[str] = []
    if samples is None:
        loaded = load_samples(
            options.model_path,
            options.calib_images,
            trust_remote_code=options.trust_remote_code,
            skip_bad_images=options.skip_bad_images,
            max_samples=options.max_samples,
            seed=options.seed,
            max_tokens=options.max_tokens,
        )
        samples, notes = loaded.samples, loaded.notes
    inputs, config = model.family.inputs, model.module.config
    without_padding = [drop_padding(sample, inputs, config) for sample in check_samples(samples, model)]
    unique = drop_duplicates(without_padding)
    if duplicates := len(without_padding) - len(unique):
        notes = [*notes, f"{pluralize(duplicates, 'duplicate sample')} dropped"]
    ordered = [sample for group in group_by_images(unique, inputs) for sample in group]
    _require_image(ordered, inputs, options)
    return CalibrationDataset(ordered, notes, probe_sample(ordered, inputs, config))


def _require_image(samples: Sequence[dict[str, torch.Tensor]], inputs: TextInputs, options: Options) -> None:
    """UserError if the model has a vision tower and no sample reaches it: every stage is traced on some sample."""
    if inputs.processing is None or any(inputs.patches(sample) for sample in samples):
        return
    where = str(options.calib_images) if "calib_images" in options.model_fields_set else "samples"
    why = "the vision tower has no activations to calibrate on"
    raise UserError(Fault("no calibration sample has an image", where, why, "add a sample with an image"))


def load_samples(
    model_path: Path,
    calib_images: Path,
    *,
    trust_remote_code: bool = False,
    skip_bad_images: bool = False,
    max_samples: int | None = None,
    seed: int = 0,
    max_tokens: int | None = None,
) -> CalibrationDataset:
    """Reads samples with the tokenizer and image processor of a checkpoint. No network; one image at a time.

    Args:
        model_path: folder of the checkpoint.
        calib_images: a folder of images, one image, or a .jsonl file; for text-only models a .jsonl file of prompts.
        trust_remote_code: allow the checkpoint's code to run.
        skip_bad_images: turn every unreadable image into a note; the next sample in the random order of `seed` takes
            the place of its sample, as long as one is left. Faulty text is never skipped.
        max_samples: if there are more, so many are selected with `seed`. They keep their order; the images of the
            others are not read.
        max_tokens: maximum number of tokens of one sample; its images are resized until it fits.

    Raises:
        UserError: with all unusable samples, and every faulty line of a .jsonl file.
    """
    config_file = model_path / "config.json"
    inputs = family_of(read_json_object(config_file), str(config_file)).inputs
    listed = list_samples(calib_images, text_only=inputs.title if inputs.processing is None else None)
    sources = listed.conversations
    processor = SampleProcessor(model_path, inputs, trust_remote_code=trust_remote_code)
    if any(source.images for source in sources):
        processor.check_images()
    selected, spare = _select(len(sources), max_samples, seed)
    samples: dict[int, _Sample] = {}
    bad_images: list[_BadImage] = []
    text_faults: list[Fault] = []
    for index in selected:  # grows while samples are skipped
        try:
            samples[index] = _read_sample(processor, sources[index], max_tokens)
        except _UnusableSample as error:
            bad_images += [image for image in error.bad_images if image not in bad_images]
            text_faults += [fault for fault in error.text_faults if fault not in text_faults]
            selected += [spare.pop(0)] if skip_bad_images and spare else []
    image_faults = first_faults([image.fault for image in bad_images], "images cannot be used")
    text_faults = first_faults(text_faults, "faulty texts")
    if text_faults or (image_faults and not skip_bad_images):
        can_skip = samples and not text_faults
        skip = ", or add --skip_bad_images to skip these images" if can_skip else ""
        fix = f"repair or remove what is named above{skip}"
        if any(image.is_missing for image in bad_images) and is_data_file(calib_images):
            fix += f"; relative paths start at the folder of the file, {calib_images.parent}"
        total = Fault(f"only {len(samples)} of {len(selected)} samples can be used", fix=fix)
        raise UserError(*image_faults, *text_faults, total)
    if not samples:
        raise UserError(*image_faults, Fault(f"{calib_images} has no usable sample", fix="pass readable images"))
    notes = [f"skipped image {image.image.name}: {image.why}" for image in bad_images]
    if max_samples is not None and max_samples < len(sources):
        notes.append(f"calibrated on {len(samples)} of {len(sources)} samples, selected with --seed {seed}")
    ordered = [sample for _, sample in sorted(samples.items())]
    notes += _video_notes(calib_images) + _resize_notes(ordered, max_tokens) + _count_notes(ordered, inputs)
    return CalibrationDataset([sample.tensors for sample in ordered], listed.notes + processor.notes + notes)


def _select(count: int, max_samples: int | None, seed: int) -> tuple[list[int], list[int]]:
    """Indices below `count` -> those to read, ascending, and the others in random order."""
    if max_samples is None or max_samples >= count:
        return list(range(count)), []
    generator = random.Random(seed)  # of its methods, only random() is guaranteed not to change between versions
    keys = [generator.random() for _ in range(count)]
    order = sorted(range(count), key=keys.__getitem__)
    return sorted(order[:max_samples]), order[max_samples:]


@dataclass(frozen=True)
class _Sample:
    """Model inputs, the number of images in them, and how many of these were resized to fit the token budget."""

    tensors: dict[str, torch.Tensor]
    images: int
    resized: int = 0


@dataclass(frozen=True)
class _BadImage:
    """An image that cannot be used. where: names the sample; why: the reason."""

    image: ImageRef
    where: str
    why: str

    @property
    def is_missing(self) -> bool:
        return self.why == MISSING

    @property
    def fault(self) -> Fault:
        return Fault(f"image {self.image.name} cannot be used", where=self.where, why=self.why)


class _UnusableSample(Exception):
    """Faults of the images and of the text of one sample."""

    def __init__(self, bad_images: Sequence[_BadImage] = (), text_faults: Sequence[Fault] = ()) -> None:
        self.bad_images, self.text_faults = bad_images, text_faults
        super().__init__()


def _read_sample(processor: SampleProcessor, source: Conversation, max_tokens: int | None) -> _Sample:
    """Reads the images of one sample and builds its model inputs. Raises _UnusableSample with all of its faults."""
    patches = _read_images(processor, source, [None] * len(source.images))
    tensors = _build(processor, source, patches)
    length = tensors["input_ids"].shape[1]
    if max_tokens is None or length <= max_tokens:
        return _Sample(tensors, len(patches))
    tokens = [processor.image_tokens(each) for each in patches]
    text = length - sum(tokens)
    smallest = processor.min_image_tokens if tokens else 0
    budgets = split_budget(tokens, max_tokens - text, smallest)
    if not budgets:
        fault = _too_long(source, text, smallest * len(tokens), max_tokens)
        raise _UnusableSample(text_faults=[fault])
    limits = [budget if budget < count else None for budget, count in zip(budgets, tokens, strict=True)]
    # Read again rather than kept: full-size images of a whole sample may not fit in memory.
    patches = _read_images(processor, source, limits)
    return _Sample(_build(processor, source, patches), len(patches), len(limits) - limits.count(None))


def _read_images(processor: SampleProcessor, source: Conversation, limits: Sequence[int | None]) -> list[Patches]:
    """Patches of every image, with at most so many image tokens each where there is a limit."""
    patches, bad_images = [], []
    for image, limit in zip(source.images, limits, strict=True):
        try:
            patches.append(processor.process_image(read_image(image.source), limit, image.pixels))
        except ImageError as error:
            bad_images.append(_BadImage(image, source.where, str(error)))
    if bad_images:
        raise _UnusableSample(bad_images)
    return patches


def _build(processor: SampleProcessor, source: Conversation, patches: list[Patches]) -> dict[str, torch.Tensor]:
    try:
        return processor.build_sample(patches, source)
    except ValueError as error:
        fault = Fault(f"the prompt {excerpt(source.request)}", where=source.where, why=str(error))
        raise _UnusableSample(text_faults=[fault]) from error


def _too_long(source: Conversation, text: int, images: int, max_tokens: int) -> Fault:
    what = f"the text of the prompt {excerpt(source.request)} alone has {pluralize(text, 'token')}"
    if text <= max_tokens:
        what = f"the sample needs at least {pluralize(images, 'token')} for its images and {text} for its text"
    fix = f"shorten the text, or give --max_tokens {text + images} or more"
    return Fault(what, where=source.where, why=f"--max_tokens is {max_tokens}", fix=fix)


def _video_notes(source: Path) -> list[str]:
    videos = sum(is_video(path) for path in source.iterdir()) if source.is_dir() else 0
    return [f"ignored {pluralize(videos, 'video')} in {source}: videos are not supported"] if videos else []


def _resize_notes(samples: list[_Sample], max_tokens: int | None) -> list[str]:
    resized, images = sum(sample.resized for sample in samples), sum(sample.images for sample in samples)
    if not resized:
        return []
    return [f"{resized} of {pluralize(images, 'image')} resized to keep samples within {max_tokens} tokens"]


def _count_notes(samples: list[_Sample], inputs: TextInputs) -> list[str]:
    has_images = inputs.processing is not None
    count = sum(sample.images for sample in samples) if has_images else len(samples)
    if count == 0:
        return ["no sample has an image: the vision tower has no activations to calibrate on"]
    kind = "calibration image" if has_images else "calibration prompt"
    return [f"{pluralize(count, kind)}: {RECOMMENDED} varied ones are recommended"] if count < RECOMMENDED else []
