"""Finds the work folder of an interrupted run, and decides whether a command resumes it, refuses or starts a new run.

The table in `vlqc/docs/resume.md` states what happens in each case.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlqc.emit.atomic_folder import JOURNAL, InUse, WorkFolder, bytes_in, require_space, work_folders
from vlqc.emit.manifest import MANIFEST
from vlqc.emit.resume.fingerprint import Fingerprint, abbreviate, differences
from vlqc.emit.resume.journal_file import DamagedJournal, JournalWriter, Record, read_lines
from vlqc.errors import Fault, UserError
from vlqc.files import sha256_of
from vlqc.formatting import pluralize
from vlqc.frontend.checkpoint.files import file_stamp
from vlqc.options.options import Options

VERSION = 1  # of the journal format


@dataclass
class InterruptedRun:
    """A work folder and the content of its journal.

    fingerprint, file_times: as recorded when the run was started; stages: records of finished stages; emitted: those
    and the records of deferred stages emitted since, in order; published: whether the result has been renamed to
    save_directory; damage: why the journal cannot be used, if so.
    """

    folder: WorkFolder
    fingerprint: Fingerprint
    file_times: dict[str, list[int]]
    stages: list[Record]
    emitted: list[Record]
    published: bool = False
    damage: str = ""

    @property
    def result(self) -> Path:
        return self.folder.target if self.published else self.folder.result


def open_or_resume(
    options: Options, fingerprint: Fingerprint, needed_bytes: int, note: Callable[[str], None]
) -> InterruptedRun:
    """The work folder to resume, or a new one.

    note: callback for messages to the user. Raises UserError as in the table of `vlqc/docs/resume.md`, or if the disk
    has fewer than `needed_bytes` free.
    """
    target = options.save_directory
    runs, busy = _existing_runs(target, remove_all=options.start_over)
    for run in [run for run in runs if run.published and not options.resume]:
        _discard(run)
        runs.remove(run)
    try:
        resumed = _select(runs, fingerprint) if options.resume else None
        if resumed is None:
            _require_no_other_run(options, runs, busy=busy)
        _require_free_target(options, resumed)
    except BaseException:
        for run in runs:
            run.folder.close()
        raise
    for run in runs:
        if run is not resumed:
            run.folder.close()
    if resumed is not None:
        require_space(target, 0 if resumed.published else needed_bytes - bytes_in(resumed.folder.folder))
        return resumed
    if options.resume:
        note("--resume: nothing to resume, a new run is started\nwhy: no interrupted run with a finished stage exists")
    require_space(target, needed_bytes)
    return _new_run(options, fingerprint)


def file_times(model: Path) -> dict[str, list[int]]:
    """Name of each weight file -> its `file_stamp`."""
    return {path.name: file_stamp(path) for path in sorted(model.glob("*.safetensors"))}


def _require_no_other_run(options: Options, runs: list[InterruptedRun], *, busy: bool) -> None:
    """UserError for an interrupted run, or for a concurrent run that would conflict with a new one."""
    where = str(options.save_directory)
    if runs:
        raise _interrupted_run_error(runs[0])
    if busy and not options.resume and not options.overwrite:
        why = "the save folder would not be empty when this run finishes"
        fix = "wait for that run to end, or choose another --save_directory"
        raise UserError(Fault("another run is writing to this save folder", where, why, fix))
    if busy and options.resume:
        why = "another run is using its work folder"
        raise UserError(Fault("nothing to resume yet", where, why, "wait for that run to end"))


def _require_free_target(options: Options, resumed: InterruptedRun | None) -> None:
    target = options.save_directory
    occupied = not options.overwrite and target.is_dir() and any(target.iterdir())
    if occupied and not (resumed and resumed.published):
        why = "there is no interrupted run to resume; it may have finished"
        why = "it was created after the run was interrupted" if resumed else why
        fix = "check it with `vlqc verify`, or add --overwrite to replace it"
        raise UserError(Fault("save folder is not empty", str(target), why, fix))


def _new_run(options: Options, fingerprint: Fingerprint) -> InterruptedRun:
    folder = WorkFolder(options.save_directory)
    try:
        times = file_times(options.model_path)
        writer = JournalWriter(folder.folder / JOURNAL)
        writer.append({"kind": "begin", "journal": VERSION, "facts": fingerprint, "file_times": times})
        writer.close()
    except BaseException:
        folder.remove()
        folder.close()
        raise
    return InterruptedRun(folder, fingerprint, times, [], [])


def _existing_runs(target: Path, *, remove_all: bool) -> tuple[list[InterruptedRun], bool]:
    """(runs that can be resumed, the most advanced first; whether another run is active). Other folders are removed."""
    runs, busy = [], False
    for path in work_folders(target):
        try:
            folder = WorkFolder(target, path)
        except (InUse, UserError):
            busy = True
            continue
        run = _read(folder)
        if run is not None and not remove_all:
            runs.append(run)
        elif folder.locks:
            folder.remove()
            folder.close()
    return sorted(runs, key=lambda run: (not run.published, -len(run.emitted), run.folder.folder)), busy


def _read(folder: WorkFolder) -> InterruptedRun | None:
    """Reads the journal of a work folder; None if there is nothing to resume."""
    path = folder.folder / JOURNAL
    if not path.is_file():
        return None
    try:
        records, _ = read_lines(path)
    except DamagedJournal as error:
        return InterruptedRun(folder, {}, {}, [], [{}], damage=str(error))
    kinds = [record["kind"] for record in records]
    if not records or "disabled" in kinds or "stage" not in kinds:
        return None
    begin, *rest = records
    complete: dict[str, Any] = next((record for record in reversed(rest) if record["kind"] == "complete"), {})
    manifest = folder.target / MANIFEST
    published = bool(complete) and manifest.is_file() and sha256_of(manifest) == complete["manifest"]
    damage = "" if begin.get("journal") == VERSION else "it was written by another version of vlqc"
    return InterruptedRun(
        folder,
        begin["facts"],
        begin["file_times"],
        [record for record in rest if record["kind"] == "stage"],
        [record for record in rest if record["kind"] in ("stage", "taken")],
        published,
        damage,
    )


def _select(runs: list[InterruptedRun], fingerprint: Fingerprint) -> InterruptedRun | None:
    """The first run with the same fingerprint, None if there are no runs. UserError if none of them matches."""
    for run in runs:
        if not run.damage and not differences(run.fingerprint, fingerprint):
            return run
    if not runs:
        return None
    run, where = runs[0], str(runs[0].folder.folder)
    if run.damage:
        fix = "start again with --start_over"
        raise UserError(Fault("files of the interrupted run are damaged", where, run.damage, fix))
    fix = "use the command of the interrupted run, or start again with --start_over"
    what = "the interrupted run cannot be resumed: this command would have another result"
    raise UserError(Fault(what, where, abbreviate(differences(run.fingerprint, fingerprint)), fix))


def _interrupted_run_error(run: InterruptedRun) -> UserError:
    return UserError(
        Fault(
            "an interrupted run into this save folder exists",
            str(run.folder.folder),
            run.damage or f"it has {pluralize(len(run.stages), 'finished stage')}",
            "add --resume to continue it, or --start_over to discard it and start again",
        )
    )


def _discard(run: InterruptedRun) -> None:
    run.folder.remove()
    run.folder.close()
