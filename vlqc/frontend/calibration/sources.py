"""Lists the samples that --calib_images names: a folder of images and videos, one of them, or a data file."""

from pathlib import Path

from vlqc.errors import Fault, UserError
from vlqc.formatting import pluralize
from vlqc.frontend.calibration.conversation import Conversation, ImageRef, Turn, VideoRef
from vlqc.frontend.calibration.data_file import DATA_SUFFIXES, NO_VIDEOS, SampleList, is_data_file, read_data_file
from vlqc.frontend.calibration.formats import PROMPT, TEXT_EXAMPLE, VIDEO_PROMPT
from vlqc.frontend.calibration.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES, is_image, is_video
from vlqc.options.fields import OptionFields

KINDS = "pass a folder of images or videos, one image or video, or a .jsonl or .json file"
TEXT_KINDS = f"pass --calib_images FILE.jsonl with lines such as {TEXT_EXAMPLE}"


def list_samples(source: Path, text_only: str | None = None, no_videos: str | None = None) -> SampleList:
    """The samples in a fixed order. Opens no image. Raises UserError for an unusable source.

    text_only, no_videos: title of a model that takes no images, or no videos; None for others.
    """
    if text_only is not None and not (is_data_file(source) and source.is_file()):
        why = f"{text_only} has no vision tower: it is calibrated with prompts"
        raise UserError(Fault(f"{_named(source)} is not a .jsonl or .json file", why=why, fix=TEXT_KINDS))
    what, suffixes = _named(source), " ".join([*IMAGE_SUFFIXES, *VIDEO_SUFFIXES])
    if source.is_dir():
        return _list_folder(source, no_videos)
    if not source.exists():
        raise UserError(Fault(what, why="there is no such folder or file", fix=KINDS))
    if not source.is_file():
        raise UserError(Fault(what, why="it is not a regular file", fix=KINDS))
    if is_data_file(source):
        return read_data_file(source, text_only, no_videos)
    if is_video(source) and no_videos is not None:
        raise UserError(Fault(what, why=f"{no_videos} takes no videos", fix=NO_VIDEOS))
    if is_image(source) or is_video(source):
        return SampleList([_file_sample(source)])
    known = f"{' '.join(DATA_SUFFIXES)} nor one of {suffixes}"
    raise UserError(Fault(what, why=f"it is neither a folder, nor {known}", fix=KINDS))


def _list_folder(folder: Path, no_videos: str | None) -> SampleList:
    """One sample per image and video of a folder, in order of the names."""
    paths = sorted(path for path in folder.iterdir() if not path.is_dir())
    videos = [path for path in paths if is_video(path)]
    used = [path for path in paths if is_image(path) or (is_video(path) and no_videos is None)]
    data_files = [path for path in paths if is_data_file(path)]
    fix = f"pass {' or '.join(map(str, data_files[:3]))} to calibrate on the samples that it holds"
    if not used:
        suffixes = " ".join(IMAGE_SUFFIXES if no_videos else [*IMAGE_SUFFIXES, *VIDEO_SUFFIXES])
        why = f"the folder contains no {suffixes} (its subfolders are not searched)"
        if videos:
            why = f"the folder contains videos only, and {no_videos} takes none"
        advice = fix if data_files else "add images; 30 varied ones are recommended"
        raise UserError(Fault(_named(folder), why=why, fix=advice))
    notes = [f"{folder} holds a data file beside the images: {fix}"] if data_files else []
    if videos and no_videos is not None:
        notes.append(f"ignored {pluralize(len(videos), 'video')} in {folder}: {no_videos} takes no videos")
    return SampleList([_file_sample(path) for path in used], notes)


def _file_sample(path: Path) -> Conversation:
    """An image or a video, with the default prompt."""
    if is_video(path):
        return Conversation((Turn("user", (VideoRef(path), VIDEO_PROMPT)),))
    return Conversation.from_prompt((ImageRef(path),), PROMPT)


def _named(source: Path) -> str:
    """The option and its value, with a remark if the user may not have given it."""
    is_default = source == OptionFields.model_fields["calib_images"].default
    return f"--calib_images {source}{' (the default)' if is_default else ''}"
