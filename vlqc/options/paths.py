"""Where a compilation may read and write: rules about the folders that the user names, before anything is loaded."""

import os
from pathlib import Path
from typing import Protocol

from vlqc.errors import Fault
from vlqc.formatting import did_you_mean


class NamedFolders(Protocol):
    """The options that the rules look at; None: not given, or not readable as a path."""

    @property
    def model_path(self) -> Path | None: ...
    @property
    def save_directory(self) -> Path | None: ...
    @property
    def calib_images(self) -> Path | None: ...
    @property
    def dump_ir(self) -> Path | None: ...
    @property
    def timings(self) -> Path | None: ...
    @property
    def overwrite(self) -> bool: ...
    @property
    def resume(self) -> bool: ...


def path_faults(given: NamedFolders) -> list[Fault]:
    """Everything wrong with the folders; links are resolved first. Nothing is created or changed."""
    faults: list[Fault] = []
    for rule in (_model_rule, _save_rule, _dump_rule, _timings_rule, _pictures_rule):
        try:
            faults += rule(given)
        except (OSError, RuntimeError) as error:  # a name too long, no permission, a circle of links
            faults.append(Fault("a folder cannot be looked at", why=str(error)))
    return faults


def _model_rule(given: NamedFolders) -> list[Fault]:
    return [] if given.model_path is None else model_faults(given.model_path)


def _save_rule(given: NamedFolders) -> list[Fault]:
    if given.save_directory is None:
        return []
    overlap = [] if given.model_path is None else _overlap_faults(given.model_path, given.save_directory)
    # What an interrupted run has left may be its finished result: then the folder is not empty for a good reason.
    left = given.resume and any(given.save_directory.resolve().parent.glob(".*.partial-*"))
    return overlap or _save_faults(given.save_directory, given.overwrite or left)


def _dump_rule(given: NamedFolders) -> list[Fault]:
    if given.dump_ir is None:
        return []
    return dump_faults("--dump_ir", given.dump_ir, model=given.model_path, save=given.save_directory)


def output_faults(what: str, place: Path, flag: str = "") -> list[Fault]:
    """What keeps an output from being written at `place`: files of a checkpoint, float or compiled, are only read.

    what: names the place for the fault; flag: the option that names it, where `what` does not. Links are followed, and
    looked at themselves, too: files of a checkpoint may be links.
    """
    fix = f"name a place elsewhere{flag and f' with {flag}'}"
    for path in dict.fromkeys((place.absolute(), place.resolve())):
        if path.is_file() and (path.suffix == ".safetensors" or path.name == "config.json"):
            return [Fault(what, why="it is a file of a model, which vlqc only reads", fix=fix)]
        checkpoint = next((folder for folder in (path, *path.parents) if _is_checkpoint(folder)), None)
        if checkpoint is not None:
            why = f"it lies in the checkpoint {checkpoint}, which vlqc only reads"
            return [Fault(what, why=why, fix=fix)]
    return []


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a float or a compiled checkpoint, by its files."""
    if (folder / "MANIFEST.json").is_file():
        return True
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _timings_rule(given: NamedFolders) -> list[Fault]:
    """Asked before the work: hours later the file could not be written."""
    if given.timings is None:
        return []
    what, fix = f"--timings {given.timings}", "name a file in an existing folder"
    if given.timings.is_dir():
        return [Fault(what, why="it is a folder", fix=fix)]
    if given.timings.exists() and not given.timings.is_file():  # a pipe may never take it
        return [Fault(what, why="it is not an ordinary file", fix=fix)]
    if not given.timings.parent.is_dir():
        return [Fault(what, why=f"there is no folder {given.timings.parent}", fix=fix)]
    if not os.access(given.timings if given.timings.exists() else given.timings.parent, os.W_OK):
        return [Fault(what, why="you may not write there", fix="name a file elsewhere")]
    for folder, kind in ((given.save_directory, "save"), (given.model_path, "model")):
        if folder is not None and _within(given.timings.resolve(), folder.resolve()):
            why = f"it lies in the {kind} folder, and says nothing but what this machine did"
            return [Fault(what, why=why, fix="name a file elsewhere")]
    return output_faults(what, given.timings)


def _pictures_rule(given: NamedFolders) -> list[Fault]:
    if given.calib_images is None or given.save_directory is None:
        return []
    if not _within(given.calib_images.resolve(), given.save_directory.resolve()):
        return []
    what, why = f"--calib_images {given.calib_images}", "it lies in the save folder, which is replaced as a whole"
    return [Fault(what, why=why, fix="name another save folder, or move the pictures")]


def model_faults(folder: Path, flag: str = "--model_path") -> list[Fault]:
    """What keeps `folder` from being a checkpoint folder: it is missing, or a file."""
    if folder.is_dir():
        return []
    what = f"{flag} {folder}"
    if folder.exists():
        return [Fault(what, why="it is a file", fix=f"name the folder around it: {flag} {folder.parent}")]
    close = _neighbours(folder)
    looks_like_hub = not folder.is_absolute() and len(folder.parts) == 2 and not folder.parent.exists()
    hub = "vlqc reads folders on this machine only: download the model first and name its folder"
    return [Fault(what, why="there is no such folder", fix=hub if looks_like_hub else close or "check the spelling")]


def dump_faults(flag: str, folder: Path, *, model: Path | None, save: Path | None = None) -> list[Fault]:
    """What keeps `folder` from taking a dump of a compilation of `model` into `save`."""
    what, fix = f"{flag} {folder}", "name a folder elsewhere"
    if folder.exists() and not folder.is_dir():
        return [Fault(what, why="it is a file", fix=fix)]
    if save is not None and _within(folder.resolve(), save.resolve()):
        return [Fault(what, why="it lies in the save folder, which holds the finished checkpoint only", fix=fix)]
    if model is not None and _within(folder.resolve(), model.resolve()):
        return [Fault(what, why="it lies in the model folder, which vlqc only reads", fix=fix)]
    return output_faults(what, folder)


def _neighbours(folder: Path) -> str:
    try:
        return did_you_mean(folder.name, [each.name for each in folder.parent.iterdir() if each.is_dir()])
    except OSError:  # the folder above is missing too, or may not be read
        return ""


def _save_faults(save: Path, overwrite: bool) -> list[Fault]:
    what, real = f"--save_directory {save}", save.resolve()
    if real.is_file():
        return [Fault(what, why="a file of that name exists", fix="name a new or empty folder")]
    above = next((each for each in real.parents if each.exists()), None)
    if above is not None and not above.is_dir():
        return [Fault(what, why=f"{above} is a file", fix="name a folder inside a folder")]
    if not real.is_dir():
        return []
    # The whole folder gets exchanged, so the folders that a slip of the keyboard may name are out of bounds.
    if real == Path(real.anchor) or _within(Path.home(), real) or _within(Path.cwd(), real):
        why = "it is the home folder, the current folder, or above one of them; the save folder is replaced as a whole"
        return [Fault(what, why=why, fix="name a new folder")]
    if os.path.ismount(real):
        why = "it is a mount point, which the system keeps; the save folder is replaced as a whole"
        return [Fault(what, why=why, fix="name a folder inside it")]
    if not overwrite and any(real.iterdir()):
        return [Fault(what, why="the folder is not empty", fix="name a new folder, or add --overwrite to replace it")]
    return []


def _overlap_faults(model: Path, save: Path) -> list[Fault]:
    what = f"--save_directory {save}"
    real_model, real_save = model.resolve(), save.resolve()
    fix = "name a folder outside the model folder"
    if real_model == real_save:
        return [Fault(what, why=f"it is the model folder itself ({real_model})", fix=fix)]
    if _within(real_save, real_model):
        return [Fault(what, why=f"it lies inside the model folder {real_model}", fix=fix)]
    if _within(real_model, real_save):
        return [Fault(what, why=f"the model folder {real_model} lies inside it", fix=fix)]
    return []


def _within(inner: Path, outer: Path) -> bool:
    return inner == outer or outer in inner.parents
