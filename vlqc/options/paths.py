"""Checks where a compilation reads and writes, before anything is loaded. Creates and changes nothing.

The model folder is never modified, and the save folder is replaced as a whole. So no output may lie in a checkpoint, no
input in the save folder, and the save folder is neither the home folder nor the current one, nor above them.
"""

import os
from pathlib import Path
from typing import Protocol

from vlqc.errors import Fault
from vlqc.formatting import did_you_mean


class NamedPaths(Protocol):
    """The options that are checked. None: not given, or not a path."""

    @property
    def model_path(self) -> Path | None: ...
    @property
    def save_directory(self) -> Path | None: ...
    @property
    def lora(self) -> tuple[Path, ...]: ...
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


def path_faults(options: NamedPaths) -> list[Fault]:
    """All faults of the paths. Links are resolved first."""
    faults: list[Fault] = []
    for rule in (_model_rule, _lora_rule, _save_rule, _dump_rule, _timings_rule, _images_rule):
        try:
            faults += rule(options)
        except (OSError, RuntimeError) as error:  # a name that is too long, no permission, a loop of links
            faults.append(Fault("cannot access folder", why=str(error)))
    return faults


def _model_rule(options: NamedPaths) -> list[Fault]:
    return [] if options.model_path is None else model_faults(options.model_path)


def _lora_rule(options: NamedPaths) -> list[Fault]:
    faults = [fault for folder in options.lora for fault in model_faults(folder, "--lora")]
    real = [folder.resolve() for folder in options.lora]
    faults += [Fault(f"--lora {folder}", why="it is named twice") for folder in real if real.count(folder) > 1][:1]
    if options.save_directory is not None:
        save = options.save_directory.resolve()
        for folder in real:
            if _within(folder, save) or _within(save, folder):
                why = "one is inside the other, and the save folder is replaced as a whole"
                faults.append(Fault(f"--lora {folder} and --save_directory", why=why, fix="choose another save folder"))
    return faults


def _save_rule(options: NamedPaths) -> list[Fault]:
    if options.save_directory is None:
        return []
    overlap = [] if options.model_path is None else _overlap_faults(options.model_path, options.save_directory)
    # With --resume the folder may be complete: `emit.resume.open_run` decides when it has looked for interrupted runs.
    return overlap or _save_faults(options.save_directory, options.overwrite or options.resume)


def _dump_rule(options: NamedPaths) -> list[Fault]:
    if options.dump_ir is None:
        return []
    return dump_faults("--dump_ir", options.dump_ir, model=options.model_path, save=options.save_directory)


def output_faults(what: str, output: Path, flag: str = "") -> list[Fault]:
    """Faults of an output path: it is a file of a checkpoint, or is inside one.

    Args:
        what: names the path in the fault.
        output: file or folder to be written. The path itself and the target of links in it are checked, because files
            of a checkpoint may be links.
        flag: the option that names the path, if `what` does not.
    """
    fix = f"choose another path{flag and f' with {flag}'}"
    for path in dict.fromkeys((output.absolute(), output.resolve())):
        if path.is_file() and (path.suffix == ".safetensors" or path.name == "config.json"):
            return [Fault(what, why="it is a file of a checkpoint, which vlqc does not modify", fix=fix)]
        checkpoint = next((folder for folder in (path, *path.parents) if _is_checkpoint(folder)), None)
        if checkpoint is not None:
            why = f"it is inside the checkpoint {checkpoint}, which vlqc does not modify"
            return [Fault(what, why=why, fix=fix)]
    return []


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder contains a float or a compiled checkpoint."""
    if (folder / "MANIFEST.json").is_file():
        return True
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _timings_rule(options: NamedPaths) -> list[Fault]:
    """Checked now, because the file is written at the end of the compilation."""
    timings = options.timings
    if timings is None:
        return []
    what, fix = f"--timings {timings}", "pass a file in an existing folder"
    if timings.is_dir():
        return [Fault(what, why="it is a folder", fix=fix)]
    if timings.exists() and not timings.is_file():  # writing to a pipe may block forever
        return [Fault(what, why="it is not a regular file", fix=fix)]
    if not timings.parent.is_dir():
        return [Fault(what, why=f"there is no folder {timings.parent}", fix=fix)]
    if not os.access(timings if timings.exists() else timings.parent, os.W_OK):
        return [Fault(what, why="permission denied", fix="choose another path")]
    for folder, kind in ((options.save_directory, "save"), (options.model_path, "model")):
        if folder is not None and _within(timings.resolve(), folder.resolve()):
            why = f"it is inside the {kind} folder, and timings are not part of a checkpoint"
            return [Fault(what, why=why, fix="choose another path")]
    return output_faults(what, timings)


def _images_rule(options: NamedPaths) -> list[Fault]:
    if options.calib_images is None or options.save_directory is None:
        return []
    if not _within(options.calib_images.resolve(), options.save_directory.resolve()):
        return []
    what, why = f"--calib_images {options.calib_images}", "it is inside the save folder, which is replaced as a whole"
    return [Fault(what, why=why, fix="choose another save folder, or move the images")]


def model_faults(folder: Path, flag: str = "--model_path") -> list[Fault]:
    """Faults of a path that should be a checkpoint folder. flag: the option that names it."""
    if folder.is_dir():
        return []
    what = f"{flag} {folder}"
    if folder.exists():
        return [Fault(what, why="it is a file", fix=f"pass its folder: {flag} {folder.parent}")]
    is_hub_name = not folder.is_absolute() and len(folder.parts) == 2 and not folder.parent.exists()
    if is_hub_name:
        fix = "vlqc reads local folders only: download the model first and give its folder"
    else:
        fix = _similar_names(folder) or "check the spelling"
    return [Fault(what, why="there is no such folder", fix=fix)]


def dump_faults(flag: str, folder: Path, *, model: Path | None, save: Path | None = None) -> list[Fault]:
    """Faults of a folder for dumps. flag: the option that names it; model, save: folders of the compilation."""
    what, fix = f"{flag} {folder}", "choose another folder"
    if folder.exists() and not folder.is_dir():
        return [Fault(what, why="it is a file", fix=fix)]
    if save is not None and _within(folder.resolve(), save.resolve()):
        return [Fault(what, why="it is inside the save folder, which contains the finished checkpoint only", fix=fix)]
    if model is not None and _within(folder.resolve(), model.resolve()):
        return [Fault(what, why="it is inside the model folder, which vlqc does not modify", fix=fix)]
    return output_faults(what, folder)


def _similar_names(folder: Path) -> str:
    try:
        return did_you_mean(folder.name, [path.name for path in folder.parent.iterdir() if path.is_dir()])
    except OSError:  # the parent folder is missing, too, or cannot be read
        return ""


def _save_faults(save: Path, overwrite: bool) -> list[Fault]:
    what, real = f"--save_directory {save}", save.resolve()
    if real.is_file():
        return [Fault(what, why="there is a file with this name", fix="pass a new or empty folder")]
    existing = next((parent for parent in real.parents if parent.exists()), None)
    if existing is not None and not existing.is_dir():
        return [Fault(what, why=f"{existing} is a file", fix="choose another parent folder")]
    if not real.is_dir():
        return []
    if real == Path(real.anchor) or _within(Path.home(), real) or _within(Path.cwd(), real):
        why = "the save folder is replaced as a whole, and this is the home or current folder, or contains it"
        return [Fault(what, why=why, fix="pass a new folder")]
    if os.path.ismount(real):
        why = "the save folder is replaced as a whole, and a mount point cannot be renamed"
        return [Fault(what, why=why, fix="pass a folder inside it")]
    if not overwrite and any(real.iterdir()):
        return [Fault(what, why="the folder is not empty", fix="pass a new folder, or add --overwrite to replace it")]
    return []


def _overlap_faults(model: Path, save: Path) -> list[Fault]:
    what = f"--save_directory {save}"
    real_model, real_save = model.resolve(), save.resolve()
    fix = "pass a folder outside the model folder"
    if real_model == real_save:
        return [Fault(what, why=f"it is the model folder itself ({real_model})", fix=fix)]
    if _within(real_save, real_model):
        return [Fault(what, why=f"it is inside the model folder {real_model}", fix=fix)]
    if _within(real_model, real_save):
        return [Fault(what, why=f"the model folder {real_model} is inside it", fix=fix)]
    return []


def _within(inner: Path, outer: Path) -> bool:
    return inner == outer or outer in inner.parents
