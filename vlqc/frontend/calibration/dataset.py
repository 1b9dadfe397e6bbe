"""Loads the calibration data: images, videos, data files or ready samples -> model inputs."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vlqc.errors import Fault, UserError, first_faults
from vlqc.families.inputs.text_inputs import TextInputs
from vlqc.families.registry import family_of
from vlqc.files import read_json_object
from vlqc.formatting import pluralize
from vlqc.frontend.calibration.conversation import Conversation, VideoRef
from vlqc.frontend.calibration.data_file import SampleList, is_data_file
from vlqc.frontend.calibration.probe import probe_sample, vision_probe_sample
from vlqc.frontend.calibration.processor import SampleProcessor
from vlqc.frontend.calibration.sample_reader import BadMedia, ReadSample, UnusableSampleError, read_sample
from vlqc.frontend.calibration.samples import check_samples, drop_duplicates, drop_padding, group_by_images
from vlqc.frontend.calibration.sources import list_samples
from vlqc.frontend.distributed import current_process_group
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.options.options import Options

NO_IMAGES = (
    "no sample has an image: the vision tower stays in float, and activation ranges of the language model are those of "
    "text tokens"
)
NO_SAMPLES = "compiled from the weights alone, without calibration samples: no output was measured"
MOST_SAMPLES = 10_000
RECOMMENDED = 30  # images, or prompts of text-only models


@dataclass(frozen=True)
class CalibrationDataset:
    """Model inputs in a fixed order, and notes for the user.

    samples: input_ids and attention_mask [1, S] int64; with images also those of the family's inputs. probe: a small
    sample, see `probe_sample`; vision_probe: see `vision_probe_sample`.
    """

    samples: list[dict[str, torch.Tensor]]
    notes: list[str] = field(default_factory=list)
    probe: dict[str, torch.Tensor] | None = None
    vision_probe: dict[str, torch.Tensor] | None = None


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
            max_frames=options.max_frames,
        )
        samples, notes = loaded.samples, loaded.notes
    inputs, config = model.family.inputs, model.module.config
    without_padding = [drop_padding(sample, inputs, config) for sample in check_samples(samples, model)]
    unique = drop_duplicates(without_padding)
    if duplicates := len(without_padding) - len(unique):
        notes = [*notes, f"{pluralize(duplicates, 'duplicate sample')} dropped"]
    ordered = [sample for group in group_by_images(unique, inputs) for sample in group]
    vision_probe = vision_probe_sample(ordered, inputs, config)
    if vision_probe is not None:
        notes = [*notes, NO_IMAGES]
    return CalibrationDataset(ordered, notes, probe_sample(ordered, inputs, config), vision_probe)


def without_samples(model: StreamedModel, *, smallest: bool) -> CalibrationDataset:
    """No samples, and a made-up one as the probe, on which the model runs once.

    smallest: for passes that prove nothing on it. Ranks other than 0 get an empty dataset. Raises UserError if the
    model's config allows no such sample.
    """
    if not current_process_group().is_rank0:
        return CalibrationDataset([])
    try:
        probe = model.family.inputs.synthetic_sample(model.module.config, smallest=smallest)
    except Exception as error:  # any config.json is possible
        why, where = f"{type(error).__name__}: {error}", str(model.checkpoint.folder / "config.json")
        raise UserError(Fault("the model cannot be run", where, why, "check config.json")) from error
    return CalibrationDataset([], [NO_SAMPLES], probe)


def load_samples(
    model_path: Path,
    calib_images: Path,
    *,
    trust_remote_code: bool = False,
    skip_bad_images: bool = False,
    max_samples: int | None = None,
    seed: int = 0,
    max_tokens: int | None = None,
    max_frames: int | None = None,
) -> CalibrationDataset:
    """Reads samples with the tokenizer and image processor of a checkpoint. No network; one image at a time.

    Args:
        model_path: folder of the checkpoint.
        calib_images: a folder of images and videos, one of them, or a data file; for text-only models a data file of
            prompts.
        trust_remote_code: allow the checkpoint's code to run.
        skip_bad_images: turn every unreadable image or video into a note; the next sample in the random order of `seed`
            takes the place of its sample, as long as one is left. Faulty text is never skipped.
        max_samples: if there are more, so many are selected with `seed`. They keep their order; the images of the
            others are not read.
        max_tokens: maximum number of tokens of one sample; its videos get fewer frames, and then its images and frames
            are resized, until it fits.
        max_frames: maximum number of frames of one video.

    Raises:
        UserError: with all unusable samples, and the faulty entries of a data file.
    """
    config_file = model_path / "config.json"
    inputs = family_of(read_json_object(config_file), str(config_file)).inputs
    listed = _listed(calib_images, inputs)
    sources = listed.conversations
    if max_samples is None and len(sources) > MOST_SAMPLES:
        what = f"--calib_images {calib_images} has {len(sources):,} samples"
        why = f"at most {MOST_SAMPLES:,} are read without --max_samples: their inputs are kept in memory"
        raise UserError(Fault(what, why=why, fix="select some of them, for example with --max_samples 128"))
    processor = SampleProcessor(model_path, inputs, trust_remote_code=trust_remote_code)
    if (with_videos := any(source.videos for source in sources)) or any(source.images for source in sources):
        processor.check_images(with_videos=with_videos)
    selected, spare = _select(len(sources), max_samples, seed)
    samples: dict[int, ReadSample] = {}
    bad_media: list[BadMedia] = []
    text_faults: list[Fault] = []
    for index in selected:  # grows while samples are skipped
        try:
            samples[index] = read_sample(processor, sources[index], max_tokens, max_frames)
        except UnusableSampleError as error:
            bad_media += [each for each in error.bad_media if each not in bad_media]
            text_faults += [fault for fault in error.text_faults if fault not in text_faults]
            selected += [spare.pop(0)] if skip_bad_images and spare else []
    image_faults = first_faults([each.fault for each in bad_media], f"{_kinds(bad_media)} cannot be used")
    text_faults = first_faults(text_faults, "faulty texts")
    if text_faults or (image_faults and not skip_bad_images):
        can_skip = samples and not text_faults
        skip = f", or add --skip_bad_images to skip these {_kinds(bad_media)}" if can_skip else ""
        fix = f"repair or remove what is named above{skip}"
        if any(each.is_missing for each in bad_media) and is_data_file(calib_images):
            fix += f"; relative paths start at the folder of the file, {calib_images.parent}"
        usable = f"only {len(samples)} of {len(selected)} samples" if samples else "no sample"
        total = Fault(f"{usable} can be used", fix=fix)
        raise UserError(*image_faults, *text_faults, total)
    if not samples or (bad_media and not any(sample.images or sample.videos for sample in samples.values())):
        fix = f"pass readable {_kinds(bad_media)}"
        raise UserError(*image_faults, Fault(f"{calib_images} has no usable sample", fix=fix))
    notes = [f"skipped {each.name}{f' in {each.where}' if each.where else ''}: {each.why}" for each in bad_media]
    if max_samples is not None and max_samples < len(sources):
        notes.append(f"calibrated on {len(samples)} of {len(sources)} samples, selected with --seed {seed}")
    ordered = [sample for _, sample in sorted(samples.items())]
    notes += _thinning_notes(ordered, max_frames) + _resize_notes(ordered, max_tokens) + _count_notes(ordered)
    return CalibrationDataset([sample.tensors for sample in ordered], listed.notes + processor.notes + notes)


def selected_conversations(options: Options, inputs: TextInputs) -> list[Conversation]:
    """The conversations that `load_calibration` reads first. Opens no image. UserError for an unusable source."""
    listed = _listed(options.calib_images, inputs).conversations
    return [listed[index] for index in _select(len(listed), options.max_samples, options.seed)[0]]


def _listed(calib_images: Path, inputs: TextInputs) -> SampleList:
    text_only = inputs.title if inputs.processing is None else None
    return list_samples(calib_images, text_only, None if inputs.videos is not None else inputs.title)


def _select(count: int, max_samples: int | None, seed: int) -> tuple[list[int], list[int]]:
    """Indices below `count` -> those to read, ascending, and the others in random order."""
    if max_samples is None or max_samples >= count:
        return list(range(count)), []
    generator = random.Random(seed)  # of its methods, only random() is guaranteed not to change between versions
    keys = [generator.random() for _ in range(count)]
    order = sorted(range(count), key=keys.__getitem__)
    return sorted(order[:max_samples]), order[max_samples:]


def _kinds(media: Sequence[BadMedia]) -> str:
    """Images, videos, or both."""
    given = {isinstance(each.image, VideoRef) for each in media}
    return " and ".join(kind for kind, is_video in (("images", False), ("videos", True)) if is_video in given)


def _thinning_notes(samples: list[ReadSample], max_frames: int | None) -> list[str]:
    """How many videos have fewer frames than their settings ask for, because of --max_frames."""
    thinned, videos = sum(sample.thinned for sample in samples), sum(sample.videos for sample in samples)
    return [f"{thinned} of {pluralize(videos, 'video')} with fewer frames by --max_frames {max_frames}"] * bool(thinned)


def _resize_notes(samples: list[ReadSample], max_tokens: int | None) -> list[str]:
    """How many images and videos were reduced."""
    resized, images = sum(sample.resized for sample in samples), sum(sample.images for sample in samples)
    reduced, videos = sum(sample.reduced for sample in samples), sum(sample.videos for sample in samples)
    reason = f"to keep samples within {max_tokens} tokens"
    notes = [f"{resized} of {pluralize(images, 'image')} resized {reason}"] if resized else []
    return notes + (
        [f"{reduced} of {pluralize(videos, 'video')} with fewer or smaller frames {reason}"] if reduced else []
    )


def _count_notes(samples: list[ReadSample]) -> list[str]:
    images, videos = sum(sample.images for sample in samples), sum(sample.videos for sample in samples)
    counts = [pluralize(images, "calibration image")] if images else []
    counts += [pluralize(videos, "calibration video")] if videos else []
    still = sum(sample.still for sample in samples)
    notes = []
    if still:
        notes = [f'{pluralize(still, "video")} with one frame, which is repeated: "image" is the key of an image']
    counts = counts or [pluralize(len(samples), "calibration prompt")]
    few = (images + videos or len(samples)) < RECOMMENDED
    return notes + ([f"{' and '.join(counts)}: {RECOMMENDED} varied ones are recommended"] if few else [])
