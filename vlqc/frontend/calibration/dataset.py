"""A folder of pictures, one picture, or JSON lines -> the model inputs on which a checkpoint is calibrated."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlqc.errors import Fault, UserError
from vlqc.formatting import pluralize
from vlqc.frontend.calibration.image_budget import share_budget
from vlqc.frontend.calibration.images import BadPicture, is_video, read_picture
from vlqc.frontend.calibration.probe import probe_sample
from vlqc.frontend.calibration.processor import ModelInputs, Patches
from vlqc.frontend.calibration.samples import by_pictures, checked_samples, without_copies, without_padding
from vlqc.frontend.calibration.sources import Request, list_requests
from vlqc.options.options import Options

ADVISED_PICTURES = 30


@dataclass(frozen=True)
class Calibration:
    """Model inputs in a fixed order, and what the user should know about them.

    samples: input_ids and attention_mask [1, S] int64; with pictures also pixel_values [P, C*T*p*p] float32 (P patches
    of all its pictures) and image_grid_thw [n, 3] int64 (one row per picture). probe: a small one to prove things on,
    see `probe.probe_sample`.
    """

    samples: list[dict[str, torch.Tensor]]
    notes: list[str] = field(default_factory=list)
    probe: dict[str, torch.Tensor] | None = None


def calibrate_on(given: Sequence[dict[str, torch.Tensor]] | None, options: Options, model: nn.Module) -> Calibration:
    """The samples given, else those that the user's options name; those with the same pictures follow each other.

    UserError for unusable ones, as `load_samples`.
    """
    loaded = load_calibration(options) if given is None else Calibration(given)  # type: ignore[arg-type]
    config: Any = model.config
    samples = [without_padding(it, config.image_token_id) for it in checked_samples(loaded.samples, model)]
    unique = without_copies(samples)
    copies = len(samples) - len(unique)
    notes = [f"{pluralize(copies, 'sample')} left out: the same as others"] if copies else []
    in_order = [sample for group in by_pictures(unique) for sample in group]
    return Calibration(in_order, loaded.notes + notes, probe_sample(in_order, config))


def load_calibration(options: Options) -> Calibration:
    """What the user's options say of calibration -> the samples. UserError as `load_samples`."""
    return load_samples(
        options.model_path,
        options.calib_images,
        trust_remote_code=options.trust_remote_code,
        skip_bad_images=options.skip_bad_images,
        max_samples=options.max_samples,
        seed=options.seed,
        max_tokens=options.max_tokens,
    )


def load_samples(
    model_path: Path,
    calib_images: Path,
    *,
    trust_remote_code: bool = False,
    skip_bad_images: bool = False,
    max_samples: int | None = None,
    seed: int = 0,
    max_tokens: int | None = None,
) -> Calibration:
    """Pictures or JSON lines, and the model's folder -> Calibration. Reads local files only, one picture at a time.

    max_samples: where there are more, `seed` chooses that many; they keep their order, and no other picture is read.
    max_tokens: the most tokens of one sample; its pictures are made smaller until it fits.
    Raises UserError with all unusable samples at once. With `skip_bad_images` every unreadable picture becomes a note,
    and the next sample in the order of `seed` takes the place of its own, as long as one is left; text that does not do
    is never skipped. Of a .jsonl file every bad line is named.
    """
    requests = list_requests(calib_images)
    inputs = ModelInputs(model_path, trust_remote_code=trust_remote_code)
    chosen, spare = _choose(len(requests), max_samples, seed)
    read: dict[int, _Sample] = {}
    pictures: list[Fault] = []
    texts: list[Fault] = []
    for number in chosen:  # grows while samples are skipped
        try:
            read[number] = _read_sample(inputs, requests[number], max_tokens)
        except _Unusable as error:
            pictures += [fault for fault in error.pictures if fault not in pictures]
            texts += [fault for fault in error.texts if fault not in texts]
            chosen += [spare.pop(0)] if skip_bad_images and spare else []
    if texts or (pictures and not skip_bad_images):
        skip = ", or add --skip_bad_images to go on without it" if not texts else ""
        fix = f"repair or remove what is named above{skip}"
        raise UserError(*pictures, *texts, Fault(f"{len(read)} of {len(chosen)} samples can be used", fix=fix))
    if not read:
        raise UserError(*pictures, Fault(f"no sample is left of {calib_images}", fix="name pictures that can be read"))
    notes = [f"skipped {fault.what}: {fault.why}" for fault in pictures]
    if max_samples is not None and max_samples < len(requests):
        notes.append(f"calibrated on {len(read)} of {len(requests)} samples, chosen by --seed {seed}")
    samples = [sample for _, sample in sorted(read.items())]
    notes += (
        _left_out(calib_images) + _made_smaller(samples, max_tokens) + _advice(sum(each.pictures for each in samples))
    )
    return Calibration([each.tensors for each in samples], inputs.notes + notes)


def _choose(count: int, most: int | None, seed: int) -> tuple[list[int], list[int]]:
    """Numbers below `count` -> those to read, ascending, and those to take in their place, in the order of `seed`."""
    if most is None or most >= count:
        return list(range(count)), []
    draw = random.Random(seed)  # of its methods, random() alone is promised to stay the same
    lots = [draw.random() for _ in range(count)]
    order = sorted(range(count), key=lots.__getitem__)
    return sorted(order[:most]), order[most:]


@dataclass(frozen=True)
class _Sample:
    """The model inputs of one request, how many pictures they hold, and how many of these were made smaller."""

    tensors: dict[str, torch.Tensor]
    pictures: int
    smaller: int = 0


class _Unusable(Exception):
    """What keeps a sample from being used: pictures that cannot be read, or text that does not do."""

    def __init__(self, pictures: Sequence[Fault] = (), texts: Sequence[Fault] = ()) -> None:
        self.pictures, self.texts = pictures, texts
        super().__init__()


def _read_sample(inputs: ModelInputs, request: Request, max_tokens: int | None) -> _Sample:
    """Reads the pictures of one request and makes its model inputs. Raises _Unusable with everything wrong with it."""
    made = _read_pictures(inputs, request, [None] * len(request.pictures))
    tensors = _build(inputs, request, made)
    length = tensors["input_ids"].shape[1]
    if max_tokens is None or length <= max_tokens:
        return _Sample(tensors, len(made))
    tokens = [inputs.tokens_of(patches) for patches in made]
    text = length - sum(tokens)
    shares = share_budget(tokens, max_tokens - text, inputs.fewest_tokens)
    if not shares:
        raise _Unusable(texts=[_too_long(request, text, inputs.fewest_tokens * len(tokens), max_tokens)])
    limits = [share if share < count else None for share, count in zip(shares, tokens, strict=True)]
    made = _read_pictures(inputs, request, limits)  # read anew, so that no sample's full pictures pile up in memory
    return _Sample(_build(inputs, request, made), len(made), len(limits) - limits.count(None))


def _read_pictures(inputs: ModelInputs, request: Request, limits: Sequence[int | None]) -> list[Patches]:
    """The patches of every picture, of at most so many tokens each where a limit is given."""
    made, faults = [], []
    for path, limit in zip(request.pictures, limits, strict=True):
        try:
            made.append(inputs.patches_of(read_picture(path), limit))
        except BadPicture as error:
            faults.append(Fault(str(path), where=request.where, why=str(error)))
    if faults:
        raise _Unusable(pictures=faults)
    return made


def _build(inputs: ModelInputs, request: Request, made: list[Patches]) -> dict[str, torch.Tensor]:
    try:
        return inputs.build(made, request.prompt, request.response)
    except ValueError as error:
        fault = Fault(f"the prompt {request.prompt!r}", where=request.where, why=str(error))
        raise _Unusable(texts=[fault]) from error


def _too_long(request: Request, text: int, pictures: int, max_tokens: int) -> Fault:
    what = f"the text of the prompt {request.prompt[:40]!r} alone has {text} tokens"
    if text <= max_tokens:
        what = f"the sample needs {pictures} tokens at least for its pictures and {text} for its text"
    fix = f"shorten the text, or give --max_tokens {text + pictures} or more"
    return Fault(what, where=request.where, why=f"--max_tokens is {max_tokens}", fix=fix)


def _left_out(source: Path) -> list[str]:
    videos = sum(is_video(path) for path in source.iterdir()) if source.is_dir() else 0
    return [f"left out of {source}: {pluralize(videos, 'video')}, which vlqc does not support"] if videos else []


def _made_smaller(samples: list[_Sample], max_tokens: int | None) -> list[str]:
    smaller, all_of_them = sum(each.smaller for each in samples), sum(each.pictures for each in samples)
    if not smaller:
        return []
    return [f"{smaller} of {pluralize(all_of_them, 'picture')} made smaller to keep samples within {max_tokens} tokens"]


def _advice(pictures: int) -> list[str]:
    if pictures == 0:
        return ["no sample has a picture: the vision tower sees nothing to calibrate on"]
    if pictures < ADVISED_PICTURES:
        return [f"{pluralize(pictures, 'calibration picture')}: {ADVISED_PICTURES} varied ones are advised"]
    return []
