"""Lists the samples that --calib_images names: a folder of images, one image, or a data file."""

from pathlib import Path

from vlqc.errors import Fault, UserError
from vlqc.frontend.calibration.conversation import Conversation, ImageRef
from vlqc.frontend.calibration.data_file import DATA_SUFFIXES, NO_VIDEOS, SampleList, is_data_file, read_data_file
from vlqc.frontend.calibration.formats import PROMPT, TEXT_EXAMPLE
from vlqc.frontend.calibration.images import IMAGE_SUFFIXES, is_image, is_video
from vlqc.options.fields import OptionFields

KINDS = "pass a folder of images, one image, or a .jsonl or .json file"
TEXT_KINDS = f"pass --calib_images FILE.jsonl with lines such as {TEXT_EXAMPLE}"


def list_samples(source: Path, text_only: str | None = None) -> SampleList:
    """The samples in a fixed order. Opens no image. Raises UserError for an unusable source.

    text_only: title of a model that takes no images; None for others.
    """
    if text_only is not None and not (is_data_file(source) and source.is_file()):
        why = f"{text_only} has no vision tower: it is calibrated with prompts"
        raise UserError(Fault(f"{_named(source)} is not a .jsonl or .json file", why=why, fix=TEXT_KINDS))
    what, suffixes = _named(source), " ".join(IMAGE_SUFFIXES)
    if source.is_dir():
        return _list_folder(source)
    if not source.exists():
        raise UserError(Fault(what, why="there is no such folder or file", fix=KINDS))
    if not source.is_file():
        raise UserError(Fault(what, why="it is not a regular file", fix=KINDS))
    if is_data_file(source):
        return read_data_file(source, text_only)
    if is_image(source):
        return SampleList([Conversation.from_prompt((ImageRef(source),), PROMPT)])
    if is_video(source):
        raise UserError(Fault(what, why=NO_VIDEOS, fix=KINDS))
    known = f"{' '.join(DATA_SUFFIXES)} nor one of {suffixes}"
    raise UserError(Fault(what, why=f"it is neither a folder, nor {known}", fix=KINDS))


def _list_folder(folder: Path) -> SampleList:
    """One sample per image of a folder, in order of the names."""
    paths = sorted(path for path in folder.iterdir() if not path.is_dir())
    images = [path for path in paths if is_image(path)]
    data_files = [path for path in paths if is_data_file(path)]
    fix = f"pass {' or '.join(map(str, data_files[:3]))} to calibrate on the samples that it holds"
    if not images:
        why = f"the folder contains no {' '.join(IMAGE_SUFFIXES)} (its subfolders are not searched)"
        if any(map(is_video, paths)):
            why = f"the folder contains videos only; {NO_VIDEOS}"
        advice = fix if data_files else "add images; 30 varied ones are recommended"
        raise UserError(Fault(_named(folder), why=why, fix=advice))
    notes = [f"{folder} holds a data file beside the images: {fix}"] if data_files else []
    return SampleList([Conversation.from_prompt((ImageRef(path),), PROMPT) for path in images], notes)


def _named(source: Path) -> str:
    """The option and its value, with a remark if the user may not have given it."""
    is_default = source == OptionFields.model_fields["calib_images"].default
    return f"--calib_images {source}{' (the default)' if is_default else ''}"
