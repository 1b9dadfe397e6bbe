"""Work folders of runs that were interrupted: which of them a command goes on with, and when it refuses.

| left by an interrupted run | as before | --resume | --start_over |
|---|---|---|---|
| nothing, or no finished stage | starts | starts, and says so | starts |
| finished stages | refuses, names both options | goes on, if the facts are the same; else names what differs | starts |
| the result, at its place already | clears up, and starts | clears up; that was all | clears up, and starts |
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlqc.emit.atomic_folder import JOURNAL, InUse, WorkFolder, bytes_in, require_space, work_folders
from vlqc.emit.manifest import MANIFEST
from vlqc.emit.resume.fingerprint import Facts, differences, listed
from vlqc.emit.resume.journal_file import DamagedJournal, JournalWriter, Record, read_lines
from vlqc.errors import Fault, UserError
from vlqc.file_digest import file_digest
from vlqc.frontend.checkpoint.files import times_of
from vlqc.options.options import Options

VERSION = 1  # of what the journal says and how


@dataclass
class Work:
    """A work folder and what its journal says.

    facts, file_times: as the run found them that began it; stages: the records of finished stages; emitted: those, and
    what was emitted since, in their order; published: whether the result stands at its place.
    """

    folder: WorkFolder
    facts: Facts
    file_times: dict[str, list[int]]
    stages: list[Record]
    emitted: list[Record]
    published: bool = False
    damage: str = ""

    @property
    def result(self) -> Path:
        return self.folder.target if self.published else self.folder.result


def open_or_resume(options: Options, facts: Facts, needed: int, tell: Callable[[str], None]) -> Work:
    """The work folder to go on with, else a new one. UserError as the table says, or where `needed` bytes lack.

    tell: hears what the user should know.
    """
    target = options.save_directory
    found, busy = _left(target, drop_all=options.start_over)
    for work in [it for it in found if it.published and not options.resume]:
        _discard(work)
        found.remove(work)
    try:
        chosen = _choose(found, facts) if options.resume else None
        if chosen is None and found:
            raise _refused(found[0])
        if chosen is None and busy and not options.resume and not options.overwrite:
            why = "it would find the save folder full when it has come to its end"
            fix = "wait for that run to end, or name another --save_directory"
            raise UserError(Fault("another run is writing into this save folder", str(target), why, fix))
        if chosen is None and options.resume and busy:
            why = "another run is writing into its work folder at this moment"
            raise UserError(Fault("there is nothing to resume yet", str(target), why, "wait for that run to end"))
        taken = not options.overwrite and target.is_dir() and any(target.iterdir())
        if taken and not (chosen and chosen.published):
            why = "no interrupted run has left anything to go on with; it may have come to its end"
            why = "something else has appeared there since the run was interrupted" if chosen else why
            fix = "look at it with vlqc verify, or add --overwrite to replace it"
            raise UserError(Fault("the save folder is not empty", str(target), why, fix))
    except BaseException:
        for work in found:
            work.folder.close()
        raise
    for work in found:
        if work is not chosen:
            work.folder.close()
    if chosen is not None:
        require_space(target, 0 if chosen.published else needed - bytes_in(chosen.folder.folder))
        return chosen
    if options.resume:
        tell("--resume: there is nothing to go on with\nwhy: no interrupted run has left a finished stage here")
    require_space(target, needed)
    return _begun(options, facts)


def _begun(options: Options, facts: Facts) -> Work:
    folder = WorkFolder(options.save_directory)
    try:
        times = file_times(options.model_path)
        writer = JournalWriter(folder.folder / JOURNAL)
        writer.append({"kind": "begin", "journal": VERSION, "facts": facts, "file_times": times})
        writer.close()
    except BaseException:
        folder.remove()
        folder.close()
        raise
    return Work(folder, facts, times, [], [])


def file_times(model: Path) -> dict[str, list[int]]:
    """Per weight file `times_of`."""
    return {path.name: times_of(path) for path in sorted(model.glob("*.safetensors"))}


def _left(target: Path, *, drop_all: bool) -> tuple[list[Work], bool]:
    """(what can be gone on with, the furthest first; whether another run is writing). All else goes."""
    found, busy = [], False
    for path in work_folders(target):
        try:
            folder = WorkFolder(target, path)
        except (InUse, UserError):
            busy = True
            continue
        work = _read(folder)
        if work is not None and not drop_all:
            found.append(work)
        elif folder.locks:
            folder.remove()
            folder.close()
    return sorted(found, key=lambda work: (not work.published, -len(work.emitted), work.folder.folder)), busy


def _read(folder: WorkFolder) -> Work | None:
    """What the journal says; None if there is nothing to go on with."""
    path = folder.folder / JOURNAL
    if not path.is_file():
        return None
    try:
        records, _ = read_lines(path)
    except DamagedJournal as error:
        return Work(folder, {}, {}, [], [{}], damage=str(error))
    kinds = [record["kind"] for record in records]
    if not records or "gave up" in kinds or "stage" not in kinds:
        return None
    begin, *rest = records
    complete: dict[str, Any] = next((it for it in reversed(rest) if it["kind"] == "complete"), {})
    manifest = folder.target / MANIFEST
    there = bool(complete) and manifest.is_file() and file_digest(manifest) == complete["manifest"]
    damage = "" if begin.get("journal") == VERSION else "it was written by another version of vlqc"
    return Work(
        folder,
        begin["facts"],
        begin["file_times"],
        [it for it in rest if it["kind"] == "stage"],
        [it for it in rest if it["kind"] in ("stage", "taken")],
        there,
        damage,
    )


def _choose(found: list[Work], facts: Facts) -> Work | None:
    """The one with the same facts; UserError if there are only others."""
    for work in found:
        if not work.damage and not differences(work.facts, facts):
            return work
    if not found:
        return None
    work, where = found[0], str(found[0].folder.folder)
    if work.damage:
        fix = "start anew with --start_over"
        raise UserError(Fault("what the interrupted run has left is damaged", where, work.damage, fix))
    fix = "run the command as it was, or start anew with --start_over"
    what = "the interrupted run cannot be resumed: this command would have another result"
    raise UserError(Fault(what, where, listed(differences(work.facts, facts)), fix))


def _refused(work: Work) -> UserError:
    count = len(work.stages)
    stages = "1 finished stage" if count == 1 else f"{count} finished stages"
    return UserError(
        Fault(
            "an interrupted run into this save folder has left its work",
            str(work.folder.folder),
            work.damage or f"it holds {stages}",
            "add --resume to go on from there, or --start_over to throw it away and start anew",
        )
    )


def _discard(work: Work) -> None:
    work.folder.remove()
    work.folder.close()
